"""What the rules of several kinds of operations need."""

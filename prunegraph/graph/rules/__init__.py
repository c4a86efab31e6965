"""What each kind of operation ties together."""

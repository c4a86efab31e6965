"""What a network is for, and what counts as good."""

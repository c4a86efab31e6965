"""Global structured pruning, split into one problem a module."""

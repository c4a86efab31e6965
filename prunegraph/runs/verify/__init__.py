"""A run rebuilt from its files."""

"""Methods of single weights: what becomes zero, and how what stays makes up for it."""

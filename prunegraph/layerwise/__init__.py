"""Weights that stay are fitted to the dense layers' outputs."""

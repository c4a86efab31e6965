"""Pruned networks on disk, and exports."""

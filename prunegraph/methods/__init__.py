"""Pruning methods behind one protocol."""

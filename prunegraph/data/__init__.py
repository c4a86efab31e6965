"""Data sets by name, as typed train, search and test splits."""

from prunegraph.data.load import load_dataset

__all__ = ["load_dataset"]

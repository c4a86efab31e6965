"""Processes that share a run: worker processes, a Ray cluster, the ranks of torchrun."""

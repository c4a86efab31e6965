"""Helpers for the tests of users who prune networks of their own."""

from prunegraph.testing.memory import assert_memory_equals_measured, measure_peak_memory
from prunegraph.testing.oracle import assert_masked_equals_pruned, count_cost, largest_difference

__all__ = [
    "assert_masked_equals_pruned",
    "assert_memory_equals_measured",
    "count_cost",
    "largest_difference",
    "measure_peak_memory",
]

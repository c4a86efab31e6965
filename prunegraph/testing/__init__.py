"""Helpers for the tests of users who prune networks of their own."""

from prunegraph.testing.method_conformance import MethodConformance
from prunegraph.testing.oracle import (
    NothingComparedError,
    assert_masked_equals_pruned,
    count_cost,
    largest_difference,
)
from prunegraph.testing.structure_check import StructureFindings, check_structure
from prunegraph.testing.weight_method_conformance import WeightMethodConformance

__all__ = [
    "MethodConformance",
    "NothingComparedError",
    "StructureFindings",
    "WeightMethodConformance",
    "assert_masked_equals_pruned",
    "check_structure",
    "count_cost",
    "largest_difference",
]

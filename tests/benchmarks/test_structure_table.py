"""The verdict of ``benchmarks/structure.py`` on rows as its workers write them."""

from types import ModuleType
from typing import Any

import pytest


def lines(**changes: Any) -> list[dict[str, Any]]:
    """Return the lines of a network that passes, with changed values by name of the stage."""
    found = {
        "model": {"params": 2_000_000, "layer_params": 1000},
        "ours.analyse": {"analyse_seconds": 0.4, "prunable": 950, "frozen": ["fc: output"]},
        "ours.prune": {"prune_seconds": 0.1, "kept_macs": 0.4999, "budget_met": True},
        "ours.compare": {"equal_masks": 5, "difference": 1e-15},
        "theirs.analyse": {"analyse_seconds": 0.1},
        "theirs.groups": {"groups_seconds": 0.1, "prunable": 1000},
        "theirs.run": {"runs": True},
        "theirs.compare": {"difference": 1e-3, "tolerance": 1e-5},
    }
    for stage, values in changes.items():
        found[stage.replace("_", ".")] |= values
    written = []
    for stage, values in found.items():
        written += [{"stage": stage}, {"stage": stage, "found": values}]
    return written


def reasons(context: ModuleType, written: list[dict[str, Any]], ending: str = "") -> list[str]:
    found: list[str] = context.assemble("zoo", "net", written, ending)["reasons"]
    return found


def test_a_network_passes(context: ModuleType) -> None:
    assert reasons(context, lines()) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ours_analyse": {"prunable": 899}}, "only 89.9% of the weights prunable, not 90.0%"),
        ({"ours_prune": {"budget_met": False, "kept_macs": 0.8}}, "keeps 80.0% of the MACs"),
        ({"ours_compare": {"equal_masks": 4}}, "were not compared"),
    ],
)
def test_what_falls_short_is_named(
    context: ModuleType, changes: dict[str, Any], reason: str
) -> None:
    assert [reason in text for text in reasons(context, lines(**changes))] == [True]


def test_less_is_enough_where_the_peer_does_no_better(context: ModuleType) -> None:
    few = {"ours_analyse": {"prunable": 600}, "theirs_groups": {"prunable": 600}}
    assert reasons(context, lines(**few)) == []
    assert reasons(context, lines(**few | {"theirs_groups": {"prunable": 601}}))


def test_a_crash_names_the_stage_it_was_in(context: ModuleType) -> None:
    row = context.assemble("zoo", "net", lines()[:3], "exit code -9: ")
    assert row["reasons"] == ["ours.analyse: exit code -9: "]
    assert context.assemble("zoo", "net", [], "exit code 1: No module")["reasons"]


def test_a_crash_of_the_peer_is_no_failure_of_ours(context: ModuleType) -> None:
    row = context.assemble("zoo", "net", lines()[:11], "over the time limit")
    assert row["reasons"] == []
    assert row["errors"] == {"theirs.groups": "over the time limit"}


def test_the_table_counts_and_compares(context: ModuleType) -> None:
    rows = [
        context.assemble("zoo", "good", lines(), ""),
        context.assemble(
            "zoo", "bad", lines(ours_analyse={"analyse_seconds": 0.9, "prunable": 1}), ""
        ),
        context.assemble("zoo", "none", lines()[:1], "exit code 1: "),
    ]
    text = context.table(rows)
    assert "| zoo/good | 2.0 | yes / yes | 5 of 5 / differs by 1e-03 | 95.0 % / 100.0 % |" in text
    assert "1 of 3 pass" in text
    assert (
        "takes 6.00 times as long as building Torch-Pruning's graph (geometric mean of 2)" in text
    )
    assert "takes 3.00 times as long as that and listing its groups" in text
    assert "- zoo/bad: only 0.1% of the weights prunable, not 90.0% (fc: output)" in text
    assert "- zoo/none: model: exit code 1" in text

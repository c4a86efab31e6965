from typing import Any

import pytest

from prunegraph.runs.report.speed import latency_warning, repaired


def content(dense: float, pruned: float, **budget: Any) -> dict[str, Any]:
    return {
        "latency_ms": {"dense": dense, "pruned": pruned, "on": "the CPU with 1 thread"},
        "dense": {"macs": 100},
        "pruned": {"macs": 50},
        "budget": budget,
    }


def test_the_share_of_the_promised_time_that_is_saved() -> None:
    assert repaired(10.0, 5.0, 0.5) == pytest.approx(1.0)
    assert repaired(10.0, 7.5, 0.5) == pytest.approx(0.5)
    assert repaired(10.0, 12.0, 0.5) < 0


def test_a_network_that_gains_no_time_is_warned_of_and_the_mend_is_named() -> None:
    warning = latency_warning(content(1.0, 0.9))
    assert warning is not None
    assert "x1.11 of the x2.00" in warning
    assert "the CPU with 1 thread" in warning
    assert "--round-to 8" in warning
    assert "\n" not in warning


def test_rounded_widths_are_not_told_to_round() -> None:
    for width in (8, 16):
        warning = latency_warning(content(1.0, 0.9, round_to=width))
        assert warning is not None
        assert "--round-to" not in warning
    assert "--round-to 8" in str(latency_warning(content(1.0, 0.9, round_to=4)))


def test_what_pays_or_was_not_timed_or_promises_nothing_is_not_warned_of() -> None:
    assert latency_warning(content(1.0, 0.6)) is None
    untimed = content(1.0, 1.0)
    del untimed["latency_ms"]
    assert latency_warning(untimed) is None
    assert latency_warning(content(1.0, 1.0) | {"pruned": {"macs": 98}}) is None


def test_a_network_that_misses_what_was_asked_is_told_with_what_to_do() -> None:
    searched = content(4.0, 2.2, max_latency=2.0)
    assert latency_warning(content(4.0, 2.08, max_latency=2.0)) is None
    assert "takes 2.2 ms on the CPU with 1 thread, 2 were asked for" in str(
        latency_warning(searched)
    )
    assert "let apply --policy with this run measure" in str(latency_warning(searched))
    decided = latency_warning(searched | {"decision": {}})
    assert "it took less when the policy decided" in str(decided)

from typing import Any

import pytest
import torch

from prunegraph.core.budget import Budget
from prunegraph.graph import analyse
from prunegraph.models import build_model
from prunegraph.runs.report.speed import latencies, latency_warning, repaired
from prunegraph.runs.report.tables import gains


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


def test_a_warning_says_what_may_pay() -> None:
    alone = str(latency_warning(content(1.0, 0.9, round_to=8)))
    assert alone.endswith("what may pay: a budget in time: --max-latency 0.5")
    told = content(1.0, 0.9)
    told["latency_ms"] |= {"batch": 64, "dense_batch": 9.0, "pruned_batch": 3.0}
    assert "what may pay: 64 images at once, which are x3.00 as fast; widths" in str(
        latency_warning(told)
    )
    told["latency_ms"]["pruned_batch"] = 8.9
    assert "at once" not in str(latency_warning(told))


def test_many_inputs_are_timed_at_once_where_memory_allows() -> None:
    model = build_model("digits_resnet8_w8", num_classes=10, image_shape=(1, 8, 8)).eval()
    example = torch.randn(1, 1, 8, 8)
    graph = analyse(model, example)
    mask = graph.project(torch.randn(graph.num_units), Budget(keep_macs=0.3))
    times = latencies(model, graph, mask, example, batch=16)
    assert times["batch"] == 16
    assert times["dense_batch"] > times["dense"] > 0.0
    assert latencies(model, graph, mask, example, batch=2**20).keys() == {"dense", "pruned", "on"}


def test_what_was_got_is_told_as_size_speed_and_score() -> None:
    told = content(2.0, 1.0) | {"score_name": "accuracy", "higher_is_better": True}
    told["dense"] |= {"params": 200, "test_accuracy": 0.99, "test_accuracy_finetuned": None}
    told["pruned"] |= {
        "params": 50,
        "test_accuracy_recalibrated": 0.97,
        "test_accuracy_finetuned": None,
    }
    assert gains(told) == [
        "size: 50.0 % of the multiply-adds, 25.0 % of the parameters are left",
        "speed: x2.00 for one input, on the CPU with 1 thread",
        "test accuracy: 97.00 % (dense 99.00 %)",
    ]
    told["pruned"] |= {"sparsity": 0.5, "network_sparsity": 0.0514}
    assert gains(told)[0].startswith(
        "zeros: 50.00 % of the prunable weights, 5.14 % of the network, in place: PyTorch runs"
    )

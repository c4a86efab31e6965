"""Which masks a comparison fine-tunes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunegraph.artefacts.pruned import StoredChannels
from prunegraph.core.masks import ChannelMask
from prunegraph.runs.context import RunContext
from prunegraph.runs.options.compare import CompareConfig
from prunegraph.runs.plan import _searched, plan_finetunes
from prunegraph.runs.store import Candidate, choose
from prunegraph.runs.tasks.registry import load_target
from support.parts import part

CHANGED = ("struprune", "maskprune", "torch_pruning")


def candidate(name: str, seed: int, accuracy: float) -> Candidate:
    return Candidate(
        name=name,
        **part(name),
        seed=seed,
        mask=ChannelMask(np.ones(1, dtype=bool)),
        networks_evaluated=0,
        search_accuracy=accuracy,
    )


def planned(weights: Path, found: list[Candidate], **more: Any) -> set[str]:
    options = CompareConfig(weights=weights, seeds=3, finetune_epochs=1, **more)
    context = RunContext(target=load_target(options, options.budget()), options=options, seed=0)
    cells = plan_finetunes(context, found)
    assert len(cells) == len({(cell.name, cell.seed) for cell in cells})
    return {cell.name for cell in cells}


def test_the_two_best_searches_are_finetuned() -> None:
    rows = [candidate("cem", 0, 0.7), candidate("cem", 1, 0.5), candidate("random_search", 0, 0.4)]
    assert {"cem", "random_search"} < _searched(rows)
    more = [
        *rows,
        candidate("netadapt", 0, 0.55),
        candidate("amc", 0, 0.65),
        candidate("agent", 0, 0.1),
    ]
    assert _searched(more) == {
        *("agent", "amc", "cem", "control:widths/l1", "control:widths/random")
    }
    assert {"sampler", "amc"} < _searched([*more, candidate("sampler", 0, 0.9)])


def test_heuristics_alone_are_finetuned(weights: Path) -> None:
    found = [candidate("l1/uniform", 0, 0.6), candidate("fpgm/uniform", 0, 0.7)]
    options = {"no_agent": True}
    assert planned(weights, found, **options) == {"l1/uniform", "fpgm/uniform", "dense"}
    assert planned(weights, found, **options, finetune_best=True) == {"fpgm/uniform", "dense"}


def test_networks_whose_method_changed_weights_are_all_finetuned(
    weights: Path, tmp_path: Path
) -> None:
    found = [candidate(name, 0, 0.9 - number / 10) for number, name in enumerate(CHANGED)]
    assert planned(weights, found, no_agent=True) == {CHANGED[0], "dense"}
    stored = StoredChannels(np.ones(1, dtype=bool), tmp_path, "weights")
    found = [replace(item, mask=stored) for item in found]
    assert planned(weights, found, no_agent=True) == {*CHANGED, "dense"}
    assert planned(weights, found, no_agent=True, finetune_best=True) == {CHANGED[0], "dense"}


@pytest.mark.parametrize("best", [False, True])
def test_the_start_of_the_search_is_finetuned_if_no_baseline_is_better(
    best: bool, weights: Path
) -> None:
    found = [
        *(candidate("agent", seed, 0.9) for seed in range(3)),
        *(candidate("cem", seed, 0.6) for seed in range(3)),
        *(candidate("prior", seed, 0.8) for seed in range(3)),
        *(candidate("policy:given", seed, 0.7) for seed in range(3)),
    ]
    expected = {"agent", "prior", "dense"} | (set() if best else {"cem"})
    assert planned(weights, found, finetune_best=best) == expected
    worse = [*found[:6], *(candidate("prior", seed, 0.5) for seed in range(3))]
    assert planned(weights, worse, finetune_best=best) == {"agent", "cem", "dense"}


def test_the_best_baseline_is_the_best_on_average() -> None:
    found = [candidate("cem", 0, 0.9), candidate("cem", 1, 0.2), candidate("l1/uniform", 0, 0.6)]
    assert choose(found).name == "l1/uniform"
    found.append(candidate("agent", 3, 0.1))
    assert choose(found).name == "agent"
    steady = [candidate("cem", seed, 0.7) for seed in (2, 1)]
    assert choose([*steady, candidate("l1/uniform", 0, 0.6)]).seed == 1


def test_of_equal_heuristics_the_first_by_name_is_finetuned(weights: Path) -> None:
    found = [candidate("agent", 0, 0.9), candidate("cem", 0, 0.8)]
    found += [candidate(f"{name}/uniform", 0, 0.7) for name in ("l2", "lamp")]
    tuned = planned(weights, found)
    assert tuned & {"l2/uniform", "lamp/uniform"} == {"l2/uniform"}


def test_a_heuristic_is_finetuned_with_the_seed_of_each_of_its_masks(weights: Path) -> None:
    options = CompareConfig(weights=weights, seeds=3, finetune_epochs=1, no_agent=True)
    context = RunContext(target=load_target(options, options.budget()), options=options, seed=0)
    found = [candidate("l1/uniform", 0, 0.9)]
    found += [candidate("thinet/global", seed, (0.5, 0.6, 0.7)[seed]) for seed in range(3)]
    found += [candidate("taylor/global", seed, (0.8, 0.4, 0.5)[seed]) for seed in range(3)]
    pairs = [
        (cell.name, None if cell.candidate is None else cell.candidate.seed, cell.seed)
        for cell in plan_finetunes(context, found)
    ]
    assert sorted(pairs, key=str) == [
        *(("dense", None, seed) for seed in range(3)),
        *(("l1/uniform", 0, seed) for seed in range(3)),
        *(("thinet/global", seed, seed) for seed in range(3)),
    ]


def test_the_pruned_network_is_one_that_is_finetuned(weights: Path) -> None:
    found = [candidate("cem", seed, (0.9, 0.2, 0.2)[seed]) for seed in range(3)]
    found += [candidate("taylor/uniform", seed, 0.6) for seed in range(3)]
    options = CompareConfig(weights=weights, seeds=3, no_agent=True, finetune_best=True)
    context = RunContext(target=load_target(options, options.budget()), options=options, seed=0)
    chosen = choose(found)
    assert chosen.name == "taylor/uniform"
    assert chosen in [cell.candidate for cell in plan_finetunes(context, found)]

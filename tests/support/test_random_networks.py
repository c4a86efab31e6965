"""Property tests of the structure engine on random networks."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from prunegraph.graph import evaluation_mode
from prunegraph.testing.structure_check import StructureFindings, check_structure
from support.random_networks import FEATURES, RandomNetwork, random_network

NUM_SEEDS = 300
QUICK, *SLOW = range(10), range(10, 100), range(100, 200), range(200, NUM_SEEDS)
BLOCKS = [QUICK, *(pytest.param(seeds, marks=pytest.mark.slow) for seeds in SLOW)]


def outputs(model: RandomNetwork, inputs: Tensor) -> tuple[Tensor, ...]:
    with evaluation_mode(model):
        out = model(inputs)
    return out if isinstance(out, tuple) else (out,)


def check(seed: int) -> StructureFindings:
    model = random_network(seed).train(seed % 2 == 0)
    model.trunk.train(seed % 3 == 0)
    return check_structure(model, model.example_inputs, seed=seed)


def test_each_feature_is_in_a_tenth_of_the_networks() -> None:
    counts: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        counts.update(random_network(seed).features)
    assert set(counts) == FEATURES
    assert {name: n for name, n in counts.items() if n < NUM_SEEDS // 10} == {}


def test_networks_are_small_and_follow_from_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    for seed in range(20):
        one, other = random_network(seed), random_network(seed)
        assert torch.equal(one.example_inputs, other.example_inputs)
        values = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in values)
        assert sum(parameter.numel() for parameter in one.parameters()) < 60_000
    assert torch.equal(state, torch.random.get_rng_state())


def test_every_output_depends_on_the_inputs() -> None:
    for seed in range(0, NUM_SEEDS, 3):
        model = random_network(seed)
        noise = torch.randn(
            model.example_inputs.shape, generator=torch.Generator().manual_seed(seed + 1)
        )
        pairs = zip(
            outputs(model, model.example_inputs), outputs(model, 1 + 2 * noise), strict=True
        )
        for one, other in pairs:
            assert bool(((one - other).abs().amax() > 1e-3 * one.abs().amax()).all()), seed


def test_norms_and_biases_are_not_the_identity() -> None:
    for seed in range(20):
        for name, value in random_network(seed).named_parameters():
            assert not bool(((value == 0) | (value == 1)).any()), f"seed {seed}: {name}"


@pytest.mark.parametrize("seeds", BLOCKS, ids=str)
def test_the_structure_of_random_networks(seeds: range) -> None:
    found = {seed: check(seed) for seed in seeds}
    failures = [
        f"seed {seed}: {failure.kind}: {failure.message}"
        for seed, each in found.items()
        for failure in each.failures
    ]
    failed = len({line.split(":")[0] for line in failures})
    assert failures == [], f"{failed} networks fail:\n" + "\n".join(failures)
    assert all(each.num_compared for each in found.values())
    assert sum(each.num_compared for each in found.values()) >= 2.5 * len(seeds)
    stuck = [seed for seed, each in found.items() if not each.reaches_half]
    assert len(stuck) <= 0.05 * len(seeds), f"cannot lose half of their multiply-adds: {stuck}"

"""Peak memory: what the graph says is what the pruned network takes, to the byte."""

import dataclasses
import pickle
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError, ModelError
from prunegraph.core.masks import ChannelMask
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.apply import apply_mask
from prunegraph.graph.costs.memory import MemoryModel, Storage
from prunegraph.models import build_model
from support.memory_oracle import assert_memory_equals_measured, measure_peak_memory
from support.toy_env import toy_graph

NETWORKS: dict[str, tuple[int, int, int]] = {
    "resnet20": (3, 32, 32),
    "torchvision:mobilenet_v2": (3, 48, 48),
    "torchvision:resnet18": (3, 48, 48),
    "torchvision:vgg11_bn": (3, 32, 32),
    "torchvision:densenet121": (3, 32, 32),
    "torchvision:shufflenet_v2_x0_5": (3, 48, 48),
    "torchvision:convnext_tiny": (3, 32, 32),
}
SLOW = {"torchvision:vgg11_bn"}


@cache
def network(name: str, batch: int = 1) -> tuple[nn.Module, StructureGraph, Tensor]:
    torch.manual_seed(0)
    model = build_model(name, num_classes=10, image_shape=NETWORKS[name]).eval()
    example = torch.randn(batch, *NETWORKS[name])
    return model, analyse(model, example, trial=False), example


def random_mask(graph: StructureGraph, seed: int) -> ChannelMask:
    """Return a mask whose groups keep very different shares, so that the peak moves."""
    rng = np.random.default_rng(seed)
    keep = rng.random(graph.num_units) < rng.random(len(graph.groups))[graph.group_of]
    keep |= graph.frozen
    for group in graph.groups:
        keep[group.units[: group.min_keep]] = True
    return graph.mask(keep)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NETWORKS],
)
def test_the_peak_equals_what_the_pruned_network_takes(name: str) -> None:
    model, graph, example = network(name)
    dense = assert_memory_equals_measured(model, graph, graph.dense_mask(), example)
    peaks = [
        assert_memory_equals_measured(model, graph, random_mask(graph, seed), example)
        for seed in range(6)
    ]
    assert max(peaks) < dense
    assert len(set(peaks)) > 1


def test_the_peak_grows_with_the_batch() -> None:
    _, one, _ = network("resnet20")
    model, four, example = network("resnet20", batch=4)
    mask = random_mask(one, 0)
    assert four.peak_memory(mask) == 4 * one.peak_memory(mask)
    assert_memory_equals_measured(model, four, mask, example)


class Odd(nn.Module):
    """In-place ops, views, a tensor kept for long, a pool with indices, two outputs."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 8, 3, padding=1)
        self.third = nn.Conv2d(20, 16, 1)
        self.head = nn.Linear(16 * 4, 5)
        self.scale = nn.Parameter(torch.rand(1, 12, 1, 1))
        self.activation = activation

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.activation(self.first(x)) * self.scale
        y = self.second(kept).relu_() + 0.0
        y += torch.zeros_like(y)
        y = torch.cat([kept, y], dim=1)
        y = functional.max_pool2d(self.third(y), 4)
        y, rest = y.flatten(1), y[:, :, 0]
        return self.head(y), rest.sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [functional.relu, functional.gelu, torch.Tensor.sin_])
def test_views_in_place_ops_and_long_lives(
    dtype: torch.dtype, activation: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    model, example = Odd(activation).to(dtype).eval(), torch.randn(2, 3, 8, 8, dtype=dtype)
    graph = analyse(model, example)
    assert graph.free.sum() == 36
    for seed in range(6):
        assert_memory_equals_measured(model, graph, random_mask(graph, seed), example)


def test_a_plain_chain_is_counted_by_hand() -> None:
    layers = [nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)]
    model, example = nn.Sequential(*layers), torch.randn(1, 4)
    graph = analyse(model, example)
    assert graph.peak_memory(graph.dense_mask()) == 4 * (4 + 10 + 10)  # input, layer, its ReLU
    keep = np.ones(graph.num_units, dtype=bool)
    keep[graph.groups[1].units[:7]] = False
    assert graph.peak_memory(keep) == 4 * (4 + 3 + 6)  # now the second layer's turn
    assert measure_peak_memory(apply_mask(model, graph, graph.mask(keep)), example) == 4 * 13


def test_the_oracle_can_fail() -> None:
    model, graph, example = network("resnet20")
    mask = random_mask(graph, 0)
    assert_memory_equals_measured(model, graph, mask, example)
    assert graph.memory_model is not None
    shorter = [
        Storage(
            bytes_per_position=s.bytes_per_position, units=s.units[1:], born=s.born, died=s.died
        )
        for s in graph.memory_model.storages
    ]
    graph = dataclasses.replace(graph, memory_model=MemoryModel(graph.num_units, shorter))
    with pytest.raises(AssertionError, match="the graph says"):
        assert_memory_equals_measured(model, graph, mask, example)


@pytest.mark.parametrize("round_to", [None, 8])
@pytest.mark.parametrize("others", [{}, {"keep_macs": 0.6}, {"keep_params": 0.5}])
def test_projection_is_never_over_and_nothing_more_fits(
    round_to: int | None, others: dict[str, float]
) -> None:
    model, graph, example = network("resnet20")
    dense = graph.peak_memory(graph.dense_mask())
    for seed, share in enumerate((0.55, 0.8)):
        budget = Budget(**others, max_memory=int(share * dense), round_to=round_to)
        scores = np.random.default_rng(seed).normal(size=graph.num_units).astype(np.float32)
        mask = graph.project(scores, budget)
        assert graph.fits(mask, budget)
        assert assert_memory_equals_measured(model, graph, mask, example) <= share * dense
        if round_to is None:
            for index in np.flatnonzero(~mask.keep):
                more = mask.keep.copy()
                more[index] = True
                assert not graph.fits(more, budget)


def test_repair_meets_the_memory() -> None:
    _, graph, _ = network("resnet20")
    budget = Budget(max_memory=graph.peak_memory(graph.dense_mask()) // 2)
    everything = np.ones(graph.num_units, dtype=bool)
    mask, flipped = graph.repair(everything, budget, np.random.default_rng(0))
    assert graph.fits(mask, budget)
    assert not graph.fits(everything, budget)
    assert flipped > 0


def test_an_impossible_memory_says_the_least() -> None:
    _, graph, _ = network("resnet20")
    scores = np.zeros(graph.num_units, dtype=np.float32)
    with pytest.raises(
        BudgetError, match=r"max_memory=1000 bytes cannot be met: the least"
    ) as error:
        graph.project(scores, Budget(max_memory=1000))
    least = int(str(error.value).split("the least that can is ")[1].split()[0])
    assert graph.peak_memory(graph.project(scores, Budget(max_memory=least))) == least


def test_the_peak_of_probabilities_goes_through_the_bits_and_has_its_slopes() -> None:
    _, graph, _ = network("resnet20")
    model = graph.memory_model
    assert model is not None
    masks = np.stack([random_mask(graph, seed).keep for seed in range(4)])
    assert model.expected(masks.astype(float)).tolist() == [graph.peak_memory(m) for m in masks]
    probabilities = np.random.default_rng(0).uniform(0.2, 0.8, (3, graph.num_units))
    step = 1e-6 * np.random.default_rng(1).normal(size=probabilities.shape)
    moved = model.expected(probabilities + step) - model.expected(probabilities)
    assert moved == pytest.approx((model.slopes(probabilities) * step).sum(axis=1), rel=1e-4)


def test_every_swap_is_foretold_to_the_byte() -> None:
    _, graph, _ = network("resnet20")
    assert graph.memory_model is not None
    keep = random_mask(graph, 0).keep
    drops = np.append(np.flatnonzero(keep & graph.free)[::9], -1)
    adds = np.append(np.flatnonzero(~keep)[::9], -1)
    found = graph.memory_model.swapped(keep, drops, adds)
    for row, column in np.ndindex(found.shape):
        bits = keep.copy()
        bits[[c for c in (drops[row], adds[column]) if c >= 0]] ^= True
        assert found[row, column] == graph.peak_memory(bits)


def test_who_still_fits_is_foretold() -> None:
    _, graph, _ = network("resnet20")
    assert graph.memory_model is not None
    keep = random_mask(graph, 0).keep
    peak = graph.peak_memory(keep)
    for limit in (peak - 1, peak, peak + 3000):
        fits = graph.memory_model.fits_with_each(keep, limit)
        for added in np.flatnonzero(~keep)[::5]:
            bits = keep.copy()
            bits[added] = True
            assert fits[added] == (graph.peak_memory(bits) <= limit)


def test_at_stake_is_what_is_alive_when_memory_runs_short() -> None:
    _, graph, _ = network("resnet20")
    dense = graph.dense_mask()
    peak = graph.peak_memory(dense)
    tight, wide = (Budget(max_memory=limit) for limit in (peak // 2, peak))
    stake = graph.at_stake(tight)
    assert 0 < stake.sum() < graph.free.sum()
    assert not graph.at_stake(wide).any()
    without = dense.keep & ~(graph.free & ~stake)  # not legal, but it can be counted
    assert graph.peak_memory(without) == peak
    assert np.array_equal(graph.at_stake(Budget(keep_macs=0.5)), graph.free)
    assert np.array_equal(graph.at_stake(Budget(keep_macs=0.5, max_memory=peak // 2)), graph.free)


@pytest.mark.parametrize("value", [0, -5, 1.5])
def test_memory_is_a_whole_number_of_bytes(value: float) -> None:
    with pytest.raises(BudgetError, match="whole number of bytes"):
        Budget(max_memory=value)  # type: ignore[arg-type]  # the point of the test


def test_a_graph_can_be_pickled_and_one_by_hand_knows_no_memory() -> None:
    _, graph, _ = network("resnet20")
    again = pickle.loads(pickle.dumps(graph))
    assert again.peak_memory(graph.dense_mask()) == graph.peak_memory(graph.dense_mask())
    toy = toy_graph((8, 8), (2, 2, 2))
    with pytest.raises(ModelError, match="use analyse"):
        toy.peak_memory(toy.dense_mask())


def test_attention_and_group_norm() -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16, track_running_stats=False),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.GroupNorm(4, 24),
        nn.Conv2d(24, 24, 3, padding=1),
        nn.InstanceNorm2d(24, affine=True),
        nn.Conv2d(24, 32, 4, stride=4),
        nn.Flatten(2),
        Transposed(),
        nn.TransformerEncoderLayer(32, 4, 48, batch_first=True),
        nn.Linear(32, 5),
    ]
    model, example = nn.Sequential(*layers).eval(), torch.randn(2, 3, 16, 16)
    graph = analyse(model, example)
    for seed in range(4):
        assert_memory_equals_measured(model, graph, random_mask(graph, seed), example)


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class FusedAttention(nn.Module):
    """Four heads; the peak is the attention itself."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv = nn.Linear(16, 3 * 32)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, 8)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        return self.head(functional.scaled_dot_product_attention(q, k, v).sum((1, 2)))


def test_heads_of_fused_attention() -> None:
    torch.manual_seed(0)
    model, example = FusedAttention().eval(), torch.randn(2, 64, 16)
    graph = analyse(model, example)
    for seed in range(4):
        assert_memory_equals_measured(model, graph, random_mask(graph, seed), example)

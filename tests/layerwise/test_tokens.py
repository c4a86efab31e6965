"""Language models are reconstructed on all positions, block by block."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegraph.core.masks import ChannelMask
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.apply import apply_mask
from prunegraph.layerwise import sequential
from prunegraph.layerwise.chain import Chain, find_chain
from prunegraph.layerwise.reconstruct import Reconstruction
from prunegraph.layerwise.room import most_fitted
from prunegraph.layerwise.sampling import ROWS_AN_INPUT
from prunegraph.layerwise.sequential import LayerwiseReconstruction
from prunegraph.methods.criteria.measured import measure_costly
from prunegraph.tasks.causal_lm import CausalLM, causal_lm

KINDS = (Reconstruction, LayerwiseReconstruction)

BARS = [("wanda", 43.5, 24.5, 21.0), ("obs", 49.0, 23.0, 20.0)]
"""Perplexities without a fit, at once and layer by layer, and a little more."""


class Block(nn.Module):
    """Attention of a running mean and a layer of neurons, each added to the stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.LayerNorm(width), nn.LayerNorm(width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        x = x + self.out(self.value(self.first(x)).cumsum(1) / counts)
        return x + self.down(self.up(self.last(x)).relu())


class Words(nn.Module):
    """A language model whose first position carries activations far larger than the others."""

    def __init__(self, massive: float = 1000.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(32, 16), nn.Embedding(64, 16)
        self.layers = nn.ModuleList(Block(16) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 32, bias=False)
        with torch.no_grad():
            self.places.weight[0] *= massive
            self.head.weight *= 8.0

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        counts = torch.arange(1, ids.shape[1] + 1)[:, None]
        for layer in self.layers:
            x = layer(x, counts)
        return self.head(self.norm(x))


def third(graph: StructureGraph, seed: int = 0) -> ChannelMask:
    """Return a mask without a third of the neurons."""
    keep, generator = np.ones(graph.num_units, dtype=bool), np.random.default_rng(seed)
    for name, axes in graph.param_units.items():
        if "down" in name and name.endswith("weight"):
            keep[generator.choice(axes[1], len(axes[1]) // 3, replace=False)] = False
    return graph.mask(keep)


def divergence(net: nn.Module, other: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        dense, found = (each(ids).log_softmax(-1) for each in (net, other))
    loss = nn.functional.kl_div(found, dense, reduction="sum", log_target=True)
    return float(loss) / ids.numel()


def test_a_chain_runs_as_the_network_does() -> None:
    net, ids = Words().eval(), torch.randint(32, (5, 20))
    outputs: list[Tensor] = []
    net.layers[2].register_forward_hook(lambda _, args, output: outputs.append(output))
    names = ["layers.0.up.weight", "layers.1.up.weight", "layers.2.up.weight"]

    def run(network: nn.Module) -> None:
        network(ids)

    chain = find_chain(net, names, run)
    assert chain is not None
    assert list(chain.blocks) == ["layers.0", "layers.1", "layers.2"]
    with torch.no_grad():
        net(ids)
        walk = Chain(net, chain, run)
        for number in range(3):
            walk.advance(number)
    first, *_, last = (output for output in outputs if len(output) == 5)
    assert torch.equal(first, last)
    assert not net._forward_pre_hooks


@pytest.mark.parametrize("embedded", [False, True])
def test_networks_of_other_inputs_have_no_chain(embedded: bool) -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    if embedded:
        net.unused = nn.Embedding(2, 2)
    calls: list[int] = []
    handle = net[2].register_forward_hook(lambda *_: calls.append(1))
    assert find_chain(net, ["0.weight"], lambda network: network(torch.randn(2, 4))) is None
    assert not calls
    handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [32, 64])
def test_a_language_model_gets_better(kind: type[Reconstruction], length: int) -> None:
    net, ids = Words().eval(), torch.randint(32, (64, length))
    graph = analyse(net, ids[:1])
    mask = third(graph)
    pruned = apply_mask(net, graph, mask)
    fitted = copy.deepcopy(pruned)
    kind(net, graph, lambda network: network(ids)).apply(fitted, mask)
    others = torch.randint(32, (16, length))
    assert divergence(net, fitted, others) < 0.5 * divergence(net, pruned, others)


def test_block_by_block_is_better_than_at_once() -> None:
    net, ids = Words(massive=1.0).eval(), torch.randint(32, (64, 48))
    graph = analyse(net, ids[:1])
    mask, found = third(graph), []
    for kind in KINDS:
        fitted = apply_mask(net, graph, mask)
        kind(net, graph, lambda network: network(ids)).apply(fitted, mask)
        found.append(divergence(net, fitted, torch.randint(32, (16, 48))))
    assert found[1] < 0.8 * found[0]


def test_one_block_is_held_and_the_walk_is_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    net, ids = Words().eval(), torch.randint(32, (24, 40))
    graph = analyse(net, ids[:1])
    mask = third(graph)
    held: list[set[str]] = []
    measure = LayerwiseReconstruction._measure

    def watched(self: LayerwiseReconstruction, send: Callable[[], None]) -> None:
        measure(self, send)
        held.append({name.split(".")[1] for name in self._wanted})

    monkeypatch.setattr(LayerwiseReconstruction, "_measure", watched)
    fit = LayerwiseReconstruction(net, graph, lambda network: network(ids))
    pruned = apply_mask(net, graph, mask)
    fit.apply(pruned, mask)
    assert held == [{"0"}, {"1"}, {"2"}]
    assert not fit._wanted
    assert not any(name.startswith("layers") for name in fit._input_statistics)
    # in one piece the blocks get the same weights; the head, which no block holds, is fitted too
    monkeypatch.setattr(sequential, "find_chain", lambda *_: None)
    monkeypatch.setattr(sequential, "ROWS", ids.numel() * 64)
    whole = apply_mask(net, graph, mask)
    LayerwiseReconstruction(net, graph, lambda network: network(ids)).apply(whole, mask)
    for own, other in zip(pruned.layers.parameters(), whole.layers.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)
    assert torch.equal(pruned.head.weight, net.head.weight)


def test_as_many_tokens_are_fitted_on_as_the_widest_layer_needs() -> None:
    net, ids = Words(), torch.randint(32, (1, 32))
    graph = analyse(net.eval(), ids)
    tokens = {"input_ids": torch.randint(32, (80, 32))}
    task = causal_lm(net, calibration=tokens["input_ids"], calibration_tokens=None)
    assert most_fitted(task, graph) == ROWS_AN_INPUT * 64 // 32
    assert most_fitted(task, graph, 3) == 3


@pytest.fixture(scope="module")
def stories(shared_dir: Path) -> CausalLM:
    folder = shared_dir / "pack" / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("needs ../shared/pack, which is absent")
    rows = np.load(folder / "stories-257.npy", allow_pickle=False)
    texts = {"calibration": rows[:64], "search": rows[152:170], "test": rows[65:152]}
    return causal_lm(folder, calibration_tokens=None, **texts)


@pytest.mark.data
@pytest.mark.parametrize(("criterion", "none", "at_once", "in_turn"), BARS)
def test_a_real_network_is_mended(
    criterion: str, none: float, at_once: float, in_turn: float, stories: CausalLM
) -> None:
    """53 % of the neurons go, 40 % of the parameters of the blocks; its perplexity is 4.56."""
    graph = analyse(stories.model, stories.example_inputs)
    values = measure_costly(criterion, stories, graph)
    keep = np.ones(graph.num_units, dtype=bool)
    for name, axes in graph.param_units.items():
        if name.endswith("down_proj.weight"):
            order = values[axes[1]].argsort(kind="stable")
            keep[axes[1][order[: round(0.533 * len(order))]]] = False
    mask = graph.mask(keep)
    for kind, most in zip((None, *KINDS), (none, at_once, in_turn), strict=True):
        pruned = apply_mask(stories.model, graph, mask)
        if kind is not None:
            assert kind.on_samples(stories, graph, stories.train).fit(pruned, mask)
        assert 0.8 * most < stories.score(pruned, stories.test).value < most

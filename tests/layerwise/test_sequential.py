"""Least squares layer by layer, on what the layers of the pruned network read."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.budget import Budget
from prunegraph.core.masks import ChannelMask
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.apply import apply_mask
from prunegraph.layerwise import sequential
from prunegraph.layerwise import statistics as moments
from prunegraph.layerwise.recalibrate import recalibrate_bn
from prunegraph.layerwise.reconstruct import Reconstruction
from prunegraph.layerwise.room import most_samples
from prunegraph.layerwise.sequential import LayerwiseReconstruction
from prunegraph.testing import assert_masked_equals_pruned

KINDS = (Reconstruction, LayerwiseReconstruction)


class Mixed(nn.Module):
    """Residual, grouped, transposed layers, batch norm, attention, one layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.inner, self.outer = nn.Conv2d(24, 32, 3, padding=1), nn.Conv2d(32, 24, 1)
        self.grouped = nn.Conv2d(24, 32, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.twice, self.attention = nn.Linear(16, 16), nn.MultiheadAttention(16, 4)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.outer(F.relu(self.inner(x)))
        x = F.relu(self.up(F.relu(self.grouped(x)))).flatten(2).permute(2, 0, 1)
        x = self.twice(F.relu(self.twice(x)))
        return self.head(self.attention(x, x, x)[0].mean(0))


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, StructureGraph, Tensor]:
    torch.manual_seed(0)
    net, images = Mixed(), torch.randn(96, 3, 8, 8)
    net(images)  # statistics of batch norm
    net.eval()
    return net, analyse(net, images[:1]), images


def half(graph: StructureGraph) -> ChannelMask:
    scores = np.random.default_rng(0).random(graph.num_units, dtype=np.float32)
    return graph.project(scores, Budget(keep_macs=0.5))


def error(net: nn.Module, other: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float((net(images) - other(images)).square().mean())


def test_what_layers_before_leave_is_made_up_for(mixed: Any) -> None:
    net, graph, images = mixed
    mask, errors = half(graph), []
    for kind in KINDS:
        pruned = apply_mask(net, graph, mask)
        kind(net, graph, lambda network: network(images)).apply(pruned, mask)
        recalibrate_bn(pruned, images.split(32))
        errors.append(error(net, pruned.eval(), torch.randn(96, 3, 8, 8)))
    assert errors[1] < 0.9 * errors[0]


def test_it_changes_no_structure_and_gives_the_same_again(mixed: Any) -> None:
    net, graph, images = mixed
    before = copy.deepcopy(net.state_dict())
    mask = half(graph)
    fit = LayerwiseReconstruction(net, graph, lambda network: network(images))
    one, other = apply_mask(net, graph, mask), apply_mask(net, graph, mask)
    fit.apply(one, mask)
    fit.apply(other, mask)
    fit.apply(other, mask)
    assert not one.training
    assert not any(module._forward_pre_hooks for module in one.modules())
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert_masked_equals_pruned(net, graph, mask, images[:1])


def test_the_last_of_a_chain_is_what_least_squares_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "RIDGE", 1e-5)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    rows = torch.randn(4096, 6)
    graph = analyse(net.eval(), rows[:1])
    mask = half(graph)
    pruned = apply_mask(net, graph, mask)
    LayerwiseReconstruction(net, graph, lambda network: network(rows)).apply(pruned, mask)
    with torch.no_grad():
        read = torch.cat([pruned[:4](rows), torch.ones(len(rows), 1)], 1).double().numpy()
        wanted, found = net(rows).double().numpy(), pruned(rows).double().numpy()
    best = np.linalg.lstsq(read, wanted, rcond=None)[0]
    least = np.square(read @ best - wanted).mean()
    assert np.square(found - wanted).mean() == pytest.approx(least, rel=1e-3)  # but for the ridge


@pytest.mark.parametrize("size", [16, 48])
def test_fewer_samples_than_inputs_are_fitted(size: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    rows = torch.randn(size, 64)
    graph = analyse(net, rows[:1])
    mask = half(graph)
    pruned = apply_mask(net, graph, mask)
    fitted = copy.deepcopy(pruned)
    LayerwiseReconstruction(net, graph, lambda network: network(rows)).apply(fitted, mask)
    assert error(net, fitted, rows) < 0.25 * error(net, pruned, rows)


def test_layers_that_read_another_number_of_samples_are_fitted_at_once() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    rows = torch.randn(512, 6)
    graph = analyse(net.eval(), rows[:1])
    mask = half(graph)
    fits = [kind(net, graph, lambda network: network(rows)) for kind in KINDS]
    for name, wanted in fits[1]._wanted.items():
        fits[1]._wanted[name] = wanted[1:]  # heads that lie along the batch, say
    assert_equally_fitted(net, graph, mask, fits)


def test_only_so_many_outputs_are_held(monkeypatch: pytest.MonkeyPatch, mixed: Any) -> None:
    net, graph, images = mixed
    monkeypatch.setattr(sequential, "MOST_VALUES", 1)
    fits = [kind(net, graph, lambda network: network(images)) for kind in KINDS]
    (first,) = fits[1]._wanted
    assert first == "inner.weight"
    fits[1]._wanted.clear()
    assert_equally_fitted(net, graph, half(graph), fits)


def assert_equally_fitted(net: nn.Module, graph: Any, mask: ChannelMask, fits: Any) -> None:
    one, other = (apply_mask(net, graph, mask) for _ in fits)
    for fit, pruned in zip(fits, (one, other), strict=True):
        fit.apply(pruned, mask)
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)


def fitted(net: nn.Module, images: Tensor, forward: Any = None) -> float:
    """Return the error of a half of a network over that of the cut."""
    graph = analyse(net.eval(), images[:1] if images.dim() != 3 else images)
    mask = half(graph)
    pruned = apply_mask(net, graph, mask)
    cut = error(net, pruned, images)
    run = forward or (lambda network: network(images))
    LayerwiseReconstruction(net, graph, run).apply(pruned, mask)
    return error(net, pruned, images) / cut


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)),
        *(nn.ReLU(), nn.Conv2d(16, 4, 1)),
    )


def test_one_image_without_a_batch_is_enough() -> None:
    assert fitted(chain(), torch.randn(3, 48, 48)) < 0.7


def test_parts_that_take_no_hooks_or_have_no_versions_are_passed_by() -> None:
    class Twice(nn.Module):
        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * x

    class Passed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.chain = Twice(), chain()

        def forward(self, x: Tensor) -> Tensor:
            return self.chain(self.twice(x).clone())

    images = torch.randn(16, 3, 12, 12)
    assert fitted(Passed(), images) < 0.7
    for part in (nn.Sequential(nn.ReLU()), nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU())):
        scripted = nn.Sequential(chain(), torch.jit.script(part))
        assert fitted(scripted, images) < 0.7


def test_as_many_samples_are_taken_as_memory_holds(mixed: Any) -> None:
    _, graph, _ = mixed
    each = graph.peak_memory(graph.dense_mask())
    assert [most_samples(graph, 1, memory=memory * each) for memory in (0, 5)] == [1, 5]
    assert most_samples(graph, 2, memory=5 * each) == 10  # of an example of two
    assert most_samples(graph, 1, 3, memory=5 * each) == 3


class Proposals(nn.Module):
    """Looks again at the positions that score highest, which differ in a pruned network."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()),
        )
        self.score, self.one = nn.Conv2d(24, 1, 1), nn.Linear(24, 48)
        self.two, self.out = nn.Linear(48, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        chosen = self.score(features).flatten(1).topk(16, dim=1).indices
        places = chosen[:, :, None].expand(-1, -1, 24)
        found = features.flatten(2).transpose(1, 2).gather(1, places)
        return self.out(F.relu(self.two(F.relu(self.one(found)))).mean(1))


@pytest.mark.parametrize("seed", [0, 2, 5])
def test_outputs_of_other_positions_are_not_paired(seed: int) -> None:
    torch.manual_seed(seed)
    net, images, others = Proposals().eval(), *torch.randn(2, 96, 3, 12, 12)
    graph = analyse(net, images[:2])
    scores = np.random.default_rng(seed).random(graph.num_units, dtype=np.float32)
    mask, errors = graph.project(scores, Budget(keep_macs=0.5)), []
    for kind in KINDS:
        pruned = apply_mask(net, graph, mask)
        kind(net, graph, lambda network: network(images)).apply(pruned, mask)
        with torch.no_grad():
            lost = net(others) - pruned(others)
        errors.append((error(net, pruned, others), float(lost.var(0).mean())))
    at_once, in_turn = errors  # paired, the one or the other is larger
    assert in_turn[0] < 1.2 * at_once[0]
    assert in_turn[1] < 1.2 * at_once[1]


def test_noise_is_the_same_in_each_network() -> None:
    images = torch.randn(64, 3, 12, 12)
    plain = fitted(chain(), images)
    noisy = fitted(chain(), images, lambda net: net(images + 0.5 * torch.randn_like(images)))
    assert noisy < 1.5 * plain + 0.01


def test_an_owners_autocast_reaches_no_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = torch.linalg.cholesky_ex
    kinds = []

    def watched(system: Tensor, **options: Any) -> Any:
        kinds.append(system.dtype)
        return factor(system, **options)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", watched)

    def forward(net: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            net(images)

    images = torch.randn(64, 3, 12, 12)
    assert fitted(chain(), images, forward) < 0.7
    assert set(kinds) == {torch.float32}

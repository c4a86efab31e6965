"""Reconstructions that make a network's outputs worse are not kept."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.masks import ChannelMask
from prunegraph.core.splits import ReadyBatches, TrainSplit
from prunegraph.data.text import TokenWindows
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.apply import apply_mask
from prunegraph.layerwise.guard import Guard
from prunegraph.layerwise.reconstruct import HELD_OUT, Reconstruction, drawn_samples
from prunegraph.layerwise.sequential import LayerwiseReconstruction
from support.tasks import image_task, language_task

KINDS = (Reconstruction, LayerwiseReconstruction)


class Words(nn.Module):
    """A language model whose first position carries activations a thousand times as large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(32, 24), nn.Embedding(128, 24)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)
        self.mix, self.norm, self.head = nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 32)
        with torch.no_grad():
            self.places.weight[0] *= 1000.0
            self.head.weight *= 8.0

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        x = x + self.down(F.relu(self.up(x)))
        sink = 0.01 * x[:, :1]  # as heads that all attend to the first position
        return self.head(self.norm(x + self.mix(sink)))


def half(graph: StructureGraph) -> ChannelMask:
    """Return the mask of every other unit of the middle layer."""
    keep = np.ones(graph.num_units, dtype=bool)
    keep[graph.param_units["down.weight"][1][::2]] = False
    return graph.mask(keep)


def divergence(net: nn.Module, other: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        dense, found = (each(ids).log_softmax(-1) for each in (net, other))
    return float(F.kl_div(found, dense, reduction="sum", log_target=True) / ids.numel())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batches", [1, 4])
def test_a_language_model_gets_better(kind: type[Reconstruction], batches: int) -> None:
    net, ids = Words().eval(), torch.randint(32, (16, 128))
    graph = analyse(net, ids[:1])

    def run(network: nn.Module) -> None:
        for batch in ids.chunk(batches):
            network(batch)

    mask = half(graph)
    pruned = apply_mask(net, graph, mask)
    fitted = copy.deepcopy(pruned)
    kind(net, graph, run).apply(fitted, mask)
    others = torch.randint(32, (16, 128))
    assert divergence(net, fitted, others) < 0.3 * divergence(net, pruned, others)


class Pair(nn.Module):
    """Two inputs, each through a unit of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_that_held_out_data_contradict_is_not_kept(kind: type[Reconstruction]) -> None:
    torch.manual_seed(0)
    net, column = Pair().eval(), torch.randn(64, 1)
    graph = analyse(net, torch.randn(1, 2))
    fitting, others = torch.cat([column, column], 1), torch.cat([column, -column], 1)
    keep = np.ones(graph.num_units, dtype=bool)
    keep[graph.param_units["last.weight"][1][1]] = False
    mask = graph.mask(keep)

    def reconstruction(held_out: Tensor) -> Reconstruction:
        run = lambda network: network(fitting)  # noqa: E731
        return kind(net, graph, run, held_out=lambda network: network(held_out))

    pruned = apply_mask(net, graph, mask)
    before = copy.deepcopy(pruned.state_dict())
    with pytest.warns(UserWarning, match="weights stay as they were"):
        reconstruction(others).apply(pruned, mask)
    assert all(torch.equal(value, before[name]) for name, value in pruned.state_dict().items())
    reconstruction(fitting).apply(pruned, mask)  # the same fit, which these confirm
    torch.testing.assert_close(pruned(fitting), net(fitting), rtol=0.1, atol=0.05)


class Noise:
    """Images of noise."""

    num_classes, image_shape = 5, (3, 8, 8)

    def __init__(self) -> None:
        self.images, self.labels = torch.randn(40, 3, 8, 8), torch.zeros(40, dtype=torch.int64)
        self.seen: list[Tensor] = []

    def load(self, index: Tensor, augment: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        self.seen.append(index)
        return self.images[index], self.labels[index]

    def fingerprint(self) -> str:
        return ""


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_are_held_out_are_not_fitted_on(kind: type[Reconstruction]) -> None:
    source = Noise()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    train = TrainSplit(source, torch.arange(40))
    task, graph = image_task(net, train), analyse(net, source.images[:1])
    source.seen.clear()
    mask = graph.dense_mask()
    kind.on_samples(task, graph, train).fit(apply_mask(net, graph, mask), mask)
    seen = [index.tolist() for index in source.seen]
    assert seen.count([*range(35, 40)]) == 3  # the dense network, without the fit, with it
    assert {i for index in seen for i in index if index[0] != 35} == set(range(35))


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_of_ready_batches_is_not_fitted_on(kind: type[Reconstruction]) -> None:
    task = language_task()
    assert isinstance(task.train.source, ReadyBatches)
    *fitted, last = (batch["input_ids"] for batch in task.train.batches(1))
    seen: list[Tensor] = []
    task.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]) if args else None)
    graph = analyse(task.model, task.example_inputs)
    reconstruction = kind.on_samples(task, graph, task.train)
    assert not any(torch.equal(ids, last) for ids in seen)
    mask = graph.dense_mask()
    reconstruction.fit(apply_mask(task.model, graph, mask), mask)
    assert any(torch.equal(ids, last) for ids in seen)
    others = [ids for ids in seen if not torch.equal(ids, last)]
    assert {row for ids in others for row in map(tuple, ids.tolist())} == {
        row for ids in fitted for row in map(tuple, ids.tolist())
    }


def test_samples_to_compare_on_are_others_if_there_are_enough() -> None:
    train = TrainSplit(Noise(), torch.arange(200))
    samples, held_out = drawn_samples(train, 100, 3)
    assert samples.index.tolist() == train.sample(100, 3).index.tolist()
    assert held_out is not None
    assert len(held_out) == HELD_OUT
    assert not {*held_out.index.tolist()} & {*samples.index.tolist()}
    ready = language_task().train
    assert drawn_samples(ready, 10**6, 0)[1] is None
    following = drawn_samples(ready, 100, 0)[1]
    assert following is not None
    assert following.index.tolist() == [1]


@pytest.mark.parametrize(("windows", "most", "held"), [(16, 100, 2), (3, 9, 1), (400, 24, 4)])
def test_windows_to_compare_on_are_never_fitted_on(windows: int, most: int, held: int) -> None:
    source = TokenWindows(torch.zeros(windows, 1024, dtype=torch.int64), 1024)
    samples, held_out = drawn_samples(TrainSplit(source, torch.arange(windows)), most, 3)
    assert held_out is not None
    assert len(held_out) == held
    assert len(samples) == min(most, windows - held)
    assert not {*held_out.index.tolist()} & {*samples.index.tolist()}


def test_the_network_that_is_looked_at_stays_as_it_is() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    images, before = torch.randn(8, 3, 8, 8), copy.deepcopy(net.state_dict())
    outputs = Guard(net, lambda network: network(images), 0).outputs(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("before", "after", "rejected"),
    [(1.0, 2.0, True), (2.0, 1.0, False), (1.0, np.nan, True), (np.nan, 1.0, False)],
)
@pytest.mark.parametrize("shape", [(6, 1), (6, 5), (6, 5, 4), (6, 5, 4, 3)])
def test_what_is_rejected(
    before: float, after: float, rejected: bool, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    dense, step = torch.randn(shape), torch.randn(shape)
    guard = Guard(nn.Identity(), lambda network: network(dense), 0)

    def moved(by: float) -> list[Tensor]:
        network = nn.Identity()
        return Guard(network, lambda own: own(dense + by * step), 0).outputs(network)

    assert guard.rejects(moved(before), moved(after)) is rejected
    assert not guard.rejects(moved(before), moved(before))


def test_a_forward_that_fails_leaves_the_fit_unchecked() -> None:
    net = nn.Linear(3, 3)
    guard = Guard(net, lambda network: network(torch.zeros(2, 3)), 0)
    assert guard.outputs(nn.Linear(4, 3)) == []
    assert "shapes" in str(guard.problem)
    assert not guard.rejects([], [])


@pytest.mark.parametrize("kind", KINDS)
def test_black_images_leave_the_weights_as_they_are(kind: type[Reconstruction]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    graph = analyse(net.eval(), torch.zeros(1, 6))
    keep = np.arange(graph.num_units) % 2 == 0
    mask = graph.mask(keep | ~graph.free)
    for images, leaves in ((torch.zeros(64, 6), True), (torch.randn(64, 6), False)):
        pruned = apply_mask(net, graph, mask)
        before = pruned[2].weight.clone()
        fit = kind(net, graph, lambda network, images=images: network(images))
        if leaves:
            with pytest.warns(UserWarning, match="stay as they were: .* are all alike"):
                fit.apply(pruned, mask)
        else:
            fit.apply(pruned, mask)
        assert torch.equal(pruned[2].weight, before) is leaves


class Given(nn.Module):
    """Returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(("worse_rows", "rejected"), [(1, False), (40, True)])
def test_one_row_that_is_sure_and_wrong_gives_up_no_reconstruction(
    worse_rows: int, rejected: bool
) -> None:
    dense = torch.eye(64) * 8.0
    before = torch.eye(64) * 6.0
    after = torch.eye(64) * 7.5  # nearer on all rows,
    after[:worse_rows] = dense[:worse_rows].roll(1, 1)  # but on some the wrong answer
    guard = Guard(Given(), lambda network: network(dense), seed=0)
    assert guard.rejects([before], [after]) is rejected

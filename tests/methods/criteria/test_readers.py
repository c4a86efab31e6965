"""Wanda, FLAP, OBS and Fisher for units, against cases that are computed in another way."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegraph.core.splits import ReadyBatches, TrainSplit
from prunegraph.core.task import Task
from prunegraph.graph import analyse
from prunegraph.layerwise.solve import Hessian, remove_columns
from prunegraph.methods.criteria import obs
from prunegraph.methods.criteria.measured import measure_costly
from prunegraph.methods.criteria.obs import Reader, greedy_errors
from support.tasks import image_task


class Branches(nn.Module):
    """Two layers read the same units, one of them a grouped convolution with a kernel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.plain = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((self.grouped(x) + self.plain(x)).relu().mean((2, 3)))


def task_of(net: nn.Module, images: Tensor) -> Task:
    batch = (images, torch.arange(len(images)) % 5)
    source = ReadyBatches(held=[batch], sizes=[len(images)], digest="0" * 16)
    return image_task(net.eval(), TrainSplit(source, torch.tensor([0])))


@pytest.mark.parametrize(("name", "centred"), [("wanda", False), ("flap", True)])
def test_columns_by_hand(name: str, centred: bool) -> None:
    net, images = Branches(), torch.randn(16, 3, 5, 5) + 1.0
    graph = analyse(net, images[:1])
    with torch.no_grad():
        read = net.stem(images).movedim(1, -1).flatten(0, 2).double()  # [S, 8]
    moments = read.var(0, unbiased=False) if centred else read.square().mean(0)
    expected = np.zeros(graph.num_units)
    for channel, unit in enumerate(graph.ops[0].out_units):
        half, place = divmod(channel, 4)
        columns = net.grouped.weight[3 * half : 3 * half + 3, place], net.plain.weight[:, channel]
        energy = sum(float(own.detach().double().square().sum()) for own in columns)
        expected[unit] += energy * float(moments[channel])
    values = measure_costly(name, task_of(net, images), graph)
    units = np.unique(graph.ops[0].out_units)
    np.testing.assert_allclose(values[units], expected[units], rtol=1e-4)


def test_the_mean_of_an_input_is_no_loss_for_flap() -> None:
    net, images = Branches(), torch.randn(16, 3, 5, 5)
    graph = analyse(net, images[:1])
    unit = graph.ops[0].out_units[0]
    found = []
    for _ in range(2):
        found.append(
            [measure_costly(name, task_of(net, images), graph)[unit] for name in ("flap", "wanda")]
        )
        with torch.no_grad():
            net.stem.bias += 10.0
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    assert found[1][1] > 10.0 * found[0][1]


@pytest.mark.parametrize("width", [1, 2])
def test_obs_goes_in_the_order_of_exact_removals(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obs, "STEPS", 64)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 10, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(10, 10, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    hessian = Hessian(rows.T @ rows / 64)
    column = np.arange(10) // width
    gone: list[int] = []
    expected, before = np.zeros(10 // width), 0.0
    while len(gone) < len(expected):
        errors = {}
        for unit in set(range(len(expected))) - set(gone):
            places = torch.from_numpy(np.flatnonzero(np.isin(column, [*gone, unit])))
            errors[unit] = hessian.error(remove_columns(weight, places, hessian) - weight)
        least = min(errors, key=errors.__getitem__)
        gone.append(least)
        expected[least], before = errors[least] - before, errors[least]
    values = greedy_errors([Reader.of(weight, hessian)], column)
    assert np.argsort(values).tolist() == gone
    highest = np.maximum.accumulate(expected[gone])
    np.testing.assert_allclose(values[gone], highest, rtol=1e-4)
    halves = [Reader.of(half, hessian) for half in weight.chunk(2)]
    np.testing.assert_allclose(greedy_errors(halves, column), values, rtol=1e-6)
    other = greedy_errors([Reader.of(weight.flip(1), hessian)], column)
    assert not np.allclose(other, values, rtol=0.1)


def test_obs_tells_twins_from_what_no_other_unit_gives() -> None:
    net, images = Branches(), torch.randn(64, 3, 5, 5)
    with torch.no_grad():
        net.stem.weight[2:4], net.stem.bias[2:4] = 0.0, 0.0
        net.stem.weight[2, 0] = net.stem.weight[3, 1] = 1.0
        for channels in ([0, 1], [4, 5]):  # units 0 and 1 are twins
            net.stem.weight[channels], net.stem.bias[channels] = 0.0, 0.0
            net.stem.weight[channels, 2] = 1.0
        net.stem.weight[6:], net.stem.bias[6:] = net.stem.weight[2:4].clone(), 0.0
    graph = analyse(net, images[:1])
    values = measure_costly("obs", task_of(net, images), graph)[graph.ops[0].out_units[:4]]
    assert values[:2].min() < 0.1 * values[2:].min()


class Opposed(nn.Module):
    """What the first two units do in one layer, the other undoes for the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 1)
        self.one, self.other = nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)
        with torch.no_grad():
            self.other.weight[:, 0] = -self.one.weight[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return (self.one(x) + self.other(x)).mean((2, 3))


def test_fisher_is_that_of_one_gate_for_all_layers() -> None:
    net, images = Opposed(), torch.randn(16, 3, 4, 4)
    graph = analyse(net, images[:1])
    task = task_of(net, images)
    units = graph.ops[0].out_units
    expected = torch.zeros(4)
    for number in range(16):
        gate = torch.ones(4, requires_grad=True)
        x = net.stem(images[number : number + 1]).relu() * gate[:, None, None]
        logits = (net.one(x) + net.other(x)).mean((2, 3))
        loss = nn.functional.cross_entropy(logits, torch.tensor([number % 5]))
        expected += torch.autograd.grad(loss, gate)[0].square() / 16
    values = measure_costly("fisher", task, graph)[units]
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-9)
    assert values[0] < 1e-9 < values[1:].min()

"""What a channel gives beyond what the others make up for."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegraph.core.masks import FloatArray
from prunegraph.core.splits import TrainSplit
from prunegraph.data.memory import MemorySource
from prunegraph.graph import StructureGraph, analyse
from prunegraph.layerwise.statistics import RIDGE
from prunegraph.methods.criteria import residual_taylor as module
from prunegraph.methods.criteria.measured import measure_costly
from prunegraph.methods.criteria.residual_taylor import Reader, greedy_values
from prunegraph.methods.criteria.taylor import measure
from support.tasks import image_task

NUM_IMAGES = 64


def images() -> TrainSplit:
    generator = torch.Generator().manual_seed(0)
    source = MemorySource(
        torch.randint(256, (NUM_IMAGES, 6, 6, 6), dtype=torch.uint8, generator=generator),
        torch.arange(NUM_IMAGES) % 5,
        num_classes=5,
        mean=(0.5,) * 6,
        std=(0.3,) * 6,
        padding=0,
        flip=False,
    )
    return TrainSplit(source, torch.arange(NUM_IMAGES))


def network(reading: nn.Module) -> tuple[nn.Module, StructureGraph]:
    """Return 6 channels that are the image's own, a layer that reads them, and 5 outputs."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(6, 6, 1, bias=False),
        reading,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(6)[:, :, None, None])
    return net, analyse(net, torch.zeros(1, 6, 6, 6))


def values_of(name: str, net: nn.Module, graph: StructureGraph) -> FloatArray:
    own = graph.ops[0].out_units
    if name == "taylor":
        return measure(image_task(net, images()), graph)["taylor"][own]
    return measure_costly(name, image_task(net, images()), graph)[own]


def test_independent_channels_have_their_taylor_importance() -> None:
    net, graph = network(nn.Conv2d(6, 8, 1))
    taylor, residual = (values_of(name, net, graph) for name in ("taylor", "residual_taylor"))
    np.testing.assert_allclose(residual, taylor, rtol=0.1)
    assert np.argsort(residual).tolist() == np.argsort(taylor).tolist()


def test_of_twins_one_goes_for_nothing_and_the_other_counts() -> None:
    net, graph = network(nn.Conv2d(6, 8, 1))
    with torch.no_grad():
        net[0].weight[4] = net[0].weight[1]
    taylor, residual = (values_of(name, net, graph) for name in ("taylor", "residual_taylor"))
    first, second = sorted((1, 4), key=lambda channel: residual[channel])
    assert residual.argmin() == first
    assert residual[first] < 0.1 * taylor[first]
    assert residual[second] > 0.8 * taylor[second]


def test_where_nothing_is_compensated_it_is_the_taylor_importance() -> None:
    net, graph = network(nn.Conv2d(6, 8, 3, groups=2))
    with torch.no_grad():
        net[0].weight[4] = net[0].weight[1]
    taylor, residual = (values_of(name, net, graph) for name in ("taylor", "residual_taylor"))
    np.testing.assert_allclose(residual, taylor, rtol=1e-4)


def correlated(size: int, seed: int) -> Tensor:
    """Return correlations of ``size`` channels with the ridge on the diagonal."""
    mixed = torch.randn(size, 3 * size, generator=torch.Generator().manual_seed(seed)).double()
    mixed[1] = mixed[0] + 0.1 * mixed[1]
    correlations = torch.corrcoef(mixed)
    return correlations.fill_diagonal_(1.0 + RIDGE)


@pytest.mark.parametrize("steps", [64, 4])
def test_the_path_is_that_of_regressions_done_anew(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEPS", steps)  # 4: three channels a step
    size, places = 12, torch.arange(1, 13)  # one more channel is read and stays
    systems = [correlated(size + 1, seed) for seed in (0, 1)]
    effects = torch.rand(2, size, generator=torch.Generator().manual_seed(2)).double()
    expected, left, highest = np.zeros(size), list(range(size)), 0.0
    while left:
        now = torch.zeros(len(left), dtype=torch.float64)
        for system, own in zip(systems, effects, strict=True):
            kept = torch.tensor([0, *(channel + 1 for channel in left)])
            inverse = torch.linalg.inv(system[kept][:, kept])
            now += own[left] / ((1.0 + RIDGE) * inverse.diagonal()[1:])
        highest = max(highest, float(now.min()))
        expected[left.pop(int(now.argmin()))] = highest
    readers = [
        Reader(torch.linalg.inv(system), places, own)
        for system, own in zip(systems, effects, strict=True)
    ]
    found = greedy_values(readers)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert len(set(found.tolist())) == size


def test_a_class_with_several_channels_of_a_layer_is_seen() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5))
    graph = analyse(net, torch.zeros(1, 6, 6, 6))
    residual, taylor = values_of("residual_taylor", net, graph), values_of("taylor", net, graph)
    assert (residual > 0).all()
    assert (np.sort(residual) <= 1.001 * np.sort(taylor)).all()

"""HRank, CHIP, OBD and ThiNet against cases that can be computed by hand."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegraph.core.errors import ModelError
from prunegraph.core.splits import TrainSplit
from prunegraph.graph import StructureGraph, analyse
from prunegraph.layerwise.capture import Read
from prunegraph.methods.criteria import feature_maps as map_statistics
from prunegraph.methods.criteria.dense import Dense
from prunegraph.methods.criteria.feature_maps import nuclear_loss
from prunegraph.methods.criteria.measured import LazyStatistics, costly_names, measure_costly
from prunegraph.methods.criteria.obd import _columns, fisher_saliency
from prunegraph.methods.criteria.thinet import greedy_errors, removal_errors, sample_contributions
from support.tasks import image_task


class Given:
    """Given images in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.num_classes, self.image_shape = 5, tuple(images.shape[1:])

    def load(self, index: Tensor, augment: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        assert augment is None, "statistics are measured without augmentation"
        return self.images[index], self.labels[index]

    def fingerprint(self) -> str:
        return "0" * 16


def split(images: Tensor, labels: Tensor | None = None) -> TrainSplit:
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    return TrainSplit(Given(images, labels), torch.arange(len(images)))


def dense(model: nn.Module, graph: StructureGraph, train: TrainSplit, seed: int = 0) -> Dense:
    return Dense(task=image_task(model, train), graph=graph, train=train, seed=seed)


def conv_net(num_channels: int, num_images: int = 3) -> tuple[nn.Module, StructureGraph, Tensor]:
    """Return image -> 1x1 conv -> 3x3 conv -> mean -> 5 outputs, its graph, random images."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, num_channels, 1, bias=False), nn.Conv2d(num_channels, 4, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip
    return net, analyse(net, torch.zeros(1, 3, 6, 6)), torch.randn(num_images, 3, 6, 6)


def test_hrank_is_the_mean_rank_of_the_maps() -> None:
    net, graph, images = conv_net(4)
    images[:, 0] = torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 7.0))  # rank 1
    images[:2, 1] = torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 0.0]))  # rank 3, 3 and
    images[2, 1] = torch.eye(6)  # 6
    with torch.no_grad():
        weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
        net[0].weight.copy_(weight[:, :, None, None])
    values = measure_costly("hrank", image_task(net, split(images)), graph)
    np.testing.assert_allclose(values[graph.ops[0].out_units], [1.0, 4.0, 6.0, 0.0])


def test_hrank_takes_maps_from_convolutions_and_columns_where_there_are_none() -> None:
    net, graph, images = conv_net(4)
    with torch.no_grad():
        net[1].weight[2] = 0.0
        net[1].bias[2] = 0.0
    values = measure_costly("hrank", image_task(net, split(images)), graph)
    assert values[graph.ops[1].out_units].tolist() == [1.0, 1.0, 0.0, 1.0]  # the linear layer's


def test_chip_by_hand() -> None:
    rows = torch.zeros(4, 6, dtype=torch.float64)
    rows[0, 0] = rows[1, 0] = 3.0  # twins
    rows[2, 1:3] = torch.tensor([3.0, 4.0])  # orthogonal to all
    expected = [3 * 2**0.5 - 3, 3 * 2**0.5 - 3, 5.0, 0.0]
    np.testing.assert_allclose(nuclear_loss(rows, torch.arange(4), 4), expected, atol=1e-7)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_chip_is_the_difference_of_nuclear_norms(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    column = torch.arange(shape[0]) // 2  # two rows a class
    expected = []
    for number in range(int(column.max()) + 1):
        without = rows.clone()
        without[column == number] = 0.0
        norms = [torch.linalg.matrix_norm(matrix, "nuc") for matrix in (rows, without)]
        expected.append(float(norms[0] - norms[1]))
    found = nuclear_loss(rows, column, len(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    monkeypatch.setattr(map_statistics, "MOST_ENTRIES", 60)  # one or two matrices at once
    np.testing.assert_allclose(nuclear_loss(rows, column, len(expected)), found, rtol=1e-9)


def test_chip_scores_the_dependent_channel_lowest() -> None:
    net, graph, images = conv_net(4)
    with torch.no_grad():
        net[0].weight[:3, :, 0, 0] = torch.eye(3)
        net[0].weight[3, :, 0, 0] = torch.tensor([0.6, -0.6, 0.5])  # as long as the others, nearly
    values = measure_costly("chip", image_task(net, split(images)), graph)[graph.ops[0].out_units]
    assert values.argmin() == 3
    assert values[3] < 0.8 * values[:3].min()


def softmax_net(width: int) -> tuple[nn.Module, StructureGraph]:
    """Return a network whose Hessian is known: 5 softmax outputs, linear in what they read."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 5)
    )
    return net, analyse(net, torch.zeros(1, 3, 6, 6))


def test_obd_is_the_formula_of_its_docstring() -> None:
    net, graph = softmax_net(6)
    images = 3.0 * torch.randn(7, 3, 6, 6)
    labels = torch.arange(7) % 5
    with torch.no_grad():
        hidden = net[:4](images)  # [B, 6]
        error = net(images).softmax(1) - nn.functional.one_hot(labels, 5)  # dL/dlogits
    fisher = torch.einsum("bk,bj->kj", error**2, hidden**2) / 7
    expected = 0.5 * (fisher * net[4].weight.detach() ** 2).sum(0)
    values = measure_costly("obd", image_task(net, split(images, labels)), graph)
    np.testing.assert_allclose(values[graph.ops[0].out_units], expected, rtol=1e-4)


class Residual(nn.Module):
    """Adds what a square convolution reads: its classes lie on both axes of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.head((y + self.conv(y).relu()).mean((2, 3)))


def test_obd_takes_the_weights_that_read_a_class_of_a_square_layer() -> None:
    graph = analyse(Residual().eval(), torch.randn(1, 3, 8, 8))
    columns = _columns(graph)
    assert columns["conv.weight"][0] == columns["head.weight"][0] == 1
    np.testing.assert_array_equal(*graph.param_units["conv.weight"].values())


def test_obd_nears_the_known_hessian_where_labels_follow_the_network() -> None:
    net, graph = softmax_net(4)
    images = 4.0 * torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        hidden, p = net[:4](images)[0], net(images).softmax(1)[0]
    labels = torch.multinomial(p, 3000, True, generator=torch.Generator().manual_seed(0))
    hessian = torch.outer(p * (1 - p), hidden**2)  # of cross-entropy in the last layer's weights
    expected = 0.5 * (hessian * net[4].weight.detach() ** 2).sum(0)
    frozen = net.requires_grad_(False).eval()
    values = fisher_saliency(dense(frozen, graph, split(images.expand(3000, -1, -1, -1), labels)))
    np.testing.assert_allclose(values[graph.ops[0].out_units], expected, rtol=0.1, atol=1e-9)


def test_obd_counts_every_layer_that_reads_and_depthwise_ones(
    mixed: nn.Module, mixed_graph: StructureGraph
) -> None:
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    values = fisher_saliency(dense(mixed.eval(), mixed_graph, split(images, labels)))
    expected = np.zeros(mixed_graph.num_units)
    weights = dict(mixed.named_parameters(remove_duplicate=False))
    fisher = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for image, label in zip(images, labels, strict=True):
        mixed.zero_grad()
        nn.functional.cross_entropy(mixed(image[None]), label[None]).backward()
        for name, weight in weights.items():
            fisher[name] += weight.grad**2 / 4
    for op in mixed_graph.ops:
        own = 0.5 * (fisher[op.param] * weights[op.param].detach() ** 2)
        classes = op.read_units
        axis = next(
            a for a, c in mixed_graph.param_units[op.param].items() if np.array_equal(c, classes)
        )
        np.add.at(expected, classes, own.movedim(axis, 0).flatten(1).sum(1).numpy())
    seen = np.isfinite(values)
    np.testing.assert_allclose(values[seen], expected[seen], rtol=2e-3)
    unread = np.union1d(mixed_graph.ops[2].out_units, mixed_graph.ops[-1].out_units)
    np.testing.assert_array_equal(np.flatnonzero(~seen), unread)


def read_of(module: nn.Module, activation: Tensor) -> Read:
    net = nn.Sequential(nn.Conv2d(3, activation.shape[1], 1), module)
    op = analyse(net, torch.zeros(1, 3, *activation.shape[2:]), trial=False).ops[1]
    return Read(op, module, activation, 1, op.in_units)


def test_thinet_samples_what_channels_give_to_outputs() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1)
    inputs = torch.randn(2, 4, 7, 7)
    sampled = sample_contributions(read_of(conv, inputs), torch.Generator().manual_seed(0))
    assert sampled is not None
    assert sampled.shape == (20, 4)
    outputs = (conv(inputs) - conv.bias[:, None, None]).flatten(1).detach()  # [B, 6 * L]
    for row, total in enumerate(sampled.sum(1)):
        assert (outputs[row // 10] - total).abs().min() < 1e-5
    grouped = nn.Conv2d(4, 6, 3, groups=2)
    assert sample_contributions(read_of(grouped, inputs), torch.Generator()) is None


def test_thinet_s_greedy_path_by_hand() -> None:
    gram = np.array([[4.0, 0.0, -4.0], [0.0, 5.0, 0.0], [-4.0, 0.0, 9.0]])
    # 0 goes first (4); then 2, since 4 + 9 - 8 = 5 beats 4 + 5 = 9; then 1, at 5 + 5
    np.testing.assert_allclose(greedy_errors(gram), [4.0, 10.0, 5.0], rtol=1e-5)


def test_thinet_s_first_and_second_step_are_the_best_there_are() -> None:
    x = np.random.default_rng(0).normal(size=(50, 6))
    first, second = np.argsort(greedy_errors(x.T @ x))[:2]
    assert first == (x**2).sum(0).argmin()
    pairs = {c: ((x[:, first] + x[:, c]) ** 2).sum() for c in range(6) if c != first}
    assert second == min(pairs, key=pairs.__getitem__)


def test_thinet_removes_channels_that_cancel_and_the_silent_one_first() -> None:
    net, graph, images = conv_net(5, num_images=8)
    with torch.no_grad():
        net[1].weight[:, 3] = 0.0  # nothing reads channel 3
        net[0].weight[4] = net[0].weight[1]  # 1 and 4 are equal and cancel
        net[1].weight[:, 4] = -net[1].weight[:, 1]
        net[1].weight[:, [1, 4]] *= 0.2
    values = measure_costly("thinet", image_task(net, split(images)), graph)[graph.ops[0].out_units]
    assert values.argmin() == 3
    assert set(np.argsort(values)[:3].tolist()) == {1, 3, 4}
    assert values.max() == pytest.approx(1.0, rel=0.05)  # all gone: the whole energy
    frozen = net.requires_grad_(False).eval()
    one, same, other = (
        removal_errors(dense(frozen, graph, split(images), seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one[graph.free], other[graph.free], rtol=1e-3)


@pytest.mark.parametrize("name", costly_names())
def test_costly_arrays_are_finite_and_the_network_is_left_as_it_was(
    name: str, mixed: nn.Module, mixed_graph: StructureGraph
) -> None:
    mixed.train()
    before = copy.deepcopy(mixed.state_dict())
    images = split(torch.randn(6, 3, 8, 8), torch.arange(6) % 5)
    values = measure_costly(name, image_task(mixed, images), mixed_graph)
    assert values.shape == (mixed_graph.num_units,)
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    assert not values[mixed_graph.frozen].any()
    assert values[mixed_graph.free].any()
    assert all(torch.equal(mixed.state_dict()[key], value) for key, value in before.items())
    assert all(module.training for module in mixed.modules())
    assert all(p.grad is None and p.requires_grad for p in mixed.parameters())


def test_an_infinite_value_is_an_error() -> None:
    net, graph = softmax_net(4)
    with torch.no_grad():
        net[4].weight.fill_(1e30)
    with pytest.raises(ModelError, match="obd is infinite"):
        measure_costly("obd", image_task(net, split(torch.randn(2, 3, 6, 6))), graph)


def test_costly_statistics_are_measured_once_and_only_when_asked() -> None:
    asked = []

    def measure(name: str) -> np.ndarray:
        asked.append(name)
        return np.ones(3, dtype=np.float32)

    lazy = LazyStatistics(lambda: {"l1": np.zeros(3, dtype=np.float32)}, measure)
    assert not lazy["l1"].any()
    assert not lazy["l1"].flags.writeable
    assert list(lazy) == ["l1"]
    assert asked == []
    assert lazy["chip"] is lazy["chip"]
    assert asked == ["chip"]
    with pytest.raises(KeyError):
        lazy["nothing"]

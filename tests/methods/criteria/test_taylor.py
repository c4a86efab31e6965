import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.errors import DataError, ModelError
from prunegraph.core.splits import Dataset, TrainSplit
from prunegraph.graph import StructureGraph, analyse
from prunegraph.layerwise.capture import Read
from prunegraph.methods.criteria import dense
from prunegraph.methods.criteria.dense import Dense
from prunegraph.methods.criteria.measured import costly_names, measure_costly
from prunegraph.methods.criteria.taylor import STATISTIC_NAMES, Effects, fill_unseen, measure
from prunegraph.methods.criteria.weights import producing_filters
from support.tasks import image_task
from support.toy_env import toy_graph


class Pictures:
    """Random images in memory."""

    num_classes = 5
    image_shape = (3, 8, 8)

    def __init__(self, num_images: int = 40) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(num_images, 3, 8, 8, generator=generator)
        self.labels = torch.randint(5, (num_images,), generator=generator)

    def load(self, index: Tensor, augment: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        assert augment is None, "statistics are measured without augmentation"
        return self.images[index], self.labels[index]

    def fingerprint(self) -> str:
        return "0" * 16


@pytest.fixture
def pictures() -> TrainSplit:
    return TrainSplit(Pictures(), torch.arange(40))


def taylor_by_definition(
    model: nn.Module, graph: StructureGraph, images: Tensor, labels: Tensor
) -> np.ndarray:
    """One backward an image, one product an element, from the weights' own gradients."""
    model = copy.deepcopy(model).eval()
    weights = dict(model.named_parameters(remove_duplicate=False))
    score = np.zeros(graph.num_units)
    for image, label in zip(images, labels, strict=True):
        model.zero_grad()
        F.cross_entropy(model(image[None]), label[None]).backward()
        for op in graph.ops:
            weight = weights[op.param]
            classes = op.read_units
            if not classes.size:
                continue  # reads the image alone
            axis = next(
                a for a, own in graph.param_units[op.param].items() if np.array_equal(own, classes)
            )
            product = (weight * weight.grad).detach().movedim(axis, 0).flatten(1).sum(1).numpy()
            effect = np.zeros(graph.num_units)
            np.add.at(effect, classes, product)
            score += effect**2 / len(images)
    return np.where(graph.free, score, 0.0)


def test_taylor_is_the_formula_of_its_docstring(
    digits_net: nn.Module, digits_graph: StructureGraph, digits: Dataset
) -> None:
    measured = measure(
        image_task(digits_net, digits.train), digits_graph, num_samples=12, batch_size=5, seed=3
    )
    images, labels = next(digits.train.sample(12, 3).batches(12))
    expected = taylor_by_definition(digits_net, digits_graph, images, labels)
    np.testing.assert_allclose(measured["taylor"], expected, rtol=2e-4, atol=1e-9)
    assert (expected[digits_graph.free] > 0).mean() > 0.9


def test_taylor_sees_through_depthwise_grouped_and_shared_layers(
    mixed: nn.Module, mixed_graph: StructureGraph, pictures: TrainSplit
) -> None:
    measured = measure(
        image_task(mixed, pictures), mixed_graph, num_samples=12, batch_size=5, seed=3
    )
    images, labels = next(pictures.sample(12, 3).batches(12))
    expected = taylor_by_definition(mixed, mixed_graph, images, labels)
    unread = mixed_graph.ops[2].out_units  # a gather alone reads what the 1x1 convolution writes
    read = np.setdiff1d(np.flatnonzero(mixed_graph.free), unread)
    np.testing.assert_allclose(measured["taylor"][read], expected[read], rtol=2e-3, atol=1e-9)
    spread = np.quantile(expected[read], (np.arange(len(unread)) + 0.5) / len(unread))
    np.testing.assert_allclose(np.sort(measured["taylor"][unread]), spread, rtol=5e-3)


def test_all_arrays_are_finite_and_silent_where_frozen(
    mixed: nn.Module, mixed_graph: StructureGraph, pictures: TrainSplit
) -> None:
    statistics = measure(image_task(mixed, pictures), mixed_graph, num_samples=16)
    assert tuple(statistics) == STATISTIC_NAMES
    for name, values in statistics.items():
        assert values.shape == (mixed_graph.num_units,)
        assert values.dtype == np.float32
        assert np.isfinite(values).all(), name
        assert not values[mixed_graph.frozen].any(), name
        assert values[mixed_graph.free].any(), name


def test_the_network_is_left_as_it_was(
    mixed: nn.Module, mixed_graph: StructureGraph, pictures: TrainSplit
) -> None:
    mixed.train()
    before = copy.deepcopy(mixed.state_dict())
    measure(image_task(mixed, pictures), mixed_graph, num_samples=16)
    after = mixed.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(module.training for module in mixed.modules())
    assert all(p.grad is None and p.requires_grad for p in mixed.parameters())
    assert not any(module._forward_pre_hooks for module in mixed.modules())


def test_batches_do_not_matter_and_seeds_do(
    mixed: nn.Module, mixed_graph: StructureGraph, pictures: TrainSplit
) -> None:
    one, other, moved = (
        measure(
            image_task(mixed, pictures), mixed_graph, num_samples=16, batch_size=size, seed=seed
        )
        for size, seed in ((16, 0), (5, 0), (16, 1))
    )
    for name in STATISTIC_NAMES:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-7)
    assert not np.allclose(one["taylor"], moved["taylor"], rtol=1e-3)
    np.testing.assert_array_equal(one["l1"], moved["l1"])


def linear_net(weight: Tensor) -> tuple[nn.Module, StructureGraph]:
    """Return 3 inputs -> len(weight) hidden -> 5 outputs on the mean colour of a picture."""
    net = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, len(weight)), nn.ReLU(),
        nn.Linear(len(weight), 5),
    )  # fmt: skip
    with torch.no_grad():
        net[2].weight.copy_(weight)
        net[2].bias.zero_()
    return net, analyse(net, torch.zeros(1, 3, 8, 8))


def test_norms_and_distances_by_hand(pictures: TrainSplit) -> None:
    weight = torch.tensor([[3.0, 4.0, 0.0], [1.0, 0.0, 0.0], [0.0, -2.0, 0.0]])
    net, graph = linear_net(weight)
    arrays = measure(image_task(net, pictures), graph, num_samples=8)
    classes = graph.ops[0].out_units
    assert arrays["l1"][classes].tolist() == [7.0, 1.0, 2.0]
    assert arrays["l2"][classes].tolist() == [5.0, 1.0, 2.0]
    distances = torch.cdist(weight, weight).sum(1).numpy()
    np.testing.assert_allclose(arrays["fpgm"][classes], distances, rtol=1e-5)
    np.testing.assert_allclose(arrays["lamp"][classes], [1.0, 1 / 30, 4 / 29], rtol=1e-6)
    np.testing.assert_allclose(arrays["twin_similarity"][classes], [0.8, 0.6, 0.8], rtol=1e-6)
    assert arrays["twin_rank"][classes].tolist() == [1.0, 0.0, 0.0]
    assert not arrays["bn_scale"].any()  # there is no norm


def test_planted_twins_are_seen_and_told_apart(pictures: TrainSplit) -> None:
    weight = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    weight[9] = weight[4]
    net, graph = linear_net(weight)
    arrays = measure(image_task(net, pictures), graph, num_samples=8)
    classes = graph.ops[0].out_units
    np.testing.assert_allclose(arrays["twin_similarity"][classes[[4, 9]]], 1.0, atol=1e-6)
    assert arrays["twin_rank"][classes[[4, 9]]].tolist() == [1.0, 0.0]
    others = np.delete(arrays["twin_similarity"][classes], [4, 9])
    assert others.max() < 1.0 - 1e-5


def test_dead_channels_read_as_zeros(pictures: TrainSplit) -> None:
    weight = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    net, graph = linear_net(weight)
    with torch.no_grad():
        net[2].bias[1] = -100.0
        net[2].bias[2] = 100.0
    arrays = measure(image_task(net, pictures), graph, num_samples=8)
    dead, alive = graph.ops[0].out_units[[1, 2]]
    assert arrays["apoz"][[dead, alive]].tolist() == [1.0, 0.0]
    assert arrays["activation_mean"][dead] == arrays["taylor"][dead] == 0.0
    assert arrays["activation_mean"][alive] == pytest.approx(100.0, rel=0.02)


def test_an_endless_gradient_is_an_error(pictures: TrainSplit) -> None:
    net, graph = linear_net(torch.ones(4, 3))
    with torch.no_grad():
        net[4].weight.fill_(3e38)
    with pytest.raises(ModelError, match=r"the loss on train data is (inf|nan): check"):
        measure(image_task(net, pictures), graph, num_samples=8)


def test_an_image_that_is_no_number_is_blamed(pictures: TrainSplit) -> None:
    net, graph = linear_net(torch.ones(4, 3))
    assert isinstance(pictures.source, Pictures)
    pictures.source.images[3:, 1, 2, 2] = torch.nan
    with pytest.raises(DataError, match="the train data hold NaN or infinite values: repair"):
        measure(image_task(net, pictures), graph, num_samples=8)


class Named(nn.MultiheadAttention):
    """Torch's attention under another name."""


class Attending(nn.Module):
    """Patches of an image through torch's own attention module, or one of its kind."""

    def __init__(self, kind: type[nn.MultiheadAttention]) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.attention = kind(8, 4, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, Named])
@pytest.mark.parametrize("name", ["taylor", "activation_mean", "obd", "thinet", "chip"])
def test_the_heads_of_torch_s_own_attention_are_told_apart(
    pictures: TrainSplit, name: str, kind: type[nn.MultiheadAttention]
) -> None:
    torch.manual_seed(0)
    model = Attending(kind).eval()
    graph = analyse(model, torch.zeros(1, 3, 8, 8))
    if name in costly_names():
        values = measure_costly(name, image_task(model, pictures), graph)
    else:
        values = measure(image_task(model, pictures), graph)[name]
    heads = next(
        group for group in graph.groups if group.frozen is None and "attention" in group.name
    )
    assert len(set(values[heads.units].tolist())) == len(heads.units) == 4
    assert type(model.attention) is kind


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_of_another_precision_are_measured_in_float32(
    digits: Dataset, digits_net: nn.Module, digits_graph: StructureGraph, dtype: torch.dtype
) -> None:
    expected = measure(image_task(digits_net, digits.train), digits_graph, num_samples=64)["taylor"]
    other = copy.deepcopy(digits_net).to(dtype)
    found = measure(image_task(other, digits.train), digits_graph, num_samples=64)["taylor"]
    rough = 1e-5 if dtype == torch.float64 else 0.2
    assert np.corrcoef(found, expected)[0, 1] > 1 - rough
    assert next(other.parameters()).dtype == dtype


def test_the_slope_of_an_activation_is_no_norm(pictures: TrainSplit) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()  # fmt: skip
    nn.init.constant_(model[2].weight, 100.0)
    graph = analyse(model, torch.zeros(1, 3, 8, 8))
    assert measure(image_task(model, pictures), graph)["bn_scale"].max() == 1.0


def test_classes_that_a_criterion_cannot_see_take_the_quantiles_of_the_others() -> None:
    graph = toy_graph((8, 4), (1, 1, 1))
    first, second = (np.flatnonzero(graph.group_of == number) for number in (1, 2))
    values, norms = np.full(graph.num_units, np.nan), np.full(graph.num_units, np.nan)
    values[first], norms[second] = np.arange(8.0), [3.0, 1.0, 4.0, 2.0]
    filled = fill_unseen(graph, values, lambda: norms)
    assert filled[first].tolist() == list(range(8))
    assert filled[second] == pytest.approx(7.0 * np.array([0.625, 0.125, 0.875, 0.375]))
    assert (filled[graph.frozen] == 0.0).all()


def test_filters_of_a_square_transposed_convolution_are_what_it_writes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
            self.up = nn.ConvTranspose2d(8, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.out(x + self.up(x))

    net = Net()
    graph = analyse(net, torch.randn(1, 3, 4, 4))
    rows = [f.rows for f in producing_filters(net, graph)][1]
    assert torch.equal(rows, net.up.weight.detach().movedim(1, 0).flatten(1))


def test_filters_of_layers_of_which_nothing_can_go_are_not_looked_at() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 50))
    graph = analyse(net, torch.randn(2, 8))
    assert [f.rows.shape for f in producing_filters(net, graph)] == [(16, 8)]


def test_a_backward_leaves_no_activation_behind(pictures: TrainSplit) -> None:
    """What only the garbage collector finds would double the memory of large images."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    graph, alive = analyse(net, torch.randn(1, 3, 8, 8)), []
    effects = Effects(graph.num_units)

    def visit(read: Read) -> None:
        effects.visit(read)
        alive.append(weakref.ref(read.activation))

    measured = Dense(task=image_task(net, pictures), graph=graph, train=pictures)
    gc.disable()
    try:
        measured.show_gradients(visit, 20)
        assert len(alive) == 4
        assert [found() for found in alive] == [None] * 4
    finally:
        gc.enable()


def test_batches_of_large_samples_are_smaller(
    pictures: TrainSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    graph = analyse(net, torch.randn(1, 3, 8, 8))
    measured = Dense(task=image_task(net, pictures), graph=graph, train=pictures)
    each = 4 * (3 * 8 * 8 + 144 + 5)  # what the layers read, and the log of the outputs
    found: list[list[int]] = []
    for size in (0, 5 * each, 10**6):
        monkeypatch.setattr(dense, "MEMORY", size)
        found.append([])
        measured.show_gradients(lambda read: found[-1].append(len(read.activation)), 16)
    assert max(found[0]) == 1
    assert 4 <= max(found[1]) <= 5
    assert max(found[2]) == 16

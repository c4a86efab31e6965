import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError, ModelError
from prunegraph.core.masks import ChannelMask
from prunegraph.graph import StructureGraph, analyse
from prunegraph.models import build_model
from prunegraph.testing import assert_masked_equals_pruned

NETWORKS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "resnet20": ("resnet20", (3, 32, 32)),
    "resnet56": ("resnet56", (3, 32, 32)),
    "vgg16_bn": ("vgg16_bn", (3, 32, 32)),
    "mobilenetv2": ("mobilenetv2", (3, 32, 32)),
    "digits_resnet": ("digits_resnet", (1, 8, 8)),
    "torchvision:resnet18": ("torchvision:resnet18", (3, 64, 64)),
    "torchvision:resnet50": ("torchvision:resnet50", (3, 64, 64)),
    "torchvision:mobilenet_v2": ("torchvision:mobilenet_v2", (3, 64, 64)),
    "torchvision:vgg16_bn": ("torchvision:vgg16_bn", (3, 32, 32)),
    "torchvision:densenet121": ("torchvision:densenet121", (3, 64, 64)),
}
LARGE = {
    "vgg16_bn",
    *(f"torchvision:{name}" for name in ("densenet121", "mobilenet_v2", "resnet50", "vgg16_bn")),
}
DEEP = {"resnet56", "mobilenetv2", "torchvision:resnet18"}
"""Networks of which a mask takes half a second."""


def lively(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and shifts, so that a masked channel could leak."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.2, 0.6)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def network(name: str) -> tuple[nn.Module, StructureGraph, Tensor]:
    torch.manual_seed(0)
    spec, shape = NETWORKS[name]
    model = lively(build_model(spec, num_classes=10, image_shape=shape))
    example = torch.randn(1, *shape)
    return model, analyse(model, example), example


def random_mask(graph: StructureGraph, seed: int) -> ChannelMask:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=graph.num_units).astype(np.float32)
    return graph.project(scores, Budget(keep_macs=float(rng.uniform(0.3, 0.9))))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in NETWORKS],
)
def test_masked_equals_pruned_for_random_masks(name: str) -> None:
    model, graph, example = network(name)
    for seed in range(5 if name in DEEP else 20):
        assert_masked_equals_pruned(model, graph, random_mask(graph, seed), example)


@pytest.mark.parametrize(
    "name",
    [  # the head of one has a hundred million weights
        pytest.param(name, marks=pytest.mark.slow if name == "torchvision:vgg16_bn" else ())
        for name in NETWORKS
    ],
)
def test_nearly_all_weights_are_prunable(name: str) -> None:
    model, graph, _ = network(name)
    weights = {key for key, value in model.named_parameters() if value.ndim > 1}
    prunable, total = graph.prunable_params(weights)
    assert total == sum(model.get_parameter(key).numel() for key in weights)
    assert prunable >= 0.9 * total
    assert graph.frozen_ops == ()


def test_residual_streams_of_our_resnet_are_groups_of_their_own() -> None:
    _, graph, _ = network("resnet20")
    groups = {group.name: group for group in graph.groups}
    assert {name: len(groups[name].units) for name in ("conv1", "layer2.0.conv2")} == {
        "conv1": 16,
        "layer2.0.conv2": 32,
    }
    stream = groups["layer2.0.conv2"]
    assert stream.frozen is None
    assert "layer2.2.conv2.weight:0" in stream.members
    assert "layer3.0.conv1.weight:1" in stream.members
    assert groups["input"].frozen == "model input"
    assert groups["fc"].frozen == "model output"


def test_analysis_leaves_the_model_as_it_was() -> None:
    model = build_model("resnet20", num_classes=10, image_shape=(3, 32, 32)).train()
    model.layer1[0].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    analyse(model, torch.randn(2, 3, 32, 32))
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_hooks for module in model.modules())


def test_the_same_network_gives_the_same_fingerprint_and_another_does_not() -> None:
    fingerprints = [network(name)[1].fingerprint() for name in ("resnet20", "resnet20", "resnet56")]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_classes_keep_their_order_so_that_saved_masks_stay_valid() -> None:
    assert network("resnet20")[1].fingerprint() == "1df7f53c1910da82"


class LiteralView(nn.Module):
    """A size written as a number keeps the group before it whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.head(x.mean((2, 3)).view(-1, 8))


class LiteralPad(nn.Module):
    """The original option-A shortcut: a literal number of padded channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.second(self.inner(x).relu()) + functional.pad(x, (0, 0, 0, 0, 4, 4))
        return self.head(x.relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("build", "free"), [(LiteralView, {"first"}), (LiteralPad, {"inner", "first", "second"})]
)
def test_literal_sizes_are_found_by_the_trial(
    build: Callable[[], nn.Module], free: set[str]
) -> None:
    torch.manual_seed(0)
    model, example = build().eval(), torch.randn(1, 3, 8, 8)
    graph = analyse(model, example)
    assert {group.name for group in graph.groups if group.frozen is None} <= free
    for seed in range(10):
        assert_masked_equals_pruned(model, graph, random_mask(graph, seed), example)


def test_without_the_trial_a_literal_size_is_missed() -> None:
    graph = analyse(LiteralView(), torch.randn(1, 3, 8, 8), trial=False)
    assert {group.name for group in graph.groups if group.frozen is None} == {"first", "second"}


class Zoo(nn.Module):
    """Concat, chunk, grouped and depthwise convolutions, a gate, reuse, layer scale, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(16, 32, 3, padding=1, groups=16)
        self.gate = nn.Conv2d(32, 32, 1)
        self.twice = nn.Conv2d(16, 16, 1)
        self.scale = nn.Parameter(torch.rand(32, 1, 1))
        self.up = nn.ConvTranspose2d(48, 6, 2, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.prelu = nn.PReLU(6)
        self.head = nn.Linear(6 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.stem(x).relu())
        y = self.depthwise(x) * self.scale
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        first, second = y.chunk(2, dim=1)
        first = self.twice(self.twice(first)) + second
        z = torch.cat([first, y], dim=1)
        z = self.prelu(self.norm(self.up(z)))
        return self.head(functional.adaptive_avg_pool2d(z, 2).flatten(1))


def test_a_zoo_of_layers_is_pruned_right() -> None:
    torch.manual_seed(0)
    model, example = lively(Zoo()), torch.randn(1, 3, 8, 8)
    graph = analyse(model, example)
    assert graph.frozen_ops == ()
    for seed in range(20):
        assert_masked_equals_pruned(model, graph, random_mask(graph, seed), example)


class Unknown(nn.Module):
    """A Bessel function has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 6, 3)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).i0())


def test_an_op_without_a_rule_freezes_what_it_touches_and_is_reported() -> None:
    graph = analyse(Unknown(), torch.randn(1, 3, 8, 8))
    assert {group.name for group in graph.groups if group.frozen is None} == {"first"}
    assert {item.op for item in graph.frozen_ops} == {"i0"}
    assert "no rule for aten.i0" in graph.frozen_ops[0].reason


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


def test_the_memory_layout_does_not_change_the_structure() -> None:
    example = torch.randn(2, 3, 8, 8)
    plain = analyse(Pooled(), example)
    model = Pooled().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch
    last = analyse(model, example.to(memory_format=torch.channels_last))
    assert last.fingerprint() == plain.fingerprint()
    assert int(last.free.sum()) == 8


class Restrided(nn.Module):
    """Reads the channels of two images in another order, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).as_strided_((2, 6), (1, 2)))


def test_another_stride_of_a_real_axis_freezes() -> None:
    with pytest.raises(ModelError, match="nothing to prune"):
        analyse(Restrided(), torch.randn(2, 4))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.second(self.first(left) + self.first(right))


def test_several_and_keyword_inputs() -> None:
    left, right = torch.randn(2, 1, 4)
    positional = analyse(TwoInputs(), (left, right))
    keyword = analyse(TwoInputs(), {"left": left, "right": right})
    assert positional.fingerprint() == keyword.fingerprint()
    assert int(positional.free.sum()) == 8


def test_a_forward_that_fails_is_one_clear_line() -> None:
    with pytest.raises(ModelError, match=r"forward of TwoInputs fails.*\[1, 4\].*right") as caught:
        analyse(TwoInputs(), torch.randn(1, 4))
    assert "\n" not in str(caught.value)


def test_nothing_to_prune_says_why() -> None:
    with pytest.raises(ModelError, match="Linear has nothing to prune"):
        analyse(nn.Linear(4, 2), torch.randn(1, 4))


def test_nan_weights_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"1\.weight holds NaN"):
        analyse(model, torch.randn(1, 4))


def test_a_mask_of_minus_infinity_is_sound_and_a_batch_norm_of_infinity_is_not() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()
    model.register_buffer("causal", torch.tensor([0.0, -torch.inf]))
    assert analyse(model, torch.randn(1, 4)).free.sum() == 8
    model[1].running_var[3] = torch.inf
    with pytest.raises(ModelError, match=r"1\.running_var holds NaN or infinite"):
        analyse(model, torch.randn(1, 4))


@pytest.mark.slow
def test_a_resnet152_is_analysed_within_seconds() -> None:
    model = torchvision.models.resnet152().eval()
    graph = analyse(model, torch.randn(1, 3, 96, 96), trial=False)
    assert int(graph.free.sum()) > 20_000


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_is_no_network_of_code_is_refused() -> None:
    network, example = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 4)
    with pytest.raises(ModelError, match="compiled: prune the network that it was scripted from"):
        analyse(torch.jit.script(network), example)
    with pytest.raises(ModelError, match="is no network: give a"):
        analyse(network.state_dict(), example)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="fails in 0 on a str without a tensor: "):
        analyse(network, "x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="attention='heads': give one of head, width"):
        analyse(network, example, attention="heads")  # type: ignore[arg-type]


def test_scores_may_be_any_array() -> None:
    graph = analyse(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 4))
    scores = torch.arange(graph.num_units, dtype=torch.float32)
    masks = {graph.project(given, Budget(keep_macs=0.5)) for given in (scores, scores.tolist())}
    assert masks == {graph.project(scores.numpy(), Budget(keep_macs=0.5))}

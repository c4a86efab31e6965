"""Models that users really have: it works, or one line says why not and what to do."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils import prune

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ModelError
from prunegraph.core.masks import ChannelMask
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.apply import apply_mask
from prunegraph.testing import assert_masked_equals_pruned


class Net(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.one(x)).relu()
        return self.head((x + self.two(x)).mean((2, 3)))


class Branches(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x if x.sum() > 0 else -x)


class Mutates(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.mul_(0.5).add_(0.1))


class Dictionary(Net):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return OrderedDict(out=y, extra={"pair": (y * 2, None, "text")})


class WithMask(Net):
    def forward(self, x: Tensor, *, mask: Tensor | None = None, scale: float = 1.0) -> Any:
        return super().forward(x if mask is None else x.masked_fill(mask, 0.0)) * scale


def mask_of(graph: StructureGraph, seed: int = 0) -> ChannelMask:
    scores = np.random.default_rng(seed).normal(size=graph.num_units).astype(np.float32)
    return graph.project(scores, Budget(keep_macs=0.5))


@pytest.mark.parametrize("kind", [Branches, Mutates, Dictionary])
def test_odd_forwards(kind: type[Net]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.rand(2, 3, 6, 6)
    before = x.clone()
    graph = analyse(model, x)
    assert torch.equal(x, before)
    assert sorted(len(g.units) for g in graph.groups if g.frozen is None) == [8]
    assert_masked_equals_pruned(model, graph, mask_of(graph), x)


def test_keyword_inputs_and_a_mask() -> None:
    torch.manual_seed(0)
    model = WithMask().eval()
    inputs = {"x": torch.rand(2, 3, 6, 6), "mask": torch.rand(2, 1, 6, 6) > 0.5, "scale": 2.0}
    graph = analyse(model, inputs)
    assert_masked_equals_pruned(model, graph, mask_of(graph), inputs)


def test_training_mode_hooks_and_frozen_parameters_are_kept() -> None:
    torch.manual_seed(0)
    model, calls = Net().train(), []
    model.one.requires_grad_(False)
    model.two.register_forward_hook(lambda *_: calls.append(1))
    state, x = copy.deepcopy(model.state_dict()), torch.rand(2, 3, 6, 6)
    graph = analyse(model, x)
    pruned = apply_mask(model, graph, mask_of(graph))
    assert model.training
    assert pruned.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not pruned.get_parameter("one.weight").requires_grad
    assert pruned.get_parameter("two.weight").requires_grad
    calls.clear()
    pruned(x)
    assert calls == [1]


def test_a_model_pruned_by_us_is_pruned_again() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.rand(2, 3, 6, 6)
    graph = analyse(model, x)
    once = apply_mask(model, graph, mask_of(graph))
    again = analyse(once, x)
    assert again.dense_cost == graph.cost(mask_of(graph))
    assert_masked_equals_pruned(once, again, mask_of(again), x)


def test_a_model_masked_by_torch_says_what_to_do() -> None:
    model, x = Net().eval(), torch.rand(2, 3, 6, 6)
    prune.l1_unstructured(model.one, "weight", 0.5)
    with pytest.raises(ModelError, match=r"one\.weight .*prune\.remove\(module"):
        analyse(model, x)
    prune.remove(model.one, "weight")
    analyse(model, x)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantized tensor.*:UserWarning")
def test_a_quantised_model_says_what_to_do() -> None:
    model = torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), {nn.Linear}
    )
    with pytest.raises(ModelError, match="prune the network before it is quantised"):
        analyse(model, torch.rand(2, 5))


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*reduce_range.*:UserWarning")
def test_a_model_that_is_prepared_for_quantisation_says_what_to_do() -> None:
    model = Net().train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    prepared = torch.ao.quantization.prepare_qat(model)
    with pytest.raises(ModelError, match="prune the network before it is prepared"):
        analyse(prepared, torch.rand(2, 3, 6, 6))


def test_parametrised_weights_that_cannot_be_followed_say_what_to_do() -> None:
    model = Net().eval()
    nn.utils.parametrizations.orthogonal(model.one)
    with pytest.raises(ModelError, match=r"one has parametrised .*remove_parametrizations"):
        analyse(model, torch.rand(2, 3, 6, 6))


@pytest.mark.filterwarnings("ignore:.*flex_attention called without.*:UserWarning")
def test_an_operator_that_hides_its_own_says_what_to_do() -> None:
    class Flexible(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query, key, value = self.mix(x).view(1, 4, 2, 12).transpose(1, 2).chunk(3, -1)
            mixed = flex_attention(query, key, value)
            out: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
            return out

    with pytest.raises(ModelError, match=r"Flexible calls flex_attention, .*scaled_dot_product"):
        analyse(Flexible().eval(), torch.rand(1, 4, 8))


def test_an_assertion_of_the_forward_is_one_line() -> None:
    class Picky(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[-1] == 32, "Input size doesn't match model"
            return super().forward(x)

    with pytest.raises(ModelError, match=r"the forward of Picky fails in .* Input size doesn't"):
        analyse(Picky().eval(), torch.rand(2, 3, 6, 6))


@pytest.mark.parametrize("inside", [lambda x: x, lambda x: (x,), lambda x: {"x": x}])
def test_numpy_arrays_are_no_example_inputs(inside: Callable[[object], object]) -> None:
    example = inside(np.zeros((2, 3, 6, 6), dtype=np.float32))
    message = "Net fails on NumPy arrays: give torch.from_numpy of them"
    with pytest.raises(ModelError, match=f"^{message}$"):
        analyse(Net().eval(), example)  # type: ignore[arg-type]


def test_a_model_is_as_it_was_after_an_error() -> None:
    model = Net().train()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="fails in one on inputs of shape"):
        analyse(model, torch.rand(2, 5, 6, 6))
    assert model.training
    assert not model._forward_hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model(torch.rand(2, 3, 6, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Net().eval().to(dtype), torch.rand(2, 3, 6, 6).to(dtype)
    graph = analyse(model, x)
    pruned = apply_mask(model, graph, mask_of(graph))
    assert pruned(x).dtype == dtype
    assert graph.fingerprint() == analyse(Net().eval(), torch.rand(2, 3, 6, 6)).fingerprint()


def test_inputs_on_another_device_say_so() -> None:
    with pytest.raises(ModelError, match="device"):
        analyse(Net().eval(), torch.rand(2, 3, 6, 6, device="meta"))


class GivenWeights(nn.Module):
    """Hands its weights to a module that has none."""

    class Convolve(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return nn.functional.conv2d(x, weight, padding=1)

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Parameter(torch.randn(8, 3, 3, 3)),
            nn.Parameter(torch.rand(8, 8, 3, 3)),
        )
        self.convolve, self.head = self.Convolve(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolve(self.convolve(x, self.one).relu(), weight=self.two)
        return self.head(x.mean((2, 3)))


class Scripted(Net):
    """Has a part that is compiled by torch.jit."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.middle = torch.jit.script(nn.Tanh())

    def forward(self, x: Tensor) -> Any:
        return self.head(self.two(self.middle(self.one(x))).mean((2, 3)))


@pytest.mark.parametrize("kind", [GivenWeights, Scripted])
def test_modules_whose_inputs_tell_no_width(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.rand(2, 3, 6, 6)
    graph = analyse(model, x)
    assert [len(g.units) for g in graph.groups if g.frozen is None] == [8, 8]
    assert_masked_equals_pruned(model, graph, mask_of(graph), x)

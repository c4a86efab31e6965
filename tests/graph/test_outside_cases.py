"""Reduced cases of an outside test: each can be pruned, or is refused with the true reason."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.errors import ModelError
from prunegraph.graph import StructureGraph, analyse
from prunegraph.testing.structure_check import check_structure

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    """A bilinear layer between linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 12), nn.Linear(6, 10)
        self.both, self.head = nn.Bilinear(12, 10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.both(self.left(x[:, :5]).relu(), self.right(x).relu()).relu())
        return out


def test_both_inputs_of_a_bilinear_layer_and_its_outputs_lose_channels(
    check_all: Callable[[nn.Module, Tensor], StructureGraph],
) -> None:
    torch.manual_seed(0)
    graph = check_all(Pair(), torch.randn(4, 6))
    assert graph.group_widths(graph.dense_mask()) == {"left": 12, "right": 10, "both": 8}


class Parity(nn.Module):
    """Computes something else where a width is odd."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3), nn.Conv2d(width, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if x.shape[1] % 2:
            x = 2 * x
        out: Tensor = self.head(self.second(x).mean((2, 3)))
        return out


@pytest.mark.parametrize("width", range(3, 19))
def test_a_width_whose_parity_decides_stays(width: int) -> None:
    torch.manual_seed(0)
    model = Parity(width).eval()
    graph = analyse(model, IMAGES)
    assert "first" not in graph.group_widths(graph.dense_mask())
    assert check_structure(model, IMAGES, seed=0, num_masks=3).failures == []


class Modulated(nn.Module):
    """StyleGAN2's convolution: a style scales the weight, and the batch becomes groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.style = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(3, 8)
        self.weight, self.head = nn.Parameter(torch.randn(10, 8, 3, 3)), nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        kernels = self.weight * (1 + self.style(x.mean((2, 3)))[:, None, :, None, None])
        x = F.conv2d(self.stem(x).view(1, -1, h, w), kernels.flatten(0, 1), padding=1, groups=b)
        out: Tensor = self.head(x.view(b, -1, h, w))
        return out


class Conditional(nn.Module):
    """CondConv: the input mixes kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.route = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(3, 4)
        self.kernels, self.head = nn.Parameter(torch.randn(4, 10, 8, 3, 3)), nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        mixed = self.route(x.mean((2, 3))).sigmoid() @ self.kernels.flatten(1)
        weight = mixed.view(b * 10, *self.kernels.shape[2:])
        x = F.conv2d(self.stem(x).view(1, -1, h, w), weight, padding=1, groups=b)
        out: Tensor = self.head(x.view(b, -1, h, w))
        return out


class Product(nn.Module):
    """A kernel of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(12, 3, 1)
        self.left, self.right = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(4, 72))

    def forward(self, x: Tensor) -> Tensor:
        kernel = (self.left @ self.right).view(12, 8, 3, 3)
        out: Tensor = self.head(F.conv2d(self.stem(x).relu(), kernel).relu())
        return out


@pytest.mark.parametrize("kind", [Modulated, Conditional, Product])
def test_a_convolution_with_a_computed_weight_stays_and_says_so(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    try:
        graph = analyse(model, IMAGES)
    except ModelError as error:
        assert "convolution with a computed weight" in str(error)
        return
    assert "stem" not in graph.group_widths(graph.dense_mask())
    assert any(item.reason == "convolution with a computed weight" for item in graph.frozen_ops)
    assert check_structure(model, IMAGES, seed=0).failures == []


class Words(nn.Module):
    """PyTorch's word_language_model: an LSTM that returns its state, too."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layers = nn.Embedding(20, 16), nn.LSTM(16, 24, 2)
        self.head = nn.Linear(24, 20)

    def forward(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, state = self.layers(self.words(tokens))
        return self.head(out), state


def test_a_recurrent_layer_whose_state_is_returned_stays_and_the_reason_names_it(
    check_all: Callable[[nn.Module, Tensor], StructureGraph],
) -> None:
    graph = check_all(Words(), torch.randint(20, (7, 2)))
    assert graph.group_widths(graph.dense_mask()) == {"words": 16}
    (reason,) = (group.frozen for group in graph.groups if group.name == "layers")
    assert reason is not None
    assert reason.startswith("model output: the state of layers is returned")
    assert any(item.module == "layers" for item in graph.frozen_ops)


class Literal(nn.Module):
    """Names a width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.adaptive_avg_pool2d(self.first(x), 2).view(-1, 64))
        return out


def test_a_literal_size_is_named_with_its_module_and_line() -> None:
    with pytest.raises(ModelError, match=r"\(1, line \d+ of test_outside_cases.py: .*view\(-1, 64"):
        analyse(nn.Sequential(nn.Identity(), Literal()), IMAGES)


def test_an_exported_module_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    exported = torch.export.export(network, (IMAGES,)).module()
    with pytest.raises(ModelError, match=r"made by torch\.export.*prune the network"):
        analyse(exported, IMAGES)

"""Depthwise convolutions that are trained in float32."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.splits import Dataset
from prunegraph.tasks.image_classification import training_task
from prunegraph.training import kernels
from prunegraph.training.kernels import SoundConvolutions
from prunegraph.training.loop import FinetuneConfig, finetune

SLOW = [
    nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
    nn.Conv2d(8, 16, 5, padding=2, groups=8, bias=False),
    nn.Conv1d(8, 8, 7, padding="same", dilation=2, groups=8),
    nn.Conv3d(8, 8, (1, 3, 3), stride=(1, 2, 2), groups=8, padding_mode="circular", padding=1),
]
QUICK = [
    nn.Conv2d(8, 8, 3, padding=1, groups=8),
    nn.Conv2d(8, 8, 3, stride=2, groups=4),
    nn.Conv2d(8, 8, 7, stride=2),
]


def gradients(layer: nn.Module, images: Tensor, *, autocast: bool = True) -> list[Tensor]:
    """Return the outputs of a layer, and the gradients of its input and weights."""
    inputs = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = layer(inputs)
    assert outputs.dtype == (torch.bfloat16 if autocast else torch.float32)
    outputs.float().square().sum().backward()
    found = [outputs, inputs.grad, *(item.grad for item in layer.parameters())]
    layer.zero_grad()
    return [value.detach().float() for value in found if value is not None]


def images_for(layer: nn.Module) -> Tensor:
    return torch.randn(4, 8, *[9] * (next(layer.parameters()).ndim - 2))


@pytest.mark.parametrize("layer", SLOW, ids=str)
def test_gradients_are_those_of_float32(layer: nn.Module) -> None:
    torch.manual_seed(0)
    images = images_for(layer)
    exact = gradients(layer, images, autocast=False)
    rounded = gradients(layer, images)
    with SoundConvolutions():
        quick = gradients(layer, images)
    for wanted, own, other in zip(exact, quick, rounded, strict=True):
        torch.testing.assert_close(own, wanted, rtol=0.01, atol=0.01 * float(wanted.abs().max()))
        assert float((own - wanted).norm()) <= float((other - wanted).norm())
    assert not torch.equal(quick[1], rounded[1])


@pytest.mark.parametrize("layer", QUICK, ids=str)
def test_other_convolutions_are_computed_as_before(layer: nn.Module) -> None:
    torch.manual_seed(0)
    images = images_for(layer)
    before = gradients(layer, images)
    with SoundConvolutions():
        after = gradients(layer, images)
    assert all(map(torch.equal, before, after))


def test_nothing_changes_without_gradients_or_autocast() -> None:
    layer, images = SLOW[0], torch.randn(4, 8, 9, 9)
    before = layer(images)
    with SoundConvolutions():
        assert torch.equal(layer(images), before)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = layer(images)
        with SoundConvolutions():
            assert torch.equal(layer(images), before)


def test_arguments_may_be_named() -> None:
    images, weight = torch.randn(4, 8, 9, 9), torch.randn(8, 1, 3, 3, requires_grad=True)
    with SoundConvolutions(), torch.autocast("cpu", torch.bfloat16):
        named = F.conv2d(images, weight=weight, groups=8, stride=(2, 2))
        placed = F.conv2d(images, weight, None, 2, 0, 1, 8)
    assert torch.equal(named, placed)


def test_finetunes_do_so(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    whole = kernels.Convolution.in_float32
    monkeypatch.setattr(
        kernels.Convolution, "in_float32", lambda given: seen.append(given) or whole(given)
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), SLOW[0], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    train = digits.train.sample(64, 0)
    task = training_task(net, train)
    finetune(net, task, FinetuneConfig(epochs=1, batch_size=32), seed=0)
    assert len(seen) == 2
    seen.clear()
    finetune(
        net,
        training_task(net, train),
        FinetuneConfig(epochs=1, batch_size=32, autocast=False),
        seed=0,
    )
    assert not seen


def test_inputs_smaller_than_the_kernel_leave_no_weight_without_a_gradient() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(24, 24, 3, stride=2, padding=1, bias=False)
    images = torch.randn(16, 24, 1, 1)
    exact = gradients(layer, images, autocast=False)
    with SoundConvolutions():
        for _ in range(10):
            junk = [torch.full((24 * 24 * 9,), torch.nan) for _ in range(50)]
            del junk  # what memory held is what such weights got
            for own, wanted in zip(gradients(layer, images), exact, strict=True):
                torch.testing.assert_close(own, wanted, rtol=0.01, atol=0.1)

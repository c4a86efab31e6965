"""The smallest networks that show what the random networks found."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegraph.graph import analyse
from prunegraph.models.random_family import Concat
from prunegraph.testing import assert_masked_equals_pruned
from prunegraph.testing.structure_check import random_mask
from support.random_blocks import (
    EagerAttention,
    Residual,
    SelfAttention,
    Shuffle,
    Split,
    Tokens,
)

SEEDS = range(10)

Build = Callable[[], nn.Module]


def around(middle: nn.Module, channels: int = 8, outputs: int | None = None) -> nn.Module:
    """Return a network of three input channels around a middle part."""
    head = nn.Conv2d(outputs or channels, 4, 1)
    return nn.Sequential(nn.Conv2d(3, channels, 1), middle, head)


def around_tokens(middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), middle, nn.Linear(8, 4))


def with_class_token(norm: nn.Module) -> nn.Module:
    body = Residual(nn.Sequential(norm, nn.Linear(8, 6), nn.Linear(6, 8)))
    return Tokens(body, 8, 16, class_token=True, positional=False)


def width_one(channels: int) -> nn.Module:
    """One channel joins the others; a residual and a grouped convolution tie it to theirs."""
    joined = channels + 1
    body = nn.Sequential(nn.Conv2d(joined, 4, 1), nn.Conv2d(4, joined, 1))
    return nn.Sequential(
        Concat(nn.Identity(), nn.Conv2d(channels, 1, 1)),
        Residual(body),
        nn.Conv2d(joined, joined, 1, groups=2),
    )


IMAGE, TOKENS = (2, 3, 4, 4), (2, 5, 3)
WRONG: dict[str, tuple[Build, tuple[int, ...]]] = {
    "halves by slices": (
        lambda: around(Split(nn.Conv2d(9, 9, 1), "slice", nn.Identity()), 18),
        IMAGE,
    ),
    "nn.ChannelShuffle": (lambda: around(nn.ChannelShuffle(2), 12), IMAGE),
    "one head, fused": (
        lambda: around_tokens(EagerAttention(8, 1, fused=True, product=True)),
        TOKENS,
    ),
    "one head, layers apart": (
        lambda: around_tokens(EagerAttention(8, 1, fused=False, product=True)),
        TOKENS,
    ),
    "transposed convolution of one output a group": (
        lambda: around(nn.ConvTranspose2d(8, 2, 2, groups=2), 8, 2),
        IMAGE,
    ),
    "a layer of width one": (lambda: around(width_one(17), 17, 18), IMAGE),
    "instance norm without weights": (
        lambda: around(nn.Sequential(nn.InstanceNorm2d(8), nn.Sigmoid())),
        IMAGE,
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_masked_equals_pruned(name: str) -> None:
    build, shape = WRONG[name]
    for seed in SEEDS:
        torch.manual_seed(seed)
        model, example = build().eval(), torch.randn(shape)
        graph, rng = analyse(model, example), np.random.default_rng(seed)
        for _ in range(3):
            assert_masked_equals_pruned(model, graph, random_mask(graph, rng)[0], example)


FROZEN: dict[str, tuple[Build, tuple[int, ...]]] = {
    "class token, RMS norm": (lambda: around(with_class_token(nn.RMSNorm(8))), IMAGE),
    "shuffle, class token, layer norm": (
        lambda: around(nn.Sequential(Shuffle(2), with_class_token(nn.LayerNorm(8)))),
        IMAGE,
    ),
    "multihead attention of one head, with its weights": (
        lambda: around_tokens(SelfAttention(8, 1, weights=True, bias=True)),
        TOKENS,
    ),
    "layer norm without weights": (
        lambda: around_tokens(nn.LayerNorm(8, elementwise_affine=False)),
        TOKENS,
    ),
    "RMS norm without weights": (
        lambda: around_tokens(nn.RMSNorm(8, elementwise_affine=False)),
        TOKENS,
    ),
    "group norm of one group without weights": (
        lambda: around(nn.GroupNorm(1, 8, affine=False)),
        IMAGE,
    ),
    "group norm of four groups without weights": (
        lambda: around(nn.GroupNorm(4, 8, affine=False)),
        IMAGE,
    ),
    "trilinear interpolation": (
        lambda: nn.Sequential(
            nn.Conv3d(3, 8, 1), nn.Upsample(scale_factor=2, mode="trilinear"), nn.Conv3d(8, 4, 1)
        ),
        (2, 3, 4, 4, 4),
    ),
}


def needless(reasons: set[str]) -> set[str]:
    """Return the reasons that no one can accept: rules that are missing, or failed trials."""
    return {reason for reason in reasons if "one head" not in reason}


@pytest.mark.parametrize("name", FROZEN)
def test_nothing_is_frozen_needlessly(name: str) -> None:
    build, shape = FROZEN[name]
    torch.manual_seed(0)
    model, example = build().eval(), torch.randn(shape)
    graph = analyse(model, example)
    assert needless({item.reason for item in graph.frozen_ops}) == set()
    assert_masked_equals_pruned(
        model, graph, random_mask(graph, np.random.default_rng(0))[0], example
    )


def test_the_helper_itself_finds_needless_reasons() -> None:
    assert needless({"no rule for aten.cumsum", "attention of one head: its width"}) == {
        "no rule for aten.cumsum"
    }


def test_sound_variants_pass() -> None:
    for middle in (Shuffle(2), Split(nn.Conv2d(4, 4, 1), "chunk", nn.Identity())):
        torch.manual_seed(0)
        model, example = around(middle).eval(), torch.randn(IMAGE)
        graph = analyse(model, example)
        assert graph.frozen_ops == ()
        found: Tensor = torch.tensor(
            [
                assert_masked_equals_pruned(model, graph, random_mask(graph, rng)[0], example)
                for rng in map(np.random.default_rng, range(5))
            ]
        )
        assert float(found.max()) < 1e-9

"""Torch-Pruning's side of the benchmark of structures."""

import copy
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

KEPT = [0, 2, 3, 7]


class RMSNorm(nn.Module):
    """A norm over channels as libraries of networks write it out, along the last axis."""

    axis = -1

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        square = x.square().mean(self.axis, keepdim=True)
        weight = self.weight.view(-1, *[1] * (-1 - self.axis))
        return x * torch.rsqrt(square + 1e-6) * weight


class LayerNorm2d(RMSNorm):
    """One over the channels of a map."""

    axis = -3

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(self.axis, keepdim=True))


@pytest.mark.parametrize("norm", [RMSNorm(8), LayerNorm2d(8), nn.LayerNorm(8)])
def test_the_masked_network_takes_means_over_what_survives(
    context: ModuleType, norm: nn.Module
) -> None:
    torch.manual_seed(0)
    is_map = isinstance(norm, LayerNorm2d)
    first, last = (nn.Conv2d(i, o, 1) if is_map else nn.Linear(i, o) for i, o in ((3, 8), (8, 2)))
    dense = nn.Sequential(first, norm, last).double()
    pruned = copy.deepcopy(dense)
    context.write_positions(pruned)
    for tensor in (*pruned[0].parameters(), *pruned[1].parameters()):
        tensor.data = tensor.data[KEPT]
    pruned[2].weight.data = pruned[2].weight.data[:, KEPT]
    if isinstance(norm, nn.LayerNorm):
        pruned[1].normalized_shape = (len(KEPT),)
    masked = context.restore_values(pruned, dense)
    example = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(masked(example), pruned(example))
    assert not torch.allclose(dense(example), pruned(example))

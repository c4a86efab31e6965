import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from prunegraph.graph import analyse
from prunegraph.graph.masked_norm import MaskedNorm
from prunegraph.testing import assert_masked_equals_pruned

KEPT = torch.tensor([True, False, True, True, False, True])


def with_random_weights(norm: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return norm


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_kept_positions_are_normalised_alone(kind: type[nn.Module]) -> None:
    norm, x = with_random_weights(kind(6)), torch.randn(4, 3, 6)
    out = MaskedNorm(norm, {0: KEPT})(x)
    small = kind(4)
    small.load_state_dict({name: value[KEPT] for name, value in norm.state_dict().items()})
    torch.testing.assert_close(out[..., KEPT], small(x[..., KEPT]))
    assert not out[..., ~KEPT].any()
    assert (out - norm(x))[..., KEPT].abs().max() > 0.05
    assert MaskedNorm(norm, {0: KEPT})(x.transpose(0, 1)).is_contiguous()  # as the norm's own


def test_a_norm_over_several_axes() -> None:
    norm, x = with_random_weights(nn.LayerNorm((2, 6))), torch.randn(4, 2, 6)
    out = MaskedNorm(norm, {1: KEPT})(x)
    small = nn.LayerNorm((2, 4))
    small.load_state_dict({name: value[:, KEPT] for name, value in norm.state_dict().items()})
    torch.testing.assert_close(out[..., KEPT], small(x[..., KEPT]))


def test_a_subclass_runs_its_own_forward() -> None:
    norm, x = with_random_weights(LayerNorm2d(6)), torch.randn(2, 6, 3, 3)
    out = MaskedNorm(norm, {0: KEPT})(x)
    small = LayerNorm2d(4)
    small.load_state_dict({name: value[KEPT] for name, value in norm.state_dict().items()})
    torch.testing.assert_close(out[:, KEPT], small(x[:, KEPT]))
    assert not out[:, ~KEPT].any()


class Shared(nn.Module):
    """A block that is used twice, by two paths, and reads its norm's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 12), nn.Linear(12, 2)
        block = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12), nn.ReLU())
        self.blocks = nn.ModuleList([block, block])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x).to(self.blocks[0][0].weight.dtype)
        out: Tensor = self.last(x)
        return out


def test_a_norm_that_has_two_paths_and_whose_weight_is_read() -> None:
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(4, 3)
    graph = analyse(model, x)
    keep = graph.frozen | (np.arange(graph.num_units) % 3 > 0)
    assert not keep.all()
    assert_masked_equals_pruned(model, graph, graph.mask(keep), x)

import pytest
import torch
from torch import nn

from prunegraph.artefacts.semi_structured import to_semi_structured
from prunegraph.core.budget import Budget
from prunegraph.core.errors import MaskError, ModelError
from prunegraph.core.weight_mask import WeightMask
from prunegraph.methods.obs.magnitude import magnitude_mask


def pruned(pattern: str) -> tuple[nn.Module, WeightMask]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
    mask = magnitude_mask(model, Budget(sparsity=0.5, pattern=pattern))
    return mask.apply(model), mask


def test_other_patterns_are_refused() -> None:
    with pytest.raises(MaskError, match="sparse tensor cores need 2:4"):
        to_semi_structured(*pruned("4:8"))


def test_a_dense_network_is_refused() -> None:
    model, mask = pruned("2:4")
    nn.init.ones_(model[0].weight)  # type: ignore[index]
    with pytest.raises(MaskError, match="not zero where the mask removes"):
        to_semi_structured(model, mask)


def test_a_cpu_is_refused() -> None:
    with pytest.raises(ModelError, match="the network is on cpu"):
        to_semi_structured(*pruned("2:4"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_outputs_are_those_of_the_masked_network() -> None:
    model, mask = pruned("2:4")
    model = model.half().cuda()
    inputs = torch.randn(64, 128, dtype=torch.float16, device="cuda")
    sparse = to_semi_structured(model, mask)
    torch.testing.assert_close(sparse(inputs), model(inputs), rtol=1e-2, atol=1e-2)

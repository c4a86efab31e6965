import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from prunegraph.core.errors import MaskError, ModelError
from prunegraph.core.pattern import Pattern
from prunegraph.core.weight_mask import WeightMask
from prunegraph.layerwise.weights import (
    PrunableWeight,
    check_pattern,
    few_reached,
    prunable_weights,
)


class Conv1D(nn.Module):
    """The linear layer of GPT-2, as transformers writes it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Text(nn.Module):
    """An embedding whose weight is the classifier's too, and a block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.up = Conv1D(16, 8)
        self.down = nn.Linear(16, 8)
        self.again = nn.Linear(16, 8)
        self.again.weight = self.down.weight
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight


def test_weights_of_linear_layers_and_convolutions_may_go(mixed: nn.Module) -> None:
    found = prunable_weights(mixed)
    layers = ["stem", "mix", "grouped", "up", "head"]  # ``tied`` is ``mix``; depthwise ones stay
    assert list(found) == [f"{layer}.weight" for layer in layers]
    assert [weight.num_inputs for weight in found.values()] == [27, 16, 36, 48, 10]
    assert sum(weight.size for weight in found.values()) == sum(
        mixed.get_parameter(name).numel() for name in found
    )
    assert list(prunable_weights(nn.Linear(3, 2))) == ["weight"]


def test_embeddings_norms_and_tied_weights_stay_or_come_once() -> None:
    found = prunable_weights(Text())
    assert found == {
        "up.weight": PrunableWeight("up", (8, 16), inputs_first=True),
        "down.weight": PrunableWeight("down", (8, 16)),
    }
    assert [weight.num_inputs for weight in found.values()] == [8, 16]


def test_only_layers_that_could_be_pruned_and_are_not_are_told(mixed: nn.Module) -> None:
    assert few_reached(mixed) is None
    assert few_reached(Text()) is None  # embeddings stay in every paper
    attention = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    told = "linear layers and convolutions alone, 35.6 % of the network: 0.in_proj_weight stays"
    assert told in str(few_reached(attention))
    gru = nn.Sequential(nn.GRU(4, 4), nn.Linear(4, 4))
    assert "weight_ih_l0 and 1 other parameter stay" in str(few_reached(gru))
    assert few_reached(nn.Sequential(nn.Linear(99, 99), nn.GRU(4, 4))) is None  # too small


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(6, 4),
        nn.Conv1d(4, 6, 3),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv3d(2, 3, 2),
        nn.ConvTranspose1d(4, 6, 3),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        Conv1D(6, 4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_row_of_the_matrix_is_what_one_output_reads(module: nn.Module) -> None:
    view = prunable_weights(module)["weight"]
    weight = module.get_parameter("weight")
    matrix = view.matrix(weight)
    assert torch.equal(view.tensor(matrix), weight)
    assert matrix.shape == (weight.numel() // view.num_inputs, view.num_inputs)
    axes = weight.ndim - 2
    inputs = view.num_inputs if axes == 0 else int(module.in_channels)  # type: ignore[arg-type]
    example = torch.randn(2, inputs, *[5] * axes)
    for row in range(len(matrix)):
        changed = matrix.detach().clone()
        changed[row] += 1.0
        before = module(example)
        with torch.no_grad():
            kept = weight.clone()
            weight.copy_(view.tensor(changed))
            moved = (module(example) - before).abs()
            weight.copy_(kept)
        outputs = moved.movedim(1, 0).flatten(1).sum(1)
        assert outputs[row] > 0.0
        assert torch.equal(outputs.nonzero().flatten(), torch.tensor([row]))


def test_a_weight_that_is_computed_is_refused() -> None:
    asked = parametrizations.weight_norm(nn.Linear(4, 4))
    masked = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    for layer in (asked, masked):
        with pytest.raises(ModelError, match=r"^1\.weight is computed .*remove_parametrizations\("):
            prunable_weights(nn.Sequential(nn.Linear(4, 4), layer))


def test_a_network_without_such_weights_is_refused() -> None:
    with pytest.raises(ModelError, match="Sequential has no linear layer or convolution"):
        prunable_weights(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)))


FOLLOWING = {
    "unstructured": [[1, 0, 0, 0], [0, 0, 0, 0]],
    "2:4": [[1, 0, 0, 1], [0, 1, 1, 0]],
    "columns": [[1, 1, 0, 1], [1, 1, 0, 1]],
}


@pytest.mark.parametrize("pattern", FOLLOWING)
@pytest.mark.parametrize("inputs_first", [False, True])
def test_zeros_must_lie_where_the_pattern_says(pattern: str, inputs_first: bool) -> None:
    layer = Conv1D(2, 4) if inputs_first else nn.Linear(4, 2)
    for other, rows in FOLLOWING.items():
        keep = torch.tensor(rows, dtype=torch.bool)
        mask = WeightMask({"weight": keep.T if inputs_first else keep}, Pattern.parse(pattern))
        if pattern in ("unstructured", other):
            check_pattern(mask, layer)
            assert mask.size == 8
        else:
            with pytest.raises(MaskError, match=f"weight do not follow the pattern {pattern}"):
                check_pattern(mask, layer)


def test_groups_must_divide_the_inputs_and_names_be_weights() -> None:
    mask = WeightMask({"weight": torch.ones(2, 6, dtype=torch.bool)}, Pattern.parse("2:4"))
    with pytest.raises(MaskError, match="weight do not follow the pattern 2:4"):
        check_pattern(mask, nn.Linear(6, 2))
    with pytest.raises(MaskError, match="bias is no weight of a linear layer"):
        check_pattern(WeightMask({"bias": torch.ones(2, dtype=torch.bool)}), nn.Linear(6, 2))

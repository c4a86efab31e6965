import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegraph.graph import analyse
from prunegraph.graph.slim_attention import SlimMultiheadAttention, is_dense_attention
from prunegraph.graph.surgery import apply_mask, zero_mask


def pair(**options: bool) -> tuple[nn.MultiheadAttention, SlimMultiheadAttention]:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(12, 3, **options).eval()
    return dense, SlimMultiheadAttention.from_sliced(copy.deepcopy(dense), 3)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_equals_the_dense_module(batch_first: bool, need_weights: bool, average: bool) -> None:
    dense, slim = pair(batch_first=batch_first, add_bias_kv=True, add_zero_attn=True)
    q, kv = torch.randn(4, 4, 12), torch.randn(4, 4, 12)
    for query, key in ((q, q), (q, kv)):
        expected = dense(query, key, key, need_weights=need_weights, average_attn_weights=average)
        found = slim(query, key, key, need_weights=need_weights, average_attn_weights=average)
        torch.testing.assert_close(found[0], expected[0])
        if need_weights:
            torch.testing.assert_close(found[1], expected[1])
        else:
            assert found[1] is None


@pytest.mark.parametrize("kind", ["bool", "float", "heads", "padding", "both"])
def test_masks(kind: str) -> None:
    dense, slim = pair(batch_first=True)
    x = torch.randn(2, 5, 12)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    options: dict[str, Tensor] = {
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": torch.randn(5, 5)},
        "heads": {"attn_mask": torch.randn(6, 5, 5)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
    }[kind]
    torch.testing.assert_close(slim(x, x, x, **options)[0], dense(x, x, x, **options)[0])


def test_one_sequence_alone_and_the_state_dict() -> None:
    dense, slim = pair()
    x = torch.randn(5, 12)
    found, expected = slim(x, x, x), dense(x, x, x)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    assert list(slim.state_dict()) == list(dense.state_dict())


def test_it_is_an_attention_to_code_that_asks() -> None:
    _, slim = pair()
    assert isinstance(slim, nn.MultiheadAttention)
    assert not is_dense_attention(slim)
    assert (slim.embed_dim, slim.head_dim, slim.num_heads) == (12, 4, 3)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    slim = SlimMultiheadAttention.from_sliced(nn.MultiheadAttention(12, 3, dropout=0.5), 3)
    x = torch.randn(5, 2, 12)
    assert not torch.equal(slim(x, x, x)[0], slim(x, x, x)[0])
    slim.eval()
    assert torch.equal(slim(x, x, x)[0], slim(x, x, x)[0])


def test_hooks_and_what_else_a_module_holds_come_along() -> None:
    dense = nn.MultiheadAttention(12, 3)
    dense.note = "of the user's own"  # type: ignore[assignment]  # attributes may be anything
    dense.register_forward_hook(lambda _module, _inputs, out: (2 * out[0], out[1]))
    x = torch.randn(5, 2, 12)
    slim = SlimMultiheadAttention.from_sliced(copy.deepcopy(dense), 3)
    torch.testing.assert_close(slim(x, x, x)[0], dense(x, x, x)[0])
    assert slim.note == "of the user's own"
    assert (slim.embed_dim, slim.head_dim) == (12, 4)


class Noisy(nn.MultiheadAttention):
    """A forward of its own, which a slim attention in its place would lose."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = super().forward(x, x, x)[0]
        return out + torch.randn_like(out) * self.training


def test_a_class_with_a_forward_of_its_own_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), Noisy(12, 3), nn.Linear(12, 8), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 2, 5)
    graph = analyse(model, x)
    keep = np.ones(graph.num_units, dtype=bool)
    for group in graph.groups:
        keep[group.units[1:]] = group.frozen is not None
    mask = graph.mask(keep)
    pruned = apply_mask(model, graph, mask)
    assert type(pruned[1]) is Noisy
    assert pruned[2].weight.shape[0] == 1
    torch.testing.assert_close(pruned(x), zero_mask(model, graph, mask)(x))

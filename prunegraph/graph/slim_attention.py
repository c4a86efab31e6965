"""What ``nn.MultiheadAttention`` becomes when it is pruned: any number of heads, any widths."""

import math
from typing import Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SlimMultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention whose heads need not fill the embedding (Vaswani et al. 2017, 3.2.2).

    Its forward takes the arguments of ``nn.MultiheadAttention``'s and its state dict has the same
    names, but the widths of queries and keys, of values and of the embedding are those of its
    parameters, and the scores keep the scale of the dense module. ``torch.nn``'s own module cannot
    hold such widths; it is the base class so that code that asks for an attention by its class
    finds one. ``from_sliced`` makes it: parameters and options are those of a dense module.

    Args:
        num_heads: H.
        scale: what the scores are multiplied with.
    """

    def __init__(self, *, num_heads: int, scale: float) -> None:
        nn.Module.__init__(self)
        self._qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer off its fused path
        self.num_heads = num_heads
        self.scale = scale

    @classmethod
    def from_sliced(cls, module: nn.MultiheadAttention, num_heads: int) -> Self:
        """Take over the sliced parameters of a module, of which ``num_heads`` heads are left.

        Its hooks and what else it holds come along; the module itself is of no use afterwards.
        """
        slim = cls(num_heads=num_heads, scale=1.0 / math.sqrt(module.head_dim))
        own = {"num_heads", "scale", "_qkv_same_embed_dim", "embed_dim", "head_dim", "kdim", "vdim"}
        vars(slim).update({name: value for name, value in vars(module).items() if name not in own})
        return slim

    @property
    def embed_dim(self) -> int:
        """Width E of the outputs."""
        return self.out_proj.out_features

    @property
    def head_dim(self) -> int:
        """Width of a head's values."""
        return int(self.out_proj.in_features // self.num_heads)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output ``[B, N, E]`` and the weights ``[B, N, M]``, or None.

        Args:
            query: ``[B, N, E]`` (``[N, B, E]`` without ``batch_first``; ``[N, E]`` unbatched).
            key: the same with M positions.
            value: the same with M positions.
            key_padding_mask: ``[B, M]``, True or -inf = do not attend.
            need_weights: return the attention weights.
            attn_mask: ``[N, M]`` or ``[B * H, N, M]``, True or -inf = do not attend.
            average_attn_weights: mean of the weights over the heads, else ``[B, H, N, M]``.
            is_causal: only a hint that ``attn_mask`` is causal; the mask itself is used.
        """
        del is_causal
        q, k, v = _project(
            query,
            key,
            value,
            packed=self.in_proj_weight,
            separate=(self.q_proj_weight, self.k_proj_weight, self.v_proj_weight),
            bias=self.in_proj_bias,
            value_width=self.out_proj.weight.shape[1],
            batch_first=self.batch_first,
        )
        bias_k, bias_v = self.bias_k, self.bias_v
        if bias_k is not None and bias_v is not None:
            k = torch.cat([k, bias_k.expand(k.shape[0], 1, -1)], 1)
            v = torch.cat([v, bias_v.expand(v.shape[0], 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        heads, weights = _attend(
            q,
            k,
            v,
            query,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            num_heads=self.num_heads,
            scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
            batch_first=self.batch_first,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
        )
        return self.out_proj(heads), weights


def is_dense_attention(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Return whether a module is an attention of torch's that has not been made slim.

    None is of a unit with a forward of its own: a slim one in its place would lose that.
    """
    forward = getattr(type(module), "forward", None)  # a scripted class has none
    return forward is nn.MultiheadAttention.forward


# Functions that depend on the dimensions of their inputs: `torch.fx` takes each as one step, as it
# takes `nn.MultiheadAttention`, and `torch.jit.script` compiles them.


@torch.fx.wrap
def _project(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    packed: Tensor | None,
    separate: tuple[Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor | None,
    value_width: int,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values ``[B, N, H * width]``."""
    inputs = [query] if query is key and key is value else [query, key, value]
    if query.dim() == 2:
        inputs = [x.unsqueeze(0) for x in inputs]
    elif not batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    if packed is not None:
        width = (packed.shape[0] - value_width) // 2
        widths = [width, width, value_width]
        if len(inputs) == 1:
            q, k, v = F.linear(inputs[0], packed, bias).split(widths, -1)
            return q, k, v
        weights = list(packed.split(widths))
    else:
        q_weight, k_weight, v_weight = separate
        assert q_weight is not None and k_weight is not None and v_weight is not None
        weights = [q_weight, k_weight, v_weight]
    sources = inputs * 3 if len(inputs) == 1 else inputs
    q = F.linear(sources[0], weights[0])
    k = F.linear(sources[1], weights[1])
    v = F.linear(sources[2], weights[2])
    if bias is not None:
        q_bias, k_bias, v_bias = bias.split([q.shape[-1], k.shape[-1], v.shape[-1]])
        q, k, v = q + q_bias, k + k_bias, v + v_bias
    return q, k, v


@torch.fx.wrap
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query: Tensor,
    *,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    num_heads: int,
    scale: float,
    dropout: float,
    batch_first: bool,
    need_weights: bool,
    average_attn_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the heads side by side, laid out as the query was given, and the weights."""
    mask = _mask(q, k.shape[1], key_padding_mask, attn_mask, num_heads)
    q = q.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    k = k.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    v = v.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    weights: Tensor | None = None
    if need_weights:
        scores = q @ k.transpose(-2, -1) * scale
        attention = (scores if mask is None else scores + mask).softmax(-1)
        heads = F.dropout(attention, dropout) @ v
        weights = attention.mean(1) if average_attn_weights else attention
    else:
        heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    heads = heads.transpose(1, 2).flatten(2)
    if query.dim() == 2:
        return heads.squeeze(0), None if weights is None else weights.squeeze(0)
    return heads if batch_first else heads.transpose(0, 1), weights


def _mask(
    q: Tensor,
    num_positions: int,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    num_heads: int,
) -> Tensor | None:
    """Return what is added to the scores, to be broadcast to ``[B, H, N, M]``, or None."""
    total: Tensor | None = None
    if attn_mask is not None:
        total = _additive(attn_mask, q)
        if total.dim() == 3:
            total = total.unflatten(0, (-1, num_heads))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q).view(-1, 1, 1, key_padding_mask.shape[-1])
        total = padding if total is None else total + padding
    if total is not None and total.shape[-1] < num_positions:
        total = F.pad(total, (0, num_positions - total.shape[-1]))
    return total


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(
            mask, -math.inf
        )
    return mask.to(like.dtype)

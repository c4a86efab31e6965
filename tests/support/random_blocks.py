"""Blocks of the random networks: each pattern as people write it, for any number of dimensions.

Maps are ``[B, C, *S]`` with one to three spatial axes, tokens are ``[B, T, C]``. A block that is
not said to change the shape keeps it. Sizes in the forwards come from the tensors, except in
``EagerAttention``, which reads its attributes as most attention modules do.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _by_rank(name: str) -> dict[int, Callable[..., nn.Module]]:
    """Return torch's layers of a name, by their number of spatial axes."""
    return {rank: getattr(nn, f"{name}{rank}d") for rank in (1, 2, 3)}


CONVOLUTIONS = _by_rank("Conv")
TRANSPOSED = _by_rank("ConvTranspose")
BATCH_NORMS = _by_rank("BatchNorm")
INSTANCE_NORMS = _by_rank("InstanceNorm")
AVERAGE_POOLS = _by_rank("AvgPool")
MAX_POOLS = _by_rank("MaxPool")
ADAPTIVE_POOLS = _by_rank("AdaptiveAvgPool")


class ChannelsLast(nn.Module):
    """Applies a module that works on the last axis to the channels of a map."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Return a map ``[B, C', *S]``."""
        axes = range(2, x.dim())
        moved: Tensor = self.inner(x.permute(0, *axes, 1))  # [B, *S, C]
        return moved.permute(0, x.dim() - 1, *range(1, x.dim() - 1))


class EagerRMSNorm(nn.Module):
    """RMS norm over the last axis, written out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class EagerLayerNorm(nn.Module):
    """Layer norm over the channels of a map, written out (ConvNeXt's)."""

    def __init__(self, rank: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, *[1] * rank))
        self.bias = nn.Parameter(torch.zeros(channels, *[1] * rank))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight * ((x - mean) / torch.sqrt(variance + 1e-6)) + self.bias


class Residual(nn.Module):
    """``shortcut(x) + scale * body(x)``.

    Args:
        body: what is added to the shortcut.
        shortcut: maps ``x`` to the body's shape.
        scale_shape: shape of a layer scale, broadcast with the body's output; None = none.
    """

    def __init__(
        self,
        body: nn.Module,
        shortcut: nn.Module | None = None,
        scale_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.scale = None if scale_shape is None else nn.Parameter(torch.ones(*scale_shape))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum, of the body's shape."""
        out: Tensor = self.body(x)
        if self.scale is not None:
            out = out * self.scale
        out += self.shortcut(x)
        return out


def halves(x: Tensor, how: str, axis: int = 1) -> Sequence[Tensor]:
    """Return the two halves of an axis of even size; ``how`` is one of ``HALVING``."""
    half = x.shape[axis] // 2
    match how:
        case "chunk":
            parts: Sequence[Tensor] = x.chunk(2, dim=axis)
        case "split":
            parts = x.split(half, dim=axis)
        case "slice":
            parts = x.narrow(axis, 0, half), x.narrow(axis, half, half)
        case _:
            parts = x.unflatten(axis, (2, half)).unbind(axis % x.dim())
    return parts


HALVING = ("chunk", "split", "slice", "unflatten")


class Split(nn.Module):
    """One half of the channels passes, the other goes through ``body``; then both are joined.

    Args:
        body: takes and returns half of the channels.
        how: way of splitting, one of ``HALVING``.
        mix: what follows, as a channel shuffle.
    """

    def __init__(self, body: nn.Module, how: str, mix: nn.Module) -> None:
        super().__init__()
        self.body, self.how, self.mix = body, how, mix

    def extra_repr(self) -> str:
        """Say how the channels are split."""
        return f"how={self.how!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        kept, changed = halves(x, self.how)
        out: Tensor = self.mix(torch.cat([kept, self.body(changed)], dim=1))
        return out


class Shuffle(nn.Module):
    """Channel shuffle by view and transpose."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        parts = x.view(x.shape[0], self.groups, x.shape[1] // self.groups, *x.shape[2:])
        return parts.transpose(1, 2).reshape(x.shape)


class SqueezeExcite(nn.Module):
    """Channels weighted by a gate that sees their means.

    Args:
        rank: number of spatial axes.
        channels: C.
        hidden: width of the gate.
        linear: linear layers on ``[B, C]`` and a view, instead of 1x1 convolutions.
    """

    def __init__(self, rank: int, channels: int, hidden: int, *, linear: bool) -> None:
        super().__init__()
        sizes = ((channels, hidden), (hidden, channels))
        make = nn.Linear if linear else lambda i, o: CONVOLUTIONS[rank](i, o, 1)
        self.reduce, self.expand = (make(*pair) for pair in sizes)
        self.linear = linear

    def extra_repr(self) -> str:
        """Say which layers make the gate."""
        return f"linear={self.linear}"

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        pooled = x.mean(tuple(range(2, x.dim())), keepdim=True)
        if self.linear:
            pooled = pooled.view(x.shape[0], x.shape[1])
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(pooled))))
        if self.linear:
            gate = gate.view(x.shape[0], x.shape[1], *[1] * (x.dim() - 2))
        return x * gate


class GLU(nn.Module):
    """Half of the channels gated by the other half; halves the width.

    Args:
        how: ``"glu"`` (``F.glu``) or one of ``HALVING``.
        axis: the axis of the channels.
    """

    def __init__(self, how: str, axis: int) -> None:
        super().__init__()
        self.how, self.axis = how, axis

    def extra_repr(self) -> str:
        """Say how the channels are split."""
        return f"how={self.how!r}, axis={self.axis}"

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor with half as many channels."""
        if self.how == "glu":
            return F.glu(x, dim=self.axis)
        value, gate = halves(x, self.how, self.axis)
        return value * torch.sigmoid(gate)


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        """Return what ``down`` gives."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Shared(nn.Module):
    """One module called twice: on its own output, or on the map and its mirror image."""

    def __init__(self, body: nn.Module, *, chained: bool) -> None:
        super().__init__()
        self.body, self.chained = body, chained

    def extra_repr(self) -> str:
        """Say how the module is called."""
        return f"chained={self.chained}"

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        first: Tensor = self.body(x)
        second: Tensor = self.body(first if self.chained else x.flip(-1))
        return second if self.chained else first + second


class Upsample(nn.Module):
    """Doubles the size of a map by interpolation."""

    def __init__(self, rank: int, *, smooth: bool) -> None:
        super().__init__()
        self.mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[rank] if smooth else "nearest"

    def forward(self, x: Tensor) -> Tensor:
        """Return a map ``[B, C, *(2 S)]``."""
        corners = None if self.mode == "nearest" else False
        return F.interpolate(x, scale_factor=2, mode=self.mode, align_corners=corners)


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` of tokens over themselves."""

    def __init__(self, channels: int, heads: int, *, weights: bool, bias: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, bias=bias, batch_first=True)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        out: Tensor = self.attention(x, x, x, need_weights=self.weights)[0]
        return out


class EagerAttention(nn.Module):
    """Multi-head self-attention written out, its sizes read from attributes.

    Args:
        channels: C.
        heads: number of heads.
        fused: one linear layer makes queries, keys and values.
        product: write the softmax out instead of ``F.scaled_dot_product_attention``.
    """

    def __init__(self, channels: int, heads: int, *, fused: bool, product: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, channels // heads
        self.fused, self.product = fused, product
        if fused:
            self.qkv = nn.Linear(channels, 3 * channels)
        else:
            self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))
        self.out = nn.Linear(channels, channels)

    def extra_repr(self) -> str:
        """Say how it is written."""
        return f"num_heads={self.num_heads}, fused={self.fused}, product={self.product}"

    def _heads(self, x: Tensor) -> Sequence[Tensor]:
        """Return queries, keys and values ``[B, H, T, D]``."""
        batch, tokens, _ = x.shape
        if self.fused:
            qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
            return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[no-any-return]  # of Tensors
        shape = (batch, tokens, self.num_heads, self.head_dim)
        layers = (self.query, self.key, self.value)
        return [layer(x).view(shape).transpose(1, 2) for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        query, key, value = self._heads(x)
        if self.product:
            scores = query @ key.transpose(-2, -1) * self.head_dim**-0.5  # [B, H, T, T]
            mixed = scores.softmax(-1) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)
        joined = mixed.transpose(1, 2).reshape(*x.shape[:2], self.num_heads * self.head_dim)
        out: Tensor = self.out(joined)
        return out


class Tokens(nn.Module):
    """Runs a body on the positions of a map as tokens.

    Args:
        body: takes and returns tokens.
        channels: C.
        num_positions: product of the map's spatial sizes.
        class_token: a token is put in front of them, whose result is added to all.
        positional: each token has an embedding of its own.
    """

    def __init__(
        self,
        body: nn.Module,
        channels: int,
        num_positions: int,
        *,
        class_token: bool,
        positional: bool,
    ) -> None:
        super().__init__()
        self.body = body
        self.token = nn.Parameter(torch.randn(1, 1, channels)) if class_token else None
        total = num_positions + class_token
        self.position = nn.Parameter(torch.randn(1, total, channels)) if positional else None

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        tokens = x.flatten(2).transpose(1, 2)  # [B, T, C]
        if self.token is not None:
            tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], dim=1)
        if self.position is not None:
            tokens = tokens + self.position
        out: Tensor = self.body(tokens)
        if self.token is not None:
            out = out[:, 1:] + out[:, :1]
        return out.transpose(1, 2).reshape(x.shape)


class GlobalMean(nn.Module):
    """The mean of every channel: ``[B, C, *S]`` to ``[B, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, C]``."""
        return x.mean(tuple(range(2, x.dim())))


class ViewFlat(nn.Module):
    """Flattens with ``view``: ``[B, C, *S]`` to ``[B, C * positions]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, C * positions]``."""
        return x.contiguous().view(x.shape[0], -1)

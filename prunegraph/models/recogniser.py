"""A small speech recogniser that CTC trains: convolutions, and attention as of a transformer."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.seeding import seeded

PROXY_SIZES: Mapping[str, int] = {"width": 48, "convolutions": 5, "stride": 2, "attentions": 0}
"""For the embedded proxy, whose frames are lines of pixels: 0.2 M parameters."""

SPEECH_SIZES: Mapping[str, int] = {"width": 112, "convolutions": 6, "stride": 4, "attentions": 2}
"""For recordings, whose frames are 10 ms: 0.7 M parameters."""

HEADS, KERNEL = 4, 5
"""Of attention; frames that a convolution sees."""


class Attention(nn.Module):
    """Self-attention whose queries, keys and values are linear layers, so that they can be pruned.

    Args:
        width: of a frame.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, heard: Tensor) -> Tensor:
        """Return ``[b, t, C]`` from frames ``[b, t, C]`` and which are heard ``[b, t]`` bool."""
        parts = (layer(x) for layer in (self.query, self.key, self.value))
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=heard[:, None, None])
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))  # [b, t, C]
        return out


class AttentionBlock(nn.Module):
    """Attention and a feed-forward layer, each added to its input after a norm.

    Args:
        width: of a frame.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, heard: Tensor) -> Tensor:
        """Return ``[b, t, C]`` from frames ``[b, t, C]`` and which are heard ``[b, t]`` bool."""
        x = x + self.attention(self.attention_norm(x), heard)
        out: Tensor = x + self.down(F.silu(self.up(self.norm(x))))
        return out


class Recogniser(nn.Module):
    """Tells tokens from features of frames, for CTC: residual convolutions, then attention.

    Args:
        features: numbers a frame.
        tokens: outputs, the blank included.
        width: of a frame within.
        convolutions: how many, the first ones without a residual.
        stride: frames that become one: 1, 2 or 4.
        attentions: blocks of attention.

    Attributes:
        sizes: the arguments.
    """

    def __init__(
        self,
        *,
        features: int,
        tokens: int,
        width: int,
        convolutions: int,
        stride: int,
        attentions: int,
    ) -> None:
        super().__init__()
        self.sizes = {
            "features": features,
            "tokens": tokens,
            "width": width,
            "convolutions": convolutions,
            "stride": stride,
            "attentions": attentions,
        }
        strides = [max(stride // 2, 1), min(stride, 2), *[1] * convolutions][:convolutions]
        self._strides = strides
        inputs = [features, *[width] * convolutions]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(size, width, KERNEL, stride=each, padding=KERNEL // 2)
            for size, each in zip(inputs, strides, strict=False)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in strides)
        self.blocks = nn.ModuleList(AttentionBlock(width) for _ in range(attentions))
        self.head = nn.Linear(width, tokens)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``[b, t', tokens]`` and how many frames of each utterance they are of.

        Args:
            features: ``[b, t, F]``; what lies behind the end does not count.
            lengths: ``[b]`` frames of each.
        """
        x, heard = features, _heard(features, lengths)  # [b, t, F]
        layers = zip(self.convolutions, self.norms, self._strides, strict=True)
        for layer, norm, stride in layers:
            y = layer((x * heard[..., None]).transpose(1, 2)).transpose(1, 2)
            lengths = (lengths - 1) // stride + 1
            heard = _heard(y, lengths)
            y = F.silu(norm(y))  # [b, t', C]
            x = x + y if x.shape == y.shape else y
        if self.blocks:
            x = x + sinusoids(x.shape[1], x.shape[2]).to(x)
        for block in self.blocks:
            x = block(x, heard)
        return self.head(x), lengths


def _heard(x: Tensor, lengths: Tensor) -> Tensor:
    """Return which frames are not behind the end ``[b, t]``."""
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


def sinusoids(length: int, width: int) -> Tensor:
    """Return the positions ``[t, width]`` of Vaswani et al. 2017, section 3.5."""
    rates = torch.arange(0, width, 2) * (-math.log(1e4) / width)
    angles = torch.arange(length)[:, None] * rates.exp()
    return torch.cat([angles.sin(), angles.cos()], 1)


def build_recogniser(*, seed: int = 0, **sizes: int) -> Recogniser:
    """Return a recogniser in eval mode with fresh weights, fixed by a seed.

    Args:
        seed: of the weights.
        sizes: the arguments of ``Recogniser``.
    """
    with seeded(seed):
        return Recogniser(**sizes).eval()

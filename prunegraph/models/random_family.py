"""Random small classifiers of ten families, for policies that learn on many networks.

``random_FAMILY_SEED`` names one: a stem, 2 to 12 blocks in up to three stages, a linear head. The
name fixes depth and widths, which vary from block to block so that no two layers matter alike.
"""

import random
import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (8, 12, 16)
"""Channels of the first stage."""

TOKEN_WIDTHS = (24, 32, 48)
"""Channels of tokens: multiples of all numbers of heads."""

MOST_BLOCKS = 12
TRUNK_LIMIT = 64
"""Channels of the trunk at the most."""

MIXTURE = ("plain", "basic", "bottleneck", "inverted", "squeeze", "concat")


def _unit(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Module:
    """Return a convolution, its batch norm and a ReLU."""
    return nn.Sequential(*_normed(inputs, outputs, kernel, stride, groups), nn.ReLU())


def _normed(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    return convolution, nn.BatchNorm2d(outputs)


class Residual(nn.Module):
    """``activation(shortcut(x) + body(x))``.

    Args:
        body: what is added.
        shortcut: brings ``x`` to the body's shape; None = ``x`` itself.
        activation: of the sum; None = none.
    """

    def __init__(
        self,
        body: nn.Module,
        shortcut: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.activation = nn.Identity() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum, of the body's shape."""
        out: Tensor = self.activation(self.shortcut(x) + self.body(x))
        return out


class SqueezeExcite(nn.Module):
    """Channels weighted by a gate that sees their means (Hu et al. 2018, arXiv 1709.01507)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class Concat(nn.Module):
    """The outputs of all branches, one after another along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map ``[B, sum of the branches' channels, h, w]``."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Attention(nn.Module):
    """Self-attention of tokens ``[B, T, C]``."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, channels // heads
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        batch, tokens, _ = x.shape
        shape = (batch, tokens, self.num_heads, self.head_dim)
        query, key, value = (
            layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        out: Tensor = self.out(mixed.reshape(batch, tokens, self.num_heads * self.head_dim))
        return out


class TokenMLP(nn.Module):
    """A perceptron along the tokens of ``[B, T, C]`` (Tolstikhin et al. 2021, arXiv 2105.01601)."""

    def __init__(self, tokens: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(tokens, hidden), nn.Linear(hidden, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        out: Tensor = self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)
        return out


class RandomClassifier(nn.Module):
    """Stem, blocks and a linear head on the mean.

    Shapes:
        - input: ``[B, C, h, w]``
        - output: ``[B, num_classes]``
    """

    def __init__(self, stem: nn.Module, blocks: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem, self.blocks = stem, blocks
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        out = self.blocks(self.stem(x))
        logits: Tensor = self.head(out.mean(dim=(2, 3)) if out.dim() == 4 else out.mean(dim=1))
        return logits


class TokenStem(nn.Module):
    """Convolutions that make tokens ``[B, T, C]`` of an image, each with a position of its own."""

    def __init__(self, inputs: int, hidden: int, channels: int, size: int) -> None:
        super().__init__()
        self.unit = _unit(inputs, hidden)
        self.patch = nn.Conv2d(hidden, channels, 2, stride=2)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // 2) ** 2, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens."""
        tokens: Tensor = self.patch(self.unit(x)).flatten(2).transpose(1, 2) + self.position
        return tokens


class _Draw:
    """Draws the parts of one network.

    Args:
        seed: of the choices; the weights come from torch's generator.
    """

    def __init__(self, seed: str) -> None:
        self.rng = random.Random(seed)

    def some(self, channels: int, least: float = 0.5, most: float = 2.0) -> int:
        """Return a width near another one: a multiple of four."""
        return max(4, round(channels * self.rng.uniform(least, most) / 4) * 4)

    def maps(
        self, families: tuple[str, ...], inputs: int, size: int, num_classes: int
    ) -> nn.Module:
        """Return a network of maps; the first block of a stage halves the size."""
        channels = self.rng.choice(WIDTHS)
        stem, blocks = _unit(inputs, channels), list[nn.Module]()
        count = self.rng.randint(2, MOST_BLOCKS)
        halvings = {count // 4, count // 2} if size > 8 else {count // 2}
        for number in range(count):
            stride = 2 if number in halvings else 1
            outputs = min(self.some(channels, 1.3, 2.2), TRUNK_LIMIT) if stride == 2 else channels
            block = BLOCKS[self.rng.choice(families)]
            blocks.append(block(self, channels, outputs, stride))
            channels = outputs
        return RandomClassifier(stem, nn.Sequential(*blocks), channels, num_classes)

    def shortcut(self, inputs: int, outputs: int, stride: int) -> nn.Module | None:
        """Return a projection where the shape changes, else None."""
        if inputs == outputs and stride == 1:
            return None
        return nn.Sequential(*_normed(inputs, outputs, 1, stride))

    def residual(self, body: list[nn.Module], inputs: int, outputs: int, stride: int) -> nn.Module:
        return Residual(nn.Sequential(*body), self.shortcut(inputs, outputs, stride), nn.ReLU())

    def plain(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        """Two convolutions (Simonyan and Zisserman 2015), the first of any width."""
        inner = self.some(outputs)
        return nn.Sequential(_unit(inputs, inner, 3, stride), _unit(inner, outputs))

    def basic(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        """Two convolutions and a shortcut (He et al. 2016)."""
        inner = self.some(outputs)
        body = [_unit(inputs, inner, 3, stride), *_normed(inner, outputs)]
        return self.residual(body, inputs, outputs, stride)

    def squeeze(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        """A basic block whose channels are gated."""
        inner = self.some(outputs)
        gate = SqueezeExcite(outputs, self.some(outputs, 0.25, 0.5))
        body = [_unit(inputs, inner, 3, stride), *_normed(inner, outputs), gate]
        return self.residual(body, inputs, outputs, stride)

    def bottleneck(
        self, inputs: int, outputs: int, stride: int, grouped: bool = False
    ) -> nn.Module:
        """1x1, 3x3 and 1x1 convolutions and a shortcut; the 3x3 one in groups (ResNeXt)."""
        inner = self.some(outputs)
        groups = self.rng.choice((2, 4)) if grouped else 1
        middle = inner if grouped else self.some(outputs)
        body = [_unit(inputs, inner, 1), _unit(inner, middle, 3, stride, groups)]
        return self.residual([*body, *_normed(middle, outputs, 1)], inputs, outputs, stride)

    def inverted(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        """Expand, filter each channel, project (Sandler et al. 2018)."""
        inner = self.some(inputs, 1.5, 4.0)
        body = nn.Sequential(
            _unit(inputs, inner, 1),
            _unit(inner, inner, 3, stride, inner),
            *_normed(inner, outputs, 1),
        )
        return Residual(body, self.shortcut(inputs, outputs, stride))

    def concat(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        """Branches side by side, joined by a 1x1 convolution (Szegedy et al. 2015)."""
        widths = [self.some(outputs, 0.25, 1.0) for _ in range(self.rng.choice((2, 3)))]
        kernels = (3, 1, 3)
        branches = [
            _unit(inputs, width, kernel, stride)
            for width, kernel in zip(widths, kernels, strict=False)
        ]
        return nn.Sequential(Concat(*branches), _unit(sum(widths), outputs, 1))

    def tokens(self, mixes: bool, inputs: int, size: int, num_classes: int) -> nn.Module:
        """Return a small vision transformer, or an MLP-Mixer."""
        channels, count = self.rng.choice(TOKEN_WIDTHS), self.rng.randint(2, MOST_BLOCKS // 2)
        stem = TokenStem(inputs, self.some(channels, 0.25, 0.5), channels, size)
        blocks: list[nn.Module] = []
        for _ in range(count):
            mix: nn.Module
            if mixes:
                mix = TokenMLP((size // 2) ** 2, self.some(channels))
            else:
                mix = Attention(channels, self.rng.choice((2, 4)))
            hidden = self.some(channels, 0.75, 2.5)
            perceptron = [nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels)]
            blocks += [
                Residual(nn.Sequential(nn.LayerNorm(channels), *layers))
                for layers in ([mix], perceptron)
            ]
        blocks.append(nn.LayerNorm(channels))
        return RandomClassifier(stem, nn.Sequential(*blocks), channels, num_classes)


BLOCKS: dict[str, Callable[[_Draw, int, int, int], nn.Module]] = {
    "plain": _Draw.plain,
    "basic": _Draw.basic,
    "bottleneck": _Draw.bottleneck,
    "inverted": _Draw.inverted,
    "squeeze": _Draw.squeeze,
    "concat": _Draw.concat,
    "grouped": partial(_Draw.bottleneck, grouped=True),
}

TOKENS = ("mixer", "transformer")
"""Families of tokens, whose mean the head reads."""

FAMILIES = (*BLOCKS, "mixture", *TOKENS)
"""The families; ``mixture`` is of the blocks of ``MIXTURE``."""

PATTERN = re.compile(rf"random_(?P<family>{'|'.join(FAMILIES)})_(?P<seed>\d{{1,9}})")


def random_classifier(
    family: str, seed: int, *, num_classes: int, image_shape: tuple[int, int, int]
) -> nn.Module:
    """Return a network with fresh weights, drawn from torch's global generator.

    Args:
        family: one of ``FAMILIES``.
        seed: of depth and widths.
        num_classes: size of the output.
        image_shape: (channels, side, side) of the images; an even side.
    """
    draw, (inputs, size, _) = _Draw(f"{family} {seed}"), image_shape
    if family in TOKENS:
        return draw.tokens(family == "mixer", inputs, size, num_classes)
    families = MIXTURE if family == "mixture" else (family,)
    return draw.maps(families, inputs, size, num_classes)

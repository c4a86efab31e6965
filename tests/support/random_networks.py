"""Random small networks that mix the patterns of today's architectures, for property tests.

A network is a stem, three to five blocks and a head over one, two or three spatial axes. All of it
follows from the seed, the weights included: norms, biases and raw parameters are drawn at random
too, because a norm that is still the identity would hide mistakes.
"""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from prunegraph.core.seeding import seeded
from prunegraph.models.random_family import Concat
from support.random_blocks import (
    ADAPTIVE_POOLS,
    AVERAGE_POOLS,
    BATCH_NORMS,
    CONVOLUTIONS,
    GLU,
    HALVING,
    INSTANCE_NORMS,
    MAX_POOLS,
    TRANSPOSED,
    ChannelsLast,
    EagerAttention,
    EagerLayerNorm,
    EagerRMSNorm,
    GatedMLP,
    GlobalMean,
    Residual,
    SelfAttention,
    Shared,
    Shuffle,
    Split,
    SqueezeExcite,
    Tokens,
    Upsample,
    ViewFlat,
)

_FEATURES = """
    residual concat split channel_shuffle grouped_convolution depthwise_convolution squeeze_excite
    multihead_attention eager_attention flatten view shared_layer layer_scale class_token
    positional_embedding batch_norm group_norm group_norm_1 layer_norm channels_first_layer_norm
    eager_layer_norm rms_norm eager_rms_norm instance_norm prelu glu gated_mlp
    transposed_convolution upsampling conv1d conv3d
"""
FEATURES = frozenset(_FEATURES.split())
"""All features that a random network may have."""

WIDTHS = (8, 12, 16, 24)
"""Channels of the trunk; all are multiples of 4, for groups and heads."""
SIZES = {1: (16, 24, 32), 2: (8, 12, 16), 3: (4, 8)}
"""Sizes of the spatial axes, by their number."""
MAX_TOKENS = 64
NUM_OUTPUTS = 5


class RandomNetwork(nn.Module):
    """A network made by ``random_network``.

    Args:
        trunk: stem and blocks: ``[B, C, *S]`` to ``[B, C', *S']``.
        heads: each takes the trunk's map; the forward returns a tensor if there is one head, else
            a tuple.
        example_inputs: ``[B, C, *S]`` inputs of the shape that the network was made for.
        features: which of ``FEATURES`` were used.
    """

    def __init__(
        self,
        trunk: nn.Module,
        heads: Sequence[nn.Module],
        example_inputs: Tensor,
        features: frozenset[str],
    ) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(heads)
        self.example_inputs, self.features = example_inputs, features

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return ``[B, NUM_OUTPUTS]`` of the only head, or a tuple of what the heads return."""
        x = self.trunk(x)
        outputs = tuple(head(x) for head in self.heads)
        return outputs if len(outputs) > 1 else outputs[0]


def random_network(seed: int) -> RandomNetwork:
    """Return the network of a seed, in training mode; torch's own generator is left alone.

    Every output depends on the inputs, in eval mode too.

    Args:
        seed: any integer; equal seeds give equal networks and weights.
    """
    with seeded(seed):
        return _Draw(seed).network()


class _Draw:
    """Draws the parts of one network and notes the features used.

    Args:
        seed: of the choices; weights come from torch's generator.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.features: set[str] = set()
        self.rank = self.rng.choices((1, 2, 3), (2, 6, 2))[0]
        self.size = self.rng.choice(SIZES[self.rank])

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def width(self) -> int:
        return self.rng.choice(WIDTHS)

    def use(self, *names: str) -> None:
        self.features.update(names)

    def network(self) -> RandomNetwork:
        """Draw all parts, then the weights."""
        if self.rank != 2:
            self.use(f"conv{self.rank}d")
        example = torch.randn(self.rng.choice((1, 2)), 3, *[self.size] * self.rank)
        channels = self.width()
        parts: list[nn.Module] = [self.unit(3, channels)]
        for _ in range(self.rng.randint(3, 5)):
            if self.size > 4 and self.size % 4 == 0 and self.chance(0.4):
                parts.append(self.down())
            block, channels = self.rng.choice(self.blocks())(channels)
            parts.append(block)
        heads = [self.head(channels)]
        if self.chance(0.15):
            heads.append(self.convolution(channels, 3, 1))
        model = RandomNetwork(nn.Sequential(*parts), heads, example, frozenset(self.features))
        _enliven(model)
        return model

    # Layers

    def convolution(
        self, inputs: int, outputs: int, kernel: int | None = None, *, groups: int = 1
    ) -> nn.Module:
        """Return a convolution that keeps the spatial size."""
        kernel = self.rng.choice((1, 3, 3)) if kernel is None else kernel
        if groups > 1:
            self.use("depthwise_convolution" if groups == inputs else "grouped_convolution")
        make = CONVOLUTIONS[self.rank]
        bias = self.chance(0.5)
        return make(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias)

    def unit(
        self, inputs: int, outputs: int, kernel: int | None = None, *, groups: int = 1
    ) -> nn.Module:
        """Return a convolution, a norm and an activation."""
        layers = [self.convolution(inputs, outputs, kernel, groups=groups), self.norm(outputs)]
        return nn.Sequential(*layers, self.activation(outputs))

    def norm(self, channels: int) -> nn.Module:
        """Return a norm of a map's channels."""
        rank, affine = self.rank, self.chance(0.97)
        makers: dict[str, Callable[[], nn.Module]] = {}
        makers["batch_norm"] = lambda: BATCH_NORMS[rank](channels, affine=affine)
        groups = [groups for groups in (2, 4, channels) if channels % groups == 0]
        makers["group_norm"] = lambda: nn.GroupNorm(
            self.rng.choice(groups), channels, affine=affine
        )
        makers["group_norm_1"] = lambda: nn.GroupNorm(1, channels, affine=affine)
        makers["channels_first_layer_norm"] = lambda: ChannelsLast(
            nn.LayerNorm(channels, elementwise_affine=affine)
        )
        makers["eager_layer_norm"] = lambda: EagerLayerNorm(rank, channels)
        makers["rms_norm"] = lambda: ChannelsLast(nn.RMSNorm(channels, elementwise_affine=affine))
        makers["eager_rms_norm"] = lambda: ChannelsLast(EagerRMSNorm(channels))
        makers["instance_norm"] = lambda: INSTANCE_NORMS[rank](
            channels, affine=self.chance(0.5), track_running_stats=self.chance(0.5)
        )
        name = self.rng.choices(list(makers), (6, 2, 1, 1, 1, 1, 1, 2))[0]
        self.use(name)
        return makers[name]()

    def token_norm(self, channels: int) -> nn.Module:
        """Return a norm of the last axis."""
        name = self.rng.choice(("layer_norm", "rms_norm", "eager_rms_norm"))
        self.use(name)
        if name == "eager_rms_norm":
            return EagerRMSNorm(channels)
        return nn.LayerNorm(channels) if name == "layer_norm" else nn.RMSNorm(channels)

    def activation(self, channels: int) -> nn.Module:
        """Return an activation of a map."""
        if self.chance(0.15):
            self.use("prelu")
            return nn.PReLU(self.rng.choice((1, channels)))
        make = self.rng.choice((nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU))
        return make()

    def down(self) -> nn.Module:
        """Return a pooling that halves the spatial size."""
        self.size //= 2
        return self.rng.choice((AVERAGE_POOLS, MAX_POOLS))[self.rank](2)

    def glu(self, axis: int) -> nn.Module:
        self.use("glu")
        return GLU(self.rng.choice(("glu", "glu", *HALVING)), axis)

    # Blocks: from the number of input channels to a module and its number of output channels

    def blocks(self) -> list[Callable[[int], tuple[nn.Module, int]]]:
        """Return the kinds of blocks that fit at the present size."""
        kinds: list[Callable[[int], tuple[nn.Module, int]]] = [
            self.residual,
            self.inverted,
            self.grouped,
            self.inception,
            self.dense,
            self.shuffled,
            self.shuffled,
            self.glu_block,
            self.channel_mlp,
            self.shared,
            self.shared,
            self.hourglass,
            self.hourglass,
        ]
        if self.size**self.rank <= MAX_TOKENS:
            kinds += [self.transformer] * 6
        return kinds

    def residual(self, channels: int) -> tuple[nn.Module, int]:
        """Basic block, perhaps with layer scale, squeeze-excite, another width."""
        self.use("residual")
        outputs = channels if self.chance(0.6) else self.width()
        inner = self.width()
        layers = [self.unit(channels, inner), self.convolution(inner, outputs), self.norm(outputs)]
        if self.chance(0.4):
            layers.append(self.squeeze_excite(outputs))
        shortcut = None if outputs == channels else self.convolution(channels, outputs, 1)
        body = Residual(nn.Sequential(*layers), shortcut, self.layer_scale(outputs))
        return nn.Sequential(body, self.activation(outputs)), outputs

    def layer_scale(self, channels: int, *, tokens: bool = False) -> tuple[int, ...] | None:
        """Return the shape of a layer scale or None."""
        if not self.chance(0.4):
            return None
        self.use("layer_scale")
        return (channels,) if tokens else (channels, *[1] * self.rank)

    def squeeze_excite(self, channels: int) -> nn.Module:
        self.use("squeeze_excite")
        return SqueezeExcite(self.rank, channels, channels // 2, linear=self.chance(0.5))

    def inverted(self, channels: int) -> tuple[nn.Module, int]:
        """Inverted residual of MobileNet, with a channel multiplier in some."""
        inner = self.width()
        wide = inner * self.rng.choice((1, 1, 2))
        layers = [self.unit(channels, inner, 1), self.unit(inner, wide, 3, groups=inner)]
        if self.chance(0.5):
            layers.append(self.squeeze_excite(wide))
        layers += [self.convolution(wide, channels, 1), self.norm(channels)]
        self.use("residual")
        return Residual(nn.Sequential(*layers), None, self.layer_scale(channels)), channels

    def grouped(self, channels: int) -> tuple[nn.Module, int]:
        """Bottleneck of ResNeXt, or a grouped convolution of the trunk itself."""
        groups = self.rng.choice((2, 4))
        if self.chance(0.4):
            outputs = self.width()
            return self.unit(channels, outputs, groups=groups), outputs
        inner, middle = self.width(), self.width()
        body = nn.Sequential(
            self.unit(channels, inner, 1),
            self.unit(inner, middle, 3, groups=groups),
            self.convolution(middle, channels, 1),
            self.norm(channels),
        )
        self.use("residual")
        return Residual(body), channels

    def inception(self, channels: int) -> tuple[nn.Module, int]:
        """Branches side by side, brought back to a width of the trunk."""
        self.use("concat")
        widths = [self.width() for _ in range(self.rng.choice((2, 3)))]
        branches = Concat(*[self.unit(channels, width) for width in widths])
        outputs = self.width()
        return nn.Sequential(branches, self.unit(sum(widths), outputs, 1)), outputs

    def dense(self, channels: int) -> tuple[nn.Module, int]:
        """The map and what was made of it, side by side."""
        self.use("concat")
        growth = self.rng.choice((4, 8))
        return Concat(nn.Identity(), self.unit(channels, growth)), channels + growth

    def shuffled(self, channels: int) -> tuple[nn.Module, int]:
        """Unit of ShuffleNet: split, join, shuffle."""
        self.use("split", "concat", "channel_shuffle")
        half, inner = channels // 2, self.width()
        body = nn.Sequential(
            self.unit(half, inner, 1),
            self.convolution(inner, inner, 3, groups=inner),
            self.norm(inner),
            self.unit(inner, half, 1),
        )
        mix = Shuffle(2) if self.chance(0.7) else nn.ChannelShuffle(2)
        return Split(body, self.rng.choice(HALVING), mix), channels

    def glu_block(self, channels: int) -> tuple[nn.Module, int]:
        """A convolution of twice the width, half of which gates the other half."""
        outputs = self.width()
        wide, norm = self.convolution(channels, 2 * outputs), self.norm(2 * outputs)
        return nn.Sequential(wide, norm, self.glu(1)), outputs

    def channel_mlp(self, channels: int) -> tuple[nn.Module, int]:
        """A gated MLP of 1x1 convolutions, or of linear layers on the last axis."""
        self.use("residual")
        return Residual(
            nn.Sequential(self.norm(channels), self.mlp(channels, tokens=self.chance(0.5))),
            None,
            self.layer_scale(channels),
        ), channels

    def mlp(self, channels: int, *, tokens: bool) -> nn.Module:
        """Return a gated MLP; ``tokens`` = linear layers, which a map needs permuted."""
        self.use("gated_mlp")
        hidden = self.width()
        if tokens:
            return ChannelsLast(self.token_mlp(channels, hidden))
        gate, up = (self.convolution(channels, hidden, 1) for _ in range(2))
        return GatedMLP(gate, up, self.convolution(hidden, channels, 1))

    def token_mlp(self, channels: int, hidden: int) -> nn.Module:
        """Return a gated MLP of linear layers, or one with GLU."""
        if self.chance(0.4):
            wide = nn.Linear(channels, 2 * hidden)
            return nn.Sequential(wide, self.glu(-1), nn.Linear(hidden, channels))
        self.use("gated_mlp")
        bias = self.chance(0.5)
        gate, up = (nn.Linear(channels, hidden, bias=bias) for _ in range(2))
        return GatedMLP(gate, up, nn.Linear(hidden, channels, bias=bias))

    def shared(self, channels: int) -> tuple[nn.Module, int]:
        """One unit called twice."""
        self.use("shared_layer")
        inner = self.width()
        body = nn.Sequential(self.unit(channels, inner), self.convolution(inner, channels, 1))
        return Shared(body, chained=self.chance(0.6)), channels

    def hourglass(self, channels: int) -> tuple[nn.Module, int]:
        """Down, a unit, up again, then added to the map or put beside it (U-Net)."""
        inner, outer = self.width(), channels if self.chance(0.5) else self.width()
        pool = AVERAGE_POOLS[self.rank](2)
        path = nn.Sequential(pool, self.unit(channels, inner), self.up(inner, outer))
        if outer == channels:
            self.use("residual")
            return Residual(path), channels
        self.use("concat")
        join = self.unit(channels + outer, channels, 1)
        return nn.Sequential(Concat(path, nn.Identity()), join), channels

    def up(self, inputs: int, outputs: int) -> nn.Module:
        """Return what doubles the spatial size."""
        if self.chance(0.5):
            self.use("upsampling")
            grow = Upsample(self.rank, smooth=self.chance(0.5))
            return nn.Sequential(grow, self.convolution(inputs, outputs))
        self.use("transposed_convolution")
        groups = self.rng.choice((1, 1, 2))
        return TRANSPOSED[self.rank](inputs, outputs, 2, stride=2, groups=groups)

    def transformer(self, channels: int) -> tuple[nn.Module, int]:
        """Attention and an MLP on the positions as tokens."""
        self.use("residual")
        heads, bias = self.rng.choice((1, 2, 2, 2, 4, 4)), self.chance(0.7)
        if self.chance(0.5):
            self.use("multihead_attention")
            weights = self.chance(0.3)
            mix: nn.Module = SelfAttention(channels, heads, weights=weights, bias=bias)
        else:
            self.use("eager_attention")
            fused, product = self.chance(0.5), self.chance(0.5)
            mix = EagerAttention(channels, heads, fused=fused, product=product)
        layers: list[nn.Module] = [
            Residual(
                nn.Sequential(self.token_norm(channels), inner),
                scale_shape=self.layer_scale(channels, tokens=True),
            )
            for inner in (mix, self.token_mlp(channels, self.width()))
        ]
        class_token, positional = self.chance(0.5), self.chance(0.6)
        self.use(*["class_token"] * class_token, *["positional_embedding"] * positional)
        tokens = Tokens(
            nn.Sequential(*layers),
            channels,
            self.size**self.rank,
            class_token=class_token,
            positional=positional,
        )
        return tokens, channels

    # Heads

    def head(self, channels: int) -> nn.Module:
        """Return ``[B, C, *S]`` to ``[B, NUM_OUTPUTS]``."""
        layers: list[nn.Module] = [GlobalMean()]
        if self.chance(0.6):
            cells = self.rng.choice((1, 2))
            flatten = self.rng.choice(("flatten", "view"))
            self.use(flatten)
            pool = ADAPTIVE_POOLS[self.rank](cells)
            layers = [pool, nn.Flatten() if flatten == "flatten" else ViewFlat()]
            channels *= cells**self.rank
        elif self.chance(0.5):
            layers.append(self.token_norm(channels))
        if self.chance(0.5):
            hidden = self.width()
            layers += [nn.Linear(channels, hidden), nn.GELU()]
            channels = hidden
        return nn.Sequential(*layers, nn.Linear(channels, NUM_OUTPUTS))


def _enliven(model: nn.Module) -> None:
    """Draw weights that carry the signal, and norms, biases and raw parameters unlike 0 and 1."""
    for name, parameter in model.named_parameters():
        own = name.rpartition(".")[2]
        if own.endswith("bias"):
            nn.init.uniform_(parameter, -0.5, 0.5)
        elif own in ("token", "position"):
            nn.init.normal_(parameter, std=0.5)
        elif parameter.squeeze().dim() <= 1:  # norms, layer scales, PReLU
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            nn.init.uniform_(buffer, -0.3, 0.3)
        elif name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 1.5)

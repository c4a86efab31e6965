"""Networks with ops that few networks have."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import ops

from prunegraph.graph import analyse
from prunegraph.testing import assert_masked_equals_pruned

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Unpooled(nn.Module):
    """Puts values back where its pooling found maxima, as SegNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 1)
        self.up, self.out = nn.Conv2d(24, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, places = F.max_pool2d(self.down(x), 2, return_indices=True)
        out: Tensor = self.out(F.max_unpool2d(self.up(self.inner(x).tanh()), places, 2))
        return out


class Blurred(nn.Module):
    """Spreads one constant kernel over all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.register_buffer("kernel", torch.ones(3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        kernel = self.get_buffer("kernel").expand(x.shape[1], 1, 3, 3)
        out: Tensor = self.out(F.conv2d(x, kernel, padding=1, stride=2, groups=x.shape[1]))
        return out


class Rotated(nn.Module):
    """Attention whose queries and keys are turned as complex numbers; sizes are of the class."""

    heads = 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.query, self.key = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.value, self.mix, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[1]), torch.tensor([1.0, 0.1])).to(x.dtype)
        turns = torch.polar(torch.ones_like(angles), angles)
        numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(numbers * turns[:, None]).flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(2).mT).tanh()
        shape = (*x.shape[:2], self.heads, 4)
        q, k, v = (layer(x).view(shape) for layer in (self.query, self.key, self.value))
        q, k = self.turned(q).transpose(1, 2), self.turned(k).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.out((x + self.mix(mixed.flatten(2))).mean(1))
        return out


class Codes(nn.Module):
    """Takes the nearest row of a table at each place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 1)
        self.table, self.out = nn.Parameter(torch.randn(20, 12) * 0.3), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x).tanh())
        rows = x.flatten(2).mT
        nearest = torch.cdist(rows.flatten(0, 1), self.table).argmin(1)
        out: Tensor = self.out(self.table[nearest].view_as(rows).mT.view_as(x))
        return out


class ClassWide(nn.Module):
    """Its width is an attribute of the class."""

    width = 16

    def __init__(self) -> None:
        super().__init__()
        self.one, self.out = nn.Conv2d(3, self.width, 1), nn.Linear(16 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.one(x), 4)
        out: Tensor = self.out(x.view(-1, self.width, 16).flatten(1))
        return out


class Bag(nn.Module):
    """Means of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(11, 16), nn.Linear(16, 3)

    def forward(self, words: Tensor) -> Tensor:
        out: Tensor = self.out(self.bag(words).tanh())
        return out


class Regions(nn.Module):
    """Classifies boxes that are cut out of the image, as two-stage detectors do."""

    def __init__(self, cut: Callable[..., Tensor]) -> None:
        super().__init__()
        self.one, self.out, self.cut = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16 * 4, 3), cut

    def forward(self, x: Tensor) -> Tensor:
        boxes = [torch.tensor([[0.0, 0.0, 5.0, 6.0], [1.0, 2.0, 8.0, 8.0]], dtype=x.dtype)] * 2
        out: Tensor = self.out(self.cut(self.one(x), boxes, 2).flatten(1))
        return out


class Deformed(nn.Module):
    """Reads at places that a convolution of its own says, as deformable detectors do."""

    def __init__(self, groups: int = 1, parts: int = 1, *, modulated: bool = True) -> None:
        super().__init__()
        self.stem, self.parts, self.modulated = nn.Conv2d(3, 16, 3, padding=1), parts, modulated
        self.places = nn.Conv2d(16, parts * (27 if modulated else 18), 3, padding=1)
        self.two = ops.DeformConv2d(16, 24, 3, padding=1, groups=groups)
        self.norm, self.out = nn.BatchNorm2d(24), nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        places = self.places(x)
        mask = None
        if self.modulated:
            rows, columns, mask = places.chunk(3, 1)
            places, mask = torch.cat([rows, columns], 1), mask.sigmoid()
        out: Tensor = self.out(self.norm(self.two(x, places, mask)).relu())
        return out


class Gated(nn.Module):
    """Experts' outputs, summed by the gates of two tasks, as in multi-gate mixtures."""

    def __init__(self, product: str) -> None:
        super().__init__()
        self.product = product
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3)
        )
        self.gates = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))
        self.towers = nn.ModuleList(nn.Linear(8, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            share = gate(x).softmax(-1)
            if self.product == "left":
                mixed = share.unsqueeze(1) @ torch.stack([e(x) for e in self.experts], 1)
            elif self.product == "right":
                mixed = torch.stack([e(x) for e in self.experts], 2) @ share.unsqueeze(2)
            else:
                stacked = torch.stack([e(x) for e in self.experts], 1)
                mixed = torch.einsum("be,bed->bd", share, stacked)
            found.append(tower(mixed.flatten(1)))
        return torch.cat(found, 1)


class Compared(nn.Module):
    """Measures how far two ways of seeing an image are apart."""

    def __init__(self, apart: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.one, self.two = (
            nn.Conv2d(3, 12, 3),
            nn.Conv2d(12, 16, 3),
            nn.Conv2d(16, 16, 1),
        )
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.stem(x).relu())
        return self.apart(x.mean((2, 3)), self.two(x).mean((2, 3)))


class Windows(nn.Module):
    """Attends in windows that overlap, laid over the storage, as Longformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.out = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.stem(x.flatten(1, 2)).relu())
        (batch, length, width), stride = x.shape, list(x.stride())
        windows = (batch, length // 4 - 1, 8, width)
        x = x.as_strided(windows, (stride[0], 4 * stride[1], *stride[1:]))
        out: Tensor = self.out(x.amax(2))
        return out


class Snakes(nn.Module):
    """Divides by numbers of each channel, as vocoders' activations do."""

    def __init__(self, inverse: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)
        self.alpha, self.inverse = nn.Parameter(torch.rand(16) + 0.5), inverse

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x = x + self.inverse(self.alpha) * (self.alpha * x).sin() ** 2
        out: Tensor = self.out(self.two(x).relu())
        return out


class Pooled(nn.Module):
    """Weighs positions by a direction of unit length, as graph pooling does."""

    def __init__(self, score: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.out, self.score = nn.Linear(8, 16), nn.Linear(16, 4), score
        self.direction = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        out: Tensor = self.out(x * self.score(x, self.direction).tanh()[..., None])
        return out


class Splines(nn.Module):
    """Distances to the points of a grid, which each channel has of its own, as KANs have."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.out = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("grid", torch.linspace(-2, 2, 5).expand(16, 5).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        x, grid = self.one(x), self.get_buffer("grid")
        bases = (x.unsqueeze(-1) - grid[:, :-1]) / (grid[:, 1:] - grid[:, :-1])
        out: Tensor = self.out(bases.clamp(0, 1).sum(-1))
        return out


class Crossing(nn.Module):
    """Reads beyond its tensor in the storage that it is a part of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(8, 16), nn.Linear(16, 4)
        self.part = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        part = self.part(x)[:, 0]
        beside = part.as_strided(part.shape, part.stride(), 12).mean((1, 2))
        out: Tensor = self.out(self.stem(x).relu()) * beside[:, None, None, None]
        return out


class Pictures(nn.Module):
    """As models of images and words have it: what an image gives takes the place of some words."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.words, self.image = nn.Embedding(11, 16), nn.Linear(16, 12)
        self.connect, self.out = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        images = self.connect(self.image(x).relu()).flatten(0, 1)
        places = (words > 8)[..., None].expand_as(x)
        if self.kind == "some channels":
            places = places & (torch.arange(16) % 3 > 0)
        if self.kind == "in place":
            x.masked_scatter_(places, images)
        else:
            x = x.masked_scatter(places, images)
        out: Tensor = self.out(x.relu())
        return out


class Deltas(nn.Module):
    """Solves a system for each head, as Gated DeltaNet does; or for channels."""

    def __init__(self, unknowns: str) -> None:
        super().__init__()
        self.unknowns, self.heads = unknowns, 4
        self.stem, self.qkv = nn.Linear(3, 16), nn.Linear(16, 3 * 4 * 5)
        self.out = nn.Linear(4 * 5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(2).transpose(1, 2)[:, :6])
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        system = k @ k.transpose(-1, -2)
        match self.unknowns:
            case "rows":
                v = torch.linalg.solve_triangular(system, v, upper=False, unitriangular=True)
            case "columns":
                solved = torch.linalg.solve_triangular(
                    system, v.mT, upper=False, unitriangular=True, left=False
                )
                v = solved.mT
            case "channels":
                system = torch.eye(5).to(v) + torch.ones(5, 5).to(v).tril(-1) / 5
                v = torch.linalg.solve_triangular(system, v.mT, upper=False).mT
        out: Tensor = self.out(((q @ k.mT).tril() @ v).transpose(1, 2).reshape(b, n, -1))
        return out


ROWS = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
WORDS = torch.arange(20).view(4, 5) % 11

CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, int]]] = {
    "unpooled": (Unpooled, IMAGES, {"down": 16, "inner": 24}),
    "blurred": (Blurred, IMAGES, {"one": 16}),
    "rotated": (Rotated, IMAGES, {"stem": 16, "query": 4}),
    "codes": (Codes, IMAGES, {"one": 16, "two": 12}),
    "class_wide": (ClassWide, IMAGES, {"one": 16}),
    "bag": (Bag, WORDS, {"bag": 16}),
    "regions": (lambda: Regions(ops.roi_align), IMAGES, {"one": 16}),
    "deformed": (Deformed, IMAGES, {"stem": 16, "two": 24}),
    "deformed in groups": (lambda: Deformed(4), IMAGES, {"stem": 4, "two": 6}),
    "deformed in parts": (lambda: Deformed(parts=2), IMAGES, {"stem": 8, "two": 24}),
    "deformed alone": (lambda: Deformed(modulated=False), IMAGES, {"stem": 16, "two": 24}),
    **{
        f"gated, {product}": (
            lambda product=product: Gated(product),
            ROWS,
            {"experts.0.0": 16, "experts.0.2": 8, "experts.1.0": 16, "experts.2.0": 16},
        )
        for product in ("left", "right", "einsum")
    },
    "distances": (lambda: Compared(F.pairwise_distance), IMAGES, {"stem": 12, "one": 16}),
    "losses": (
        lambda: Compared(lambda a, b: F.huber_loss(a, b, reduction="none").sum(1)),
        IMAGES,
        {"stem": 12, "one": 16},
    ),
    "a loss": (lambda: Compared(F.mse_loss), IMAGES, {"stem": 12}),
    "windows": (Windows, IMAGES, {"stem": 16, "inner": 12}),
    "snakes": (lambda: Snakes(lambda alpha: 1 / alpha), IMAGES, {"one": 16, "two": 12}),
    "divided": (lambda: Snakes(lambda alpha: alpha.sin() / alpha), IMAGES, {"one": 16, "two": 12}),
    "unit": (lambda: Pooled(lambda x, p: x @ (p / p.norm())), IMAGES, {"one": 16}),
    "cosine": (
        lambda: Pooled(lambda x, p: (x * F.normalize(p, dim=0)).sum(-1)),
        IMAGES,
        {"one": 16},
    ),
    "splines": (Splines, IMAGES, {"one": 16}),
    "crossing": (Crossing, IMAGES, {"stem": 16}),
    "pictures": (lambda: Pictures("rows"), WORDS, {"connect": 16, "image": 12}),
    "pictures in place": (lambda: Pictures("in place"), WORDS, {"connect": 16, "image": 12}),
    "pictures in channels": (lambda: Pictures("some channels"), WORDS, {"image": 12}),
    "deltas": (lambda: Deltas("rows"), IMAGES, {"stem": 16, "qkv": 4}),
    "deltas, from the right": (lambda: Deltas("columns"), IMAGES, {"stem": 16, "qkv": 4}),
    "equations of channels": (lambda: Deltas("channels"), IMAGES, {"stem": 16}),
    "pooled_regions": (lambda: Regions(ops.roi_pool), IMAGES, {"one": 16}),
}


@pytest.mark.parametrize("name", CASES)
def test_channels_can_go(name: str) -> None:
    torch.manual_seed(0)
    kind, example, free = CASES[name]
    net = kind().eval()
    graph = analyse(net, example)
    assert {g.name: g.units.size for g in graph.groups if g.frozen is None} == free
    for seed in range(3):
        rng, keep = np.random.default_rng(seed), graph.dense_mask().keep.copy()
        for group in graph.groups:
            if group.frozen is None:
                keep[rng.permutation(group.units)[: max(1, group.units.size // 3)]] = False
        assert_masked_equals_pruned(net, graph, graph.mask(keep), example)
    assert not hasattr(type(net), "width") or type(net).__dict__["width"] == 16

"""The embedded data sets: scikit-learn's 1,797 real 8 x 8 digits, alone and among pieces."""

from functools import cache

import torch
from torch import Tensor

from prunegraph.core.extras import Late
from prunegraph.data.splits import stratified_cut

datasets = Late("sklearn.datasets")

DIGITS_MEAN = (0.3070,)
DIGITS_STD = (0.3771,)
CLUTTER_MEAN = (0.1423,)
CLUTTER_STD = (0.3036,)
GREY_MAX = 16  # the originals have 17 grey levels
TEST_SHARE = 0.25
SEARCH_SHARE = 0.15
SPLIT_SEED = 0

CLUTTER_SIDE, NUM_PIECES, PIECE_SIDE = 16, 3, 4
CLUTTER_IMAGES = {"train": 6000, "val": 1000, "test": 1000}


def read_digits() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return ``[1797, 1, 8, 8]`` uint8 images, labels, and fixed positions by split.

    Train 60 %, val 15 %, test 25 % of each class, the same whatever the caller's seed: weights
    trained in one run must never have seen the search or test images of another.
    """
    images, labels = (values.clone() for values in _parsed())
    everything = torch.arange(len(labels))
    rest, test = stratified_cut(labels, everything, TEST_SHARE, SPLIT_SEED, 10)
    share = SEARCH_SHARE / (1 - TEST_SHARE)
    train, val = stratified_cut(labels, rest, share, SPLIT_SEED, 10)
    return images, labels, {"train": train, "val": val, "test": test}


@cache
def _parsed() -> tuple[Tensor, Tensor]:
    """Return the images and labels, of which callers take copies: the file is a table of text."""
    digits = datasets.load_digits()
    pixels = torch.from_numpy(digits.images) * (255 / GREY_MAX)
    images = pixels.round().to(torch.uint8).unsqueeze(1)  # [n, 1, 8, 8]
    return images, torch.from_numpy(digits.target).to(torch.int64)


def read_clutter() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return ``[8000, 1, 16, 16]`` uint8 images, labels, and positions by split.

    Each shows a real digit at a random place, among pieces of three others. All of an image are of
    one split of ``read_digits``. It is hard enough to tell methods apart that digits alone do not.
    """
    digits, labels, positions = read_digits()
    images: list[Tensor] = []
    shown: list[Tensor] = []
    split: dict[str, Tensor] = {}
    for seed, (name, count) in enumerate(CLUTTER_IMAGES.items()):
        generator = torch.Generator().manual_seed(seed)
        own = digits[positions[name]][:, 0]
        pick = torch.randint(len(own), (count,), generator=generator)
        split[name] = torch.arange(len(images), len(images) + count)
        images += [_scene(own, int(digit), generator) for digit in pick]
        shown.append(labels[positions[name]][pick])
    return torch.stack(images), torch.cat(shown), split


def _scene(digits: Tensor, shown: int, generator: torch.Generator) -> Tensor:
    """Return ``[1, 16, 16]`` with one of ``[n, 8, 8]`` digits among pieces of others."""
    scene = torch.zeros(1, CLUTTER_SIDE, CLUTTER_SIDE, dtype=digits.dtype)

    def draw(below: int) -> tuple[int, int]:
        y, x = torch.randint(below, (2,), generator=generator).tolist()
        return y, x

    def put(piece: Tensor) -> None:
        side = len(piece)
        y, x = draw(CLUTTER_SIDE - side + 1)
        place = scene[0, y : y + side, x : x + side]
        torch.maximum(place, piece, out=place)

    for _ in range(NUM_PIECES):
        other = digits[int(torch.randint(len(digits), (1,), generator=generator))]
        y, x = draw(len(other) - PIECE_SIDE + 1)
        put(other[y : y + PIECE_SIDE, x : x + PIECE_SIDE])
    put(digits[shown])
    return scene

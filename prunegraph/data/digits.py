"""The embedded default data set: scikit-learn's 1,797 real 8 x 8 digits."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from prunegraph.data.splits import stratified_cut

DIGITS_MEAN = (0.3070,)
DIGITS_STD = (0.3771,)
GREY_MAX = 16  # the originals have 17 grey levels
TEST_SHARE = 0.25
SEARCH_SHARE = 0.15
SPLIT_SEED = 0


def read_digits() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return ``[1797, 1, 8, 8]`` uint8 images, labels, and fixed positions by split.

    Train 60 %, val 15 %, test 25 % of each class, the same whatever the caller's seed: weights
    trained in one run must never have seen the search or test images of another.
    """
    digits = load_digits()
    pixels = torch.from_numpy(digits.images) * (255 / GREY_MAX)
    images = pixels.round().to(torch.uint8).unsqueeze(1)  # [n, 1, 8, 8]
    labels = torch.from_numpy(digits.target).to(torch.int64)
    everything = torch.arange(len(labels))
    rest, test = stratified_cut(labels, everything, TEST_SHARE, SPLIT_SEED, 10)
    share = SEARCH_SHARE / (1 - TEST_SHARE)
    train, val = stratified_cut(labels, rest, share, SPLIT_SEED, 10)
    return images, labels, {"train": train, "val": val, "test": test}

"""Cut the search split from the train images, and put the typed splits together."""

import torch
from torch import Tensor

from prunegraph.core.errors import DataError
from prunegraph.core.splits import Dataset, ImageSource, SearchSplit, TestSplit, TrainSplit


def stratified_cut(
    labels: Tensor, index: Tensor, share: float, seed: int, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Cut a random share of each class off ``index``.

    Every class keeps at least one image, and gives at least one if it has two.

    Args:
        labels: ``[n]`` class of every image of the source.
        index: ``[k]`` positions in the source to divide.
        share: share to cut off, in (0, 1).
        seed: fixes the draw.
        num_classes: number of classes.

    Returns:
        Positions that remain and positions cut off, both ascending.
    """
    generator = torch.Generator().manual_seed(seed)
    remaining, cut = [], []
    for label in range(num_classes):
        members = index[labels[index] == label]
        order = members[torch.randperm(len(members), generator=generator)]
        count = min(max(round(share * len(members)), 1), max(len(members) - 1, 0))
        cut.append(order[:count])
        remaining.append(order[count:])
    return torch.cat(remaining).sort().values, torch.cat(cut).sort().values


def assemble(
    name: str,
    source: ImageSource,
    positions: dict[str, Tensor],
    *,
    class_names: tuple[str, ...],
    normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    search_share: float,
    seed: int,
) -> Dataset:
    """Make the three typed splits from the folders that a data set has.

    ``train, val, test``: ``val`` is the search split. ``train, test`` or ``train, val``: the
    search split is cut from ``train``, and the other folder is the test split.

    Args:
        name: the data set's name.
        source: all of its images.
        positions: positions in the source by folder: ``train`` and ``val``, ``test`` or both.
        class_names: the classes in index order.
        normalisation: (mean, std) that the source applies.
        search_share: share of ``train`` to cut where there is no folder to search on.
        seed: fixes the cut.

    Raises:
        DataError: there is neither ``val`` nor ``test``, or too few images to cut.
    """
    train = positions["train"]
    search, test = positions.get("val"), positions.get("test")
    if test is None:
        search, test = None, search
    if test is None:
        msg = f"{name}: there is no val/ and no test/ folder; add one to measure the result on"
        raise DataError(msg)
    if search is None:
        if not 0.0 < search_share < 1.0:
            msg = f"search_share={search_share} must lie between 0 and 1"
            raise DataError(msg)
        train, search = stratified_cut(source.labels, train, search_share, seed, len(class_names))
    if not len(search):
        msg = f"{name}: train/ has one image a class, none left to search on; add images or val/"
        raise DataError(msg)
    mean, std = normalisation
    return Dataset(
        name=name,
        train=TrainSplit(source, train),
        search=SearchSplit(source, search),
        test=TestSplit(source, test),
        class_names=class_names,
        mean=mean,
        std=std,
    )

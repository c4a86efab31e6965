"""CIFAR-10 and CIFAR-100 as torchvision downloads them."""

import os
from pathlib import Path

import torch
from torch import Tensor

from prunegraph.core.errors import DataError
from prunegraph.core.extras import Late

datasets = Late("torchvision.datasets")
READERS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
"""Data set -> class of torchvision that reads it."""


def cache_dir() -> Path:
    """Return where downloads go: ``$PRUNEGRAPH_CACHE``, else the user's cache folder."""
    if folder := os.environ.get("PRUNEGRAPH_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "prunegraph"


def find_download(name: str, data_dir: Path | None) -> Path | None:
    """Return the torchvision root if ``data_dir`` holds, or is, a torchvision download."""
    if data_dir is None or name not in READERS:
        return None
    base = getattr(datasets, READERS[name]).base_folder
    if data_dir.name == base and data_dir.is_dir():
        return data_dir.parent
    return data_dir if (data_dir / base).is_dir() else None


def read_cifar(
    name: str, root: Path | None
) -> tuple[Tensor, Tensor, dict[str, Tensor], tuple[str, ...]]:
    """Read, or download, a CIFAR data set by torchvision.

    torchvision checks the files' published MD5 sums before it opens them.

    Args:
        name: ``cifar10`` or ``cifar100``.
        root: folder that holds the unpacked download; None = download to ``cache_dir()``.

    Returns:
        ``[60000, 3, 32, 32]`` uint8 images, labels, positions of ``train`` and ``test``, classes.

    Raises:
        DataError: no network, or the files are damaged.
    """
    folder = root or cache_dir() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        read = getattr(datasets, READERS[name])
        parts = [read(folder, train=train, download=root is None) for train in (True, False)]
    except (OSError, RuntimeError, EOFError) as error:
        what = "cannot be read" if root else "cannot be downloaded"
        msg = (
            f"{name} {what} in {folder} ({error}); pass --data-dir with a folder or .tar of "
            "{train,val,test}/<class>/<image>, or with a whole torchvision download"
        )
        raise DataError(msg) from error
    images = torch.cat([torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in parts])
    labels = torch.cat([torch.tensor(part.targets, dtype=torch.int64) for part in parts])
    train = torch.arange(len(parts[0].targets))
    test = torch.arange(len(train), len(labels))
    return images.contiguous(), labels, {"train": train, "test": test}, tuple(parts[0].classes)

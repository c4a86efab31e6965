"""Small image folders and tars."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeFolder = Callable[..., Path]


def write_image(path: Path, size: tuple[int, int], seed: int, mode: str = "RGB") -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Return a function that writes an image-folder layout and returns its root."""

    def make(
        *,
        splits: tuple[str, ...] = ("train", "val", "test"),
        classes: tuple[str, ...] = ("cat", "ant", "bee"),
        per_class: int = 4,
        size: tuple[int, int] = (32, 32),
        suffix: str = ".png",
        root: str = "images",
    ) -> Path:
        seed = 0
        for split in splits:
            for class_name in classes:
                for number in range(per_class):
                    path = tmp_path / root / split / class_name / f"{number:03}{suffix}"
                    write_image(path, size, seed)
                    seed += 1
        return tmp_path / root

    return make


@pytest.fixture
def make_tar() -> Callable[[Path, str], Path]:
    """Return a function that packs a folder into ``<folder>.tar`` below a root name."""

    def make(folder: Path, root: str) -> Path:
        path = folder.with_suffix(".tar")
        with tarfile.open(path, "w") as archive:
            archive.add(folder, arcname=root)
        return path

    return make

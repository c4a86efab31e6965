from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prunegraph.data.lazy import DRAWS_PER_IMAGE, LazySource, centre_crop, random_crop
from prunegraph.data.records import scan

MakeFolder = Callable[..., Path]


def gradient(width: int, height: int) -> Image.Image:
    """Return an image whose red is the column and whose green is the row."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(width)
    pixels[..., 1] = np.arange(height)[:, None]
    return Image.fromarray(pixels)


def lazy(folder: Path, size: int = 96) -> LazySource:
    records = scan(folder)
    labels = torch.arange(len(records)).remainder(3)
    return LazySource(
        records, labels, num_classes=3, size=size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
    )


def test_large_centre_crop_keeps_seven_eighths_of_the_shorter_side() -> None:
    pixels = np.asarray(centre_crop(gradient(240, 128), (112, 112)))
    assert pixels.shape == (112, 112, 3)
    # scale 1: columns 64 .. 175, rows 8 .. 119
    assert pixels[0, 0].tolist() == [64, 8, 0]
    assert pixels[-1, -1].tolist() == [175, 119, 0]


def test_small_images_are_not_cut_but_fitted() -> None:
    image = gradient(32, 32)
    assert centre_crop(image, (32, 32)) is image
    pixels = np.asarray(centre_crop(gradient(40, 32), (32, 32)))
    assert pixels[0, 0].tolist() == [4, 0, 0]
    assert pixels[-1, -1].tolist() == [35, 31, 0]


def test_random_crops_vary_in_place_area_and_direction() -> None:
    image = gradient(200, 100)
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand((300, DRAWS_PER_IMAGE), generator=generator).tolist()
    crops = [np.asarray(random_crop(image, 32, row)).astype(int) for row in draws]
    assert all(crop.shape == (32, 32, 3) for crop in crops)
    widths = np.array([crop[16, -1, 0] - crop[16, 0, 0] for crop in crops])
    heights = np.array([crop[-1, 16, 1] - crop[0, 16, 1] for crop in crops])
    assert 100 < (widths < 0).sum() < 200  # flipped
    assert (heights > 0).all()
    area = np.abs(widths) * heights / 20_000
    assert 0.05 < area.min() < 0.12
    assert 0.45 < area.max() <= 1
    ratio = np.abs(widths) / heights
    assert 0.7 < np.quantile(ratio, 0.02) < 0.85
    assert 1.2 < np.quantile(ratio, 0.98) < 1.45


@pytest.mark.parametrize("size", [(1000, 3), (3, 1000), (1, 1)])
def test_extreme_shapes_still_load(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 20, 30))
    for result in (centre_crop(image, (96, 96)), random_crop(image, 96, [0.999] * 41)):
        assert np.asarray(result).tolist() == np.full((96, 96, 3), (10, 20, 30)).tolist()


def test_load_is_normalised_and_in_order(make_folder: MakeFolder) -> None:
    source = lazy(make_folder(size=(130, 110), suffix=".jpg"))
    index = torch.tensor([5, 0, 30])
    batch = source.load(index)[0]
    assert batch.shape == (3, 3, 96, 96)
    assert batch.dtype == torch.float32
    assert -2 <= batch.min() < -1 < 1 < batch.max() <= 2
    singles = torch.cat([source.load(index[k : k + 1])[0] for k in range(3)])
    assert torch.equal(batch, singles)


def test_augmentation_follows_the_generator(make_folder: MakeFolder) -> None:
    source = lazy(make_folder(size=(130, 110)))
    index = torch.arange(12)
    first = source.load(index, torch.Generator().manual_seed(3))[0]
    assert torch.equal(first, source.load(index, torch.Generator().manual_seed(3))[0])
    assert not torch.equal(first, source.load(index, torch.Generator().manual_seed(4))[0])
    assert not torch.equal(first, source.load(index)[0])


def test_fingerprint_follows_names_sizes_and_options(make_folder: MakeFolder) -> None:
    folder = make_folder(size=(70, 70))
    first = lazy(folder).fingerprint()
    assert lazy(folder).fingerprint() == first
    assert lazy(folder, size=100).fingerprint() != first
    image = folder / "train" / "ant" / "000.png"
    image.write_bytes(image.read_bytes() + b"\0")
    assert lazy(folder).fingerprint() != first

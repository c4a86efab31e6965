import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prunegraph.core.errors import DataError
from prunegraph.data.decode import CHUNK, decode, decode_all, stored_shape
from prunegraph.data.records import Record


def record(path: Path) -> Record:
    return Record("train", "ant", f"ant/{path.name}", str(path))


def unchanged(image: Image.Image) -> Image.Image:
    return image


def bomb(path: Path) -> None:
    """Write a tiny PNG that claims 50,000 x 50,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4)


def cut(path: Path) -> None:
    Image.effect_noise((90, 90), 50).save(path)
    path.write_bytes(path.read_bytes()[:-2000])


def text(path: Path) -> None:
    path.write_text("<html>not found</html>")


def gone(path: Path) -> None:
    path.symlink_to(path.parent / "absent")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (bomb, "exceeds limit"),
        (cut, "truncated"),
        (text, "not an image"),
        (gone, "No such file"),
    ],
)
def test_a_broken_image_is_named(
    tmp_path: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    path = tmp_path / "broken.png"
    spoil(path)
    with pytest.raises(DataError, match=rf"broken\.png .*{reason}.*; replace or remove") as caught:
        decode(record(path), unchanged)
    assert "\n" not in str(caught.value)
    if spoil is not cut:
        with pytest.raises(DataError, match=rf"broken\.png .*{reason}"):
            stored_shape(record(path))


def test_pixels_and_shape_are_exact(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert stored_shape(record(tmp_path / "a.png")) == (5, 7)
    decoded = decode(record(tmp_path / "a.png"), unchanged)
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize(
    ("mode", "fill"),
    [
        ("L", 100),
        ("LA", (100, 30)),
        ("RGBA", (100, 100, 100, 7)),
        ("P", 100),
        ("I;16", 100 * 256),
        ("1", 1),
        ("CMYK", (155, 155, 155, 0)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, fill: object) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image = Image.new(mode, (4, 4), fill)
    if mode == "P":
        image.putpalette([100] * 768)
        image.save(path, transparency=bytes(range(256)))
    else:
        image.save(path)
    decoded = decode(record(path), unchanged)
    assert decoded.shape == (3, 4, 4)
    assert decoded.unique().tolist() == [255 if mode == "1" else 100]


def test_many_images_keep_their_order(tmp_path: Path) -> None:
    count = CHUNK + 3
    records = []
    for number in range(count):
        path = tmp_path / f"{number}.bmp"
        Image.new("RGB", (2, 3), (number // 256, number % 256, 0)).save(path)
        records.append(record(path))
    images = decode_all(records, [unchanged] * count, (3, 2))
    values = images[:, 0, 0, 0].int() * 256 + images[:, 1, 0, 0].int()
    assert images.shape == (count, 3, 3, 2)
    assert values.tolist() == list(range(count))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_grey_of_an_unknown_range_is_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4), 1).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif.*32 bits, whose range is not known"):
        decode(record(tmp_path / "a.tif"), unchanged)

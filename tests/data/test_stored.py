"""Images of a loader, in memory or in a file."""

import pytest
import torch

from prunegraph.core.errors import DataError
from prunegraph.data import stored
from prunegraph.data.stored import StoredImages


@pytest.mark.parametrize("most", [0, 500, 10**9])  # all, some, none in the file
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_images_come_back(monkeypatch: pytest.MonkeyPatch, most: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(stored, "IN_MEMORY", most)
    images, labels = torch.rand(7, 3, 4, 5).mul(9).to(dtype), torch.arange(7)
    source = StoredImages()
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        source.add(images[part].contiguous(memory_format=torch.channels_last), labels[part])
    index = torch.tensor([6, 0, 3, 3])
    for _ in range(2):
        loaded, found = source.load(index)
        assert torch.equal(loaded, images[index])
        assert torch.equal(found, labels[index])
    assert (source.image_shape, source.num_classes) == ((3, 4, 5), 7)
    assert torch.equal(source.labels, labels)


def test_the_place_of_the_images_does_not_change_their_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = []
    for most, scale in ((0, 1.0), (10**9, 1.0), (0, 2.0)):
        monkeypatch.setattr(stored, "IN_MEMORY", most)
        source = StoredImages()
        source.add(scale * torch.ones(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))
        names.append(source.fingerprint())
    assert names[0] == names[1] != names[2]


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    monkeypatch.setattr(stored.tempfile, "TemporaryFile", full)
    with pytest.raises(DataError, match=r"No space left .* set TMPDIR"):
        StoredImages().add(torch.ones(1, 3, 2, 2), torch.zeros(1, dtype=torch.int64))

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch

from prunegraph.core.errors import DataError
from prunegraph.data import cifar, load_dataset


class FakeCifar:
    """Stands for torchvision's reader: 40 train and 20 test images."""

    base_folder = "cifar-10-batches-py"
    classes = tuple("abcdefghij")
    calls: list[tuple[Path, bool, bool]]

    def __init__(self, root: Path, *, train: bool, download: bool) -> None:
        self.calls.append((Path(root), train, download))
        count = 40 if train else 20
        self.targets = list(np.arange(count) % 10)
        self.data = np.full((count, 32, 32, 3), 7 if train else 9, dtype=np.uint8)
        self.data[..., 1] = np.arange(32)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeCifar]:
    FakeCifar.calls = []
    monkeypatch.setattr(cifar, "datasets", SimpleNamespace(CIFAR10=FakeCifar))
    monkeypatch.setenv("PRUNEGRAPH_CACHE", str(tmp_path / "cache"))
    return FakeCifar


def test_without_a_folder_torchvision_downloads_to_the_cache(
    fake: type[FakeCifar], tmp_path: Path
) -> None:
    data = load_dataset("cifar10", search_share=0.25)
    root = tmp_path / "cache" / "cifar10"
    assert fake.calls == [(root, True, True), (root, False, True)]
    assert (len(data.train), len(data.search), len(data.test)) == (30, 10, 20)
    assert data.class_names == fake.classes
    assert data.search.labels.bincount().tolist() == [1] * 10
    pixels = data.train.source.images  # type: ignore[attr-defined]
    assert pixels[data.train.index][:, 0].unique().tolist() == [7]
    assert pixels[data.test.index][:, 0].unique().tolist() == [9]
    assert pixels[0, 1, 0].tolist() == list(range(32))


@pytest.mark.parametrize("below", [".", "cifar-10-batches-py"])
def test_an_existing_download_is_read_without_network(
    fake: type[FakeCifar], tmp_path: Path, below: str
) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    data = load_dataset("cifar10", data_dir=tmp_path / below)
    assert fake.calls == [(tmp_path, True, False), (tmp_path, False, False)]
    assert len(data.test) == 20


def test_no_network_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, fake: type[FakeCifar], tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        reason = "Temporary failure in name resolution"
        raise URLError(reason)

    monkeypatch.setattr(fake, "__init__", fail)
    with pytest.raises(DataError, match=r"cifar10 cannot be downloaded .*name resol.*--data-dir"):
        load_dataset("cifar10")
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match="cifar10 cannot be read in"):
        load_dataset("cifar10", data_dir=tmp_path)


def test_a_damaged_download_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"a pickle that torchvision must not open")
    with pytest.raises(DataError, match=r"cannot be read in .*corrupted"):
        load_dataset("cifar10", data_dir=tmp_path)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEGRAPH_CACHE", "/somewhere")
    assert cifar.cache_dir() == Path("/somewhere")
    monkeypatch.delenv("PRUNEGRAPH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cifar.cache_dir() == Path("/xdg/prunegraph")


@pytest.mark.slow
@pytest.mark.data
def test_the_shared_tar_loads_as_it_is(shared_dir: Path) -> None:
    data = load_dataset("cifar10", data_dir=shared_dir / "data" / "cifar10.tar")
    assert [len(split) for split in (data.train, data.search, data.test)] == [45_000, 5_000, 10_000]
    assert data.class_names[:3] == ("airplane", "automobile", "bird")
    assert data.test.labels.bincount().tolist() == [1_000] * 10
    assert data.search.labels.bincount().tolist() == [500] * 10
    images, _ = data.train.source.load(data.train.index)
    assert images.mean(dim=(0, 2, 3)).abs().max() < 0.01
    assert torch.allclose(images.std(dim=(0, 2, 3)), torch.ones(3), atol=0.01)

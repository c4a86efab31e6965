from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from prunegraph.core.errors import DataError
from prunegraph.core.splits import SearchSplit, TestSplit, TrainSplit
from prunegraph.data import load_dataset
from prunegraph.data.digits import read_clutter, read_digits
from prunegraph.data.lazy import LazySource
from prunegraph.data.memory import MemorySource
from prunegraph.models import build_model

MakeFolder = Callable[..., Path]
MakeTar = Callable[[Path, str], Path]


def positions(data: object, *names: str) -> list[int]:
    return sorted(p for name in names for p in getattr(data, name).index.tolist())


def test_digits_are_split_for_good() -> None:
    data = load_dataset("digits")
    assert [len(split) for split in (data.train, data.search, data.test)] == [1078, 269, 450]
    assert positions(data, "train", "search", "test") == list(range(1797))
    assert [type(s) for s in (data.train, data.search, data.test)] == [
        TrainSplit,
        SearchSplit,
        TestSplit,
    ]
    # Pinned: weights trained on this split must never meet another one.
    assert [s.fingerprint() for s in (data.train, data.search, data.test)] == [
        "49fb5cc7d1c76d2a",
        "32e5a649e559b695",
        "242f62820d9acce7",
    ]
    other = load_dataset("digits", seed=5, search_share=0.4)
    assert other.search.fingerprint() == data.search.fingerprint()


def test_clutter_shows_digits_of_its_own_split_among_pieces() -> None:
    data = load_dataset("clutter")
    assert [len(split) for split in (data.train, data.search, data.test)] == [6000, 1000, 1000]
    assert data.image_shape == (1, 16, 16)
    assert data.num_classes == 10
    images, labels = next(data.train.batches(6000))
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1.0) < 0.01
    assert labels.bincount().min() > 500
    again = load_dataset("clutter", seed=7)
    assert again.test.fingerprint() == data.test.fingerprint()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_scene_holds_the_digit_that_its_label_names(split: str) -> None:
    scenes, labels, positions = read_clutter()
    digits, names, own = read_digits()
    number = int(positions[split][3])
    windows = scenes[number, 0].unfold(0, 8, 1).unfold(1, 8, 1).reshape(-1, 8, 8)
    inside = [
        int(names[at])
        for at in own[split].tolist()
        if bool((windows >= digits[at, 0]).all((1, 2)).any())
    ]
    assert int(labels[number]) in inside


def test_digits_are_normalised_and_shifted_but_not_flipped() -> None:
    data = load_dataset("digits")
    images, labels = next(data.train.batches(2000))
    assert images.shape == (1078, *data.image_shape) == (1078, 1, 8, 8)
    assert abs(images.mean()) < 1e-3
    assert abs(images.std() - 1) < 1e-3
    assert labels.bincount().min() >= 100
    source = data.train.source
    assert isinstance(source, MemorySource)
    assert (source.padding, source.flip) == (1, False)


def test_digits_teach_a_digits_resnet() -> None:
    data = load_dataset("digits")
    torch.manual_seed(0)
    model = build_model("digits_resnet8_w8", num_classes=10, image_shape=data.image_shape)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=20 * 9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for images, labels in data.train.batches(128, shuffle=generator, augment=generator):
            optimiser.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimiser.step()
            schedule.step()
    model.eval()
    images, labels = next(data.test.batches(1000))
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.97


def test_three_folders_are_the_three_splits(make_folder: MakeFolder, make_tar: MakeTar) -> None:
    folder = make_folder(per_class=5)
    for path in (folder, make_tar(folder, "root"), str(folder)):
        data = load_dataset("folder", data_dir=path)
        assert data.class_names == ("ant", "bee", "cat")
        assert [len(s) for s in (data.train, data.search, data.test)] == [15, 15, 15]
        assert data.test.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
        assert data.image_shape == (3, 32, 32)
        assert isinstance(data.train.source, MemorySource)
        assert data.train.source.padding == 4
        stored = Image.open(folder / "val" / "bee" / "002.png")
        image = data.train.source.images[int(data.search.index[7])]
        assert list(image.permute(1, 2, 0).numpy().tobytes()) == list(stored.tobytes())


def test_tar_and_folder_have_one_fingerprint(make_folder: MakeFolder, make_tar: MakeTar) -> None:
    folder = make_folder()
    tar = make_tar(folder, "root")
    first, second = (load_dataset("folder", data_dir=path) for path in (folder, tar))
    assert first.search.fingerprint() == second.search.fingerprint()
    assert first.search.fingerprint() != first.test.fingerprint()


@pytest.mark.parametrize("other", ["val", "test"])
def test_search_is_cut_from_train_where_a_folder_lacks(make_folder: MakeFolder, other: str) -> None:
    folder = make_folder(splits=("train", other), per_class=10)
    data = load_dataset("folder", data_dir=folder, search_share=0.2)
    assert [len(s) for s in (data.train, data.search, data.test)] == [24, 6, 30]
    assert positions(data, "train", "search") == list(range(30))
    assert positions(data, "test") == list(range(30, 60))
    assert data.search.labels.bincount().tolist() == [2, 2, 2]
    same = load_dataset("folder", data_dir=folder, search_share=0.2)
    moved = load_dataset("folder", data_dir=folder, search_share=0.2, seed=1)
    assert same.search.fingerprint() == data.search.fingerprint() != moved.search.fingerprint()


def test_only_train_or_one_image_a_class_is_not_enough(make_folder: MakeFolder) -> None:
    with pytest.raises(DataError, match="no val/ and no test/ folder"):
        load_dataset("folder", data_dir=make_folder(splits=("train",), root="a"))
    lone = make_folder(splits=("train", "test"), per_class=1, root="b")
    with pytest.raises(DataError, match="one image a class"):
        load_dataset("folder", data_dir=lone)
    with pytest.raises(DataError, match=r"search_share=1\.5 must lie between"):
        load_dataset("folder", data_dir=lone, search_share=1.5)


def test_a_hundred_classes_of_small_images(make_folder: MakeFolder) -> None:
    classes = tuple(f"c{number:03}" for number in range(100))
    folder = make_folder(splits=("train", "test"), classes=classes, per_class=2)
    for name in ("cifar100", "folder"):
        data = load_dataset(name, data_dir=folder)
        assert data.num_classes == 100
        assert data.image_shape == (3, 32, 32)
        assert [len(s) for s in (data.train, data.search, data.test)] == [100, 100, 200]


def test_large_images_stay_on_disk_at_224(make_folder: MakeFolder) -> None:
    folder = make_folder(size=(300, 200), suffix=".JPEG", per_class=1)
    (folder / "train" / "ant" / "000.JPEG").unlink()
    Image.new("L", (65, 40)).save(folder / "train" / "ant" / "grey.JPEG")
    for name in ("imagenet", "folder"):
        data = load_dataset(name, data_dir=folder)
        assert isinstance(data.train.source, LazySource)
        assert data.image_shape == (3, 224, 224)
        images, labels = next(data.train.batches(3, augment=torch.Generator().manual_seed(0)))
        assert images.shape == (3, 3, 224, 224)
        assert labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("size", "kind"), [(48, MemorySource), (65, LazySource)])
def test_image_size_is_followed(make_folder: MakeFolder, size: int, kind: type) -> None:
    data = load_dataset("folder", data_dir=make_folder(size=(100, 80)), image_size=size)
    assert isinstance(data.train.source, kind)
    assert data.image_shape == next(data.test.batches(2))[0].shape[1:] == (3, size, size)


def test_small_images_of_mixed_sizes_take_the_most_common(make_folder: MakeFolder) -> None:
    folder = make_folder(size=(30, 20))
    Image.new("RGB", (64, 64)).save(folder / "train" / "ant" / "000.png")
    assert load_dataset("folder", data_dir=folder).image_shape == (3, 20, 30)


def test_a_data_set_is_found_below_its_parent(make_folder: MakeFolder, make_tar: MakeTar) -> None:
    classes = tuple("abcdefghij")
    folder = make_folder(classes=classes, per_class=1, root="cifar10")
    assert load_dataset("cifar10", data_dir=folder.parent).class_names == classes
    tar = make_tar(folder, "root")
    folder.rename(folder.parent / "elsewhere")
    assert load_dataset("cifar10", data_dir=tar.parent).class_names == classes


def test_own_normalisation(make_folder: MakeFolder) -> None:
    data = load_dataset("folder", data_dir=make_folder(), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    images = next(data.test.batches(100))[0]
    assert (data.mean, data.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "mnist",
            {},
            "unknown data set 'mnist'; known: digits, clutter, cifar10, cifar100, imagenet, fol",
        ),
        ("folder", {}, "folder needs a data_dir"),
        ("imagenet", {}, "imagenet needs a data_dir"),
        ("digits", {"data_dir": Path("x")}, "digits are built in"),
        ("digits", {"image_size": 32}, "digits has a fixed image size"),
        ("digits", {"mean": (0.1, 0.2)}, r"digits has 1 channel\(s\)"),
        ("digits", {"mean": (float("nan"),)}, "do not fit"),
        ("digits", {"std": (0.0,)}, "must be above 0"),
        ("folder", {"data_dir": Path("absent"), "image_size": 0}, "image_size=0 must be"),
        ("folder", {"data_dir": Path("absent")}, "no data at absent"),
        ("cifar10", {"data_dir": Path("absent")}, "no data at absent"),
    ],
)
def test_bad_options_are_one_line(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(name, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_cifar_with_other_classes_is_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(DataError, match="cifar10 has 10 classes, not 3; use folder"):
        load_dataset("cifar10", data_dir=make_folder())


@pytest.mark.parametrize("size", [(32, 32), (100, 100)])
def test_a_broken_image_is_named_when_it_is_read(
    make_folder: MakeFolder, size: tuple[int, int]
) -> None:
    folder = make_folder(size=size)
    (folder / "val" / "bee" / "001.png").write_text("oops")
    with pytest.raises(DataError, match=r"val/bee/001\.png \(not an im"):
        next(load_dataset("folder", data_dir=folder).search.batches(100))


@pytest.mark.parametrize("size", [(30, 20), (100, 80)])
def test_flips_can_be_left_out(make_folder: MakeFolder, size: tuple[int, int]) -> None:
    folder = make_folder(size=size)
    images = {
        flip: next(
            load_dataset("folder", data_dir=folder, flip=flip).train.batches(
                6, augment=torch.Generator().manual_seed(0)
            )
        )[0]
        for flip in (True, False)
    }
    same = [torch.equal(one, other) for one, other in zip(*images.values(), strict=True)]
    mirrored = [
        torch.allclose(one, other.flip(-1), atol=0.05)
        for one, other in zip(*images.values(), strict=True)
    ]
    if size == (100, 80):  # the draw of the flip comes last: the crops are the same
        assert all(a or b for a, b in zip(same, mirrored, strict=True))
        assert any(mirrored)
    source = load_dataset("folder", data_dir=folder, flip=False).train.source
    assert source.flip is False

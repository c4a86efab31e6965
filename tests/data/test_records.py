import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from prunegraph.core.errors import DataError
from prunegraph.data.records import scan

MakeFolder = Callable[..., Path]
MakeTar = Callable[[Path, str], Path]


def names(path: Path) -> list[str]:
    return [f"{record.split}/{record.name}" for record in scan(path)]


def test_folder_is_sorted_by_split_and_class(make_folder: MakeFolder) -> None:
    found = names(make_folder(per_class=1))
    classes = ["ant/000.png", "bee/000.png", "cat/000.png"]
    assert found == [f"{split}/{name}" for split in ("train", "val", "test") for name in classes]


@pytest.mark.parametrize("root", ["cifar", ".", ""])
def test_tar_gives_the_same_images_as_its_folder(
    make_folder: MakeFolder, make_tar: MakeTar, root: str
) -> None:
    folder = make_folder()
    tar = make_tar(folder, root or "./")
    assert names(tar) == names(folder)
    assert [record.read() for record in scan(tar)] == [record.read() for record in scan(folder)]


def test_hidden_and_foreign_files_are_passed_over(make_folder: MakeFolder) -> None:
    folder = make_folder()
    before = names(folder)
    (folder / "train" / "ant" / "._000.png").write_bytes(b"resource fork")
    (folder / "train" / "ant" / "notes.txt").write_text("x")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "ant" / ".ipynb_checkpoints").mkdir()
    image = (folder / "train" / "ant" / "000.png").read_bytes()
    (folder / "train" / "ant" / ".ipynb_checkpoints" / "000-checkpoint.png").write_bytes(image)
    (folder / "train" / "README.md").write_text("x")
    assert names(folder) == before


def test_images_in_deeper_folders_count(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=1)
    (folder / "train" / "ant" / "deep").mkdir()
    (folder / "train" / "ant" / "000.png").rename(folder / "train" / "ant" / "deep" / "a.png")
    assert names(folder)[0] == "train/ant/deep/a.png"


def test_a_link_to_a_folder_of_images_is_not_passed_over(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "train" / "ant" / "more").symlink_to(folder / "val")
    with pytest.raises(DataError, match="ant/more is a link to a folder"):
        names(folder)


def test_missing_and_empty_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data at .*absent; give the folder"):
        scan(tmp_path / "absent")
    with pytest.raises(DataError, match=r"no folder 'train' \(it holds: nothing"):
        scan(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train holds no images; the layout is"):
        scan(tmp_path)
    (tmp_path / "train" / "ant").mkdir()
    with pytest.raises(DataError, match="ant holds no images"):
        scan(tmp_path)


def test_loose_images_are_named(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "train" / "ant" / "000.png").rename(folder / "val" / "loose.png")
    with pytest.raises(DataError, match=r"val/loose\.png lies outside a class folder"):
        scan(folder)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_training_never_sees_is_named(make_folder: MakeFolder, split: str) -> None:
    folder = make_folder()
    (folder / split / "ant").rename(folder / split / "zebra")
    with pytest.raises(DataError, match=f"class 'zebra' is in {split}/ but not in train/"):
        scan(folder)


def test_one_class_is_not_enough(make_folder: MakeFolder) -> None:
    with pytest.raises(DataError, match="one class only, 'ant'"):
        scan(make_folder(classes=("ant",)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "train" / "ant").chmod(0)
    with pytest.raises(DataError, match="make the folder readable"):
        scan(folder)
    (folder / "train" / "ant").chmod(0o755)


def test_every_truncation_of_a_tar_is_noticed(make_folder: MakeFolder, make_tar: MakeTar) -> None:
    tar = make_tar(make_folder(per_class=1, size=(4, 4)), "root")
    content = tar.read_bytes()
    end = len(content.rstrip(b"\0")) // 512 * 512
    for length in range(0, end, 512):  # every block border, the hardest places to cut
        tar.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"images\.tar is truncated or no plain tar"):
            scan(tar)


def test_garbage_inside_a_tar_is_noticed(make_folder: MakeFolder, make_tar: MakeTar) -> None:
    tar = make_tar(make_folder(per_class=2), "root")
    with tarfile.open(tar) as archive:
        border = archive.getmembers()[8].offset
    content = tar.read_bytes()
    tar.write_bytes(content[:border] + b"x" * 512 + content[border + 512 :])
    with pytest.raises(DataError, match="truncated or no plain tar"):
        scan(tar)


def test_compressed_tars_and_other_files_say_what_to_do(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(make_folder(), arcname="root")
    (tmp_path / "b.tar").write_bytes(b"no tar at all")
    for name in ("a.tar.gz", "b.tar"):
        with pytest.raises(DataError, match="unpack a compressed one and give the folder"):
            scan(tmp_path / name)


def add(archive: tarfile.TarFile, name: str, kind: bytes, link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, 0
    archive.addfile(member, io.BytesIO(b""))


def test_devices_and_hidden_folders_in_a_tar_are_passed_over(
    make_folder: MakeFolder, make_tar: MakeTar
) -> None:
    folder = make_folder()
    tar = make_tar(folder, "root")
    with tarfile.open(tar, "a") as archive:
        add(archive, "root/train/ant/pipe.png", tarfile.FIFOTYPE)
        add(archive, "root/train/.ipynb_checkpoints/a.png", tarfile.REGTYPE)
        add(archive, "root/train/ant/.ipynb_checkpoints/a.png", tarfile.REGTYPE)
        add(archive, "root/train/__MACOSX/a.png", tarfile.SYMTYPE, "/etc/passwd")
    assert names(tar) == names(folder)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_images_that_are_links_in_a_tar_are_refused(
    make_folder: MakeFolder, make_tar: MakeTar, kind: bytes
) -> None:
    tar = make_tar(make_folder(), "root")
    with tarfile.open(tar, "a") as archive:
        add(archive, "root/train/ant/passwd.png", kind, "/etc/passwd")
    with pytest.raises(DataError, match=r"passwd\.png as a link: make it with"):
        scan(tar)


@pytest.mark.parametrize("name", ["../train/ant/x.png", "/train/ant/x.png", "a/../../x.png"])
def test_paths_that_leave_the_tar_are_refused(
    make_folder: MakeFolder, make_tar: MakeTar, name: str
) -> None:
    tar = make_tar(make_folder(), "root")
    with tarfile.open(tar, "a") as archive:
        add(archive, name, tarfile.REGTYPE)
    with pytest.raises(DataError, match="holds the unsafe path"):
        scan(tar)


def test_an_image_that_a_tar_holds_twice_is_named(
    make_folder: MakeFolder, make_tar: MakeTar
) -> None:
    folder = make_folder()
    tar = make_tar(folder, "root")
    with tarfile.open(tar, "a") as archive:
        archive.add(folder / "train" / "ant", "other/train/ant")
    with pytest.raises(DataError, match=r"holds train/ant/\S+ twice: make it anew"):
        scan(tar)


def test_nothing_is_ever_unpacked(make_folder: MakeFolder, make_tar: MakeTar) -> None:
    tar = make_tar(make_folder(root="source"), "root")
    before = sorted(tar.parent.rglob("*"))
    assert len([record.read() for record in scan(tar)]) == 36
    assert sorted(tar.parent.rglob("*")) == before

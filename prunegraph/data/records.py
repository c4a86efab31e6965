"""Find the images of an image-folder layout, on disk or inside a tar, without unpacking it.

The layout is ``[root/]{train,val,test}/<class>/.../<image>``; class indices are alphabetical.
"""

import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from prunegraph.core.errors import DataError

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
)
TAR_BLOCK = 512
MAX_BYTES = 400 * 1024**2  # more than any image of MAX_PIXELS, packed or not
LAYOUT = "the layout is {train,val,test}/<class>/<image>"


class Record(NamedTuple):
    """Where one image lies.

    Attributes:
        split: ``train``, ``val`` or ``test``.
        class_name: its class.
        name: its path below the split's folder, for messages and hashes.
        path: the file that holds it: itself, or the tar.
        offset: where its bytes start in that file.
        size: how many they are; -1 = the whole file.
    """

    split: str
    class_name: str
    name: str
    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """Return the image file's bytes.

        Raises:
            DataError: it is no regular file, or gigantic.
        """
        status = Path(self.path).stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device would never end
            msg = f"cannot read image {self} (no regular file); replace or remove it"
            raise DataError(msg)
        size = self.size if self.size >= 0 else status.st_size
        if size > MAX_BYTES:
            msg = f"{self} has {size:,} bytes; shrink or remove the file"
            raise DataError(msg)
        with Path(self.path).open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(size)

    def __str__(self) -> str:
        return f"{self.path}: {self.name}" if self.size >= 0 else self.path


def scan(path: Path) -> list[Record]:
    """Return the images below a folder or inside a ``.tar``, sorted by split, class and name.

    Args:
        path: a folder that holds ``train/``, or a plain (not compressed) tar of one.

    Raises:
        DataError: nothing there, no ``train``, no images, a truncated or compressed tar, a class
            without train images.
    """
    if path.is_dir():
        try:
            records = list(_scan_folder(path))
        except OSError as error:
            msg = f"cannot list the images in {path} ({error}); make the folder readable"
            raise DataError(msg) from error
    elif path.is_file():
        records = list(_scan_tar(path))
    else:
        msg = f"no data at {path}; give the folder or .tar that holds the images ({LAYOUT})"
        raise DataError(msg)
    _check_classes(path, records)
    return sorted(records, key=lambda item: (SPLITS.index(item.split), item.class_name, item.name))


def _scan_folder(root: Path) -> Iterator[Record]:
    """Yield the images of a folder on disk."""
    if not (root / "train").is_dir():
        found = sorted(entry.name for entry in root.iterdir())[:5]
        msg = f"{root} has no folder 'train' (it holds: {', '.join(found) or 'nothing'}); {LAYOUT}"
        raise DataError(msg)
    for split in SPLITS:
        if not (root / split).is_dir():
            continue
        for folder in _class_folders(root / split):
            names = list(_image_names(folder))
            if not names:
                msg = (
                    f"{folder} holds no images ({' '.join(IMAGE_SUFFIXES)}); add some or delete it"
                )
                raise DataError(msg)
            for name in names:
                inside = f"{folder.name}/{name}"
                yield Record(split, folder.name, inside, str(root / split / inside))


def _class_folders(folder: Path) -> list[Path]:
    """Return a split's class folders; refuse images that lie beside them."""
    folders = []
    for entry in folder.iterdir():
        if entry.is_dir() and not _is_hidden(entry.name):
            folders.append(entry)
        elif _is_image(entry.name):
            msg = f"{entry} lies outside a class folder; move it to {folder}/<class>/"
            raise DataError(msg)
    if not folders:
        msg = f"{folder} holds no images; {LAYOUT}"
        raise DataError(msg)
    return folders


def _is_hidden(name: str) -> bool:
    """Tell folders that are no classes, as ``.ipynb_checkpoints`` and ``__MACOSX``."""
    return name.startswith((".", "__"))


def _image_names(folder: Path) -> Iterator[str]:
    """Yield the images' paths relative to ``folder``, at any depth, with forward slashes."""
    for parent, folders, files in os.walk(folder, onerror=_reraise):
        below = Path(parent).relative_to(folder)
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for name in folders:
            if Path(parent, name).is_symlink():
                msg = f"{Path(parent, name)} is a link to a folder: put the folder in its place"
                raise DataError(msg)
        for name in files:
            if _is_image(name):
                yield (below / name).as_posix()


def _reraise(error: OSError) -> None:
    """Raise what ``os.walk`` would pass over in silence."""
    raise error


def _is_image(name: str) -> bool:
    """Tell images by suffix; hidden files (macOS puts ``._x.jpg`` beside ``x.jpg``) are none."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _scan_tar(path: Path) -> Iterator[Record]:
    """Yield the images of a plain tar; devices and the like are passed over, links refused."""
    try:
        with tarfile.open(path, "r:") as archive:
            seen: set[tuple[str, str]] = set()
            for member in archive:
                if member.size < 0:  # Python before 3.11.14 would read the same members for ever
                    msg = f"{member.name!r} has a negative size"
                    raise tarfile.ReadError(msg)
                record = _tar_record(path, member)
                if record is None:
                    continue
                place = record.split, record.name
                if place in seen:
                    msg = f"{path} holds {'/'.join(place)} twice: make it anew from the folder"
                    raise DataError(msg)
                seen.add(place)
                yield record
            _check_tar_end(archive)
    except DataError:
        raise
    except Exception as error:  # on headers that lie, tarfile raises about anything
        msg = (
            f"{path} is truncated or no plain tar ({error}); fetch it again, or unpack a "
            "compressed one and give the folder"
        )
        raise DataError(msg) from error


def _check_tar_end(archive: tarfile.TarFile) -> None:
    """Raise unless the end-of-archive block follows the last member.

    ``tarfile`` takes a file that ends, or turns to garbage, between two members for complete.
    """
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(TAR_BLOCK) != bytes(TAR_BLOCK):
        msg = "its end is missing"
        raise tarfile.ReadError(msg)


def _tar_record(path: Path, member: tarfile.TarInfo) -> Record | None:
    """Return the image that a tar member is, or None if it is none."""
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts:
        msg = f"{path} holds the unsafe path {member.name!r}; make the tar from inside the folder"
        raise DataError(msg)
    if not parts or not _is_image(parts[-1]):
        return None
    start = next((i for i in (0, 1) if i < len(parts) and parts[i] in SPLITS), None)
    if start is None:
        return None
    inside = parts[start + 1 :]
    if any(_is_hidden(folder) for folder in inside[:-1]):
        return None
    if member.islnk() or member.issym():
        advice = "make it with `tar --dereference --hard-dereference`"
        msg = f"{path} holds {member.name} as a link: {advice}"
        raise DataError(msg)
    if not member.isreg() or member.issparse():
        return None
    if len(inside) < 2:
        msg = f"{path}: {member.name} lies outside a class folder; {LAYOUT}"
        raise DataError(msg)
    name = "/".join(inside)
    return Record(parts[start], inside[0], name, str(path), member.offset_data, member.size)


def _check_classes(path: Path, records: list[Record]) -> None:
    """Refuse a data set without images, or with classes that training never sees."""
    classes = {split: {r.class_name for r in records if r.split == split} for split in SPLITS}
    if not classes["train"]:
        msg = f"{path} holds no train images ({' '.join(IMAGE_SUFFIXES)}); {LAYOUT}"
        raise DataError(msg)
    for split in ("val", "test"):
        if unknown := sorted(classes[split] - classes["train"]):
            msg = (
                f"{path}: class {unknown[0]!r} is in {split}/ but not in train/; "
                "add train images of it or remove it"
            )
            raise DataError(msg)
    if len(classes["train"]) < 2:
        msg = f"{path} has one class only, {min(classes['train'])!r}; at least two are needed"
        raise DataError(msg)

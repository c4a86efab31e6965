import errno
import json
import os
from pathlib import Path

import pytest

from prunegraph.core.errors import ArtefactError
from prunegraph.core.files import write_bytes, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_content_is_whole_and_leaves_no_other_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "deep" / "a.bin", b"\x00\x01")
    write_text(tmp_path / "deep" / "b.txt", "é\n")
    write_json(tmp_path / "deep" / "c.json", {"a": [1, 2.5, None]})
    assert (tmp_path / "deep" / "a.bin").read_bytes() == b"\x00\x01"
    assert (tmp_path / "deep" / "b.txt").read_bytes() == "é\n".encode()
    assert json.loads((tmp_path / "deep" / "c.json").read_text()) == {"a": [1, 2.5, None]}
    assert names(tmp_path / "deep") == ["a.bin", "b.txt", "c.json"]


def test_permissions_are_those_of_a_plain_open(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_text(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_full_disk_keeps_the_old_file_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    target = tmp_path / "w.bin"
    target.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if stage == "fsync" else (Path, "replace")), full)
    with pytest.raises(ArtefactError, match=r"w\.bin: No space left on device; free space"):
        write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["w.bin"]


def test_interrupt_leaves_no_half_written_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "w.bin", b"new")
    assert names(tmp_path) == []


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtefactError, match=r"cannot write .*file.*a\.json"):
        write_json(tmp_path / "file" / "a.json", {})


def test_json_refuses_nan_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert names(tmp_path) == []

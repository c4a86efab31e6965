"""Recordings, texts, tables and tokenizers from strangers: one line in seconds, or the data."""

import gzip
import io
import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from prunegraph.core.errors import DataError, ModelError
from prunegraph.data import recordings, text
from prunegraph.data.recordings import read_recordings
from prunegraph.data.sentences import EncodedSentences, SentenceTable, cut, read_table
from prunegraph.data.text import read_text, read_tokens
from prunegraph.models.pretrained import load_tokenizer
from prunegraph.runs.pretrained import model_card
from prunegraph.tasks.texts import encoder
from support.recordings import HEAD, pack, wav, write

pytestmark = pytest.mark.timeout(60)


def check_refused(make: Callable[[], object], message: str) -> None:
    """Check that one line says what is wrong."""
    with pytest.raises((DataError, ModelError), match=message) as raised:
        make()
    line = str(raised.value)
    assert line.isprintable()
    assert len(line) < 600


@pytest.mark.parametrize("name", ["digits.csv", "en.zip"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_recordings_are_regular_files(tmp_path: Path, name: str, kind: str) -> None:
    path = pack(tmp_path) / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    check_refused(lambda: read_recordings(tmp_path), rf"{name} is a pipe or a device: give a file")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.npy", "a.tsv"])
def test_texts_and_arrays_are_regular_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "other.txt").write_text("words")
    os.mkfifo(tmp_path / name)
    check_refused(lambda: read_tokens(tmp_path / name, list, "test"), "is a pipe or a device")
    if name.startswith("a.txt"):
        check_refused(lambda: read_text(tmp_path), "is a pipe or a device")


@pytest.mark.parametrize("language", ["../../secret", "/etc/x", "", "..", "a\\b", "c:x"])
def test_the_name_of_a_language_is_no_path(tmp_path: Path, language: str) -> None:
    write(tmp_path, [f'a,"{language}",1,s,train'], {})
    check_refused(lambda: read_recordings(tmp_path), "line 2: .* is no name of a language")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,en", "line 2: it has no digit: repair the line"),
        ("a,e\x1b[2Jn,1,s,train", "line 2: its language is no printable text"),
        ("a,en,1,s,train,more", "line 2: it has more fields than line 1"),
        ("a,en," + "1" * 5000 + ",s,train", "line 2: its digit is no printable text of at most"),
        ('"a\nb",en,1,s,train', "its file is no printable text"),
        ("a,en,1,s," + "x" * 200, "is of split 'x+'"),
        ("a" * 200_000 + ",en,1,s,train", "cannot be read .*field larger than"),
        ("\udcff,en,1,s,train", "cannot be read .*utf-8"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    content = f"{HEAD}\n{row}\n".encode(errors="surrogateescape")
    (tmp_path / "digits.csv").write_bytes(content)
    check_refused(lambda: read_recordings(tmp_path), message)


def test_a_table_of_recordings_has_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(tmp_path)
    monkeypatch.setattr(recordings, "MOST_ROWS", 11)
    check_refused(lambda: read_recordings(tmp_path), "has more than 11 rows")
    with (tmp_path / "digits.csv").open("wb") as stream:
        stream.truncate(2**40)
    check_refused(lambda: read_recordings(tmp_path), "is larger than")


def repacked(folder: Path, method: int, content: bytes) -> Path:
    """Give the first English clip another content, packed in a way."""
    kept: dict[str, bytes] = {}
    with zipfile.ZipFile(folder / "en.zip") as archive:
        kept = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "en.zip", "w", method) as archive:
        for name, old in kept.items():
            archive.writestr(name, content if name == "en-train-1" else old)
    return folder


def test_a_clip_is_measured_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(tmp_path)
    monkeypatch.setattr(recordings, "MAX_CLIP_BYTES", 100_000)
    repacked(tmp_path, zipfile.ZIP_DEFLATED, bytes(10**6))
    check_refused(lambda: read_recordings(tmp_path), "en-train-1 unpacks to 1,000,000 bytes")
    path = tmp_path / "en.zip"
    content = path.read_bytes()
    lie = content.replace((10**6).to_bytes(4, "little"), (999).to_bytes(4, "little"))
    assert lie != content
    path.write_bytes(lie)  # the headers say that it is short
    check_refused(lambda: read_recordings(tmp_path), r"en-train-1 that can be read \(damaged")
    repacked(pack(tmp_path), zipfile.ZIP_BZIP2, wav())  # its reader knows no limit
    check_refused(
        lambda: read_recordings(tmp_path), "en-train-1 is packed by another method than deflate"
    )


def test_sound_is_measured_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sound(frames: int, channels: int = 1) -> bytes:
        content = io.BytesIO()
        soundfile.write(content, np.zeros((frames, channels), np.float32), 16_000, format="FLAC")
        return content.getvalue()

    asked: list[int] = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda self, frames=-1, **options: asked.append(frames) or read(self, frames, **options),
    )
    long = sound(16_000 * 60)
    check_refused(
        lambda: read_recordings(pack(tmp_path, en_train_1=long)), "en-train-1 is shorter than"
    )
    assert max(asked) <= 30 * 16_000 + 1
    assert min(asked) > 0
    wide = sound(16_000, channels=8)
    monkeypatch.setattr(recordings, "MOST_CHANNELS", 7)
    check_refused(
        lambda: read_recordings(pack(tmp_path, en_train_1=wide)), "en-train-1 has 8 channels"
    )
    monkeypatch.setattr(recordings, "SPARE_SECONDS", 20.0)
    silent = pack(tmp_path, en_train_1=sound(16_000 * 25))
    repacked(silent, zipfile.ZIP_DEFLATED, sound(16_000 * 25))
    check_refused(lambda: read_recordings(silent), "holds more sound than speech of its size")


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_zip_is_read_or_told_in_one_line(
    tmp_path: Path, seed: int, mutators: dict[str, Callable[..., bytes]]
) -> None:
    path = pack(tmp_path) / ("digits.csv" if seed % 4 == 0 else "en.zip")
    path.write_bytes(mutators["bytes"](path.read_bytes(), Random(seed)))
    try:
        assert len(read_recordings(tmp_path).train) <= 4
    except DataError as error:
        assert str(error).isprintable()


def test_a_table_of_many_splits_is_read_in_one_pass(tmp_path: Path) -> None:
    path = tmp_path / "toy.tsv"
    rows = [f"s{number}\t{number % 2}\tword" for number in range(20_000)]
    rows += ["train\t0\tword", "train\t1\tword"]
    path.write_text("\n".join(["split\tlabel\tsentence1", *rows]))
    started = time.monotonic()
    table = read_table(path)
    assert time.monotonic() - started < 5.0
    assert table.splits["s7"].tolist() == [7]
    assert table.splits["train"].tolist() == [20_000, 20_001]
    check_refused(lambda: cut(table, SimpleNamespace(), "test", 0), "has no rows of split test")  # type: ignore[arg-type]


def test_a_text_that_is_a_mark_of_its_order_alone_is_empty(tmp_path: Path) -> None:
    (tmp_path / "toy.tsv").write_bytes(b"\xef\xbb\xbf")
    check_refused(lambda: read_table(tmp_path / "toy.tsv"), "is empty")


def test_a_folder_of_texts_has_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress(b"word " * 1000))
    assert len(read_text(tmp_path)) == 15_004
    monkeypatch.setattr(text, "MAX_TEXT_BYTES", 12_000)
    check_refused(lambda: read_text(tmp_path), "holds more than 12,000 bytes: give a part of it")


def npy(header: str, content: bytes = b"") -> bytes:
    head = header.encode("latin-1")
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + content


@pytest.mark.parametrize(
    "content",
    [
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776,), }"),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (4611686018427387904, 8), }"),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-3,), }", bytes(64)),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (10,), }", bytes(64)),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", bytes(64)),
        npy("{'descr': '<i0', 'fortran_order': False, 'shape': (1,), }", bytes(64)),
        npy("{'descr': ('<i8', (1000000000,)), 'fortran_order': False, 'shape': (9,), }"),
        npy("{'descr': '<i8', 'fortran_order': 1, 'shape': (1,), }", bytes(64)),
        npy("{'descr': " + "(" * 9000),
        npy("{'descr': '<i8'" + "'''"),
        npy("{" * 200 + "[" * 200),
        npy("-" * 9000 + "1"),
        npy("\0"),
        npy("{}"),
        b"\x93NUMPY\x09\x00",
        b"\x93NUMPY",
        b"PK\x03\x04" + bytes(64),
        b"",
    ],
)
def test_the_header_of_an_array_may_lie(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    check_refused(
        lambda: read_tokens(path, None, "test"), "a.npy cannot be read as an array of tokens"
    )


def test_an_archive_of_arrays_is_no_array(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as stream:
        np.savez_compressed(stream, tokens=np.zeros(10**6, np.int64))
    check_refused(
        lambda: read_tokens(tmp_path / "a.npy", None, "test"), "cannot be read as an array of"
    )


def test_an_array_of_tokens_has_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", np.zeros(1000, np.uint8))
    assert len(read_tokens(tmp_path / "a.npy", None, "test")) == 1000
    monkeypatch.setattr(text, "MOST_TOKENS", 999)
    check_refused(lambda: read_tokens(tmp_path / "a.npy", None, "test"), "holds 1,000 tokens")


def tokenizer_folder(folder: Path, **parts: Any) -> Path:
    """Write a tokenizer of two words, some of its parts changed."""
    model = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    nothing = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    content = {"version": "1.0", "added_tokens": [], **dict.fromkeys(nothing), "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content | parts))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_tokenizer_that_panics_when_it_is_loaded_is_told(tmp_path: Path) -> None:
    folder = tokenizer_folder(
        tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    )
    check_refused(
        lambda: load_tokenizer(folder), "the tokenizer in .* cannot be loaded: PanicException"
    )


PANICS = {"type": "FixedLength", "length": 0}
FAILS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}


@pytest.mark.parametrize("parts", [{"pre_tokenizer": PANICS}, {"model": FAILS}])
def test_a_tokenizer_that_panics_on_a_text_is_told(tmp_path: Path, parts: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path, **parts))
    encode = encoder(tokenizer)
    assert encode is not None
    check_refused(lambda: encode("b"), "the tokenizer fails on a text")
    table = SentenceTable(name="toy", rows=[("b",)], labels=np.zeros(1), splits={})  # type: ignore[arg-type]
    check_refused(lambda: EncodedSentences(table, tokenizer, 8), "the tokenizer fails on a text")


def test_a_model_card_escapes_names() -> None:
    name = "a`b\n---\n<script>x</script> | ![x](http://y) # z"
    costs = {"macs": 2, "params": 2, "score": 0.5}
    report = {"dense": costs, "pruned": costs | {"widths": {name: 3}}, "method": name}
    report |= {"budget": {"keep_macs": name}, "networks_evaluated": 1, "score_name": name}
    result = SimpleNamespace(report=report, task=SimpleNamespace(name=name))
    plain = {"name": "plain", "method": "l1", "score_name": "accuracy"}
    tame = report | {**plain, "budget": {}, "pruned": costs | {"widths": {"a.b_c": 3}}}
    lines = model_card(result, "").splitlines()  # type: ignore[arg-type]
    others = model_card(SimpleNamespace(report=tame, task=SimpleNamespace(name="x")), "")  # type: ignore[arg-type]
    assert len(lines) == len(others.splitlines())
    assert lines.count("---") == 2
    outside = "\n".join(lines).replace("\\<", "").replace("\\!", "")
    assert "``a`b --- <script>x</script> | ![x](http://y) # z``: 3" in outside  # code as it is
    assert "# a\\`b --- \\<script\\>x\\</script\\> \\| \\!\\[x\\](http://y) \\# z, pruned" in lines
    assert "- `a.b_c`: 3" in others

"""Folders of recordings: what is read, and one line for what cannot be."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from prunegraph.core.errors import DataError
from prunegraph.data.recordings import read_recordings

HEAD = "file,language,digit,speaker,split"


def wav(seconds: float = 0.3, rate: int = 16_000, pitch: float = 300.0) -> bytes:
    content, times = io.BytesIO(), np.arange(int(seconds * rate)) / rate
    soundfile.write(content, 0.5 * np.sin(2 * np.pi * pitch * times), rate, format="WAV")
    return content.getvalue()


def write(
    folder: Path, rows: list[str], clips: dict[str, dict[str, bytes]], head: str = HEAD
) -> Path:
    (folder / "digits.csv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    for language, files in clips.items():
        with zipfile.ZipFile(folder / f"{language}.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    return folder


def pack(folder: Path, **changed: bytes) -> Path:
    """Write two languages with two digits of a speaker a split."""
    rows, clips = [], {}
    for language in ("en", "uk"):
        files = {}
        for split in ("train", "val", "test"):
            for digit in (1, 2):
                name = f"{language}-{split}-{digit}"
                files[name] = changed.get(name.replace("-", "_"), wav(pitch=200.0 * digit))
                rows.append(f"{name},{language},{digit},{language}{split},{split}")
        clips[language] = files
    return write(folder, rows, clips)


def test_a_folder_is_read(tmp_path: Path) -> None:
    data = read_recordings(pack(tmp_path), words=1)
    assert data.languages == ("en", "uk")
    assert (len(data.train), len(data.search), len(data.test)) == (4, 4, 4)
    batch = next(iter(data.test.batches(2)))
    assert batch["features"].shape == (2, 30, 80)
    texts = [data.alphabet.decode(row.tolist()) for row in batch["targets"]]
    assert texts == ["one", "two"]
    assert not data.proxy


def test_strings_of_words_are_of_one_speaker_and_some_languages(tmp_path: Path) -> None:
    data = read_recordings(pack(tmp_path), ["uk"])
    whole = read_recordings(pack(tmp_path))
    assert data.languages == ("uk",)
    assert data.alphabet == whole.alphabet
    lengths = {len(part) for part in data.train.source.parts}  # type: ignore[attr-defined]
    assert lengths == {1, 2, 3}


def test_clips_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="en-val-1 has 8000 samples a second, 16000 are needed"):
        read_recordings(pack(tmp_path, en_val_1=wav(rate=8000)))
    with pytest.raises(DataError, match=r"uk.zip holds no clip uk-train-2 that can be read"):
        read_recordings(pack(tmp_path, uk_train_2=b"no sound"))
    with pytest.raises(DataError, match="en-val-1 is empty"):
        read_recordings(pack(tmp_path, en_val_1=wav(seconds=0.0)))


def test_tables_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"digits.csv cannot be read.*give the folder that holds"):
        read_recordings(tmp_path)
    write(tmp_path, ["a,en,1,s,train"], {}, head="file,language,digit,who,split")
    with pytest.raises(DataError, match="lacks the column speaker"):
        read_recordings(tmp_path)
    write(tmp_path, ["a,de,1,s,train"], {})
    with pytest.raises(DataError, match="says '1' in 'de', which has no written form"):
        read_recordings(tmp_path)
    write(tmp_path, ["a,en,1,s,dev"], {})
    with pytest.raises(DataError, match="split 'dev', none of train, val, test"):
        read_recordings(tmp_path)
    write(tmp_path, ["a,en,1,s,train"], {"en": {"a": wav()}})
    with pytest.raises(DataError, match="has no val clips of language en"):
        read_recordings(tmp_path)
    with pytest.raises(DataError, match="has no language 'fr'; it has: en"):
        read_recordings(tmp_path, ["fr"])
    (tmp_path / "en.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"en.zip cannot be read"):
        read_recordings(tmp_path)


def test_a_text_of_ones_own_is_said_in_any_language(tmp_path: Path) -> None:
    rows = [f"{s},de,1,s{s},{s},eins" for s in ("train", "val", "test")]
    clips = {"de": dict.fromkeys(("train", "val", "test"), wav())}
    data = read_recordings(write(tmp_path, rows, clips, head=f"{HEAD},text"), words=1)
    assert {*data.alphabet.tokens} == {*"eins "}


@pytest.mark.data
def test_the_pack_of_spoken_digits_is_read(shared_dir: Path) -> None:
    data = read_recordings(shared_dir / "pack" / "speech", ["en"], words=1)
    assert (len(data.train), len(data.search), len(data.test)) == (1200, 300, 300)
    speakers = [
        {*split.source.clips.speakers}  # type: ignore[attr-defined]
        for split in (data.train, data.search, data.test)
    ]
    assert not speakers[0] & speakers[1] | speakers[0] & speakers[2] | speakers[1] & speakers[2]

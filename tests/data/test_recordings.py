"""Folders of recordings: what is read, and one line for what cannot be."""

import zipfile
from pathlib import Path

import pytest

from prunegraph.core.errors import DataError
from prunegraph.data.recordings import read_recordings
from support.recordings import HEAD, pack, wav, write


def test_a_folder_is_read(tmp_path: Path) -> None:
    data = read_recordings(pack(tmp_path))
    assert data.languages == ("en", "uk")
    assert (len(data.train), len(data.search), len(data.test)) == (4, 4, 4)
    batch = next(iter(data.test.batches(2)))
    assert batch["features"].shape == (2, 30, 80)
    texts = [data.alphabet.decode(row.tolist()) for row in batch["targets"]]
    assert texts == ["one", "two"]
    assert not data.proxy


def test_strings_of_words_are_of_one_speaker_and_some_languages(tmp_path: Path) -> None:
    data = read_recordings(pack(tmp_path), ["uk"], words=3)
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
    for seconds in (0.0, 0.001):
        with pytest.raises(DataError, match=r"en-val-1 is shorter than 0\.025 s, .*: leave it out"):
            read_recordings(pack(tmp_path, en_val_1=wav(seconds=seconds)))
    path = pack(tmp_path) / "en.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("en-train-1", wav())
    content = bytearray(path.read_bytes())
    content[40] ^= 0xFF  # of the compressed bytes
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"en-train-1 that can be read \(damaged, .*: copy it"):
        read_recordings(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", wav())
    with pytest.raises(DataError, match=r"en-train-1 that can be read \(missing\): copy it"):
        read_recordings(tmp_path)


def test_tables_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*digits\.csv: check the path"):
        read_recordings(tmp_path)
    write(tmp_path, ["a,en,1,s,train"], {}, head="file,language,digit,who,split")
    with pytest.raises(DataError, match="lacks the column speaker"):
        read_recordings(tmp_path)
    write(tmp_path, ["a,de,1,s,train"], {})
    with pytest.raises(DataError, match="says '1' in 'de', which has no written form"):
        read_recordings(tmp_path)
    write(tmp_path, ["a,en,²,s,train"], {})
    with pytest.raises(DataError, match="says '²' in 'en', which has no written form"):
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
    data = read_recordings(write(tmp_path, rows, clips, head=f"{HEAD},text"))
    assert {*data.alphabet.tokens} == {*"eins "}


@pytest.mark.data
def test_the_pack_of_spoken_digits_is_read(shared_dir: Path) -> None:
    data = read_recordings(shared_dir / "pack" / "speech", ["en"])
    assert (len(data.train), len(data.search), len(data.test)) == (1200, 300, 300)
    speakers = [
        {*split.source.clips.speakers}  # type: ignore[attr-defined]
        for split in (data.train, data.search, data.test)
    ]
    assert not speakers[0] & speakers[1] | speakers[0] & speakers[2] | speakers[1] & speakers[2]

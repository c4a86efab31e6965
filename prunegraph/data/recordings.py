"""Recordings of single words in a folder: ``digits.csv`` and a zip of clips for each language."""

import csv
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunegraph.core.errors import DataError, one_line
from prunegraph.core.extras import library
from prunegraph.core.reading import check_file, read_bytes
from prunegraph.data.speech import (
    Alphabet,
    Clips,
    SpeechData,
    chosen_languages,
    drawn_utterances,
    make_speech_data,
)

TABLE = "digits.csv"

COLUMNS = ("file", "language", "digit", "speaker", "split")
"""Of the table; a column ``text`` says what is said where it is no digit of ``DIGITS``."""

SPLITS = ("train", "val", "test")

RATE = 16_000
"""Samples a second of a clip."""

BANDS = 80
"""Of the log-mel features, those of Whisper: a frame is 10 ms."""

SHORTEST, LONGEST = 0.025, 30.0
"""Seconds of a clip; a frame sees as much as the shortest."""

MAX_TABLE_BYTES, MOST_ROWS, MOST_LETTERS = 2**26, 500_000, 255
"""Of the table: its bytes, its rows, and the letters of a field but ``text``."""

MAX_CLIP_BYTES, MOST_CHANNELS = 2**25, 8
"""Of a clip: its file's bytes, and its channels; the longest one as float64 fits."""

LEAST_BYTES, SPARE_SECONDS = 500, 600.0
"""Speech takes at least so many bytes a second, and a zip that packs more sound is a trap; a few
minutes of silence are none."""

STRINGS = {"train": 1200, "val": 150, "test": 250}
"""Utterances of each language, where they are of several words."""

DIGITS = {
    "en": "zero one two three four five six seven eight nine",
    "uk": "нуль один два три чотири п'ять шість сім вісім дев'ять",
    "gu": "શૂન્ય એક બે ત્રણ ચાર પાંચ છ સાત આઠ નવ",
    "bn": "শূন্য এক দুই তিন চার পাঁচ ছয় সাত আট নয়",
}
"""Written forms of 0 to 9."""


def read_recordings(
    folder: Path | str, languages: Sequence[str] | None = None, *, words: int = 1
) -> SpeechData:
    """Return the recordings of a folder; its split ``val`` is searched on.

    Speakers of one split should be in no other.

    Args:
        folder: it holds ``digits.csv`` with ``COLUMNS`` and ``LANGUAGE.zip`` with the files.
        languages: some of them; None = all. The alphabet is that of all.
        words: 1 = each clip is an utterance; more = an utterance is so many clips of a speaker in a
            row, or fewer, drawn by a fixed seed.

    Raises:
        ConfigError: soundfile or transformers is not installed.
        DataError: a file is missing or damaged, a clip has another rate, a language has no clips.
    """
    folder = Path(folder)
    rows = _read_table(folder)
    known = list(dict.fromkeys(row["language"] for row in rows))
    names = chosen_languages(known, languages, str(folder))
    texts = {id(row): _text(row, folder) for row in rows}
    letters = sorted({letter for text in texts.values() for letter in text} | {" "})
    alphabet = Alphabet(tokens=tuple(letters))
    features: dict[int, Tensor] = {}
    for name in names:
        own = [row for row in rows if row["language"] == name]
        read = _read_clips(folder / f"{name}.zip", [row["file"] for row in own])
        features |= {id(row): clip for row, clip in zip(own, read, strict=True)}
    clips: dict[str, Clips] = {}
    utterances: dict[str, list[tuple[int, ...]]] = {}
    for seed, split in enumerate(SPLITS):
        own = [row for row in rows if row["split"] == split and row["language"] in names]
        own.sort(key=lambda row: names.index(row["language"]))
        clips[split] = Clips(
            features=[features[id(row)] for row in own],
            texts=[texts[id(row)] for row in own],
            languages=[names.index(row["language"]) for row in own],
            speakers=[row["speaker"] for row in own],
            names=tuple(names),
            alphabet=alphabet,
        )
        if words == 1:
            utterances[split] = [(clip,) for clip in range(len(own))]
        else:
            count = STRINGS[split]
            utterances[split] = drawn_utterances(clips[split], count, (1, words), seed)
    return make_speech_data(folder.resolve().name, clips, utterances, distort=True)


def _read_table(folder: Path) -> list[dict[str, str]]:
    path = folder / TABLE
    content = read_bytes(path, MAX_TABLE_BYTES, DataError)
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            msg = f"{path} lacks the column {missing[0]}"
            raise DataError(msg)
        rows: list[dict[str, str]] = []
        for row in reader:
            rows.append(_checked_row(row, f"{path}, line {reader.line_num}"))
            if len(rows) > MOST_ROWS:
                msg = f"{path} has more than {MOST_ROWS:,} rows: give a part of them"
                raise DataError(msg)
    except (UnicodeDecodeError, csv.Error) as error:
        msg = f"{path} cannot be read ({one_line(error, 100)}): copy it again"
        raise DataError(msg) from error
    if not rows:
        msg = f"{path} lacks rows"
        raise DataError(msg)
    return rows


def _checked_row(row: dict[Any, Any], where: str) -> dict[str, str]:
    """Return a row if nothing is wrong with it."""
    if why := _wrong(row):
        msg = f"{where}: {why}: repair the line"
        raise DataError(msg)
    return row


def _wrong(row: dict[Any, Any]) -> str | None:
    """Say which field of a row is missing, cannot be shown, or is of no use."""
    if None in row:
        return "it has more fields than line 1"
    for name in COLUMNS:
        if row[name] is None:
            return f"it has no {name}"
        if len(row[name]) > MOST_LETTERS or not row[name].isprintable():
            return f"its {name} is no printable text of at most {MOST_LETTERS} letters"
    if not row["language"].strip(" .") or set(row["language"]) & set("/\\:"):
        return f"{row['language']!r} is no name of a language"
    if row["split"] not in SPLITS:
        return f"{row['file']} is of split {row['split']!r}, none of {', '.join(SPLITS)}"
    return None


def _text(row: dict[str, str], folder: Path) -> str:
    """Return what is said in a clip."""
    if row.get("text"):
        return row["text"]
    words = DIGITS.get(row["language"], "").split()
    digit = row["digit"]
    if not (digit.isdecimal() and len(digit) < 4 and int(digit) < len(words)):
        msg = (
            f"{folder / TABLE}: {row['file']} says {digit!r} in {row['language']!r}, which "
            "has no written form: add a column text"
        )
        raise DataError(msg)
    return words[int(digit)]


def _read_clips(path: Path, files: Sequence[str]) -> list[Tensor]:
    """Return the features of the clips of a zip, float16 ``[frames, BANDS]``.

    Raises:
        DataError: the zip or a clip is missing or damaged, or unpacks to more than speech does.
    """
    reader, extract = library("recordings need", "soundfile", "speech"), _features()
    check_file(path, DataError)
    left = path.stat().st_size / LEAST_BYTES + SPARE_SECONDS
    clips = []
    try:
        with zipfile.ZipFile(path) as archive:
            for name in files:
                wave = _read_clip(reader, archive, name, path)
                left -= len(wave) / RATE
                if left < 0.0:
                    msg = f"{path} holds more sound than speech of its size does: copy it again"
                    raise DataError(msg)
                clips.append(extract(wave))
    except DataError:
        raise
    except Exception as error:  # on headers that lie, zipfile raises about anything
        msg = f"{path} cannot be read ({one_line(error, 100)}): copy it again"
        raise DataError(msg) from error
    return clips


def _read_clip(reader: Any, archive: zipfile.ZipFile, name: str, path: Path) -> Any:
    """Return the samples of a clip, which is measured before it is unpacked and decoded."""
    where = f"{path}: {name}"
    try:
        content = _unpacked(archive, name, where)
        with reader.SoundFile(io.BytesIO(content)) as sound:
            rate, channels = sound.samplerate, sound.channels
            most = int(LONGEST * RATE) + 1 if rate == RATE and channels <= MOST_CHANNELS else 0
            wave = sound.read(min(sound.frames, most), dtype="float32", always_2d=True)
    except DataError:
        raise
    except Exception as error:  # of zipfile, zlib or soundfile
        why = "missing" if isinstance(error, KeyError) else "damaged, or no format of soundfile"
        found = f"{path} holds no clip {name} that can be read ({why})"
        msg = f"{found}: copy it again, or drop its row"
        raise DataError(msg) from error
    if rate != RATE:
        msg = f"{where} has {rate} samples a second, {RATE} are needed: resample it"
        raise DataError(msg)
    if channels > MOST_CHANNELS:
        msg = f"{where} has {channels} channels, more than {MOST_CHANNELS}: mix them"
        raise DataError(msg)
    if not SHORTEST <= len(wave) / RATE <= LONGEST or not np.isfinite(wave).all():
        limits = f"shorter than {SHORTEST:g} s, longer than {LONGEST:g} s"
        msg = f"{where} is {limits}, or holds NaN: leave it out"
        raise DataError(msg)
    return wave.mean(1)


def _unpacked(archive: zipfile.ZipFile, name: str, where: str) -> bytes:
    """Return the bytes of a file in a zip, of which no more are unpacked than a clip has."""
    member = archive.getinfo(name)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        msg = f"{where} is packed by another method than deflate: pack it anew"
        raise DataError(msg)
    if member.file_size > MAX_CLIP_BYTES:
        msg = f"{where} unpacks to {member.file_size:,} bytes, more than a clip has: leave it out"
        raise DataError(msg)
    with archive.open(member) as stream:
        return stream.read(MAX_CLIP_BYTES)  # a number: else zipfile unpacks up to a gigabyte


def _features() -> Any:
    """Return the function from samples to features: Whisper's, without its padding."""
    transformers = library("recordings need", "transformers", "speech")
    extractor = transformers.WhisperFeatureExtractor(feature_size=BANDS)

    def extract(wave: Any) -> Tensor:
        inputs = extractor(wave, sampling_rate=RATE, padding="longest", return_tensors="pt")
        features: Tensor = inputs["input_features"][0].T
        return features.contiguous().to(torch.float16)

    return extract

"""Recordings of single words in a folder: ``digits.csv`` and a zip of clips for each language."""

import csv
import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunegraph.core.errors import DataError, one_line
from prunegraph.core.extras import library
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
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = [dict(row) for row in reader]
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        msg = f"{path} cannot be read ({one_line(error, 100)}): give the folder that holds it"
        raise DataError(msg) from error
    if missing or not rows:
        msg = f"{path} lacks {'the column ' + missing[0] if missing else 'rows'}"
        raise DataError(msg)
    odd = next((row for row in rows if row["split"] not in SPLITS), None)
    if odd is not None:
        msg = f"{path}: {odd['file']} is of split {odd['split']!r}, none of {', '.join(SPLITS)}"
        raise DataError(msg)
    return rows


def _text(row: dict[str, str], folder: Path) -> str:
    """Return what is said in a clip."""
    if row.get("text"):
        return row["text"]
    words = DIGITS.get(row["language"], "").split()
    if not (row["digit"].isdecimal() and int(row["digit"]) < len(words)):
        msg = (
            f"{folder / TABLE}: {row['file']} says {row['digit']!r} in {row['language']!r}, which "
            "has no written form: add a column text"
        )
        raise DataError(msg)
    return words[int(row["digit"])]


def _read_clips(path: Path, files: Sequence[str]) -> list[Tensor]:
    """Return the features of the clips of a zip, float16 ``[frames, BANDS]``.

    Raises:
        DataError: the zip or a clip is missing or damaged.
    """
    reader, extract = library("recordings need", "soundfile", "speech"), _features()
    try:
        with zipfile.ZipFile(path) as archive:
            return [extract(_read_clip(reader, archive, name, path)) for name in files]
    except (OSError, zipfile.BadZipFile) as error:
        msg = f"{path} cannot be read ({one_line(error, 100)}): copy it again"
        raise DataError(msg) from error


def _read_clip(reader: Any, archive: zipfile.ZipFile, name: str, path: Path) -> Any:
    try:
        wave, rate = reader.read(io.BytesIO(archive.read(name)), dtype="float32", always_2d=True)
    except (KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        why = "missing" if isinstance(error, KeyError) else "damaged, or no format of soundfile"
        found = f"{path} holds no clip {name} that can be read ({why})"
        msg = f"{found}: copy it again, or drop its row"
        raise DataError(msg) from error
    if rate != RATE:
        msg = f"{path}: {name} has {rate} samples a second, {RATE} are needed: resample it"
        raise DataError(msg)
    if not SHORTEST <= len(wave) / RATE <= LONGEST or not np.isfinite(wave).all():
        limits = f"shorter than {SHORTEST:g} s, longer than {LONGEST:g} s"
        msg = f"{path}: {name} is {limits}, or holds NaN: leave it out"
        raise DataError(msg)
    return wave.mean(1)


def _features() -> Any:
    """Return the function from samples to features: Whisper's, without its padding."""
    transformers = library("recordings need", "transformers", "speech")
    extractor = transformers.WhisperFeatureExtractor(feature_size=BANDS)

    def extract(wave: Any) -> Tensor:
        inputs = extractor(wave, sampling_rate=RATE, padding="longest", return_tensors="pt")
        features: Tensor = inputs["input_features"][0].T
        return features.contiguous().to(torch.float16)

    return extract

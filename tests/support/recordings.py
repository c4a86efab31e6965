"""Folders of recordings for tests: tones of a few tenths of a second."""

import io
import zipfile
from pathlib import Path

import numpy as np
import soundfile

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

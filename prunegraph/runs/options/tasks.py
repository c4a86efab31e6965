"""The options that say what networks are for, and those of single methods."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from prunegraph.runs.options.help import HIDDEN, Section

DATASETS = "datasets:"
"""Begins a text that the library datasets loads, and no path."""

IMAGES = "image_classification"
"""The task of commands that take no other."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What networks are for; which of these options a task takes, ``runs/tasks`` says.

    Attributes:
        task: image_classification; causal_lm: --weights is a folder of a language model of
            transformers, default: a small one, trained first on text that comes with Python;
            text_classification: --weights is a folder of an encoder, the table is NAME.tsv or
            NAME.tsv.gz of --dataset NAME in --data-dir; speech_recognition: --weights is a folder
            of Whisper or a file of the small recogniser, --data-dir holds recordings (digits.csv
            and a zip a language), default: the small one, trained first on rows of digits.
        report_on: split of the table of sentences that is reported on, test or dev; default: test,
            else dev.
        calibration_text: text that a language model is measured and trained on: a file, a folder of
            text files, or datasets:NAME:CONFIG:SPLIT; default: the English text of Python.
        test_text: text that perplexities are reported on; default: another part of that text.
        calibration_tokens: tokens that each seed draws of the calibration text; default: 16384.
        window: tokens of a window; default: 1024, at most what the network takes.
        bos: take the text as the tokenizer encodes it; default: each window begins with the
            beginning-of-sequence token, where the tokenizer adds one to a text.
        languages: languages of the recordings that are used; default: all.
        method_options: METHOD.FIELD=VALUE of methods; on the command line --METHOD.FIELD VALUE.
    """

    section: ClassVar[str] = "data"
    task: Annotated[str, Section("what")] = IMAGES
    calibration_text: Path | None = None
    test_text: Path | None = None
    calibration_tokens: Annotated[int | None, HIDDEN] = None
    window: Annotated[int | None, HIDDEN] = None
    bos: Annotated[bool, HIDDEN] = True
    report_on: Annotated[str | None, HIDDEN] = None
    languages: Annotated[tuple[str, ...], HIDDEN] = ()
    method_options: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()

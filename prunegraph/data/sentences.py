"""Tables of labelled sentences, as those of GLUE: read, checked, encoded, cut into typed splits.

A table is UTF-8 (``.gz`` too) with tabs between its fields and no quotes. Its first line is
``split label sentence1``, with ``sentence2`` behind it where sentences come in pairs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunegraph.core.errors import DataError
from prunegraph.core.splits import Batch, HashedSource, SearchSplit, TestSplit, TrainSplit
from prunegraph.data.text import read_text, tokenizing

SUFFIXES = (".tsv", ".tsv.gz")

HEADER = ["split", "label", "sentence1", "sentence2"]

TESTS = ("test", "dev")
"""Splits that figures may be reported on; the first that a table has, unless one is asked for."""

MOST_CLASSES = 1000

SEARCH_SHARE, MOST_SEARCHED = 0.1, 1000
"""Of a table without rows to search on, this share of the train rows is set aside."""

Row = tuple[str, ...]
"""A sentence, or two."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SentenceTable:
    """A table as it was read.

    Attributes:
        name: of its file.
        rows: the sentences of each row.
        labels: ``[n]`` int64 class numbers, or float32 numbers of a regression.
        splits: the positions ``[k]`` of each split's rows.
    """

    name: str
    rows: Sequence[Row]
    labels: Tensor
    splits: Mapping[str, Tensor]

    @property
    def num_outputs(self) -> int:
        """Classes, or one number of a regression."""
        return 1 if self.labels.is_floating_point() else int(self.labels.max()) + 1


def find_table(folder: Path, name: str) -> Path:
    """Return the table of a name in a folder.

    Raises:
        DataError: there is none.
    """
    for suffix in SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    names = sorted(path.name.partition(".")[0] for path in folder.glob("*.tsv*"))
    msg = f"{folder} holds no {name}.tsv or {name}.tsv.gz; there are: {', '.join(names) or 'none'}"
    raise DataError(msg)


def read_table(path: Path | str) -> SentenceTable:
    """Read a table; labels that are all whole numbers are classes.

    Raises:
        DataError: it is missing, damaged, no such table, or has no rows to train on.
    """
    path = Path(path)
    first, *lines = read_text(path).splitlines()
    header = first.split("\t")
    if header not in (HEADER[:3], HEADER):
        msg = f"{path} begins with {first[:80]!r}, not with the fields {' '.join(HEADER)}, by tabs"
        raise DataError(msg)
    fields = [line.split("\t") for line in lines]
    for number, row in enumerate(fields, start=2):
        if len(row) != len(header):
            msg = f"{path}, line {number}: {len(row)} fields, not {len(header)}: repair the line"
            raise DataError(msg)
    places: dict[str, list[int]] = {}
    for place, row in enumerate(fields):
        places.setdefault(row[0], []).append(place)
    found = {name: torch.tensor(own) for name, own in places.items()}
    if len(found.get("train", ())) < 2:
        msg = f"{path} has fewer than two rows of split train: give a table to train on"
        raise DataError(msg)
    return SentenceTable(
        name=path.name.partition(".")[0],
        rows=[tuple(row[2:]) for row in fields],
        labels=_labels(path, [row[1] for row in fields]),
        splits=found,
    )


def _labels(path: Path, texts: Sequence[str]) -> Tensor:
    """Return class numbers, or other numbers.

    Raises:
        DataError: one is no number, or they are all of one class.
    """
    whole = (text.removeprefix("-").isdecimal() and len(text) < len(str(2**31)) for text in texts)
    if all(whole):
        labels = torch.tensor([int(text) for text in texts])
        least, most = int(labels.min()), int(labels.max())
        if least >= 0 and 1 <= most < MOST_CLASSES:
            return labels
        msg = (
            f"{path} has classes from {least} to {most}: give 0 and 1, at most {MOST_CLASSES}, and "
            "leave out rows whose label is hidden"
        )
        raise DataError(msg)
    values = []
    for number, text in enumerate(texts, start=2):
        try:
            values.append(float(text))
        except ValueError as error:
            msg = f"{path}, line {number}: the label {text[:40]!r} is no number"
            raise DataError(msg) from error
    numbers = torch.tensor(values)
    if not bool(numbers.isfinite().all()):
        msg = f"{path} has a label that is NaN or infinite: repair it"
        raise DataError(msg)
    return numbers


class EncodedSentences(HashedSource):
    """A ``Source`` of rows as tokens.

    Batches are what the tokenizer gives, ``{"input_ids": [b, t] int64, "attention_mask": [b, t],
    ...}``, padded to the longest row, with ``"labels"`` ``[b]``.

    Args:
        table: the rows.
        tokenizer: of transformers.
        window: most tokens of a row.
    """

    def __init__(self, table: SentenceTable, tokenizer: Any, window: int) -> None:
        columns = [list(column) for column in zip(*table.rows, strict=True)]
        with tokenizing():
            encoded = tokenizer(*columns, truncation=True, max_length=window, verbose=False)
        self.labels = table.labels
        self.fields: dict[str, list[Tensor]] = {
            name: [torch.tensor(row) for row in rows] for name, rows in encoded.items()
        }
        self.lengths = torch.tensor([len(row) for row in self.fields["input_ids"]])
        self.padding = {"input_ids": tokenizer.pad_token_id or 0}

    def load(self, index: Tensor, augment: torch.Generator | None = None) -> Batch:
        """Return the rows at ``index``; there is no augmentation to draw."""
        del augment
        places = index.tolist()
        batch = {
            name: torch.nn.utils.rnn.pad_sequence(
                [rows[place] for place in places],
                batch_first=True,
                padding_value=self.padding.get(name, 0),
            )
            for name, rows in self.fields.items()
        }
        return {**batch, "labels": self.labels[index]}

    def hashed(self) -> Any:
        """Return the hash of tokens and labels."""
        content = hashlib.sha256(self.labels.numpy().tobytes())
        content.update(self.lengths.numpy().tobytes())
        content.update(torch.cat(self.fields["input_ids"]).numpy().tobytes())
        return content


def cut(
    table: SentenceTable, source: EncodedSentences, test: str | None, seed: int
) -> tuple[TrainSplit, SearchSplit, TestSplit | None]:
    """Return the typed splits of a table: its rows ``train``, ``search``, and ``test`` or ``dev``.

    Without rows ``search`` a tenth of the train rows is set aside, fixed by a seed.

    Args:
        table: the rows.
        source: the same, encoded.
        test: what is reported on; None = ``test``, else ``dev``, else nothing.
        seed: of that cut.

    Raises:
        DataError: it is no split to report on, or the table has no such rows.
    """
    if test is not None and test not in TESTS:
        msg = f"{test!r} is nothing to report on, masks are chosen on it: give {' or '.join(TESTS)}"
        raise DataError(msg)
    if test is not None and test not in table.splits:
        known = ", ".join(ascii(name)[1:-1] for name in [*table.splits][:5])
        msg = f"{table.name} has no rows of split {test}; it has {known[:200]}"
        raise DataError(msg)
    name = test or next((each for each in TESTS if each in table.splits), None)
    train, search = table.splits["train"], table.splits.get("search")
    if search is None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        held_out = min(max(round(SEARCH_SHARE * len(train)), 1), MOST_SEARCHED)
        train, search = train[order[held_out:]], train[order[:held_out]]
    tested = None if name is None else TestSplit(source, table.splits[name])
    return TrainSplit(source, train), SearchSplit(source, search), tested

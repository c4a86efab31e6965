"""Texts as windows of tokens: read from files, encoded by a tokenizer, cut into typed splits."""

import codecs
import gzip
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunegraph.core.errors import DataError, first_line, is_panic, one_line
from prunegraph.core.reading import check_file
from prunegraph.core.splits import Batch, HashedSource, SearchSplit, TrainSplit

TEXT_SUFFIXES = (".txt", ".md", ".text", ".txt.gz", ".md.gz", ".text.gz")
"""Files of a folder that are read."""

MAX_TEXT_BYTES = 2**30
"""Of a file or all files of a folder, unpacked: about 250 million tokens."""

MOST_TOKENS = 2**28
"""Of an array: as many as a text of that size has."""

DATASETS_PREFIX = "datasets:"
"""Before the name of a data set of the ``datasets`` library: ``datasets:NAME[:CONFIG[:SPLIT]]``."""

BETWEEN = "\n\n"
"""What joins the documents of a text, as the scripts of GPTQ, SparseGPT and Wanda join them."""

IGNORED = -100
"""Label of a token that is not scored."""

SEARCH_SHARE = 5
"""At most a fifth of the calibration text is held out for searching."""

Text = str | Path | Sequence[str] | Tensor | np.ndarray[Any, Any] | Any
"""A text: a file (UTF-8, ``.gz`` too) or a folder of such; an array of tokens or its ``.npy`` file;
``datasets:NAME:CONFIG:SPLIT``, or such a data set; a list of documents."""

Encode = Callable[[str], Sequence[int]]
"""Makes token numbers of a text."""


class TokenWindows(HashedSource):
    """A ``Source`` of windows of tokens.

    Batches are ``{"input_ids": [b, t] int64}``. Where windows overlap there are ``"labels"``
    ``[b, t]`` too: the tokens, ``IGNORED`` where an earlier window has scored them. No label is
    shifted, and the first token of a window is not predicted.

    Args:
        tokens: ``[n]``, one text, or ``[rows, t]``, one window a row.
        window: tokens of a window; of rows, the first ones.
        stride: tokens from the start of a window to that of the next; None = no overlap.
        bos: the token that begins each window of one text and counts as one of its tokens; None =
            windows hold the text alone.

    Raises:
        DataError: there are fewer tokens than a window has, or window or stride is out of range.
    """

    def __init__(
        self, tokens: Tensor, window: int, stride: int | None = None, *, bos: int | None = None
    ) -> None:
        if window < 2:
            msg = f"window={window} must be at least 2: its first token is not predicted"
            raise DataError(msg)
        if stride is not None and not 1 <= stride <= window:
            msg = f"stride={stride} must lie in 1 to window={window}"
            raise DataError(msg)
        taken = window - (bos is not None)  # of the text
        if tokens.shape[-1] < taken or not tokens.numel():
            msg = (
                f"the text has {tokens.shape[-1]:,} tokens, a window {taken:,}: give a longer "
                "text, or a smaller window"
            )
            raise DataError(msg)
        self.tokens = tokens.to(torch.int32).contiguous()
        self.window = window
        self.bos = bos
        whole = stride is None or tokens.ndim == 2
        self.overlap = 0 if whole else max(taken - (stride or taken), 0)
        self.windows = (
            self.tokens[:, :window]
            if tokens.ndim == 2
            else self.tokens.unfold(0, taken, taken - self.overlap)
        )  # [n, taken]

    def __len__(self) -> int:
        return len(self.windows)

    def load(self, index: Tensor, augment: torch.Generator | None = None) -> Batch:
        """Return the windows at ``index``; there is no augmentation to draw."""
        del augment
        ids = self.windows[index].long()
        first = self.overlap
        if self.bos is not None:
            ids = torch.cat([ids.new_full((len(ids), 1), self.bos), ids], 1)
            first += 1
        if not self.overlap:
            return {"input_ids": ids}
        labels = ids.clone()
        labels[index > 0, :first] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def hashed(self) -> Any:
        """Return the hash of tokens, window, stride and the token before each window."""
        begin = "" if self.bos is None else f" {self.bos}"
        digest = hashlib.sha256(f"{self.windows.shape} {self.overlap}{begin}".encode())
        digest.update(self.tokens.numpy().data)
        return digest


def cut_search(
    source: TokenWindows, num_tokens: int, seed: int, *, search: bool
) -> tuple[TrainSplit, SearchSplit | None]:
    """Draw calibration windows at random, and others to search on.

    Args:
        source: the windows, which do not overlap.
        num_tokens: of the calibration windows, at least; the search windows are as many, but at
            most a fifth of all.
        seed: fixes the draw.
        search: whether to hold some out.

    Raises:
        DataError: there are fewer tokens to calibrate on than a window has, or one window only.
    """
    if num_tokens < source.window:
        msg = (
            f"calibration_tokens={num_tokens:,} is less than one window of {source.window:,}: "
            "ask for more tokens, or a smaller window"
        )
        raise DataError(msg)
    wanted, total = math.ceil(num_tokens / source.window), len(source)
    held_out = min(wanted, max(total // SEARCH_SHARE, 1)) if search else 0
    if total <= held_out:
        msg = (
            f"the calibration text fills one window of {source.window:,} tokens, and another is "
            "needed to search on: give a longer text, a smaller window, or search="
        )
        raise DataError(msg)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    train = TrainSplit(source, order[held_out:][:wanted])
    return train, SearchSplit(source, order[:held_out]) if search else None


def read_tokens(text: Text, encode: Encode | None, what: str) -> Tensor:
    """Return a text as tokens ``[n]``, or ``[rows, t]`` of an array of rows.

    Args:
        text: see ``Text``.
        encode: makes tokens of a text; None = there is no tokenizer, and only arrays are taken.
        what: name of the argument, for errors.

    Raises:
        DataError: it cannot be read, or there is no tokenizer for it.
    """
    if isinstance(text, str | Path) and str(text).endswith(".npy"):
        text = _read_array(Path(text))
    if isinstance(text, Tensor):
        text = np.asarray(text.cpu() if text.dtype != torch.bfloat16 else text.float())
    if isinstance(text, np.ndarray):
        return _checked_array(text, what)
    if encode is None:
        msg = (
            f"{what} is a text and there is no tokenizer: give a network's folder that holds one, "
            "tokens as an array or a .npy file, or in Python tokenizer="
        )
        raise DataError(msg)
    found = read_text(text, what)
    return torch.tensor(encode(found), dtype=torch.int64)


@contextmanager
def tokenizing() -> Iterator[None]:
    """Tell in one error what a tokenizer raises; a panic of its Rust code is no ``Exception``.

    Raises:
        DataError: it fails on a text.
    """
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        msg = f"the tokenizer fails on a text ({one_line(error, 120)}): copy its files again"
        raise DataError(msg) from error


def read_text(text: Any, what: str = "the text") -> str:
    """Return what a file, the files of a folder, a data set or a list of documents holds.

    Raises:
        DataError: there is none, it is empty, or no UTF-8 text.
    """
    if isinstance(text, str) and text.startswith(DATASETS_PREFIX):
        text = _load_dataset(text)
    if isinstance(text, str | Path):
        return _read_path(Path(text), what)
    documents = text["text"] if "text" in (getattr(text, "column_names", None) or ()) else text
    if isinstance(documents, bytes) or not isinstance(documents, Sequence):
        try:  # a column of a data set is read when it is gone through
            documents = None if isinstance(documents, bytes | dict) else list(documents)
        except TypeError:
            documents = None
    if documents is None or not all(isinstance(item, str) for item in documents):
        msg = (
            f"{what} is a {type(text).__name__}: give a file, a folder, a list of texts, an array "
            "of tokens, or a data set with a column 'text'"
        )
        raise DataError(msg)
    joined = BETWEEN.join(documents)
    if not joined.strip():
        msg = f"{what} holds no text: give at least one document"
        raise DataError(msg)
    return joined


def _read_path(path: Path, what: str) -> str:
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.name.endswith(TEXT_SUFFIXES))
        if not files:
            msg = f"{path} holds no texts ({' '.join(TEXT_SUFFIXES)}): give a folder that does"
            raise DataError(msg)
        parts, left = [], MAX_TEXT_BYTES
        for item in files:
            part, size = _read_file(item, left)
            parts.append(part)
            left -= size
        return BETWEEN.join(parts)
    if not path.exists():
        msg = (
            f"{what}: there is no file or folder {path}: check the path, or write "
            f"{DATASETS_PREFIX}NAME for a data set"
        )
        raise DataError(msg)
    return _read_file(path, MAX_TEXT_BYTES)[0]


def _read_file(path: Path, left: int) -> tuple[str, int]:
    """Return the text of one file and its bytes, of which there are ``left`` at most.

    Raises:
        DataError: it is no regular file, empty, too large, damaged, or no UTF-8 text.
    """
    check_file(path, DataError)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            content = stream.read(left + 1)
    except (OSError, EOFError) as error:
        msg = f"{path} cannot be read ({first_line(error)}): fetch it again"
        raise DataError(msg) from error
    except Exception as error:  # zlib raises an error of its own
        msg = f"{path} is damaged ({one_line(error)}): fetch it again"
        raise DataError(msg) from error
    if len(content) > left:
        what = str(path) if left == MAX_TEXT_BYTES else f"{path.parent} with {path.name}"
        msg = f"{what} holds more than {MAX_TEXT_BYTES:,} bytes: give a part of it"
        raise DataError(msg)
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        msg = f"{path} is empty: give a file that holds text"
        raise DataError(msg)
    place = content.find(b"\0")
    if place >= 0:
        msg = f"{path} is no text (byte {place:,} is zero): give a UTF-8 text file"
        raise DataError(msg)
    try:
        return content.decode("utf-8-sig"), len(content)
    except UnicodeDecodeError as error:
        msg = f"{path} is no UTF-8 text (byte {error.start:,}): save it as UTF-8"
        raise DataError(msg) from error


def _read_array(path: Path) -> np.ndarray[Any, Any]:
    check_file(path, DataError)
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # what the file lacks takes no memory
    except Exception as error:  # on headers that lie, numpy raises about anything
        why = " ".join(first_line(error).split())[:100]
        msg = f"{path} cannot be read as an array of tokens ({why}): make it anew"
        raise DataError(msg) from error
    if array.size > MOST_TOKENS:
        msg = f"{path} holds {array.size:,} tokens, more than {MOST_TOKENS:,}: give a part of them"
        raise DataError(msg)
    return np.asarray(array)


def _checked_array(tokens: np.ndarray[Any, Any], what: str) -> Tensor:
    if tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2):
        msg = (
            f"{what} is an array of {tokens.dtype} and shape {list(tokens.shape)}, not token "
            "numbers [n] or [rows, tokens]"
        )
        raise DataError(msg)
    return torch.from_numpy(tokens.astype(np.int64))


def _load_dataset(spec: str) -> Any:
    """Return a data set by its name.

    Raises:
        DataError: the library is not installed, or cannot load it.
    """
    name, config, split = [*spec.removeprefix(DATASETS_PREFIX).split(":"), "", ""][:3]
    try:
        import datasets as library
    except ImportError as error:
        msg = f"{spec} needs the library `datasets`: pip install datasets, or give a text file"
        raise DataError(msg) from error
    try:
        return library.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # no network, no such name, no such split
        msg = f"{spec} cannot be loaded ({one_line(error, 200)}): check name, config and split"
        raise DataError(msg) from error

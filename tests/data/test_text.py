import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from prunegraph.core.errors import DataError
from prunegraph.core.splits import SearchSplit, TrainSplit
from prunegraph.data.embedded_text import embedded_text
from prunegraph.data.text import IGNORED, TokenWindows, cut_search, read_text, read_tokens


def test_windows_follow_one_another_and_the_rest_is_left_out() -> None:
    source = TokenWindows(torch.arange(23), 5)
    batch = source.load(torch.arange(len(source)))
    assert [*batch] == ["input_ids"]
    assert torch.equal(batch["input_ids"], torch.arange(20).view(4, 5))
    assert batch["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("stride", [1, 2, 4, 5])
def test_overlapping_windows_score_each_token_once(stride: int) -> None:
    source = TokenWindows(torch.arange(23), 5, stride)
    index = torch.arange(len(source))
    batch = source.load(index)
    labels = batch.get("labels", batch["input_ids"])[:, 1:]
    scored = labels[labels != IGNORED].tolist()
    assert len(set(scored)) == len(scored)
    overlapping = stride < 5  # else the first token of each window is not predicted
    assert scored == [*range(1, 23 - (23 - 5) % stride)] or not overlapping
    assert torch.equal(source.load(index.flip(0))["input_ids"], batch["input_ids"].flip(0))


@pytest.mark.parametrize("stride", [None, 1, 3, 4, 5])
def test_a_first_token_stands_before_each_window_and_every_other_is_scored_once(
    stride: int | None,
) -> None:
    source = TokenWindows(torch.arange(1, 23), 5, stride, bos=0)
    batch = source.load(torch.arange(len(source)))
    assert batch["input_ids"].shape == (len(source), 5)
    assert batch["input_ids"][:, 0].tolist() == [0] * len(source)
    step = min(stride or 4, 4)
    assert batch["input_ids"][1].tolist() == [0, *range(1 + step, 5 + step)]
    labels = batch.get("labels", batch["input_ids"])[:, 1:]
    assert labels[labels != IGNORED].tolist() == [*range(1, 23 - (22 - 4) % step)]


def test_rows_are_windows_and_may_be_shortened() -> None:
    rows = torch.arange(12).view(3, 4)
    assert torch.equal(TokenWindows(rows, 4).load(torch.tensor([2]))["input_ids"], rows[2:])
    assert torch.equal(TokenWindows(rows, 3).load(torch.tensor([1]))["input_ids"], rows[1:2, :3])


def test_the_fingerprint_names_tokens_window_and_stride() -> None:
    tokens = torch.arange(24)
    sources = [
        TokenWindows(tokens, 4),
        TokenWindows(tokens, 6),
        TokenWindows(tokens, 4, 2),
        TokenWindows(tokens.flip(0), 4),
        TokenWindows(tokens, 4, bos=0),
        TokenWindows(tokens, 4, bos=1),
    ]
    assert len({source.fingerprint() for source in sources}) == 6
    assert TokenWindows(tokens, 4, 4).fingerprint() == sources[0].fingerprint()


def test_search_windows_are_others_and_the_seed_fixes_both() -> None:
    source = TokenWindows(torch.arange(400), 4)
    train, search = cut_search(source, 90, 0, search=True)
    assert isinstance(train, TrainSplit)
    assert isinstance(search, SearchSplit)
    assert (len(train), len(search)) == (23, 20)  # at least 90 tokens; a fifth of 100 windows
    assert not {*train.index.tolist()} & {*search.index.tolist()}
    again, _ = cut_search(source, 90, 0, search=True)
    other, _ = cut_search(source, 90, 1, search=True)
    assert torch.equal(train.index, again.index)
    assert not torch.equal(train.index, other.index)
    whole, none = cut_search(source, 400, 0, search=False)
    assert (len(whole), none) == (100, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenWindows(torch.arange(3), 4), "3 tokens, a window 4: give a longer text"),
        (lambda: TokenWindows(torch.zeros(0, 4), 4), "give a longer text"),
        (lambda: TokenWindows(torch.arange(9), 1), "window=1 must be at least 2"),
        (lambda: TokenWindows(torch.arange(9), 4, 5), "stride=5 must lie in 1 to window=4"),
        (
            lambda: cut_search(TokenWindows(torch.arange(9), 4), 3, 0, search=True),
            "calibration_tokens=3 is less than one window of 4",
        ),
        (
            lambda: cut_search(TokenWindows(torch.arange(7), 4), 4, 0, search=True),
            "another is needed to search on",
        ),
    ],
)
def test_too_few_tokens_are_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_texts_of_every_form_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("zwei ä", encoding="utf-8")
    (tmp_path / "deep").mkdir()
    with gzip.open(tmp_path / "deep" / "a.txt.gz", "wt", encoding="utf-8") as file:
        file.write("one")
    (tmp_path / "picture.png").write_bytes(b"\0")
    assert read_text(tmp_path / "b.txt") == "zwei ä"
    assert read_text(tmp_path) == "zwei ä\n\none"
    assert read_text(["zwei ä", "one"]) == read_text(str(tmp_path))
    data = ColumnOnly(["zwei ä", "one"])
    assert read_text(data) == read_text(tmp_path)


class ColumnOnly:
    """What a data set of the ``datasets`` library has that is used."""

    column_names = ("text",)

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __getitem__(self, name: str) -> Any:
        assert name == "text"
        return iter(self.texts)


def test_arrays_of_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = np.arange(6, dtype=np.uint16).reshape(2, 3)
    np.save(tmp_path / "rows.npy", rows)
    for given in (tmp_path / "rows.npy", str(tmp_path / "rows.npy"), rows, torch.tensor(rows)):
        found = read_tokens(given, None, "test")
        assert found.dtype == torch.int64
        assert found.tolist() == rows.tolist()


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("unpickled",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: give a file that holds text"),
        (b" \n", "is empty"),
        (b"abc\0def", r"is no text \(byte 3 is zero\)"),
        (b"abc\xff\xfe", r"is no UTF-8 text \(byte 3\): save it as UTF-8"),
    ],
)
def test_files_that_hold_no_text_are_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    for where in (tmp_path / "text.txt", tmp_path):
        with pytest.raises(DataError, match=message) as raised:
            read_text(where)
        assert str(tmp_path / "text.txt") in str(raised.value)


def test_missing_and_damaged_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"test: there is no file or folder .*nowhere"):
        read_text(tmp_path / "nowhere", "test")
    with pytest.raises(DataError, match="holds no texts"):
        read_text(tmp_path)
    whole = gzip.compress(b"some words of a text " * 99)
    for number, damaged in enumerate((b"no gzip", whole[:-20], whole[:30] + b"\xff" * 30)):
        path = tmp_path / f"{number}.txt.gz"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{number}.txt.gz .*fetch it again"):
            read_text(path)


def test_nothing_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "tokens.npy", np.array([Harmful()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read as an array of tokens"):
        read_tokens(tmp_path / "tokens.npy", None, "test")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.rand(4), "an array of float32"),
        (np.zeros((1, 2, 3), np.int64), r"shape \[1, 2, 3\]"),
        (np.array(["a"]), "not token numbers"),
        ("a.txt", "is no tokenizer: give a network's folder"),
    ],
)
def test_what_is_no_array_of_tokens_is_one_line(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_tokens(given, None, "test")


@pytest.mark.parametrize("given", [5, b"bytes", {"text": 1}, [1, 2], None])
def test_what_is_no_text_is_one_line(given: Any) -> None:
    with pytest.raises(DataError, match=r"the text is a .*: give a file"):
        read_text(given)
    with pytest.raises(DataError, match="holds no text"):
        read_text(["", " "])


def test_the_library_of_data_sets_is_asked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the library `datasets`: pip install datasets"):
        read_text("datasets:some/texts")
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> ColumnOnly:
        asked.append((name, config, split))
        if name == "none":
            raise FileNotFoundError(name)
        return ColumnOnly(["words"])

    library = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert read_text("datasets:some/texts") == "words"
    assert read_text("datasets:some/texts:raw:test") == "words"
    with pytest.raises(DataError, match="datasets:none cannot be loaded"):
        read_text("datasets:none")
    assert asked[:2] == [("some/texts", None, "train"), ("some/texts", "raw", "test")]


def test_the_embedded_text_has_three_parts_without_a_common_paragraph() -> None:
    text = embedded_text()
    given = (text.train, text.search, text.test)
    parts = [{item for item in part if len(item) > 80} for part in given]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    sizes = [sum(map(len, part)) for part in given]
    assert sizes[0] > 200_000
    assert min(sizes[1:]) > 20_000

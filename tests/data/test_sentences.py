"""Tables of labelled sentences: read, cut into typed splits, encoded, refused."""

import gzip
import os
from pathlib import Path

import pytest
import torch

from prunegraph.core.errors import DataError
from prunegraph.core.splits import SearchSplit, TestSplit, TrainSplit
from prunegraph.data.sentences import EncodedSentences, cut, find_table, read_table
from support.sentences import WORDS, tiny_tokenizer, write_table

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers")


def lines_of(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_table_is_read_packed_too(tmp_path: Path) -> None:
    path = write_table(tmp_path / "toy.tsv", pairs=True, train=6, search=2, dev=2)
    packed = tmp_path / "packed.tsv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    plain, other = read_table(path), read_table(packed)
    assert (plain.name, other.name) == ("toy", "packed")
    assert plain.rows == other.rows
    assert len(plain.rows[0]) == plain.num_outputs == 2
    assert {name: len(rows) for name, rows in plain.splits.items()} == {
        "train": 6,
        "search": 2,
        "dev": 2,
    }
    assert find_table(tmp_path, "packed") == packed


def test_labels_that_are_no_whole_numbers_are_a_regression(tmp_path: Path) -> None:
    table = read_table(write_table(tmp_path / "toy.tsv", numbers=True))
    assert table.num_outputs == 1
    assert table.labels.unique().tolist() == [0.5, 1.5]


def test_rows_are_padded_to_the_longest_of_a_batch(tmp_path: Path) -> None:
    path = lines_of(
        tmp_path / "toy.tsv",
        "split\tlabel\tsentence1\tsentence2",
        "train\t1\tthe film\tis fine",
        "train\t0\tthe very poor story\tof two friends",
    )
    source = EncodedSentences(read_table(path), tiny_tokenizer(), window=8)
    batch = source.load(torch.tensor([0, 1]))
    assert batch["labels"].tolist() == [1, 0]
    assert batch["input_ids"].shape == (2, 8)  # the second one is cut
    assert batch["attention_mask"].sum(1).tolist() == [7, 8]
    assert batch["input_ids"][0, 7] == WORDS.index("[PAD]")
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    assert source.load(torch.tensor([0]))["input_ids"].shape == (1, 7)
    assert (
        source.fingerprint()
        != EncodedSentences(read_table(path), tiny_tokenizer(), 6).fingerprint()
    )


def test_splits_are_typed_and_reported_on_test_first(tmp_path: Path) -> None:
    table = read_table(write_table(tmp_path / "toy.tsv", test=10))
    source = EncodedSentences(table, tiny_tokenizer(), 16)
    parts = cut(table, source, None, 0)
    assert list(map(type, parts)) == [TrainSplit, SearchSplit, TestSplit]
    assert [len(part) for part in parts if part is not None] == [256, 64, 10]
    assert len(cut(table, source, "dev", 0)[2] or ()) == 64


def test_without_rows_to_search_on_some_train_rows_are_set_aside(tmp_path: Path) -> None:
    table = read_table(write_table(tmp_path / "toy.tsv", search=0, dev=0))
    source = EncodedSentences(table, tiny_tokenizer(), 16)
    train, search, test = cut(table, source, None, 1)
    assert test is None
    assert len(search) == 26
    assert sorted(torch.cat([train.index, search.index]).tolist()) == list(range(256))
    assert not torch.equal(cut(table, source, None, 2)[1].index, search.index)


HEAD = "split\tlabel\tsentence1"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["label,sentence", "1,fine"], "begins with 'label,sentence'"),
        ([HEAD, "train\t1\tfine", "train\t0"], "line 3: 2 fields, not 3"),
        ([HEAD, "train\t1\ta\tb", "train\t0\tc"], "line 2: 4 fields"),
        ([HEAD, "train\tgood\ta", "train\t0\tc"], "line 2: the label 'good' is no number"),
        ([HEAD, "train\t0.5\ta", "train\tnan\tc"], "NaN"),
        ([HEAD, "train\t0\ta", "train\t0\tc"], "classes from 0 to 0: give 0 and 1"),
        ([HEAD, "train\t0\ta", "train\t1000\tc"], "classes from 0 to 1000"),
        ([HEAD, "train\t0\ta", "train\t1\tc", "test\t-1\td"], "from -1 to 1: .* hidden"),
        ([HEAD, "dev\t0\ta", "train\t1\tc"], "fewer than two rows of split train"),
        ([HEAD], "fewer than two rows"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(
    lines: list[str], message: str, tmp_path: Path
) -> None:
    path = lines_of(tmp_path / "toy.tsv", *lines)
    with pytest.raises(DataError, match=message) as refused:
        read_table(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_and_splits_that_are_not_there(tmp_path: Path) -> None:
    write_table(tmp_path / "toy.tsv")
    with pytest.raises(DataError, match=r"no sst2\.tsv or .*there are: toy"):
        find_table(tmp_path, "sst2")
    with pytest.raises(DataError, match="no file"):
        read_table(tmp_path / "no.tsv")
    table = read_table(tmp_path / "toy.tsv")
    source = EncodedSentences(table, tiny_tokenizer(), 16)
    for split in ("search", "train"):  # selecting on what is reported
        with pytest.raises(DataError, match="nothing to report on"):
            cut(table, source, split, 0)
    with pytest.raises(DataError, match="no rows of split test"):
        cut(table, source, "test", 0)


@pytest.mark.data
def test_the_pack_s_tables(shared_dir: Path) -> None:
    folder = shared_dir / "pack" / "glue"
    if not folder.is_dir():
        pytest.skip("needs ../shared/pack/glue, which is absent")
    sizes = {"sst2": (62_690, 2), "cola": (7_751, 2), "mrpc": (3_668, 2), "stsb": (5_249, 1)}
    for name, (rows, outputs) in sizes.items():
        table = read_table(find_table(folder, name))
        assert (len(table.splits["train"]), table.num_outputs) == (rows, outputs)
        assert len(table.splits["search"]) >= 250

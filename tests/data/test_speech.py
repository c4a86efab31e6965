"""Utterances: alphabets, the proxy, batches of one language, augmentation."""

import dataclasses

import pytest
import torch

from prunegraph.core.errors import DataError
from prunegraph.core.splits import SearchSplit
from prunegraph.data.speech import DIRECTIONS, Alphabet, distorted, make_speech_data, proxy_speech
from support.speech import tiny_speech


def test_an_alphabet_takes_texts_there_and_back() -> None:
    letters, words = Alphabet(tokens=(" ", "a", "b")), Alphabet(tokens=("r1", "r2"), between="")
    assert letters.encode("ab a") == (2, 3, 1, 2)
    assert letters.decode((2, 0, 3, 1, 1, 2, 1)) == "ab a"
    assert words.decode(words.encode("r2 r1")) == "r2 r1"
    assert (len(letters), len(words)) == (4, 3)
    with pytest.raises(DataError, match="no 'c', which 'abc' holds"):
        letters.encode("abc")


def test_the_proxy_reads_the_same_digits_in_four_directions() -> None:
    data = proxy_speech()
    assert data.proxy
    assert data.languages == DIRECTIONS
    batch = next(iter(data.test.batches(3)))
    assert batch["features"].shape[2] == 8
    assert (batch["lengths"] == 8 * batch["target_lengths"]).all()
    clips = data.train.source.clips  # type: ignore[attr-defined]
    count = len(clips.texts) // 4
    right, left, down, up = (clips.features[n * count] for n in range(4))
    assert torch.equal(right, left.flip(0))
    assert torch.equal(down, up.flip(0))
    assert torch.equal(right, down.T)
    assert [clips.texts[n * count][0] for n in range(4)] == ["r", "l", "d", "u"]


def test_no_digit_is_in_two_splits() -> None:
    data = proxy_speech(["down"])
    seen = [
        {clip.numpy().tobytes() for clip in split.source.clips.features}  # type: ignore[attr-defined]
        for split in (data.train, data.search, data.test)
    ]
    assert len(seen[0] & seen[2]) + len(seen[1] & seen[2]) + len(seen[0] & seen[1]) == 0
    assert data.alphabet == proxy_speech(["up"]).alphabet


def test_batches_are_of_one_language_and_together_hold_all() -> None:
    split = tiny_speech().train
    for shuffle in (None, torch.Generator().manual_seed(0)):
        batches = list(split.batches(16, shuffle=shuffle))
        assert all(len(batch["languages"].unique()) == 1 for batch in batches)
        assert sum(len(batch["languages"]) for batch in batches) == len(split)
    firsts = [int(batch["languages"][0]) for batch in batches]
    assert firsts != sorted(firsts)
    rest = list(split.batches(16, shuffle=torch.Generator().manual_seed(0), skip=2))
    assert torch.equal(rest[0]["targets"], batches[2]["targets"])
    equal = list(split.equal_batches(4))
    assert all(len(batch["languages"].unique()) == 1 for batch in equal)


def test_augmentation_draws_other_clips_of_the_speaker() -> None:
    split = tiny_speech().train
    plain = next(iter(split.batches(8)))
    drawn = next(iter(split.batches(8, augment=torch.Generator().manual_seed(1))))
    again = next(iter(split.batches(8, augment=torch.Generator().manual_seed(1))))
    assert torch.equal(drawn["features"], again["features"])
    assert plain["features"].shape == drawn["features"].shape
    assert not torch.equal(plain["targets"], drawn["targets"])
    assert torch.equal(plain["languages"], drawn["languages"])


def test_distortion_changes_length_and_hides_a_part() -> None:
    features = torch.randn(60, 20)
    lengths = {len(distorted(features, torch.Generator().manual_seed(seed))) for seed in range(8)}
    assert len(lengths) > 1
    assert all(51 <= length <= 69 for length in lengths)


def test_what_is_missing_is_named() -> None:
    data = tiny_speech()
    clips = data.train.source.clips  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="tiny has no val clips of language xy"):
        parts = {"train": [(0,), (40,)], "val": [(0,)], "test": [(0,), (40,)]}
        make_speech_data("tiny", dict.fromkeys(parts, clips), parts, distort=False)
    with pytest.raises(DataError, match="no language 'de'; it has: right, left, down, up"):
        proxy_speech(["de"])
    with pytest.raises(DataError, match="the alphabet has no 'z', which 'baz' holds"):
        dataclasses.replace(clips, texts=[*clips.texts[:-1], "baz"])


def test_a_search_on_the_test_split_is_refused() -> None:
    data = tiny_speech()
    with pytest.raises(DataError, match="search is a TestSplit: give a SearchSplit"):
        dataclasses.replace(data, search=data.test)
    assert isinstance(data.search, SearchSplit)

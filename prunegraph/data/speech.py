"""Utterances in several languages as typed splits: recordings of digits, and an embedded proxy.

An utterance is one clip or several of one speaker in a row. Its features are a row a frame, its
target the tokens of its words. Batches are of one language.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunegraph.core.errors import DataError
from prunegraph.core.splits import Batch, HashedSource, SearchSplit, TestSplit, TrainSplit
from prunegraph.data.digits import read_digits

BLANK = 0
"""The token of CTC that stands for none."""

PROXY = "digits-proxy"
"""Name of the embedded data, which are no speech."""

DIRECTIONS = ("right", "left", "down", "up")
"""The proxy's languages: in which direction a row of digits is read."""

PROXY_ROWS = {"train": 1000, "val": 150, "test": 250}
"""Rows of digits of each direction, by split."""

STRETCH, SHIFT, HIDDEN = 0.15, 0.08, 0.15
"""Augmentation: by how much time and frequency are stretched, and the largest share that is hidden
of each."""


@dataclass(frozen=True, kw_only=True)
class Alphabet:
    """What texts are made of.

    Attributes:
        tokens: the tokens in order, without the blank, which comes before them.
        between: what lies between words: a token, or nothing where each token is a word.
    """

    tokens: tuple[str, ...]
    between: str = " "

    def __len__(self) -> int:
        """Return how many tokens there are, the blank included."""
        return len(self.tokens) + 1

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens, start=1)}

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text, words between spaces.

        Raises:
            DataError: it has a letter that is none of the tokens.
        """
        letters = text if self.between else text.split()
        unknown = [letter for letter in letters if letter not in self._numbers]
        if unknown:
            msg = f"the alphabet has no {unknown[0]!r}, which {text[:60]!r} holds: use its letters"
            raise DataError(msg)
        return tuple(self._numbers[letter] for letter in letters)

    def decode(self, numbers: Sequence[int]) -> str:
        """Return the text of tokens; blanks are left out."""
        tokens = [self.tokens[number - 1] for number in numbers if number != BLANK]
        text = ("" if self.between else " ").join(tokens)
        return " ".join(text.split())


@dataclass(frozen=True, eq=False, kw_only=True)
class Clips:
    """Clips that utterances are made of.

    Attributes:
        features: of each clip ``[frames, F]``.
        texts: what is said in each.
        languages: number of the language of each.
        speakers: who says it; utterances are drawn anew from clips of one speaker.
        names: of the languages.
        alphabet: of the texts.
    """

    features: Sequence[Tensor]
    texts: Sequence[str]
    languages: Sequence[int]
    speakers: Sequence[str]
    names: tuple[str, ...]
    alphabet: Alphabet

    def __post_init__(self) -> None:
        """Raise DataError if the alphabet lacks a letter of a text."""
        for text in dict.fromkeys(self.texts):
            self.alphabet.encode(text)

    def text(self, part: Sequence[int]) -> str:
        """Return what is said in an utterance of some clips."""
        return " ".join(self.texts[clip] for clip in part)

    @cached_property
    def pools(self) -> dict[tuple[int, str], list[int]]:
        """The clips of each speaker of a language."""
        found: dict[tuple[int, str], list[int]] = {}
        for clip, speaker in enumerate(self.speakers):
            found.setdefault((self.languages[clip], speaker), []).append(clip)
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Utterances(HashedSource):
    """A ``Source`` of utterances.

    ``load`` returns a dictionary: ``features`` float32 ``[b, t, F]``, zero behind the end;
    ``lengths`` ``[b]`` frames; ``targets`` ``[b, u]`` tokens, blank behind the end;
    ``target_lengths`` ``[b]``; ``languages`` ``[b]``.

    Augmentation draws other clips of the same speaker, and stretches and hides
    parts of time and frequency, where ``distort``.

    Attributes:
        clips: what they are made of.
        parts: the clips of each utterance.
        distort: change time and frequency in training.
    """

    clips: Clips
    parts: Sequence[tuple[int, ...]]
    distort: bool = True

    def hashed(self) -> Any:
        """Return the hash of clips, texts and languages."""
        content = hashlib.sha256(repr((self.clips.names, self.clips.alphabet.tokens)).encode())
        for part in self.parts:
            content.update(repr([(clip, self.clips.texts[clip]) for clip in part]).encode())
        for clip in sorted({clip for part in self.parts for clip in part}):
            content.update(self.clips.features[clip].contiguous().numpy().data)
        return content

    @cached_property
    def groups(self) -> Tensor:
        """``[n]`` number of the language of each utterance."""
        return torch.tensor([self.clips.languages[part[0]] for part in self.parts])

    def load(self, index: Tensor, augment: torch.Generator | None = None) -> Batch:
        """Return a batch; see the class."""
        features, targets = [], []
        for part in [self.parts[at] for at in index.tolist()]:
            if augment is not None:
                part = self._other(part, augment)  # its place is the same
            whole = torch.cat([self.clips.features[clip].float() for clip in part])
            if augment is not None and self.distort:
                whole = distorted(whole, augment)
            features.append(whole)
            targets.append(torch.tensor(self.clips.alphabet.encode(self.clips.text(part))))
        return {
            "features": torch.nn.utils.rnn.pad_sequence(features, batch_first=True),
            "lengths": torch.tensor([len(each) for each in features]),
            "targets": torch.nn.utils.rnn.pad_sequence(targets, batch_first=True),
            "target_lengths": torch.tensor([len(each) for each in targets]),
            "languages": self.groups[index],
        }

    def _other(self, part: tuple[int, ...], generator: torch.Generator) -> tuple[int, ...]:
        clip = part[0]
        pool = self.clips.pools[self.clips.languages[clip], self.clips.speakers[clip]]
        drawn = torch.randint(len(pool), (len(part),), generator=generator)
        return tuple(pool[at] for at in drawn.tolist())


def distorted(features: Tensor, generator: torch.Generator) -> Tensor:
    """Return features ``[t, F]`` stretched in time and frequency, a part of each hidden.

    After vocal tract length perturbation (Jaitly and Hinton 2013) and SpecAugment (Park et al.
    2019, arXiv 1904.08779).
    """
    drawn = torch.rand(6, generator=generator)
    frames, bands = features.shape
    long = max(round(frames * float(1.0 + STRETCH * (2.0 * drawn[0] - 1.0))), 2)
    scale = float(1.0 + SHIFT * (2.0 * drawn[1] - 1.0))
    places = (torch.arange(bands) * scale).clamp(max=bands - 1)
    low = places.long().clamp(max=bands - 2)
    share = places - low
    warped = features[:, low] * (1.0 - share) + features[:, low + 1] * share
    warped = F.interpolate(warped.T[None], long, mode="linear", align_corners=False)[0].T.clone()
    mean = warped.mean()
    for axis, size in ((0, long), (1, bands)):
        width = int(drawn[2 + 2 * axis] * HIDDEN * size)
        first = int(drawn[3 + 2 * axis] * (size - width))
        warped.narrow(axis, first, width).fill_(mean)
    return warped


@dataclass(frozen=True, eq=False, kw_only=True)
class SpeechData:
    """Utterances by what they are for.

    Attributes:
        name: of the data.
        train: to train on.
        search: to choose masks on.
        test: to report on.
        alphabet: of the texts.
        languages: their names.
        proxy: whether they are no speech, but stand for it.
    """

    name: str
    train: TrainSplit
    search: SearchSplit
    test: TestSplit
    alphabet: Alphabet
    languages: tuple[str, ...]
    proxy: bool = False

    def __post_init__(self) -> None:
        kinds = {"train": TrainSplit, "search": SearchSplit, "test": TestSplit}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                given = type(getattr(self, name)).__name__
                msg = (
                    f"{name} is a {given}: give a {kind.__name__}, so that no choice sees the test"
                )
                raise DataError(msg)


def make_speech_data(
    name: str,
    clips: Mapping[str, Clips],
    utterances: Mapping[str, Sequence[tuple[int, ...]]],
    *,
    distort: bool,
    proxy: bool = False,
) -> SpeechData:
    """Return clips and utterances of the splits ``train``, ``val`` and ``test`` as data.

    Raises:
        DataError: a language has no utterances in a split.
    """
    sources = {
        split: Utterances(clips=own, parts=utterances[split], distort=distort)
        for split, own in clips.items()
    }
    first = clips["train"]
    for split, source in sources.items():
        counts = source.groups.bincount(minlength=len(first.names)) if source.parts else [0]
        empty = [each for each, count in zip(first.names, counts, strict=False) if count == 0]
        if empty:
            msg = f"{name} has no {split} clips of language {empty[0]}: add some or leave it out"
            raise DataError(msg)
    every = {split: torch.arange(len(source.parts)) for split, source in sources.items()}
    return SpeechData(
        name=name,
        train=TrainSplit(sources["train"], every["train"]),
        search=SearchSplit(sources["val"], every["val"]),
        test=TestSplit(sources["test"], every["test"]),
        alphabet=first.alphabet,
        languages=first.names,
        proxy=proxy,
    )


def chosen_languages(known: Sequence[str], asked: Sequence[str] | None, where: str) -> list[str]:
    """Return which languages are used.

    Raises:
        DataError: one that was asked for is not known.
    """
    odd = [name for name in asked or () if name not in known]
    if odd:
        msg = f"{where} has no language {odd[0]!r}; it has: {', '.join(known[:20])}"
        raise DataError(msg)
    return [name for name in known if not asked or name in asked]


def proxy_speech(languages: Sequence[str] | None = None) -> SpeechData:
    """Return the embedded proxy: 2 to 4 of scikit-learn's digits in a row, read in four directions.

    A direction is a language with an alphabet of its own. A digit is a word of one letter, a frame
    a line of its pixels. It is no speech: four alphabets, not four languages.

    Args:
        languages: some of the directions; None = all. The alphabet is that of all.

    Raises:
        DataError: a direction is unknown.
    """
    names = chosen_languages(DIRECTIONS, languages, "the proxy")
    images, labels, positions = read_digits()
    pixels = images[:, 0].float().div(255.0).sub(0.3)  # [n, 8 rows, 8 columns]
    views = {
        "right": pixels.transpose(1, 2),  # frames are columns, first the left one
        "left": pixels.transpose(1, 2).flip(1),
        "down": pixels,
        "up": pixels.flip(1),
    }
    alphabet = Alphabet(
        tokens=tuple(f"{name[0]}{digit}" for name in DIRECTIONS for digit in range(10)), between=""
    )
    clips, utterances = {}, {}
    for number, (split, own) in enumerate(positions.items()):
        clips[split] = Clips(
            features=[views[name][at] for name in names for at in own.tolist()],
            texts=[f"{name[0]}{labels[at]}" for name in names for at in own.tolist()],
            languages=[language for language in range(len(names)) for _ in own],
            speakers=["" for _ in names for _ in own],
            names=tuple(names),
            alphabet=alphabet,
        )
        utterances[split] = drawn_utterances(clips[split], PROXY_ROWS[split], (2, 4), seed=number)
    return make_speech_data(PROXY, clips, utterances, distort=False, proxy=True)


def drawn_utterances(
    clips: Clips, count: int, lengths: tuple[int, int], seed: int
) -> list[tuple[int, ...]]:
    """Return utterances of each language: clips in a row of one speaker, drawn by a seed.

    Args:
        clips: what they are made of.
        count: of each language.
        lengths: fewest and most clips of one.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    found = []
    for language in range(len(clips.names)):
        pools = [pool for (own, _), pool in clips.pools.items() if own == language]
        for _ in range(count if pools else 0):
            pool = pools[draw(0, len(pools))]
            size = draw(lengths[0], lengths[1] + 1)
            found.append(tuple(pool[draw(0, len(pool))] for _ in range(size)))
    return found

"""Texts of a user's, encoded as a network takes them and made into typed splits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunegraph.core.errors import DataError
from prunegraph.core.splits import SearchSplit, Split, TrainSplit
from prunegraph.data.text import Encode, Text, TokenWindows, cut_search, read_tokens, tokenizing
from prunegraph.tasks.base import Kind, checked_split

WINDOW = 1024
"""Tokens of a window, if the network takes as many: as tables for small networks have it."""


@dataclass(frozen=True, kw_only=True)
class TextReader:
    """Makes windows of texts for one network.

    Attributes:
        encode: makes tokens of a text; None = texts come as tokens.
        vocabulary: how many tokens the network knows.
        longest: how many it takes at once; None = any number.
        window: tokens of a window; None = ``WINDOW``, ``longest``, or a row of an array.
        stride: tokens between the starts of windows of ``split``.
        bos: the token that begins each window of a text; None = texts stay as they are encoded.
        rows: whether an array of rows, whose windows are given, is taken beside ``bos``.
    """

    encode: Encode | None
    vocabulary: int
    longest: int | None
    window: int | None
    stride: int | None
    bos: int | None = None
    rows: bool = True

    def __post_init__(self) -> None:
        if self.longest is not None and (self.window or 0) > self.longest:
            msg = f"window={self.window:,} is more than the network takes, {self.longest:,} tokens"
            raise DataError(msg)

    def split(self, kind: type[Kind], text: Text | Kind, what: str) -> Kind:
        """Return all windows of a text in order; a split stays as it is.

        Raises:
            DataError: it is another kind of split, too short, or has tokens of another network.
        """
        if isinstance(text, Split):
            return checked_split(kind, text, what)
        source = self._source(text, what, self.stride)
        return kind(source, torch.arange(len(source)))

    def calibration(
        self, text: Text | TrainSplit, num_tokens: int | None, seed: int, *, cut: bool
    ) -> tuple[TrainSplit, SearchSplit | None]:
        """Return windows drawn from a text; with ``cut``, others to search on too.

        Args:
            text: a text, or a split, which stays as it is.
            num_tokens: of the calibration windows; None = all.
            seed: fixes the draw.
            cut: whether windows are held out for searching.

        Raises:
            DataError: see ``cut_search``, or a split without one to search on.
        """
        if isinstance(text, Split):
            if cut:
                msg = "a TrainSplit needs a SearchSplit beside it: give search="
                raise DataError(msg)
            return checked_split(TrainSplit, text, "calibration"), None
        source = self._source(text, "calibration", None)
        most = source.window * len(source) if num_tokens is None else num_tokens
        return cut_search(source, most, seed, search=cut)

    def _source(self, text: Text, what: str, stride: int | None) -> TokenWindows:
        tokens = read_tokens(text, self.encode, what)
        self._check_tokens(tokens, what)
        window = min(self.longest or WINDOW, WINDOW) if self.window is None else self.window
        bos = self.bos
        if tokens.ndim == 2:
            if not self.rows:
                msg = f"{what} is an array of rows, which stay as they are: leave bos=True out"
                raise DataError(msg)
            bos = None
            window = min(window, tokens.shape[1]) if self.window is None else window
        elif bos is not None and tokens[0] == bos:
            tokens = tokens[1:]  # the tokenizer has put it before the whole text
        try:
            return TokenWindows(tokens, window, stride, bos=bos)
        except DataError as error:
            msg = f"{what}: {error}"
            raise DataError(msg) from error

    def _check_tokens(self, tokens: Tensor, what: str) -> None:
        if not tokens.numel():
            msg = f"{what} has no tokens: give a longer text"
            raise DataError(msg)
        least, highest = (int(token) for token in tokens.aminmax())
        highest = max(highest, self.bos or 0)
        if least < 0 or highest >= self.vocabulary:
            wrong = least if least < 0 else highest
            msg = (
                f"{what} holds token {wrong}, and the network knows 0 to {self.vocabulary - 1}: "
                "give the tokenizer of this network"
            )
            raise DataError(msg)


def begin_token(tokenizer: Any, model: nn.Module, wanted: bool | None) -> int | None:
    """Return the token that begins each window of a text, or None.

    Args:
        tokenizer: of transformers or a method of one, any other function, or None.
        model: whose config may name the token.
        wanted: whether there is one; None = where a tokenizer of transformers adds one to a text.

    Raises:
        DataError: it is wanted and nothing names it.
    """
    tokenizer = getattr(tokenizer, "__self__", tokenizer)
    found = getattr(tokenizer, "bos_token_id", None)
    if wanted is None and found is not None and _of_transformers(tokenizer):
        wanted = tokenizer("a", verbose=False)["input_ids"][:1] == [found]
    if not wanted:
        return None
    if found is None:
        found = getattr(getattr(model, "config", None), "bos_token_id", None)
    if not isinstance(found, int):
        msg = "bos=True, and neither tokenizer nor config names one: leave it out"
        raise DataError(msg)
    return found


def encoder(tokenizer: Any) -> Encode | None:
    """Return what makes tokens of a text.

    Args:
        tokenizer: of transformers, or a function from text to token numbers, or None.

    Raises:
        DataError: it is neither.
    """
    if tokenizer is None:
        return None
    if not callable(tokenizer):
        msg = (
            f"tokenizer is a {type(tokenizer).__name__}: give one of transformers, a folder, or a "
            "function from text to token numbers"
        )
        raise DataError(msg)
    if not _of_transformers(tokenizer):
        return tokenizer  # type: ignore[no-any-return]  # callable() narrows Any to a bare callable

    def encode(text: str) -> Sequence[int]:
        with tokenizing():
            tokens: Sequence[int] = tokenizer(text, verbose=False)["input_ids"]
        return tokens

    return encode


def _of_transformers(tokenizer: Any) -> bool:
    """Tell a tokenizer of transformers from other functions."""
    return hasattr(tokenizer, "convert_ids_to_tokens")

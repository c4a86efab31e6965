"""The embedded default text: English on Python's own language that comes with it, 370 kB."""

from dataclasses import dataclass
from pydoc_data.topics import topics

from prunegraph.data.text import BETWEEN

PIECE = 4096
"""Characters, about, that lie in one split in a row."""


@dataclass(frozen=True, kw_only=True)
class EmbeddedText:
    """Paragraphs by what they are for; none is in two.

    Attributes:
        train: to train and calibrate on, eight pieces of ten.
        search: to search on, one of ten.
        test: to report on, one of ten.
    """

    train: list[str]
    search: list[str]
    test: list[str]


def embedded_text() -> EmbeddedText:
    """Return the topics of Python's ``help``, the same whatever the caller's seed.

    They differ between versions of Python, and figures do with them.
    """
    splits: dict[int, list[str]] = {8: [], 9: []}
    train: list[str] = []
    passed = 0
    paragraphs = BETWEEN.join(str(topics[name]) for name in sorted(topics)).split(BETWEEN)
    for paragraph in dict.fromkeys(paragraphs):  # some topics hold others
        splits.get(passed // PIECE % 10, train).append(paragraph)
        passed += len(paragraph)
    return EmbeddedText(train=train, search=splits[8], test=splits[9])

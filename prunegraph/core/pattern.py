"""Where the zeros of a weight mask may lie."""

import re
from dataclasses import dataclass
from typing import Literal, Self

from prunegraph.core.errors import BudgetError

MOST_IN_A_GROUP = 1024
"""Weights of a group of an n:m pattern; hardware knows 4, 8 and 16."""

PatternKind = Literal["unstructured", "n:m", "columns"]


@dataclass(frozen=True)
class Pattern:
    """Where the zeros of a weight mask may lie; made by ``Pattern.parse``.

    A weight is seen as a matrix with a row for each output. A convolution's row holds its input
    channels, and for each of them the numbers of its kernel.

    Attributes:
        kind: ``"unstructured"``: anywhere. ``"n:m"``: of each m consecutive weights of a row n
            stay. ``"columns"``: whole inputs of a layer are zero.
        num_kept: n of ``"n:m"``, else 0.
        group: m of ``"n:m"``, else 0.
    """

    kind: PatternKind = "unstructured"
    num_kept: int = 0
    group: int = 0

    def __post_init__(self) -> None:
        if self.kind == "n:m" and not 1 <= self.num_kept < self.group <= MOST_IN_A_GROUP:
            msg = (
                f"pattern {self} must keep at least one weight of a group, not all, of at most "
                f"{MOST_IN_A_GROUP}: as 2:4"
            )
            raise BudgetError(msg)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the pattern that ``str`` writes, as ``"unstructured"``, ``"2:4"``, ``"columns"``.

        Raises:
            BudgetError: it is none.
        """
        if text in ("unstructured", "columns"):
            return cls(text)  # type: ignore[arg-type]  # one of the literals
        found = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", text) if isinstance(text, str) else None
        if found is None:
            msg = (
                f"pattern={text!r} is none: give unstructured, columns, or n:m where n of "
                "each m weights stay, as 2:4"
            )
            raise BudgetError(msg)
        return cls("n:m", int(found[1]), int(found[2]))

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that the pattern fixes, or None if it fixes none."""
        return 1.0 - self.num_kept / self.group if self.kind == "n:m" else None

    def __str__(self) -> str:
        return f"{self.num_kept}:{self.group}" if self.kind == "n:m" else self.kind


UNSTRUCTURED = Pattern()
"""Zeros anywhere."""

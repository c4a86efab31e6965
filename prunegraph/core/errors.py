"""The error tree: every message says what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


def one_line(error: BaseException, most: int | None = None) -> str:
    """Return an error's class and the first ``most`` characters of its message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"


def is_panic(error: BaseException) -> bool:
    """Tell a panic of Rust code, which pyo3 raises as no ``Exception``."""
    return type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or what it is if it has none."""
    return next(iter(str(error).strip().splitlines()), repr(error))


def suggest(name: str, names: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest of ``names``, or an empty string."""
    nearest = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def nearest(name: str, names: Iterable[str], most: int = 3) -> str:
    """Return the nearest of ``names``, or the first ones if none is near, with commas between."""
    known = list(names)
    return ", ".join(difflib.get_close_matches(name, known, most, cutoff=0.4) or known[:most])


class PruneGraphError(Exception):
    """Base of all errors that prunegraph raises on purpose; the command line exits with 2."""


class ConfigError(PruneGraphError):
    """An option is unknown, contradictory or out of range."""


class DataError(PruneGraphError):
    """A data set cannot be found, read or used."""


class ModelError(PruneGraphError):
    """A network cannot be built, run or analysed."""


class BudgetError(PruneGraphError):
    """A budget is malformed or cannot be met."""


class MaskError(PruneGraphError):
    """A keep mask is illegal for its structure graph."""


class SurgeryError(PruneGraphError):
    """A network's forward cannot follow the removal of channels."""


class ArtefactError(PruneGraphError):
    """A file (weights, mask, policy, report) is missing, damaged or of another network."""


class ExportError(PruneGraphError):
    """An exported file does not reproduce the network."""

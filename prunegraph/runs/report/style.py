"""How figures look.

Three colours stand for what a reader's light or dark page gives: ``INK``, ``PAPER``, ``MUTED``.
"""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, PAPER, MUTED = "#1f2329", "#fefefe", "#8b929b"

SMALL = 8
"""Points of the smallest letters."""

STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), PAPER),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.edgecolor": MUTED,
    "font.size": 9,
    "legend.fontsize": SMALL,
    "text.parse_math": False,  # names may hold dollars
}

WIDTH = 3.4
"""Inches of a figure: as wide as a phone's page, so that its letters keep their size there."""


def new_figure(height: float) -> tuple[Figure, Axes]:
    """Return a figure of a page's width, and of a height in inches, with its axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=200)
    return figure, figure.subplots()

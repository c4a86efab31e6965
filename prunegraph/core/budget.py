"""What may remain, and what a network costs."""

from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal

from prunegraph.core.errors import BudgetError
from prunegraph.core.pattern import Pattern

AttentionUnit = Literal["head", "width"]
"""What can leave an attention: a whole head, or a part of the width of all."""

SHAPES = frozenset({"round_to", "uniform", "depth"})
"""Names of what rules over the widths, and is no limit by itself."""

PATTERN_ROUNDING = 5e-4
"""A sparsity may differ by this much from the one that its pattern fixes: 0.667 with 1:3."""


def short(value: float | str) -> str:
    """Return a limit as names of files and titles show it: all digits of a whole number."""
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may remain: of channels, by their cost on the example input, or of single weights.

    Several limits of channels hold at once. A sparsity stands alone.

    Attributes:
        keep_macs: at most this share, in (0, 1], of the dense network's multiply-adds remains.
        keep_params: at most this share, in (0, 1], of the dense network's parameters remains.
        max_memory: at most this many bytes of activations are alive at once.
        max_latency: a forward takes at most this many milliseconds (and 5 % for noise) where it
            is measured: ``pruning.project_latency`` alone can meet it.
        round_to: if given, the number of channels that a group keeps is a multiple of it, or all
            of them, or the group's minimum where the whole group is smaller. No limit by itself.
        uniform: layers that stand at the same place of repeated blocks keep equally many channels,
            so that one number of a config tells the width of all. No limit by itself.
        depth: sub-layers of residual blocks (an MLP, an attention) may leave wholly, so that depth
            and widths compete. No limit by itself.
        sparsity: this share, in [0, 1), of the prunable weights becomes zero.
        pattern: where the zeros lie, as ``"2:4"`` (see ``Pattern``), which fixes the sparsity;
            default: anywhere.
    """

    keep_macs: float | None = None
    keep_params: float | None = None
    max_memory: int | None = None
    max_latency: float | None = None
    round_to: int | None = None
    uniform: bool = False
    depth: bool = False
    sparsity: float | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        self._take_pattern()
        if not self.as_dict().keys() - SHAPES:
            msg = (
                "a budget needs at least one of keep_macs, keep_params, max_memory, max_latency; "
                "or sparsity"
            )
            raise BudgetError(msg)
        self._check_numbers()
        if self.uniform and self.depth:
            msg = "uniform keeps one width for all layers, depth removes some: give one of them"
            raise BudgetError(msg)
        if self.sparsity is not None:
            self._check_sparsity(self.sparsity)

    def __str__(self) -> str:
        """Return the limits as messages and names show them: ``keep_macs=0.5, round_to=8``."""
        given = self.as_dict().items()
        return ", ".join(n if value is True else f"{n}={short(value)}" for n, value in given)

    @property
    def kind(self) -> Literal["channels", "weights"]:
        """What is removed: channels, or single weights."""
        return "channels" if self.sparsity is None else "weights"

    @property
    def in_blocks(self) -> bool:
        """Whether several units join or leave at once."""
        return self.round_to is not None or self.uniform

    def check_channels(self) -> None:
        """Raise BudgetError if the budget is one of single weights."""
        if self.kind == "weights":
            msg = (
                f"a budget of {self} zeroes single weights, and channels are chosen here: give "
                "keep_macs, keep_params, max_memory or max_latency, or a method of weights"
            )
            raise BudgetError(msg)

    def _take_pattern(self) -> None:
        """Set the sparsity that the pattern fixes, and write the pattern in one way."""
        if self.pattern is None:
            return
        pattern = Pattern.parse(self.pattern)
        fixed, asked = pattern.sparsity, self.sparsity
        if fixed is not None and asked is None:
            asked = fixed
        if asked is None:
            msg = f"pattern={pattern} needs a sparsity: give the share of weights that become zero"
            raise BudgetError(msg)
        if fixed is not None and isinstance(asked, int | float):
            if not abs(asked - fixed) <= PATTERN_ROUNDING:
                msg = (
                    f"sparsity={asked} does not fit pattern={pattern}, which makes it {fixed:.4g}: "
                    "leave one of them out"
                )
                raise BudgetError(msg)
            asked = fixed
        object.__setattr__(self, "sparsity", asked)
        object.__setattr__(
            self, "pattern", None if pattern.kind == "unstructured" else str(pattern)
        )

    def _check_sparsity(self, sparsity: float) -> None:
        others = self.as_dict().keys() - {"sparsity", "pattern"}
        if others:
            msg = (
                f"sparsity zeroes single weights, {min(others)} removes channels: give one of them"
            )
            raise BudgetError(msg)
        if not 0.0 <= sparsity < 1.0:
            percent = f"; {sparsity:g} % is {sparsity / 100:g}" if 1.0 < sparsity < 100.0 else ""
            msg = f"sparsity={sparsity} must lie in [0, 1): it is the share of zeros{percent}"
            raise BudgetError(msg)

    def _check_numbers(self) -> None:
        for name, value in self.as_dict().items():
            if name == "pattern" or (name in ("uniform", "depth") and value is True):
                continue
            if name in ("uniform", "depth"):
                msg = f"{name}={value!r} must be True or False"
                raise BudgetError(msg)
            if isinstance(value, bool) or not isinstance(value, Real):
                msg = f"{name}={value!r} must be a number, not of type {type(value).__name__}"
                raise BudgetError(msg)
        for name in ("keep_macs", "keep_params"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                percent = f"; {value:g} % is {value / 100:g}" if 1.0 < value <= 100.0 else ""
                msg = f"{name}={value} must lie in (0, 1]: it is the share that remains{percent}"
                raise BudgetError(msg)
        if self.max_latency is not None and not self.max_latency > 0.0:
            msg = f"max_latency={self.max_latency} must be milliseconds above 0"
            raise BudgetError(msg)
        for name, unit in (("max_memory", "bytes"), ("round_to", "channels, as 8 or 16")):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                msg = f"{name}={value} must be a whole number of {unit}"
                raise BudgetError(msg)

    def without_latency(self) -> "Budget":
        """Return the limits that can be met without a clock; all may remain if there are none."""
        values = self.as_dict()
        values.pop("max_latency", None)
        if not values.keys() - SHAPES:
            values["keep_macs"] = 1.0
        return Budget(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return what is set, by name; ``Budget(**budget.as_dict())`` is the same budget."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {n: value for n, value in values.items() if value is not None and value is not False}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a network costs on one example input.

    Attributes:
        macs: multiply-adds of convolutions, linear layers and matrix products; one multiply-add
            counts once; biases, norms and activations are excluded (fvcore's convention).
        params: number of parameters, biases and norms included.
    """

    macs: int
    params: int

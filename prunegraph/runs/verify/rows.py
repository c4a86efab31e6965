"""Whether a run holds what its plan asks for, no search and no fine-tune more or less."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunegraph.artefacts.masked import MaskedNetwork, load_masked
from prunegraph.artefacts.pruned import StoredChannels, read_info
from prunegraph.core.masks import ChannelMask
from prunegraph.core.tensors import parameter_digest
from prunegraph.layerwise.weights import check_pattern
from prunegraph.runs.context import Mask, RunContext
from prunegraph.runs.plan import Plan
from prunegraph.runs.report.verdict import DENSE, MethodRow
from prunegraph.runs.store import Candidate


@dataclass(frozen=True, kw_only=True)
class Check:
    """One figure of a report, and what was found.

    Attributes:
        name: where the figure stands in the report.
        reported: what the report says.
        found: what was measured or recomputed.
        tolerance: largest difference that is no difference.
    """

    name: str
    reported: Any
    found: Any
    tolerance: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether the report is right."""
        if isinstance(self.reported, float) and isinstance(self.found, float):
            return abs(self.reported - self.found) <= self.tolerance
        return bool(self.reported == self.found)


def compare(name: str, reported: Any, found: Any) -> Iterator[Check]:
    """Yield the checks of a figure, or of all in a dictionary."""
    both = isinstance(found, dict) and isinstance(reported, Mapping)
    if both and reported.keys() == found.keys():
        for key, value in found.items():
            yield from compare(f"{name}.{key}" if name else key, reported[key], value)
    else:
        yield Check(name=name, reported=reported, found=found)


def check_handed_on(context: RunContext, cell: Path, where: str) -> Iterator[Check]:
    """Yield the checks of what ``export`` hands on with a saved network."""
    saved, expected = read_info(cell), context.target.saved
    for name, value in vars(expected).items():
        yield Check(name=f"{where}.cell: {name}", reported=getattr(saved, name), found=value)


def check_mask(context: RunContext, mask: Mask | None, where: str) -> list[Check]:
    """Check that a mask keeps to the budget; None = everything stays.

    Of single weights the zeros are counted again, in the network that lies on disk.
    """
    budget, fits = context.budget, True
    if isinstance(mask, ChannelMask):
        fits = context.target.graph.fits(mask, budget)
    elif mask is not None:
        saved = load_masked(mask.where, context.target.build)
        check_pattern(saved.mask, saved.model)
        return [
            Check(name=f"{where}: zeros", reported=mask.sparsity, found=_zeros(saved)),
            Check(
                name=f"{where}: pattern",
                reported=str(saved.mask.pattern),
                found=budget.pattern or str(saved.mask.pattern),
            ),
            Check(name=f"{where}: mask on disk", reported=mask.name, found=saved.mask.digest()),
            Check(
                name=f"{where}: weights on disk",
                reported=mask.weights,
                found=None if mask.weights is None else parameter_digest(saved.model),
            ),
        ]
    checks = [Check(name=f"{where} within the budget", reported=True, found=fits)]
    if isinstance(mask, StoredChannels):
        found = parameter_digest(context.network(mask))
        checks.append(Check(name=f"{where}: weights on disk", reported=mask.weights, found=found))
    return checks


def _zeros(saved: MaskedNetwork) -> float:
    """Return the share of the masked weights that are zero; a mean over groups."""
    parameters = saved.mask.parameters_of(saved.model)
    shares = []
    for mask in saved.mask.groups.values():
        kept = sum(int((parameters[name][bits] != 0).sum()) for name, bits in mask.keep.items())
        shares.append((mask.size - kept) / mask.size)
    return sum(shares) / len(shares)


def check_rows(plan: Plan, content: Mapping[str, Any], rows: Sequence[MethodRow]) -> list[Check]:
    """Check that rows are of the methods and seeds that the plan asks for, each in its part."""
    expected, allowed = _by_name(plan.rows()), _by_name({*plan.rows(), *plan.choices()})
    found = _by_name({(row.name, row.seed) for row in rows if row.name != DENSE})
    asked = [row for row in rows if row.name == DENSE or row.name in allowed]
    parts = {(r.name, (r.role, r.searches, r.beginning), plan.part(r.name)) for r in asked}
    odd = sorted({name for name, told, known in parts if known is not None and told != known})
    checks = [
        Check(name="methods in the part of others", reported=odd, found=[]),
        Check(
            name="methods that are missing",
            reported=sorted(expected.keys() - found.keys()),
            found=[],
        ),
        Check(
            name="methods that nobody asked for",
            reported=sorted(found.keys() - allowed.keys()),
            found=[],
        ),
        *(
            Check(name=f"seeds of {name}", reported=found[name], found=allowed[name])
            for name in sorted(found.keys() & allowed.keys())
        ),
    ]
    if plan.searched and content["search"] is not None:
        told = content["search"].get("seeds")
        checks.append(Check(name="search.seeds", reported=told, found=[*plan.seeds]))
    return checks


def _by_name(pairs: set[tuple[str, int]]) -> dict[str, list[int]]:
    """Return the seeds of each name."""
    found: dict[str, list[int]] = {}
    for name, seed in sorted(pairs):
        found.setdefault(name, []).append(seed)
    return found


def candidates_of(rows: Sequence[MethodRow], masks: Mapping[str, Mask]) -> list[Candidate]:
    """Return what a report's rows say that methods chose, each once."""
    found = {
        (row.name, row.seed): Candidate(**row.told(), mask=masks[row.digest])
        for row in rows
        if row.name != DENSE
    }
    return list(found.values())

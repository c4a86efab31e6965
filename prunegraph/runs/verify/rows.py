"""Whether a run holds what its plan asks for, no search and no fine-tune more or less."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from prunegraph.artefacts.masked import MaskedNetwork, load_masked
from prunegraph.artefacts.pruned import PRETRAINED_FILE, WEIGHTS_FILE, PrunedInfo, read_info
from prunegraph.core.masks import ChannelMask
from prunegraph.layerwise.weights import check_pattern
from prunegraph.runs.context import Mask, RunContext
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.plan import Plan, plan_finetunes
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


def check_handed_on(context: RunContext, cell: Path, where: str) -> list[Check]:
    """Check what ``export`` hands on with a saved network against network and data set."""
    saved, expected = read_info(cell), context.target.saved
    return [
        Check(
            name=f"{where}.cell: {field.name}",
            reported=getattr(saved, field.name),
            found=getattr(expected, field.name),
        )
        for field in fields(PrunedInfo)
    ]


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
            Check(name=f"{where}: mask on disk", reported=mask.digest(), found=saved.mask.digest()),
        ]
    return [Check(name=f"{where} within the budget", reported=True, found=fits)]


def _zeros(saved: MaskedNetwork) -> float:
    """Return the share of the masked weights that are zero."""
    parameters = saved.mask.parameters_of(saved.model)
    kept = sum(int((parameters[name][bits] != 0).sum()) for name, bits in saved.mask.keep.items())
    return (saved.mask.size - kept) / saved.mask.size


def check_finetunes(
    context: RunContext,
    plan: Plan,
    content: Mapping[str, Any],
    rows: Sequence[MethodRow],
    masks: Mapping[str, Mask],
) -> list[Check]:
    """Check that a run holds exactly the fine-tunes that its plan asks for.

    A fine-tune that is left out or counted twice would change means and verdict.
    """
    expected = [
        (cell.name, cell.searched, cell.seed, cell.folder or "")
        for cell in plan_finetunes(context, candidates_of(rows, masks))
    ]
    trained = context.trains
    found = [
        (row.name, row.seed, row.finetune_seed, row.cell or "")
        for row in rows
        if row.finetune_seed is not None
    ]
    weights = [
        digest
        for name, digest in content["files"].items()
        if name.startswith(f"{RunFolder.CELLS}/")
        and name.rpartition("/")[2] in (WEIGHTS_FILE, PRETRAINED_FILE)
    ]
    return [
        Check(name="fine-tunes", reported=sorted(found), found=sorted(expected)),
        Check(
            name="cells with the same weights",
            reported=(len(weights) - len({*weights})) * trained,
            found=0,
        ),
        Check(
            name="verdict_metric",
            reported=content["verdict_metric"],
            found=plan.metric(trained=trained),
        ),
        Check(
            name="stage_one_verdict",
            reported="stage_one_verdict" in content,
            found=plan.finetunes,
        ),
    ]


def check_rows(plan: Plan, content: Mapping[str, Any], rows: Sequence[MethodRow]) -> list[Check]:
    """Check that no row counts twice, none tells of a fine-tune without its network, none is lost.

    Each would change means and verdict.
    """
    counts = Counter((row.name, row.seed, row.finetune_seed) for row in rows)
    twice = sorted({name for (name, _, _), count in counts.items() if count > 1})
    alone = {r.name for r in rows if r.cell is None and r.test_accuracy_finetuned is not None}
    expected, allowed = _by_name(plan.rows()), _by_name({*plan.rows(), *plan.choices()})
    found = _by_name({(row.name, row.seed) for row in rows if row.name != DENSE})
    asked = [row for row in rows if row.name == DENSE or row.name in allowed]
    parts = {(r.name, (r.role, r.searches, r.beginning), plan.part(r.name)) for r in asked}
    odd = sorted({name for name, told, known in parts if known is not None and told != known})
    checks = [
        Check(name="methods in the part of others", reported=odd, found=[]),
        Check(name="methods with a row that is there twice", reported=twice, found=[]),
        Check(name="methods with a fine-tune of no network", reported=sorted(alone), found=[]),
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
        (row.name, row.seed): Candidate(
            name=row.name,
            role=row.role,
            searches=row.searches,
            beginning=row.beginning,
            seed=row.seed,
            mask=masks[row.digest],
            networks_evaluated=row.networks_evaluated,
            search_accuracy=row.search_accuracy,
        )
        for row in rows
        if row.name != DENSE
    }
    return list(found.values())

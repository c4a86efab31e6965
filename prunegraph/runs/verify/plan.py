"""Whether a comparison holds what its rules ask for, no search and no fine-tune more or less."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from prunegraph.artefacts.pruned import WEIGHTS_FILE, PrunedInfo, read_info
from prunegraph.core.masks import ChannelMask
from prunegraph.runs.baselines import differs_by_seed
from prunegraph.runs.bench import Bench
from prunegraph.runs.compare import METRIC, seeds_of
from prunegraph.runs.finetune import pruned_info
from prunegraph.runs.finetune_plan import plan_cells
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.compare import CompareConfig
from prunegraph.runs.options.config import PruningOptions, TrainConfig
from prunegraph.runs.report.verdict import (
    DENSE,
    INITIAL,
    UNTRAINED,
    MethodRow,
    is_agent,
    is_baseline,
)
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


def check_handed_on(bench: Bench, cell: Path, where: str) -> list[Check]:
    """Check what ``export`` hands on with a saved network against network and data set."""
    saved, expected = read_info(cell), pruned_info(bench.target)
    return [
        Check(
            name=f"{where}.cell: {field.name}",
            reported=getattr(saved, field.name),
            found=getattr(expected, field.name),
        )
        for field in fields(PrunedInfo)
    ]


def check_plan(
    bench: Bench,
    config: CompareConfig,
    content: Mapping[str, Any],
    rows: Sequence[MethodRow],
    masks: Mapping[str, ChannelMask],
) -> list[Check]:
    """Check that a comparison holds all searches and exactly the fine-tunes that its rules ask for.

    A fine-tune that is left out or counted twice would change means and verdict.
    """
    candidates = candidates_of(rows, masks)
    planned = plan_cells(bench, candidates, config)
    expected = [
        (c.name, c.seed if c.candidate is None else c.candidate.seed, c.seed, c.folder)
        for c in planned
    ]
    trained = bench.recipe().epochs > 0
    found = [(r.name, r.seed, r.finetune_seed, r.cell) for r in rows if r.cell is not None]
    begun = {row.name for row in rows if row.name in (UNTRAINED, INITIAL)}
    seeds = {name: sorted({row.seed for row in rows if row.name == name}) for name in begun}
    weights = [
        digest
        for name, digest in content["files"].items()
        if name.startswith(f"{RunFolder.CELLS}/") and name.endswith(f"/{WEIGHTS_FILE}")
    ]
    return [
        Check(name="fine-tunes", reported=sorted(found), found=sorted(expected)),
        *(
            Check(name=f"seeds of {name}", reported=own, found=seeds_of(config))
            for name, own in sorted(seeds.items())
        ),
        Check(
            name="cells with the same weights",
            reported=(len(weights) - len({*weights})) * trained,
            found=0,
        ),
        Check(
            name="verdict_metric",
            reported=content["verdict_metric"],
            found=METRIC if trained else "test_accuracy_recalibrated",
        ),
        Check(name="stage_one_verdict", reported="stage_one_verdict" in content, found=True),
    ]


def check_rows(
    run: PruningOptions, content: Mapping[str, Any], rows: Sequence[MethodRow]
) -> list[Check]:
    """Check that no row counts twice, none tells of a fine-tune without its network, none is lost.

    Each would change means and verdict.
    """
    counts = Counter((row.name, row.seed, row.finetune_seed) for row in rows)
    twice = sorted({name for (name, _, _), count in counts.items() if count > 1})
    alone = {r.name for r in rows if r.cell is None and r.test_accuracy_finetuned is not None}
    checks = [
        Check(name="methods with a row that is there twice", reported=twice, found=[]),
        Check(name="methods with a fine-tune of no network", reported=sorted(alone), found=[]),
    ]
    if not isinstance(run, TrainConfig | CompareConfig):
        return checks
    count = run.search_seeds if isinstance(run, TrainConfig) else run.seeds
    seeds = [run.seed + number for number in range(count)]
    names = {row.name for row in rows}
    asked = sorted(n for n in names if is_agent(n) or (is_baseline(n) and differs_by_seed(n)))
    checks += [
        Check(
            name=f"seeds of {name}",
            reported=sorted({row.seed for row in rows if row.name == name}),
            found=seeds,
        )
        for name in asked
    ]
    if content["search"] is not None:
        told = content["search"].get("seeds")
        checks.append(Check(name="search.seeds", reported=told, found=seeds))
    return checks


def candidates_of(rows: Sequence[MethodRow], masks: Mapping[str, ChannelMask]) -> list[Candidate]:
    """Return what a report's rows say that methods chose, each once."""
    found = {
        (row.name, row.seed): Candidate(
            name=row.name,
            seed=row.seed,
            mask=masks[row.digest],
            networks_evaluated=row.networks_evaluated,
            search_accuracy=row.search_accuracy,
        )
        for row in rows
        if row.name != DENSE
    }
    return list(found.values())

"""The rows of a report. Accuracies are kept on disk: an interrupted run measures none twice."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from prunegraph.core.console import Console
from prunegraph.core.files import write_json
from prunegraph.core.masks import ChannelMask
from prunegraph.core.reading import checked, read_json
from prunegraph.runs.context import Mask, RunContext
from prunegraph.runs.finetune import finetuned_accuracy
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.plan import Finetune
from prunegraph.runs.report.report import machine
from prunegraph.runs.report.verdict import DENSE, Chosen, MethodRow
from prunegraph.runs.store import Candidate, CandidateStore

CONTENT = {"machine": dict[str, Any], "search": dict[str, float], "test": dict[str, float]}
"""What the file holds: accuracies by mask."""


class Measured:
    """What masks get right without a fine-tune; each is measured once, in this process.

    Figures of another machine, device, or number of threads do not count: last digits depend on
    them, and all rows of a report are measured alike.

    Args:
        context: the network.
        folder: of its files; what was measured is kept there, and read if it is there.
        fresh: nothing is kept or read: all is measured, but what lies elsewhere.

    Raises:
        ArtefactError: the file is damaged.
    """

    def __init__(self, context: RunContext, folder: RunFolder, *, fresh: bool = False) -> None:
        self.context = context
        self.folder = folder
        self.fresh = fresh
        self._path = folder.checkpoint(RunFolder.MEASURED)
        self._machine = {**machine(), "device": str(context.target.device)}
        known = self._path.is_file() and not fresh
        self._search, self._test = read_measured(self._path, self._machine) if known else ({}, {})

    def search(self, mask: Mask | None) -> float:
        """Return a mask's utility on the search split; None = the dense network as it is."""
        context = self.context
        return self._known(
            self._search, mask, context.recalibrated_search_accuracy, context.search_accuracy
        )

    def test(self, mask: Mask | None) -> float:
        """Return its utility on the test split. Call it when every choice is made."""
        context = self.context
        return self._known(
            self._test, mask, context.recalibrated_test_accuracy, context.test_accuracy
        )

    def _known(
        self,
        found: dict[str, float],
        mask: Mask | None,
        pruned: Callable[[Mask], float],
        dense: Callable[[nn.Module], float],
    ) -> float:
        """Return what was found of a mask; if nothing was, measure it and write all."""
        key = DENSE if mask is None else mask.digest()
        if key not in found:
            found[key] = dense(self.context.target.model) if mask is None else pruned(mask)
            content = {"machine": self._machine, "search": self._search, "test": self._test}
            if not self.fresh:
                write_json(self._path, content)
        return found[key]


def read_measured(path: Path, here: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return what was measured on the search and on the test split, if it was ``here``.

    Raises:
        ArtefactError: the file is damaged.
    """
    content = checked(read_json(path), CONTENT, str(path))
    return (content["search"], content["test"]) if content["machine"] == here else ({}, {})


def measure_again(
    context: RunContext, store: CandidateStore, folder: RunFolder, console: Console
) -> None:
    """Measure what other processes chose anew in this one, before anything is chosen among it.

    With other threads an image more or less may be right, and what a report shows must be what
    decided.
    """
    measured, candidates = Measured(context, folder), list(store)
    with console.progress("measure on the search split", len(candidates)) as report:
        for number, candidate in enumerate(candidates, start=1):
            accuracy = measured.search(candidate.mask)
            if accuracy != candidate.search_accuracy:
                store.add(dataclasses.replace(candidate, search_accuracy=accuracy))
            report(number)


def measure_rows(
    measured: Measured,
    candidates: Sequence[Candidate],
    cells: Sequence[Finetune],
    console: Console,
) -> list[MethodRow]:
    """Open the test split: return a row for each fine-tune, and for each candidate without one."""
    rows: list[MethodRow] = []
    tuned = {(cell.name, cell.candidate.seed) for cell in cells if cell.candidate is not None}
    untuned = [item for item in candidates if (item.name, item.seed) not in tuned]
    with console.progress("measure on the test split", len(cells) + len(untuned)) as report:
        for cell in cells:
            rows.append(_finetuned_row(measured, cell))
            report(len(rows), cell.name)
        for item in untuned:
            rows.append(_row(measured, item, item.mask, {"test_accuracy_finetuned": None}))
            report(len(rows), item.name)
    return rows


def _finetuned_row(measured: Measured, cell: Finetune) -> MethodRow:
    context, finetuned = measured.context, None
    if context.trains and cell.folder is not None:
        where = measured.folder.file(cell.folder)
        finetuned = finetuned_accuracy(context, where, cell.mask, fresh=measured.fresh)
    dense = Chosen(
        name=DENSE,
        role="control",
        searches=False,
        seed=cell.seed,
        networks_evaluated=0,
        search_accuracy=0.0,  # measured below
    )
    tuned = {"test_accuracy_finetuned": finetuned, "finetune_seed": cell.seed, "cell": cell.folder}
    return _row(measured, cell.candidate or dense, cell.mask, tuned)


def _row(
    measured: Measured, chosen: Chosen, mask: Mask | None, tuned: Mapping[str, Any]
) -> MethodRow:
    """Return a row, its recalibrated network measured on search and test samples.

    All rows are measured in this process: the last digits depend on the number of threads.
    """
    seconds = round(chosen.seconds, 1) if chosen.seconds else None
    return MethodRow(
        **chosen.told() | {"search_accuracy": measured.search(mask), "seconds": seconds},
        test_accuracy_recalibrated=measured.test(mask),
        **tuned,
        **mask_figures(measured.context, mask),
    )


def mask_figures(context: RunContext, mask: Mask | None) -> dict[str, Any]:
    """Return what a row tells of its mask alone; None = everything stays.

    Single weights become zero in place, so that network costs what the dense one does.
    """
    target, bits = context.target, mask or context.target.whole
    cost, memory, sparsity = target.cost, None, None
    if isinstance(bits, ChannelMask):
        cost = target.graph.cost(bits)
        limited = context.budget.max_memory is not None
        memory = target.graph.peak_memory(bits) if limited else None
    else:
        sparsity = bits.sparsity
    return {
        "macs": cost.macs,
        "params": cost.params,
        "digest": bits.digest(),
        "memory": memory,
        "sparsity": sparsity,
    }

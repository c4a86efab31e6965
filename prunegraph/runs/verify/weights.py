"""Whether a run that zeroed single weights says what its files hold."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from prunegraph.runs.context import RunContext
from prunegraph.runs.finetune import load_finetuned
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.config import PruneConfig
from prunegraph.runs.report.verdict import DENSE, MethodRow, judge
from prunegraph.runs.verify.rows import Check
from prunegraph.runs.weights import load_saved, zeroed

Accuracy = Callable[[str, float, float, str, bool], Check]
"""Returns the check of an accuracy: name, reported, found, split, whether it was fine-tuned."""


def check_weights(
    context: RunContext,
    content: Mapping[str, Any],
    rows: Sequence[MethodRow],
    folder: RunFolder,
    accuracy: Accuracy,
) -> list[Check]:
    """Measure the dense network and the one with zeros again."""
    target, config = context.target, cast(PruneConfig, context.options)
    saved = load_saved(target, folder)
    mask, trained = saved.mask, context.recipe().epochs > 0
    dense, _ = load_finetuned(target, folder.file(folder.DENSE_FINETUNED))
    found = {
        DENSE: (target.model, dense, target.graph.dense_mask().digest(), 0.0),
        config.method: (zeroed(context, mask), saved.model, mask.digest(), mask.sparsity),
    }
    checks = [
        Check(name="methods", reported=[row.name for row in rows], found=[*found]),
        Check(name="sparsity", reported=content["sparsity"], found=mask.sparsity),
        Check(name="densities", reported=content["densities"], found=mask.densities),
        Check(
            name="verdict",
            reported=[content["verdict"], content["verdict_reason"]],
            found=[*judge(rows, content["verdict_metric"])],
        ),
    ]
    for row in rows:
        if row.name not in found:
            continue
        before, tuned, digest, sparsity = found[row.name]
        where = f"methods[{row.name}, seed {row.seed}]"
        search, test = context.search_accuracy(before), context.test_accuracy(before)
        checks += [
            Check(name=f"{where}.digest", reported=row.digest, found=digest),
            Check(name=f"{where}.sparsity", reported=row.sparsity, found=sparsity),
            Check(
                name=f"{where}.params", reported=row.params, found=target.graph.dense_cost.params
            ),
            accuracy(f"{where}.search_accuracy", row.search_accuracy, search, "search", False),
            accuracy(
                f"{where}.test_accuracy_recalibrated",
                row.test_accuracy_recalibrated,
                test,
                "test",
                False,
            ),
        ]
        if trained and row.test_accuracy_finetuned is not None:
            name, value = f"{where}.test_accuracy_finetuned", row.test_accuracy_finetuned
            checks.append(accuracy(name, value, context.test_accuracy(tuned), "test", True))
    own = rows[-1]
    figures = ("search_accuracy", "test_accuracy_recalibrated", "test_accuracy_finetuned")
    checks += [
        Check(name=f"pruned.{name}", reported=content["pruned"][name], found=getattr(own, name))
        for name in figures
    ]
    return checks

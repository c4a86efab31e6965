"""``prunegraph compare``: one comparison, or one of each network at each budget and a summary."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prunegraph.experiment.baselines import check_methods
from prunegraph.experiment.bench import Bench
from prunegraph.experiment.compare import Plan, make_plan, run_compare
from prunegraph.experiment.compare_config import CompareConfig, ComparisonsConfig
from prunegraph.experiment.console import Console
from prunegraph.experiment.folder import RunFolder, open_run, slug
from prunegraph.experiment.setup import check_trainable, load_target, resolve_arch
from prunegraph.experiment.summary import summary_table, write_summary
from prunegraph.experiment.train import budget_name, check_networks
from prunegraph.models import weights_info


def run_comparisons(config: ComparisonsConfig, console: Console) -> dict[str, Any]:
    """Make each comparison that is not made yet; return the only one's report, or the summary."""
    parts = config.comparisons()
    if len(parts) == 1:
        return run_compare(parts[0], console)
    check_methods(config.methods)
    names = folder_names(parts)
    folder = open_run(config, config.out, f"compare-{'+'.join(names)}"[:MAX_NAME])
    members = [RunFolder(path=folder.path / name) for name in names]
    parts = tuple(
        replace(part, out=member.path) for part, member in zip(parts, members, strict=True)
    )
    if folder.finished:
        console.say(f"{folder.path} is finished; this is its summary (a new --out runs it anew)")
        summary = write_summary(config, folder, members)
    else:
        summary = _run(config, parts, folder, members, console)
    console.table(summary_table(summary))
    console.say(f"written to {folder.path}")
    return summary


MAX_NAME = 100
"""Letters of a default run folder's name."""


def folder_names(parts: Sequence[CompareConfig]) -> list[str]:
    """Return the folder of each comparison: network and budget, numbered where they repeat."""
    names: list[str] = []
    for part in parts:
        info = weights_info(part.weights) if part.weights else None
        arch = resolve_arch(part.arch, part.weights, info)
        name = f"{slug(arch)}-{budget_name(part.budget())}"
        number = sum(other == name or other.startswith(f"{name}-again") for other in names)
        names.append(f"{name}-again{number}" if number else name)
    return names


def _run(
    config: ComparisonsConfig,
    parts: Sequence[CompareConfig],
    folder: RunFolder,
    members: Sequence[RunFolder],
    console: Console,
) -> dict[str, Any]:
    """Make the comparisons that are missing, and the summary."""
    missing = [part for part, each in zip(parts, members, strict=True) if not each.finished]
    plans = [look_ahead(part) for part in missing]  # and find what is wrong before anything long
    with folder.started(config):
        console.say(f"run folder: {folder.path}")
        console.say(
            f"plan, at most, of {len(missing)} of {len(parts)} comparisons: "
            f"{sum(plan.hours for plan in plans):.1f} hours, one job after the other"
        )
        for number, part in enumerate(missing, start=len(parts) - len(missing) + 1):
            console.say(f"comparison {number} of {len(parts)}")
            run_compare(part, console)
        summary = write_summary(config, folder, members)
        folder.finish()
    return summary


def look_ahead(part: CompareConfig) -> Plan:
    """Check a comparison's network, images and budget, and foretell what it will take.

    Raises:
        PruneGraphError: something is missing, damaged, contradictory, or cannot be met.
    """
    target = load_target(part, part.budget())
    check_networks([target], part)
    check_trainable(target, part)
    return make_plan(Bench(target=target, options=part, seed=part.seed), part)

"""``prunegraph apply``: prune a network with a policy that was trained before, on any networks."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from prunegraph.agent.policies import TrainedPolicy, load_policy, save_policy
from prunegraph.core.console import Console
from prunegraph.core.errors import BudgetError
from prunegraph.core.files import write_json
from prunegraph.core.reading import checked, read_json
from prunegraph.core.tensors import parameter_digest
from prunegraph.runs.adapt import adapt_contexts, num_decision_networks
from prunegraph.runs.agent_rows import add_untrained, measured, warn_if_worse
from prunegraph.runs.baselines import add_controls, baseline_job
from prunegraph.runs.bench import Bench
from prunegraph.runs.conclude import Outcome, finalise, finetune_chosen
from prunegraph.runs.dense import warn_of_network
from prunegraph.runs.folder import RunFolder, open_run
from prunegraph.runs.jobs import Jobs, Workplace, make_workplace
from prunegraph.runs.options.config import ApplyConfig
from prunegraph.runs.policies import check_same_policy, find_policy
from prunegraph.runs.prepare import check_trainable, load_target
from prunegraph.runs.report.page import show_finished
from prunegraph.runs.report.report import SearchResult
from prunegraph.runs.report.verdict import AGENT
from prunegraph.runs.store import CandidateStore
from prunegraph.runs.train import run_name

APPLIED = f"{AGENT}/applied"
"""The name of the row of an applied policy."""

DECISION = {"start": str, "share": float, "divergence": dict[str, float], "seconds": float}
"""What is kept of how a policy decided."""

COMPARED = ("l1/uniform", "taylor/per_mac")
"""Heuristics that an applied policy is shown beside; they need no search either."""


def run_apply(config: ApplyConfig, console: Console) -> dict[str, Any]:
    """Prune with a saved policy, fine-tune, measure; return the report."""
    policy = find_policy(config.policy)
    target = load_target(config, config.budget())
    check_trainable(target, config)
    name = f"apply-{run_name([target], config.budget())}"
    folder = open_run(config, config.out, name)
    if folder.finished:
        return show_finished(config, [folder], [target.graph], console)
    with folder.started(config):
        console.say(f"run folder: {folder.path}")
        check_policy(policy, folder)
        save_policy(folder.path, policy)
        place = make_workplace(config, [target], [folder], console)
        bench = place.benches[0]
        warn_of_network(bench, console)
        store = CandidateStore(folder.checkpoint(folder.CANDIDATES), target.graph)
        prior = policy.network.config.prior or "start"
        decision = _decide(policy, bench, store, folder.checkpoint(folder.DECISION), console)
        networks = num_decision_networks(policy, target.graph)
        if config.max_latency is None:
            add_untrained(bench, store, bench.seed, prior)
            add_controls(bench, store, store.named(APPLIED), console)
        with Jobs(config, place) as jobs:
            for name in COMPARED:
                _add_heuristic(store, place, name, config, console)
            own, *_ = store.named(APPLIED)
            warn_if_worse(bench, list(store), own, console)
            outcome = Outcome(
                candidates=list(store),
                search=SearchResult(
                    seconds=decision["seconds"],
                    networks_evaluated=networks,
                    evaluation_seconds=0.0,
                ),
                details={
                    "policy": dict(policy.record),
                    "decision": {name: decision[name] for name in ("start", "share", "divergence")},
                },
            )
            finetune_chosen(jobs, [outcome])
        report = finalise(config, bench, outcome, folder, console)
        folder.finish()
        console.say(f"written to {folder.path}")
        return report


def check_policy(policy: TrainedPolicy, folder: RunFolder) -> None:
    """Raise ConfigError if a run that goes on began with another policy."""
    if not folder.file(folder.POLICY).with_suffix(".json").is_file():  # written last
        return
    begun, given = (parameter_digest(item.network) for item in (load_policy(folder.path), policy))
    check_same_policy(begun, given, folder.path)


def _decide(
    policy: TrainedPolicy, bench: Bench, store: CandidateStore, path: Path, console: Console
) -> dict[str, Any]:
    """Add the mask that the policy chooses, and return how it was; an interrupted run's stands.

    Under a latency another start might decide otherwise, and its fine-tune be of another mask.
    """
    if path.is_file():
        return read_decision(path)
    started = time.monotonic()
    networks = num_decision_networks(policy, bench.target.graph)
    if bench.budget.max_latency is not None:  # one out of reach is told before anything long
        console.say("timing the layers at several widths, for the latency")
        bench.project(np.zeros(bench.target.graph.num_units, dtype=np.float32), bench.budget)
    console.say("measuring what the policy reads of the network")
    with console.progress("decide", networks) as report, bench.unlabelled.watched(report):
        adapted, _ = adapt_contexts(policy, [bench], [bench.budget])
        if bench.unlabelled.num_networks < networks:  # some starts led to one mask
            report(networks)
    seconds = time.monotonic() - started
    console.say(
        f"decided in {seconds:.0f} s and {networks} networks on train images; no search, no "
        "look at the search split"
    )
    start = adapted.starts[0]
    tried = ", ".join(f"{100 * share:.0f} %: {kl:.3f}" for share, kl in adapted.divergence.items())
    console.say(
        f"the policy starts from {start} and adds {100 * adapted.share:.0f} % of what it was "
        f"taught; divergence from the dense outputs with {tried}"
    )
    store.add(measured(bench, APPLIED, bench.seed, adapted.masks[0], networks))
    decision = {
        "start": start,
        "share": adapted.share,
        "divergence": {str(share): kl for share, kl in adapted.divergence.items()},
        "seconds": seconds,
    }
    write_json(path, decision)
    return decision


def read_decision(path: Path) -> dict[str, Any]:
    """Return how an interrupted run decided.

    Raises:
        ArtefactError: the file is damaged.
    """
    return dict(checked(read_json(path), DECISION, str(path)))


def _add_heuristic(
    store: CandidateStore, place: Workplace, name: str, config: ApplyConfig, console: Console
) -> None:
    """Add a heuristic's row; one that misses a latency, which is met by luck too, is left out."""
    try:
        store.add(baseline_job(place, 0, name, config.seed, 0))
    except BudgetError as error:
        if config.max_latency is None:
            raise
        console.say(f"no row of {name}: {error}")

"""What a trained policy decides on a network that it has not seen: ``prunegraph apply``."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from prunegraph.agent.policies import TrainedPolicy, load_policy, save_policy
from prunegraph.core.console import Console
from prunegraph.core.files import write_json
from prunegraph.core.reading import checked, read_json
from prunegraph.core.tensors import parameter_digest
from prunegraph.runs.adapt import NUM_DECISION_NETWORKS, adapt_contexts
from prunegraph.runs.agent_rows import measured
from prunegraph.runs.bench import Bench
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.plan import APPLIED
from prunegraph.runs.policies import check_same_policy
from prunegraph.runs.store import CandidateStore

DECISION = {"start": str, "share": float, "divergence": dict[str, float], "seconds": float}
"""What is kept of how a policy decided."""


def pin_applied(policy: TrainedPolicy, folder: RunFolder) -> None:
    """Keep a copy of the policy in the run folder; a run goes on with the same alone.

    Raises:
        ConfigError: it began with another one.
    """
    if not folder.file(folder.POLICY).with_suffix(".json").is_file():  # written last
        save_policy(folder.path, policy)
        return
    begun, given = (parameter_digest(item.network) for item in (load_policy(folder.path), policy))
    check_same_policy(begun, given, folder.path)


def decide(
    policy: TrainedPolicy, bench: Bench, store: CandidateStore, path: Path, console: Console
) -> dict[str, Any]:
    """Add the mask that the policy chooses, and return how it was; an interrupted run's stands.

    Under a latency another start might decide otherwise, and its fine-tune be of another mask.
    """
    if path.is_file():
        return read_decision(path)
    started = time.monotonic()
    networks = NUM_DECISION_NETWORKS
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

"""What a trained policy decides on a network that it has not seen: ``prunegraph apply``."""

from pathlib import Path
from typing import Any

from prunegraph.agent.adapt import NUM_DECISION_NETWORKS
from prunegraph.agent.method import AppliedPolicy
from prunegraph.agent.policies import TrainedPolicy, load_policy, save_policy
from prunegraph.core.console import Console
from prunegraph.core.files import write_json
from prunegraph.core.reading import checked, read_json
from prunegraph.core.tensors import parameter_digest
from prunegraph.runs.bench import Bench
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.plan import APPLIED
from prunegraph.runs.policies import check_same_policy
from prunegraph.runs.store import Candidate, CandidateStore

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

    Under a latency another prior might decide otherwise, and its fine-tune be of another mask.
    """
    if path.is_file():
        return read_decision(path)
    if bench.budget.max_latency is not None:
        console.say("timing the layers at several widths, for the latency")
    console.say("measuring what the policy reads of the network")
    with console.progress("decide", NUM_DECISION_NETWORKS) as report:
        problem = bench.problem(seed=bench.seed, progress=report)
        result = AppliedPolicy(policy).prune(problem)
        report(NUM_DECISION_NETWORKS)  # some priors led to one mask
    found = result.details
    console.say(
        f"decided in {found['seconds']:.0f} s and {result.networks} networks on train images; no "
        "search, no look at the search split"
    )
    tried = ", ".join(
        f"{100 * float(strength):.0f} %: {kl:.3f}" for strength, kl in found["divergence"].items()
    )
    console.say(
        f"the policy starts from {found['prior']} and adds {100 * found['strength']:.0f} % of what "
        f"it was taught; divergence from the dense outputs with {tried}"
    )
    store.add(
        Candidate(
            name=APPLIED,
            role="agent",
            searches=False,
            seed=bench.seed,
            mask=result.channels,
            networks_evaluated=result.networks,
            search_accuracy=bench.final_evaluator.evaluate(result.channels).accuracy,
        )
    )
    decision = {
        "start": found["prior"],
        "share": found["strength"],
        "divergence": found["divergence"],
        "seconds": found["seconds"],
    }
    write_json(path, decision)
    return decision


def read_decision(path: Path) -> dict[str, Any]:
    """Return how an interrupted run decided.

    Raises:
        ArtefactError: the file is damaged.
    """
    return dict(checked(read_json(path), DECISION, str(path)))

"""Policies that a run is given: pinned when it begins, applied without a search."""

from pathlib import Path
from typing import Any

from prunegraph.agent.adapt import NUM_DECISION_NETWORKS
from prunegraph.agent.method import AppliedPolicy
from prunegraph.agent.policies import TrainedPolicy, find_policy, load_policy, save_policy
from prunegraph.core.errors import ConfigError
from prunegraph.core.files import write_json
from prunegraph.core.reading import checked, read_json
from prunegraph.core.tensors import parameter_digest
from prunegraph.runs.context import RunContext
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.parallel.jobs import Workplace
from prunegraph.runs.store import Candidate, CandidateStore

DECISION = {"start": str, "share": float, "divergence": dict[str, float], "seconds": float}
"""What is kept of how a policy decided."""


def pin_policy(policy: Path | None, path: Path) -> None:
    """Note in a run's checkpoint which policy it begins with; it goes on with the same alone.

    Args:
        policy: as ``find_policy`` takes it; None = it begins with none.
        path: of the checkpoint, in a folder of the run's.

    Raises:
        ConfigError: it began with another one.
    """
    if policy is None:
        return
    digest = parameter_digest(find_policy(policy).network)
    if not path.is_file():
        write_json(path, {"policy": digest})
    else:
        begun = checked(read_json(path), {"policy": str}, str(path))["policy"]
        check_same_policy(begun, digest, path.parents[1])


def check_same_policy(begun: str, given: str, run: Path) -> None:
    """Raise ConfigError if the digests of a run's policy and of the given one differ."""
    if begun != given:
        msg = f"{run} was begun with another policy: restore it, or give a new --out"
        raise ConfigError(msg)


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
    policy: TrainedPolicy, name: str, context: RunContext, store: CandidateStore, place: Workplace
) -> dict[str, Any]:
    """Add the mask that the policy chooses, and return how it was; an interrupted run's stands.

    Under a latency another prior might decide otherwise, and its fine-tune be of another mask.

    Args:
        policy: the policy.
        name: of its row.
        context: the network.
        store: where its mask goes.
        place: the run's.
    """
    folder, console = place.folders[0], place.console
    path = folder.checkpoint(folder.DECISION)
    if path.is_file():
        return read_decision(path)
    if context.budget.max_latency is not None:
        console.say("timing the layers at several widths, for the latency")
    console.say("measuring what the policy reads of the network")
    with console.progress("decide", NUM_DECISION_NETWORKS) as report:
        problem = context.problem(seed=context.seed, progress=report)
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
        f"it learned; divergence from the dense outputs with {tried}"
    )
    store.add(
        Candidate(
            name=name,
            role="agent",
            searches=False,
            seed=context.seed,
            mask=result.channels,
            networks_evaluated=result.networks,
            search_accuracy=context.recalibrated_search_accuracy(result.channels),
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

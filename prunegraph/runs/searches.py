"""What the agent's searches of a run cost together, and the policy that is kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prunegraph.core.errors import ArtefactError
from prunegraph.core.reading import checked, read_json
from prunegraph.methods.registry import load
from prunegraph.runs.choose import CURVES
from prunegraph.runs.parallel.jobs import Workplace
from prunegraph.runs.report.verdict import AGENT
from prunegraph.runs.store import CandidateStore

FINISHED = {
    "seconds": float,
    "evaluation_seconds": float,
    "networks_evaluated": int,
    "history": dict.fromkeys(CURVES, list[float]),
}
"""What is kept of a finished search."""

DECISION = {"start": str, "share": float, "divergence": dict[str, float], "seconds": float}
"""What is kept of how a policy decided."""


def searched(
    place: Workplace, stores: Sequence[CandidateStore], seeds: Sequence[int]
) -> dict[str, Any]:
    """Keep the policy of the best search, and return what reports tell of all of them."""
    folder = place.folders[0]
    records = [read_finished(folder.found(AGENT, seed)) for seed in seeds]
    best = max(seeds, key=lambda seed: (_mean_accuracy(stores, seed), -seed))
    path = folder.search(AGENT, best)
    if (path / folder.POLICY).is_file():
        policies = load("agent.policies")
        policies.save_policy(folder.path, policies.load_policy(path))
    else:  # a comparison that goes on on another machine may have left its policies behind
        place.console.say(f"the run folder gets no policy: {path} is not there")
    return summary(seeds, records)


def summary(seeds: Sequence[int], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields of an ``Outcome`` that tell of finished searches."""

    def total(key: str) -> float:
        return float(sum(record[key] for record in records))

    return {
        "search": {
            "seconds": round(total("seconds"), 2),
            "networks_evaluated": int(total("networks_evaluated")),
            "evaluation_seconds": round(total("evaluation_seconds"), 2),
            "seeds": list(seeds),
        },
        "repaired": float(np.mean([np.mean(each["history"]["repaired"]) for each in records])),
        "history": {
            f"{AGENT}, seed {seed}": record["history"]
            for seed, record in zip(seeds, records, strict=True)
        },
    }


def read_finished(path: Path) -> dict[str, Any]:
    """Return what is kept of a finished search.

    Raises:
        ArtefactError: the file is damaged.
    """
    record: dict[str, Any] = checked(read_json(path), FINISHED, str(path))
    lengths = {len(values) for values in record["history"].values()}
    if len(lengths) != 1 or 0 in lengths:
        msg = f"{path} is damaged: delete it to repeat the search"
        raise ArtefactError(msg)
    return record


def decided(place: Workplace, store: CandidateStore, name: str, seed: int) -> dict[str, Any]:
    """Return the fields of an ``Outcome`` that tell how a policy decided; say it to people."""
    folder = place.folders[0]
    decision = read_decision(folder.found(name, seed))
    (own,) = store.named(name)
    tried = ", ".join(
        f"{100 * float(strength):.0f} %: {kl:.3f}"
        for strength, kl in decision["divergence"].items()
    )
    place.console.say(
        f"decided in {decision['seconds']:.0f} s and {own.networks_evaluated} networks on train "
        f"images; no search, no look at the search split. The policy starts from "
        f"{decision['start']} and adds {100 * decision['share']:.0f} % of what it learned; "
        f"divergence from the dense outputs with {tried}"
    )
    return {
        "search": {
            "seconds": round(decision["seconds"], 2),
            "networks_evaluated": own.networks_evaluated,
            "evaluation_seconds": 0.0,
        },
        "details": {
            "policy": dict(load("agent.policies:load_policy")(folder.path).record),
            "decision": {name: decision[name] for name in ("start", "share", "divergence")},
        },
    }


def read_decision(path: Path) -> dict[str, Any]:
    """Return how a policy decided.

    Raises:
        ArtefactError: the file is damaged.
    """
    return dict(checked(read_json(path), DECISION, str(path)))


def _mean_accuracy(stores: Sequence[CandidateStore], seed: int) -> float:
    found = [store.get(AGENT, seed) for store in stores]
    return float(np.mean([item.search_accuracy for item in found if item is not None]))

"""Trained policies: those that come with the package, and those of runs."""

from pathlib import Path

from prunegraph.agent import TrainedPolicy, load_policy
from prunegraph.agent.saving import POLICY_FILE
from prunegraph.errors import ArtefactError, suggest
from prunegraph.experiment.checks import check_one_run
from prunegraph.reading import read_json

SHIPPED = Path(__file__).parents[1] / "policies"
"""The folder of the policies that come with the package."""


def find_policy(policy: Path) -> TrainedPolicy:
    """Read a policy of the package, that of a run folder, or a policy file.

    Args:
        policy: a path, or, where no policy lies there, a name of ``shipped_policies``.

    Raises:
        ArtefactError: there is none, or it is damaged.
    """
    if is_shipped(policy):
        return load_policy(shipped_policies()[str(policy)])
    if not policy.exists():
        near = suggest(str(policy), shipped_policies())
        msg = (
            f"no policy {policy}{near}: give the folder of a finished `prunegraph train`, its "
            f"file, or the name of one that comes with the package: {', '.join(shipped_policies())}"
        )
        raise ArtefactError(msg)
    check_one_run(policy)
    beside = policy.with_suffix(".json")
    if policy.is_file() and beside.is_file():
        content = read_json(beside)
        if isinstance(content, dict) and "arch" in content:
            msg = f"{policy} holds the weights of a network, not a policy: give a run of `train`"
            raise ArtefactError(msg)
    return load_policy(policy)


def is_shipped(policy: Path) -> bool:
    """Tell whether a name means a policy of the package: there is one, and none at that path."""
    return str(policy) in shipped_policies() and not (policy / POLICY_FILE).is_file()


def shipped_policies() -> dict[str, Path]:
    """Return the policies that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.safetensors"))}

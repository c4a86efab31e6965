"""Trained policies: those that come with the package, and those of runs."""

from pathlib import Path

from prunegraph.agent.policies import TrainedPolicy, load_policy
from prunegraph.core.errors import ArtefactError, ConfigError, suggest
from prunegraph.core.files import write_json
from prunegraph.core.reading import checked, read_json
from prunegraph.core.tensors import parameter_digest
from prunegraph.runs.folder import check_one_run
from prunegraph.runs.options.shipped import is_shipped, shipped_policies


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

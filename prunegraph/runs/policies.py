"""Policies that a run is given: a run goes on with the one that it began with alone."""

from pathlib import Path
from typing import Any

from prunegraph.core.errors import ConfigError
from prunegraph.core.files import write_json
from prunegraph.core.reading import checked, read_json
from prunegraph.core.tensors import parameter_digest
from prunegraph.methods.registry import load
from prunegraph.runs.folder import RunFolder


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
    digest = parameter_digest(load("agent.policies:find_policy")(policy).network)
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


def pin_applied(policy: Any, folder: RunFolder) -> None:
    """Keep a copy of the policy in the run folder; a run goes on with the same alone.

    Raises:
        ConfigError: it began with another one.
    """
    policies = load("agent.policies")
    if not folder.file(folder.POLICY).with_suffix(".json").is_file():  # written last
        policies.save_policy(folder.path, policy)
        return
    begun, given = (
        parameter_digest(item.network) for item in (policies.load_policy(folder.path), policy)
    )
    check_same_policy(begun, given, folder.path)

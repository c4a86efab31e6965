"""Policies and checkpoints on disk: tensors as safetensors, everything else as JSON.

Nothing is ever unpickled; the zip files of stable-baselines3 hold pickles and are not used.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch_geometric.data import Data

from prunegraph.agent.network import NetworkConfig, PruningNetwork
from prunegraph.agent.ppo import ChannelPPO
from prunegraph.agent.shipped import is_shipped, shipped_policies
from prunegraph.core.errors import ArtefactError, ConfigError, first_line, suggest
from prunegraph.core.files import POLICY_FILE, write_bytes, write_json
from prunegraph.core.masks import FloatArray
from prunegraph.core.reading import (
    checked,
    holds_numbers,
    parse_json,
    read_bytes,
    read_json,
    read_safetensors,
)

SCHEMA = 4
"""Of checkpoints."""

POLICY_SCHEMA = 3
"""Of policies."""

MAX_POLICY_BYTES = 256 * 1024**2
"""The shipped policy is a five-hundredth of it."""

POLICY = {
    "schema": int,
    "network": NetworkConfig,
    "weights": {"sha256": str},
    "record": dict[str, Any],
}
"""What the JSON beside a policy must hold."""

CHECKPOINT = {
    "schema": int,
    "seed": int,
    "num_rollouts": int,
    "num_timesteps": int,
    "n_updates": int,
    "num_networks": int,
    "history": list[dict[str, Any]],
    "surrogate": dict[str, dict[str, Any]],
}
"""What the state of a checkpoint must hold."""


@dataclass(frozen=True, eq=False)
class TrainedPolicy:
    """A policy's network, usable on networks of any size, and how it was trained.

    Attributes:
        network: the network, in eval mode.
        record: JSON values: options, seeds, networks evaluated, ...
    """

    network: PruningNetwork
    record: Mapping[str, Any] = field(default_factory=dict)

    def logits(self, data: Data, node_features: FloatArray, context: FloatArray) -> FloatArray:
        """Return keep scores ``[N]``; see ``PruningNetwork.logits``."""
        return self.network.logits(data, node_features, context)


def save_policy(path: Path | str, policy: TrainedPolicy) -> None:
    """Write a policy as ``NAME.safetensors`` and ``NAME.json`` beside it, each atomically.

    Args:
        path: the safetensors file, or a folder that gets ``policy.safetensors``.
        policy: the policy.

    Raises:
        ArtefactError: a file cannot be written.
    """
    weights_path = _weights_path(path)
    weights = safetensors.torch.save(_tensors(policy.network.state_dict()))
    record = {
        "schema": POLICY_SCHEMA,
        "network": dataclasses.asdict(policy.network.config),
        "weights": {"file": weights_path.name, "sha256": hashlib.sha256(weights).hexdigest()},
        "record": dict(policy.record),
    }
    write_bytes(weights_path, weights)
    write_json(weights_path.with_suffix(".json"), record)


def load_policy(path: Path | str, *, expected: NetworkConfig | None = None) -> TrainedPolicy:
    """Read a policy.

    Args:
        path: what ``save_policy`` was given.
        expected: names that its features must have; default: those that ``graph`` makes today.

    Raises:
        ArtefactError: a file is missing or damaged, or the policy was made for other features.
    """
    weights_path = _weights_path(path)
    path = weights_path.with_suffix(".json")
    schema = checked(read_json(path), {"schema": int}, str(path))["schema"]
    if schema != POLICY_SCHEMA:
        msg = (
            f"{path} is of another version (schema {schema}, this one reads {POLICY_SCHEMA}): "
            "train a policy with this version of prunegraph"
        )
        raise ArtefactError(msg)
    try:
        record = checked(read_json(path), POLICY, str(path))
    except ConfigError as error:
        msg = f"{path} does not describe a policy: {error}"
        raise ArtefactError(msg) from error
    config, digest = record["network"], record["weights"]["sha256"]
    _check_schema(weights_path, config, expected or NetworkConfig())
    content = read_bytes(weights_path, MAX_POLICY_BYTES)
    if hashlib.sha256(content).hexdigest() != digest:
        msg = f"{weights_path} is not the file that its JSON describes: it is damaged or swapped"
        raise ArtefactError(msg)
    tensors, _ = read_safetensors(weights_path)
    try:
        with torch.device("meta"):  # sizes that lie cost no memory
            network = PruningNetwork(config)
        owned = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
        network.load_state_dict(owned, assign=True)
    except Exception as error:  # tensors that do not fit make torch raise about anything
        msg = f"{weights_path} does not fit its JSON: {first_line(error)}"
        raise ArtefactError(msg) from error
    for name, tensor in tensors.items():
        if not holds_numbers(tensor):
            msg = f"{weights_path}: tensor {name} holds NaN, infinity or no numbers: train again"
            raise ArtefactError(msg)
    return TrainedPolicy(network.eval(), record["record"])


def find_policy(policy: Path | str) -> TrainedPolicy:
    """Read a policy of the package, that of a run folder, or a policy file.

    Args:
        policy: a path, or, where no policy lies there, a name of ``shipped_policies``.

    Raises:
        ArtefactError: there is none, or it is damaged.
    """
    policy = Path(policy)
    if is_shipped(policy):
        return load_policy(shipped_policies()[str(policy)])
    if not policy.exists():
        near = suggest(str(policy), shipped_policies())
        msg = (
            f"no policy {policy}{near}: give the folder of a finished `prunegraph train`, its "
            f"file, or the name of one that comes with the package: {', '.join(shipped_policies())}"
        )
        raise ArtefactError(msg)
    if policy.is_dir() and not (policy / POLICY_FILE).is_file():
        msg = f"{policy} holds no policy: name the folder of one run of `prunegraph train`"
        raise ArtefactError(msg)
    beside = policy.with_suffix(".json")
    if policy.is_file() and beside.is_file():
        content = read_json(beside)
        if isinstance(content, dict) and "arch" in content:
            msg = f"{policy} holds the weights of a network, not a policy: give a run of `train`"
            raise ArtefactError(msg)
    return load_policy(policy)


def _check_schema(path: Path, config: NetworkConfig, expected: NetworkConfig) -> None:
    for name in ("feature_names", "op_feature_names", "relation_names", "context_names"):
        theirs, ours = getattr(config, name), getattr(expected, name)
        if name == "feature_names":  # a policy may read fewer of them
            ours = tuple(item for item in ours if item in theirs)
        if theirs != ours:
            odd = sorted(set(theirs) ^ set(ours)) or ["the order"]
            msg = (
                f"{path} was trained on other {name} (differs in {', '.join(odd)}): "
                "train a policy with this version of prunegraph"
            )
            raise ArtefactError(msg)


def save_checkpoint(path: Path | str, model: ChannelPPO) -> None:
    """Write all that an interrupted training needs as one file, atomically.

    Args:
        path: a safetensors file; the JSON state lies in its header.
        model: between two updates.

    Raises:
        ArtefactError: the file cannot be written.
    """
    optimizer = model.policy.optimizer.state_dict()
    tensors = {f"policy.{name}": value for name, value in model.policy.state_dict().items()}
    for index, slots in optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{slot}": value for slot, value in slots.items()}
    state: dict[str, Any] = {
        "schema": SCHEMA,
        "seed": model.run_seed,
        "num_rollouts": model.num_rollouts,
        "num_timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "num_networks": model.num_networks,
        "history": model.history,
        "surrogate": model.surrogate.state_dict(),
        "competition": model.competitors.competition.state_dict(),
    }
    if model.memory is not None:
        state["memory"] = model.memory.state()
    content = safetensors.torch.save(_tensors(tensors), {"state": json.dumps(state)})
    write_bytes(path, content)


def load_checkpoint(path: Path | str, model: ChannelPPO) -> None:
    """Set ``model`` (and its environments' wrapper) to what ``save_checkpoint`` wrote.

    Raises:
        ArtefactError: the file is missing, damaged, or of another training.
    """
    path = Path(path)
    tensors, metadata = read_safetensors(path)
    # a network whose loss overflowed is remembered with an infinite one
    state = parse_json(metadata.get("state", ""), path, finite=False)
    state = checked(state, CHECKPOINT, str(path))
    if state["schema"] != SCHEMA:
        msg = f"{path} is of another version of prunegraph: delete it to start over"
        raise ArtefactError(msg)
    if state["seed"] != model.run_seed:
        msg = f"{path} is of a training with seed {state['seed']}, not {model.run_seed}"
        raise ArtefactError(msg)
    for name, tensor in tensors.items():
        if not holds_numbers(tensor):
            msg = f"{path}: tensor {name} holds NaN or infinity; delete the file to start over"
            raise ArtefactError(msg)
    try:
        _restore(model, state, tensors)
    except RuntimeError as error:
        msg = f"{path} is of another policy network: {first_line(error)}"
        raise ArtefactError(msg) from error
    except Exception as error:  # what somebody changed by hand may be wrong in any way
        reason = f"{type(error).__name__}: {error}"
        msg = f"cannot resume from {path} ({reason}); delete it to start over"
        raise ArtefactError(msg) from error


def _restore(model: ChannelPPO, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    policy = {
        name.removeprefix("policy."): value
        for name, value in tensors.items()
        if name.startswith("policy.")
    }
    model.policy.load_state_dict(policy)
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".", 2)
            slots.setdefault(int(index), {})[slot] = value
    groups = model.policy.optimizer.state_dict()["param_groups"]
    model.policy.optimizer.load_state_dict({"state": slots, "param_groups": groups})
    model.num_rollouts = state["num_rollouts"]
    model.num_timesteps = state["num_timesteps"]
    model._n_updates = state["n_updates"]
    model.history = state["history"]
    if model.history:  # no update may follow that sets it, and the policy's record holds it
        model.policy.temperature = float(model.history[-1]["temperature"])
    model.surrogate.load_state_dict(state["surrogate"])
    model.competitors.resume(state["competition"], state["num_networks"])
    if model.memory is not None and "memory" in state:
        model.memory.restore(state["memory"])


def _tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _weights_path(path: Path | str) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / POLICY_FILE

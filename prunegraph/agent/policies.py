"""Policies on disk: tensors as safetensors, everything else as JSON.

Nothing is ever unpickled; the zip files of stable-baselines3 hold pickles and are not used.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch_geometric.data import Data

from prunegraph.agent.network import NetworkConfig, PruningNetwork
from prunegraph.core.errors import ArtefactError, ConfigError, first_line, suggest
from prunegraph.core.files import POLICY_FILE, write_bytes, write_json
from prunegraph.core.masks import FloatArray
from prunegraph.core.reading import check_schema, checked, read_bytes, read_json
from prunegraph.core.tensors import holds_numbers, read_safetensors
from prunegraph.policies import is_shipped, shipped_policies

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
    check_schema(schema, POLICY_SCHEMA, path)
    try:
        record = checked(read_json(path), POLICY, str(path))
    except ConfigError as error:
        msg = f"{path} does not describe a policy: {error}"
        raise ArtefactError(msg) from error
    config, digest = record["network"], record["weights"]["sha256"]
    _check_features(weights_path, config, expected or NetworkConfig())
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


def _check_features(path: Path, config: NetworkConfig, expected: NetworkConfig) -> None:
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


def _tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _weights_path(path: Path | str) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / POLICY_FILE

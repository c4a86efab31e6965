import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from prunegraph.agent.network import NetworkConfig, PruningNetwork
from prunegraph.agent.policies import POLICY_SCHEMA, TrainedPolicy, load_policy, save_policy
from prunegraph.agent.threshold import BudgetThreshold
from prunegraph.core.errors import ArtefactError
from support.toy_env import draw_signs, toy_graph, toy_graphs

GRAPHS = toy_graphs()
CONTEXT = np.array([0.5, 1, 1, 0], dtype=np.float32)


@pytest.fixture
def policy(network_config: Callable[..., NetworkConfig]) -> TrainedPolicy:
    torch.manual_seed(0)
    network = PruningNetwork(network_config())
    torch.nn.init.normal_(network.channel_head[-1].weight)
    return TrainedPolicy(network.eval(), {"seed": 3, "networks": ["toy0"]})


def load(path: Path, network_config: Callable[..., NetworkConfig]) -> TrainedPolicy:
    return load_policy(path, expected=network_config())


def test_a_saved_policy_scores_alike_networks_of_any_size(
    policy: TrainedPolicy, network_config: Callable[..., NetworkConfig], tmp_path: Path
) -> None:
    save_policy(tmp_path / "run", policy)
    loaded = load(tmp_path / "run", network_config)
    assert loaded.record == {"seed": 3, "networks": ["toy0"]}
    for graph in (*GRAPHS, toy_graph((30, 2, 12), (4, 4, 2, 1))):
        features, _ = draw_signs(graph, np.random.default_rng(0))
        data = BudgetThreshold.of(graph).data
        logits = loaded.logits(data, features, CONTEXT)
        assert np.array_equal(logits, policy.logits(data, features, CONTEXT))
        assert logits.shape == (graph.num_units,)
        assert logits.std() > 0


def test_no_topology_and_no_pickle_is_saved(policy: TrainedPolicy, tmp_path: Path) -> None:
    save_policy(tmp_path, policy)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "policy.json",
        "policy.safetensors",
    ]
    tensors = safetensors.torch.load_file(tmp_path / "policy.safetensors")
    assert tensors.keys() == policy.network.state_dict().keys()
    record = json.loads((tmp_path / "policy.json").read_text())
    assert record["network"]["feature_names"] == ["u", "v", "w", "noise", "start"]


def test_a_file_may_have_another_name(
    policy: TrainedPolicy, network_config: Callable[..., NetworkConfig], tmp_path: Path
) -> None:
    save_policy(tmp_path / "resnet-cifar.safetensors", policy)
    assert load(tmp_path / "resnet-cifar.safetensors", network_config).record["seed"] == 3


def test_other_features_are_refused_by_name(policy: TrainedPolicy, tmp_path: Path) -> None:
    save_policy(tmp_path, policy)
    with pytest.raises(ArtefactError, match=r"other feature_names \(differs in noise, u, v, w\)"):
        load_policy(tmp_path)


def damage_weights(folder: Path) -> None:
    path = folder / "policy.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def truncate_json(folder: Path) -> None:
    (folder / "policy.json").write_text('{"schema": 1,')


def forget_network(folder: Path) -> None:
    (folder / "policy.json").write_text(json.dumps({"schema": POLICY_SCHEMA}))


def age(folder: Path) -> None:
    record = json.loads((folder / "policy.json").read_text())
    record["network"]["critic_only"] = []
    (folder / "policy.json").write_text(json.dumps(record | {"schema": 2}))


def contradict(folder: Path) -> None:
    record = json.loads((folder / "policy.json").read_text())
    record["network"]["hidden"] = 16
    (folder / "policy.json").write_text(json.dumps(record))


def exaggerate(folder: Path) -> None:
    record = json.loads((folder / "policy.json").read_text())
    record["network"] |= {"hidden": 4096, "layers": 64}  # 48 GB, if it were built
    (folder / "policy.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (damage_weights, "policy.safetensors is not the file"),
        (truncate_json, "policy.json is damaged: it is no JSON"),
        (forget_network, "policy.json: network is missing"),
        (age, "policy.json has schema 2, this version reads 3: update, or make it anew"),
        (contradict, "does not fit its JSON"),
        (exaggerate, "does not fit its JSON"),
        (lambda folder: (folder / "policy.json").unlink(), "there is no file .*policy.json"),
        (
            lambda folder: (folder / "policy.safetensors").unlink(),
            r"there is no file .*\.safetensors",
        ),
    ],
)
def test_damage_is_told(
    policy: TrainedPolicy,
    network_config: Callable[..., NetworkConfig],
    tmp_path: Path,
    damage: Callable[[Path], None],
    match: str,
) -> None:
    save_policy(tmp_path, policy)
    damage(tmp_path)
    with pytest.raises(ArtefactError, match=match) as caught:
        load(tmp_path, network_config)
    assert "\n" not in str(caught.value)

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from prunegraph.agent import policies as saving
from prunegraph.agent.config import PPOConfig
from prunegraph.agent.network import NetworkConfig, PruningNetwork
from prunegraph.agent.policies import (
    TrainedPolicy,
    load_checkpoint,
    load_policy,
    save_checkpoint,
    save_policy,
)
from prunegraph.agent.ppo import ChannelPPO
from prunegraph.agent.threshold import BudgetThreshold
from prunegraph.agent.train import AgentConfig, build_model, make_vec_env
from prunegraph.core.errors import ArtefactError
from prunegraph.rewards import RewardConfig
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
    (folder / "policy.json").write_text(json.dumps({"schema": saving.POLICY_SCHEMA}))


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
        (age, "is of another version .schema 2"),
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


MakeModel = Callable[..., ChannelPPO]


@pytest.fixture
def make_model(
    toy_config: Callable[..., AgentConfig], toy_factories: Callable[..., list]
) -> MakeModel:
    def make(seed: int = 0, **options: object) -> ChannelPPO:
        config = toy_config(episodes_per_update=16, seed=seed, **options)
        return build_model(make_vec_env(toy_factories(4, block=16, repeat=4)), GRAPHS, config)

    return make


def weights(model: ChannelPPO) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()


@pytest.mark.parametrize("form", ["accuracy", "ema"])
def test_a_resumed_training_equals_an_uninterrupted_one(
    make_model: MakeModel, tmp_path: Path, form: str
) -> None:
    reward = RewardConfig(self_competition=form)  # type: ignore[arg-type]
    whole = make_model(reward=reward)
    whole.max_networks = 80
    whole.learn(80)
    first = make_model(reward=reward)
    first.max_networks = 80
    first.learn(32)
    save_checkpoint(tmp_path / "checkpoint.safetensors", first)
    second = make_model(reward=reward)
    second.max_networks = 80
    load_checkpoint(tmp_path / "checkpoint.safetensors", second)
    assert torch.equal(weights(second), weights(first))
    second.learn(48, reset_num_timesteps=False)
    assert torch.equal(weights(second), weights(whole))
    assert second.history == whole.history
    assert second.num_networks == whole.num_networks == 80
    assert second.env.competition.state_dict() == whole.env.competition.state_dict()


def test_a_training_that_was_killed_after_its_last_update_keeps_its_temperature(
    make_model: MakeModel, tmp_path: Path
) -> None:
    ppo = PPOConfig(temperature_start=3.0, temperature_end=2.0)
    first = make_model(ppo=ppo)
    first.max_networks = 64
    first.learn(64)
    save_checkpoint(tmp_path / "checkpoint.safetensors", first)
    second = make_model(ppo=ppo)
    assert second.policy.temperature != first.policy.temperature
    load_checkpoint(tmp_path / "checkpoint.safetensors", second)
    assert second.policy.temperature == first.policy.temperature


def test_a_checkpoint_of_another_training_is_refused(
    make_model: MakeModel,
    network_config: Callable[..., NetworkConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    model = make_model()
    model.learn(16)
    save_checkpoint(path, model)
    with pytest.raises(ArtefactError, match="training with seed 0, not 1"):
        load_checkpoint(path, make_model(seed=1))
    with pytest.raises(ArtefactError, match="another policy network"):
        load_checkpoint(path, make_model(network=network_config(hidden=16)))
    with monkeypatch.context() as patch, pytest.raises(ArtefactError, match="another version"):
        patch.setattr(saving, "SCHEMA", saving.SCHEMA + 1)
        load_checkpoint(path, model)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ArtefactError, match=r"checkpoint\.safetensors is truncated"):
        load_checkpoint(path, make_model())

"""The policies that come with the package, and how policies are named."""

from pathlib import Path

import pytest
import torch

from prunegraph.agent.method import AppliedPolicy
from prunegraph.agent.network import NetworkConfig, PruningNetwork
from prunegraph.agent.policies import TrainedPolicy, find_policy, save_policy
from prunegraph.core.errors import ArtefactError, ConfigError
from prunegraph.models import WeightsInfo, build_model, save_weights, weights_info
from prunegraph.policies import shipped_policies
from prunegraph.runs.context import RunContext
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.compare import CompareConfig
from prunegraph.runs.policies import pin_applied, pin_policy
from prunegraph.runs.tasks.registry import load_target

LARGEST = 1 << 20
"""Bytes of a policy that comes with the package."""


@pytest.mark.parametrize("name", shipped_policies())
def test_a_shipped_policy_is_small_and_tells_how_it_was_trained(name: str) -> None:
    record = find_policy(Path(name)).record
    assert record["networks_evaluated"] > 0
    assert record["distill_steps"] > 0
    assert {"trained_on", "data", "budgets", "seed"} <= record.keys()
    assert shipped_policies()[name].stat().st_size < LARGEST


@pytest.mark.slow
@pytest.mark.data
def test_the_shipped_policy_beats_its_start_on_a_network_that_it_has_not_seen(
    shared_dir: Path,
) -> None:
    config = CompareConfig(
        weights=shared_dir / "weights" / "resnet56_cifar10_45k.safetensors",
        dataset="cifar10",
        data_dir=shared_dir / "data" / "cifar10.tar",
        keep_macs=0.5,
    )
    context = RunContext(target=load_target(config, config.budget()), options=config, seed=0)
    problem = context.measures.problem(context.budget, seed=0)
    result = AppliedPolicy("resnet-cifar").prune(problem)
    prior = problem.project(problem.priors()[0].scores)
    ours, theirs = (problem.evaluator.evaluate(mask) for mask in (result.channels, prior))
    assert result.details["strength"] > 0.0
    assert ours.accuracy > theirs.accuracy + 0.004
    assert ours.accuracy > 0.875


def test_a_path_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network = PruningNetwork(NetworkConfig()).eval()
    save_policy(Path("resnet-cifar"), TrainedPolicy(network, {"mine": True}))
    assert find_policy(Path("resnet-cifar")).record == {"mine": True}


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ArtefactError, match="comes with the package: resnet-cifar"):
        find_policy(Path("resnet-imagenet"))


def test_what_is_no_policy_is_told_what_it_is(tmp_path: Path) -> None:
    model = build_model("digits_resnet8_w8", num_classes=10, image_shape=(1, 8, 8))
    save_weights(model, tmp_path / "w.safetensors", WeightsInfo(arch="digits_resnet8_w8"))
    with pytest.raises(ArtefactError, match="holds the weights of a network, not a policy"):
        find_policy(tmp_path / "w.safetensors")
    with pytest.raises(ArtefactError, match="holds no policy: name the folder of one run"):
        find_policy(tmp_path)
    save_policy(tmp_path / "p.safetensors", TrainedPolicy(PruningNetwork(NetworkConfig()).eval()))
    with pytest.raises(ArtefactError, match="a trained policy, not a network"):
        weights_info(tmp_path / "p.safetensors")


def test_a_run_that_goes_on_keeps_its_policy(tmp_path: Path) -> None:
    policies = []
    for seed in range(2):
        torch.manual_seed(seed)
        network = PruningNetwork(NetworkConfig(feature_names=("start",)))
        policies.append(TrainedPolicy(network.eval(), {}))
    folder = RunFolder(path=tmp_path)
    pin_applied(policies[0], folder)
    save_policy(tmp_path, policies[0])
    pin_applied(policies[0], folder)
    with pytest.raises(ConfigError, match="was begun with another policy"):
        pin_applied(policies[1], folder)
    folder.file("policy.json").unlink()  # as a kill between the two files leaves it
    pin_applied(policies[1], folder)
    path = folder.checkpoint("policy.json")
    pin_policy(None, path)
    assert not path.exists()
    for number, policy in enumerate(policies):
        save_policy(tmp_path / f"{number}.safetensors", policy)
    for _ in range(2):
        pin_policy(tmp_path / "0.safetensors", path)
    with pytest.raises(ConfigError, match=f"{folder.path} was begun with another policy"):
        pin_policy(tmp_path / "1.safetensors", path)

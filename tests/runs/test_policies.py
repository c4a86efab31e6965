"""The policies that come with the package, and how policies are named."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunegraph as pg
from prunegraph.agent.network import NetworkConfig, PruningNetwork
from prunegraph.agent.policies import TrainedPolicy, save_policy
from prunegraph.core.errors import ArtefactError, ConfigError, DataError, ModelError
from prunegraph.data import load_dataset
from prunegraph.models import WeightsInfo, build_model, save_weights, weights_info
from prunegraph.runs.adapt import adapt_contexts
from prunegraph.runs.bench import Bench
from prunegraph.runs.decide import pin_applied
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.compare import CompareConfig
from prunegraph.runs.options.shipped import shipped_policies
from prunegraph.runs.policies import find_policy, pin_policy
from prunegraph.runs.prepare import load_target

LARGEST = 1 << 20
"""Bytes of a policy that comes with the package."""


@pytest.mark.parametrize("name", shipped_policies())
def test_a_shipped_policy_is_small_and_tells_how_it_was_trained(name: str) -> None:
    record = find_policy(Path(name)).record
    assert record["networks_evaluated"] > 0
    assert record["distill_steps"] > 0
    assert {"trained_on", "data", "budgets", "seed"} <= record.keys()
    assert shipped_policies()[name].stat().st_size < LARGEST


def test_a_shipped_policy_prunes_a_network_by_its_name() -> None:
    model = build_model("digits_resnet8_w8", num_classes=10, image_shape=(1, 8, 8)).eval()
    images, labels = next(load_dataset("digits").train.batches(128))
    result = pg.prune(
        model,
        images[:1],
        policy="resnet-cifar",
        calibration_data=[(images, labels)],
        keep_macs=0.5,
    )
    assert 0.4 < result.report["pruned"]["macs"] / result.report["dense"]["macs"] <= 0.5


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
    bench = Bench(target=load_target(config, config.budget()), options=config, seed=0)
    policy = find_policy(Path("resnet-cifar"))
    adapted, _ = adapt_contexts(policy, [bench], [bench.budget])
    start = bench.project(bench.start(bench.budget).scores, bench.budget)
    ours, theirs = (bench.final_evaluator.evaluate(mask) for mask in (adapted.masks[0], start))
    assert adapted.share > 0.0
    assert ours.accuracy > theirs.accuracy + 0.004
    assert ours.accuracy > 0.875


def test_pruning_leaves_the_modes_of_the_network_s_parts_alone() -> None:
    model = build_model("digits_resnet8_w8", num_classes=10, image_shape=(1, 8, 8)).train()
    model.bn1.eval()  # frozen by its owner
    images, _ = next(load_dataset("digits").train.batches(64))
    modes = [module.training for module in model.modules()]
    pg.prune(model, images[:1], policy="resnet-cifar", calibration_data=[images], keep_macs=0.5)
    assert [module.training for module in model.modules()] == modes


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
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ArtefactError, match="several comparisons"):
        find_policy(tmp_path)
    save_policy(tmp_path / "p.safetensors", TrainedPolicy(PruningNetwork(NetworkConfig()).eval()))
    with pytest.raises(ArtefactError, match="a trained policy, not a network"):
        weights_info(tmp_path / "p.safetensors")


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"boxes": self.head(self.body(x).relu().mean((2, 3)))}


def test_what_prune_cannot_take_gets_one_line() -> None:
    net = build_model("digits_resnet8_w8", num_classes=10, image_shape=(1, 8, 8)).train()
    images = torch.rand(40, 1, 8, 8)

    def prune(model: nn.Module, data: list[Tensor], **options: Any) -> pg.PruneResult:
        given = {"policy": "resnet-cifar", "calibration_data": data, "keep_macs": 0.5, **options}
        return pg.prune(model, images[:1].to(next(model.parameters()).dtype), **given)

    with pytest.raises(ModelError, match="returns dict, not logits"):
        prune(Detector(), [images])
    with pytest.raises(ModelError, match=r"give model\.float"):
        prune(copy.deepcopy(net).half(), [images.half()])
    with pytest.raises(DataError, match=r"images of \[1, 8, 8\] and \[1, 9, 9\]"):
        prune(net, [images, torch.rand(4, 1, 9, 9)])
    with pytest.raises(ConfigError, match="num_images=0"):
        prune(net, [images], num_images=0)
    assert not prune(net, [images], num_images=16).model.training


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

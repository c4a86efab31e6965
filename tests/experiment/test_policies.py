"""The policies that come with the package, and how policies are named."""

from pathlib import Path

import pytest

import prunegraph as pg
from prunegraph.agent import NetworkConfig, PruningNetwork, TrainedPolicy, save_policy
from prunegraph.data import load_dataset
from prunegraph.errors import ArtefactError
from prunegraph.experiment.policies import find_policy, shipped_policies
from prunegraph.models import build_model

LARGEST = 1 << 20
"""Bytes of a policy that comes with the package."""


@pytest.mark.parametrize("name", shipped_policies())
def test_a_shipped_policy_is_small_and_tells_how_it_was_trained(name: str) -> None:
    record = find_policy(Path(name)).record
    assert record["networks_evaluated"] > 0
    assert record["amortise_steps"] > 0
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

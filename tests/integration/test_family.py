"""One policy for several networks: trained on two, applied to a third in a fresh process."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import prunegraph as pg
from prunegraph.agent import search
from prunegraph.agent.adapt import TRIED_PRIORS
from prunegraph.agent.method import AppliedPolicy
from prunegraph.agent.network import NetworkConfig, PruningNetwork
from prunegraph.agent.policies import TrainedPolicy, load_policy, save_policy
from prunegraph.cli.main import main
from prunegraph.core.masks import ChannelMask
from prunegraph.data import load_dataset
from prunegraph.methods.prior import MEAN, NUM_PRIORS, PRIORS
from prunegraph.models import build_model, load_weights

SMALL = (
    *(
        "--networks",
        "28",
        "--agent.update-size",
        "8",
        "--agent.subset",
        "64",
        "--agent.surrogate-steps",
        "2",
        "--agent.distill-steps",
        "1",
    ),
    *("--calibration-images", "64", "--finetune-epochs", "1", "--threads", "1"),
)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family") / "run"
    words = ["train", "--arch", "digits_resnet8_w4", "digits_resnet8_w8", "--pretrain-epochs", "2"]
    words += ["--search-seeds", "1", "--baselines", "none", *SMALL, "--out", str(path)]
    assert main(words) == 0
    return path


def test_every_network_of_a_family_is_pruned_and_reported(family: Path) -> None:
    for folder, arch in ((family, "digits_resnet8_w4"), (family / "1-digits_resnet8_w8",) * 2):
        report = json.loads((folder / "report.json").read_text())
        assert report["arch"] == str(arch).rpartition("-")[2]
        assert report["pruned"]["macs"] <= 0.5 * report["dense"]["macs"]


def test_a_family_is_verified_as_a_whole(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (family / "1-digits_resnet8_w8" / "report.html").write_text("of an earlier version")
    assert main(["verify", str(family), "--threads", "1"]) == 0
    path = family / "1-digits_resnet8_w8" / "masks.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"8", b"9", 1))
    assert main(["verify", str(family), "--threads", "1"]) == 2
    assert str(path) in capsys.readouterr().err
    path.write_bytes(content)


def test_a_policy_is_applied_to_a_third_width_and_depth_in_a_fresh_process(
    family: Path, tmp_path: Path
) -> None:
    words = ["apply", "--policy", str(family), "--arch", "digits_resnet14_w6", "--json"]
    words += ["--pretrain-epochs", "2", "--finetune-epochs", "1", "--calibration-images", "64"]
    words += ["--keep-macs", "0.4", "--threads", "1", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "prunegraph", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["arch"] == "digits_resnet14_w6"
    assert 0.39 < report["pruned"]["macs"] / report["dense"]["macs"] <= 0.4
    assert report["search"]["networks_evaluated"] == NUM_PRIORS + 2 * TRIED_PRIORS
    assert f"decide: {NUM_PRIORS + 2 * TRIED_PRIORS}/" in done.stderr
    assert report["decision"]["start"] in (*PRIORS, MEAN)
    tried = report["decision"]["divergence"]
    best = min(tried, key=lambda share: float(f"{tried[share]:.4g}"))
    assert best == str(report["decision"]["share"])
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"<td>{report['decision']['start']}</td>" in page
    assert main(["verify", str(tmp_path / "run"), "--threads", "1"]) == 0


def test_a_search_for_other_budgets_has_finalists_at_its_own(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finalists: list[Sequence[ChannelMask]] = []
    best = search.best_of

    def note(masks: Sequence[ChannelMask], evaluator: Any, remaining: int) -> Any:
        finalists.append(masks)
        return best(masks, evaluator, remaining)

    monkeypatch.setattr(search, "best_of", note)
    words = ["train", "--weights", str(family / "dense.safetensors"), *SMALL]
    words += ["--budgets", "0.3", "0.7", "--keep-macs", "0.5", "--baselines", "none"]
    words += ["--search-seeds", "1", "--networks", "56"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    start = next(row for row in report["methods"] if row["name"] == "prior")
    own = next(row for row in report["methods"] if row["name"].startswith("agent"))
    assert len(finalists[0]) >= 2
    assert {start["digest"], own["digest"]} <= {mask.digest() for mask in finalists[0]}


def test_a_search_goes_on_from_a_trained_policy(family: Path, tmp_path: Path) -> None:
    words = ["train", "--weights", str(family / "dense.safetensors"), "--policy", str(family)]
    words += ["--search-seeds", "1", "--baselines", "none", *SMALL]
    words += ["--networks", "36"]  # what the policy runs to decide is counted
    words += ["--agent.distill-steps", "0"]
    words += ["--agent.metric", "accuracy"]  # by which the rows of a report are compared below
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    known, found = (load_policy(path) for path in (family, tmp_path / "run"))
    assert found.record["initial"]["trained_on"] == ["digits_resnet8_w4", "digits_resnet8_w8"]
    assert found.record["trained_on"] == ["digits_resnet8_w4"]
    before, after = (
        torch.cat([value.flatten() for value in policy.network.state_dict().values()])
        for policy in (known, found)
    )
    assert 0.0 < float((after - before).norm()) < 0.1 * float(before.norm())
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    rows = {row["name"]: row["search_accuracy"] for row in report["methods"]}
    assert rows.keys() >= {given := f"policy:{family.name}", "prior"}
    assert rows["agent"] >= rows[given]  # what it began with may win too


def test_pruning_in_one_call_follows_the_policy(family: Path, tmp_path: Path) -> None:
    dataset = load_dataset("digits")
    model = build_model("digits_resnet8_w4", num_classes=10, image_shape=(1, 8, 8)).eval()
    load_weights(model, family / "dense.safetensors")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = next(dataset.train.batches(256))
    loader = DataLoader(TensorDataset(images, labels), batch_size=64)
    task = pg.tasks.image_classification(model, train=loader, num_images=128)
    result = pg.prune(task, f"policy:{family}", pg.Budget(keep_macs=0.5))
    assert result.report["pruned"]["macs"] <= 0.5 * result.report["dense"]["macs"]
    assert result.report["networks_evaluated"] == NUM_PRIORS + 2 * TRIED_PRIORS
    assert result.model(images[:2]).shape == (2, 10)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    trained = load_policy(family)
    shuffled = PruningNetwork(NetworkConfig())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in shuffled.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_policy(tmp_path, TrainedPolicy(shuffled.eval(), trained.record))
    other = pg.prune(task, AppliedPolicy(tmp_path), pg.Budget(keep_macs=0.5))
    found, moved = (each.report["divergence"] for each in (result, other))
    assert found["0.0"] == moved["0.0"]  # the prior alone
    assert found["1.0"] != moved["1.0"]

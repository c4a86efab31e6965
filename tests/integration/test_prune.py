"""``prunegraph prune METHOD``: one method, from the command line to the verified run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prunegraph.cli.main import main
from prunegraph.core.weight_mask import WeightMask
from prunegraph.runs.options.compare import CompareConfig
from prunegraph.runs.options.config import ApplyConfig, PruneConfig, TrainConfig
from prunegraph.runs.plan import CONTROLS, make_plan

SMALL = ("--calibration-images", "64", "--finetune-epochs", "1", "--threads", "1")


def prune(method: str, weights: Path, out: Path, *more: str) -> int:
    return main(["prune", method, "--weights", str(weights), "--out", str(out), *SMALL, *more])


def read(out: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((out / "report.json").read_text())
    return content


@pytest.mark.parametrize("method", ["l1/uniform", "random_search", "policy:resnet-cifar"])
def test_a_method_prunes_and_verify_confirms_it(method: str, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ["--keep-macs", "0.6", *["--networks", "12"] * (method == "random_search")]
    assert prune(method, weights, out, *more) == 0
    content = json.loads((out / "report.json").read_text())
    assert (content["command"], content["task"]) == ("prune", "image_classification")
    assert (content["score_name"], content["higher_is_better"]) == ("accuracy", True)
    dense, own = content["methods"]
    assert dense["name"] == "dense"
    assert own["cell"] == "pruned"
    assert own["score"] == own["test_accuracy_finetuned"]
    assert own["macs"] <= 0.6 * dense["macs"]
    assert (out / "pruned" / "mask.json").is_file()
    assert main(["verify", str(out), "--threads", "1"]) == 0
    before = (out / "report.json").read_bytes()
    assert prune(method, weights, out, *more) == 0  # shows it again
    assert (out / "report.json").read_bytes() == before


def test_magnitude_makes_exactly_the_asked_zeros_and_a_finetune_leaves_them(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert prune("magnitude", weights, out, "--sparsity", "0.6") == 0
    content = json.loads((out / "report.json").read_text())
    mask = WeightMask.load(out / "pruned" / "mask.safetensors")
    assert mask.size - mask.num_kept == round(0.6 * mask.size)
    tensors = load_file(out / "pruned" / "pruned.safetensors")
    dense = load_file(out / "dense.safetensors")
    for name, keep in mask.keep.items():
        assert not tensors[name][~keep].any()
        assert not torch.equal(tensors[name][keep], dense[name][keep])  # they were trained
    assert content["methods"][1]["sparsity"] == content["pruned"]["sparsity"] == mask.sparsity
    assert content["budget"] == {"sparsity": 0.6}
    assert main(["verify", str(out), "--threads", "1"]) == 0
    content["methods"][1]["sparsity"] = 0.7
    (out / "report.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["verify", str(out), "--threads", "1"]) == 2
    assert "methods[magnitude, seed 0].sparsity is reported as 0.7" in capsys.readouterr().err


def test_a_federation_has_a_dense_row_beside_its_own_and_says_what_it_sent(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["--clients", "4", "--participants", "3", "--dirichlet", "0.5", "--rounds", "3"]
    words += ["--fedmap.epochs", "1", "--fedmap.batch-size", "64", "--fedmap.every", "1"]
    words += ["--sparsity", "0.8", "--finetune-epochs", "0"]
    assert prune("fedmap", weights, out, *words) == 0
    assert "bytes" in capsys.readouterr().out
    rows = {row["name"]: row for row in read(out)["methods"]}  # type: ignore[attr-defined]
    assert set(rows) == {"dense", "fedmap", "fedavg"}
    assert rows["fedmap"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert rows["fedavg"]["sparsity"] == 0.0
    assert all(0.0 < rows[name]["score"] <= 1.0 for name in rows)
    for way in ("bytes_up", "bytes_down"):
        assert 0 < rows["fedmap"][way] < rows["fedavg"][way]
        assert rows["dense"][way] is None
    assert main(["verify", str(out), "--threads", "1"]) == 0
    told = read(out)["clients"]  # type: ignore[attr-defined]
    assert set(told) == {"fedmap", "fedavg"}
    assert told["fedmap"]["mean"] == pytest.approx(sum(told["fedmap"]["scores"]) / 4)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert '<th scope="row">dense</th><td>0.00 %</td><td></td><td></td>' in page  # it sent nothing
    shown = (f"{100 * told['fedmap'][name]:.2f}" for name in ("mean", "deviation", "min", "max"))
    assert "".join(f"<td>{figure}</td>" for figure in shown) in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("l1/uniform --sparsity 0.5", "zeroes single weights, and channels are chosen here"),
        ("agent --sparsity 0.5", "zeroes single weights, and channels are chosen here"),
        ("policy:resnet-cifar --sparsity 0.5", "zeroes single weights"),
        (
            "magnitude --keep-macs 0.5",
            "needs a sparsity: give one, as 0.5, in place of keep_macs=0.5",
        ),
        ("magnitude --pattern 2:4", "pattern=2:4 does not fit conv1.weight"),
        ("magnitude --sparsity 0.5 --keep-macs 0.5", "give one of them"),
        ("magnitude --sparsity 50", "50 % is 0.5"),
        ("l3/uniform", "unknown method 'l3/uniform' (did you mean"),
        ("taylor", "unknown method 'taylor' (did you mean 'taylor/uniform'?)"),
        (
            "l1/uniform --task imagenet",
            "unknown task 'imagenet'; known: image_classification",
        ),
        ("netadapt --networks 2", "networks=2 is too few for netadapt"),
        ("policy:nowhere", "no policy nowhere"),
    ],
)
def test_what_a_method_cannot_do_is_told_before_any_work(
    words: str, message: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, *more = words.split()
    assert prune(method, weights, tmp_path / "run", *more) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_plan_says_which_rows_a_run_must_have() -> None:
    alone = make_plan(PruneConfig(method="l1/uniform", seed=4))
    assert alone.rows() == {("l1/uniform", 4)}
    searched = make_plan(PruneConfig(method="random_search", seed=4))
    assert searched.rows() == {("random_search", 4)}
    trained = make_plan(TrainConfig(baselines="none", search_seeds=2))
    assert trained.rows() == {(trained.agent, 0), (trained.agent, 1)} | {
        ("prior", seed) for seed in range(2)
    }
    applied = make_plan(ApplyConfig(policy=Path("resnet-cifar")))
    names = {name for name, _ in applied.rows()}
    assert names == {"policy:resnet-cifar", "prior", "l1/uniform", "taylor/per_mac", *CONTROLS}
    compared = make_plan(CompareConfig(no_agent=True, methods=("cem", "l1/uniform"), seeds=2))
    assert compared.rows() == {("cem", 0), ("cem", 1), ("l1/uniform", 0)}
    named = make_plan(CompareConfig(methods=("agent", "cem"), seeds=1))
    assert (named.agent, named.methods) == ("agent", ("agent", "cem"))
    assert make_plan(CompareConfig(methods=("cem", "prior"), seeds=1)) == named  # it begins there
    assert compared.metric(trained=True) == "test_accuracy_finetuned"
    assert alone.metric(trained=True) == "test_accuracy_recalibrated"


def test_modules_that_stay_stay_through_a_run_and_its_verification(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    kept = ["--exclude", "layer1.*", "--keep-at-least", "layer2.0.conv1=0.75"]
    assert prune("l1/global", weights, out, "--keep-macs", "0.8", *kept) == 0
    small = load_file(out / "pruned" / "pruned.safetensors")
    dense = load_file(out / "dense.safetensors")
    assert small["layer1.0.conv1.weight"].shape == dense["layer1.0.conv1.weight"].shape
    inner = "layer2.0.conv1.weight"
    assert len(small[inner]) >= 0.75 * len(dense[inner])
    assert len(small["layer3.0.conv1.weight"]) < len(dense["layer3.0.conv1.weight"])
    assert main(["verify", str(out), "--threads", "1"]) == 0
    assert prune("l1/global", weights, out, "--keep-macs", "0.8") == 2  # a run of other options
    assert "exclude" in capsys.readouterr().err
    assert prune("magnitude", weights, tmp_path / "other", "--sparsity", "0.5", *kept) == 2
    assert "are of channels" in capsys.readouterr().err

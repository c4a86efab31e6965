"""``--task causal_lm``: from a folder of transformers to a verified run, and back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prunegraph.artefacts.pruned import load_pruned, read_info
from prunegraph.cli.main import main
from prunegraph.core.weight_mask import WeightMask
from prunegraph.models.embedded_language import build_embedded, byte_tokenizer
from prunegraph.models.pretrained import load_pretrained, load_tokenizer, save_pretrained_layout
from support.language import tiny_experts, tiny_llama

METHOD = """
from dataclasses import dataclass

from prunegraph.methods.method import Result
from prunegraph.methods.registry import make_method


@dataclass(frozen=True)
class Halved:
    name: str = "MODULE:method"
    role: str = "baseline"
    kind: str = "weights"
    searches: bool = False
    per_seed: bool = True

    def check(self, problem):
        assert problem.structure is None

    def prune(self, problem):
        mask = make_method("magnitude").prune(problem).mask
        model = mask.apply(problem.task.model)
        name = next(iter(mask.keep))
        model.get_parameter(name).data *= 0.5
        return Result(mask=mask, model=model, details={"bytes_up": 7 + problem.seed})


def method():
    return Halved()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a tiny language model with a tokenizer."""
    path = tmp_path_factory.mktemp("lm") / "tiny"
    save_pretrained_layout(build_embedded(), byte_tokenizer(), path)
    return path


@pytest.fixture(scope="module")
def words(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return options that name the network and short texts."""
    texts = tmp_path_factory.mktemp("texts")
    for name, first in (("calibration", 0), ("test", 5000)):
        lines = (f"Line {number} counts to {number * 7}." for number in range(first, first + 400))
        (texts / f"{name}.txt").write_text("\n".join(lines))
    return [
        *("--task", "causal_lm", "--weights", str(folder), "--calibration-tokens", "1024"),
        *("--calibration-text", str(texts / "calibration.txt"), "--threads", "1"),
        *("--test-text", str(texts / "test.txt")),
    ]


def test_a_language_model_is_pruned_into_a_from_pretrained_folder(
    words: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["prune", "magnitude", *words, "--sparsity", "0.5", "--pattern", "2:4"]
    assert main([*command, "--out", str(out)]) == 0
    assert "test perplexity" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert (report["task"], report["score_name"]) == ("causal_lm", "perplexity")
    assert report["higher_is_better"] is False
    dense, own = report["methods"]
    assert own["sparsity"] == 0.5
    assert own["score"] == own["test_score_recalibrated"] > 1.0
    assert dense["score"] > 1.0
    assert "test_accuracy_recalibrated" not in own
    pruned = out / "pruned"
    tensors, mask = (
        load_file(pruned / "model.safetensors"),
        WeightMask.load(pruned / "mask.safetensors"),
    )
    assert all(not tensors[name][~keep].any() for name, keep in mask.keep.items())
    assert load_tokenizer(pruned)("a")["input_ids"] == load_tokenizer(folder)("a")["input_ids"]
    model = load_pretrained(pruned)
    ids = torch.arange(8)[None]
    expected = mask.apply(load_pretrained(folder))
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert main(["verify", str(out), "--threads", "1"]) == 0
    before = (out / "report.json").read_bytes()
    assert main([*command, "--out", str(out)]) == 0  # shows it again
    assert (out / "report.json").read_bytes() == before
    assert main(["inspect", "--run", str(out)]) == 0
    assert "50.00 % of" in capsys.readouterr().out
    assert main(["export", str(out), "--format", "safetensors"]) == 0
    assert (out / "exported.mask.safetensors").is_file()


@pytest.mark.parametrize("method", ["l2/uniform", "maskprune"])
def test_uniform_widths_make_a_from_pretrained_folder(
    words: list[str], folder: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "run"
    command = ["prune", method, *words, "--keep-params", "0.7", "--uniform", "--out", str(out)]
    command += ["--no-layer-by-layer"] if method == "l2/uniform" else ["--maskprune.steps", "10"]
    assert main(command) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["budget"] == {"keep_params": 0.7, "uniform": True}
    model = load_pretrained(out / "pruned")
    assert sum(parameter.numel() for parameter in model.parameters()) == report["pruned"]["params"]
    assert (
        load_tokenizer(out / "pruned")("a")["input_ids"] == load_tokenizer(folder)("a")["input_ids"]
    )
    assert main(["verify", str(out), "--threads", "1"]) == 0
    assert main(["export", str(out), "--format", "safetensors"]) == 0
    assert (out / "exported.safetensors").is_file()


def test_neurons_are_cut_and_fitted_compared_and_verified(
    words: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["compare", "--no-agent", "--methods", "struprune", "l2/uniform", *words]
    command += ["--keep-params", "0.8", "--struprune.rounds", "1", "--seeds", "1"]
    assert main([*command, "--out", str(out)]) == 0
    rows = {row["name"]: row for row in json.loads((out / "report.json").read_text())["methods"]}
    assert rows["struprune"]["params"] <= 0.8 * rows["dense"]["params"]
    assert (out / "chosen" / "struprune-0" / "errors.json").is_file()
    assert main(["verify", str(out), "--threads", "1"]) == 0
    capsys.readouterr()
    one = tmp_path / "one"
    command = ["prune", "struprune", *words, "--keep-params", "0.8", "--out", str(one)]
    command += ["--struprune.rounds", "1"]
    assert main(command) == 0
    own = json.loads((one / "report.json").read_text())
    assert own["pruned"]["mask_digest"] == rows["struprune"]["digest"]
    shape = read_info(one / "pruned").example_shape
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.int64)}
    saved = load_pruned(one / "pruned", lambda: load_pretrained(folder), inputs)
    dense = load_pretrained(folder)
    assert sum(item.numel() for item in saved.model.parameters()) == own["pruned"]["params"]
    assert not torch.allclose(saved.model(**inputs).logits, dense(**inputs).logits)
    (chosen,) = one.glob("chosen/struprune-0/pruned.safetensors")
    content = chosen.read_bytes()
    chosen.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["verify", str(one), "--threads", "1"]) == 2
    assert str(chosen) in capsys.readouterr().err


def test_what_single_weights_reach_of_experts_is_told_once(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "experts", tmp_path / "run"
    save_pretrained_layout(tiny_experts("Mixtral"), byte_tokenizer(), folder)
    command = ["compare", "--methods", "magnitude", "wanda", *words, "--weights", str(folder)]
    assert main([*command, "--sparsity", "0.5", "--seeds", "1", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert told.count("warning: single weights are pruned in linear layers") == 1
    pruned = json.loads((out / "report.json").read_text())["pruned"]
    assert pruned["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert 0.02 < pruned["network_sparsity"] < 0.1
    assert f"{100 * pruned['network_sparsity']:.2f} % of the network" in told
    assert main(["verify", str(out), "--threads", "1"]) == 0


def test_too_few_calibration_tokens_are_told(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [{"1024": "128"}.get(word, word) for word in words]
    command = ["prune", "l2/uniform", *given, "--keep-params", "0.8", "--no-layer-by-layer"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert "warning: the calibration data have 128 tokens" in capsys.readouterr().out


def test_the_prior_lets_whole_sublayers_leave(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["prune", "prior", *words, "--keep-params", "0.6", "--depth", "--no-reconstruct"]
    assert main([*command, "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["budget"] == {"keep_params": 0.6, "depth": True}
    own = next(row for row in report["methods"] if row["name"] == "prior")
    assert own["role"] == "control"
    assert own["params"] <= 0.6 * report["dense"]["params"]
    assert main(["verify", str(out), "--threads", "1"]) == 0


def test_methods_of_weights_are_compared_over_seeds_and_a_changed_bit_names_its_file(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = f"halved_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(METHOD.replace("MODULE", module))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    out, own = tmp_path / "run", f"{module}:method"
    command = ["compare", "--methods", "magnitude", own, *words, "--sparsity", "0.5"]
    command += ["--seeds", "2", "--finetune-epochs", "1", "--workers", "1", "--out", str(out)]
    assert main(command) == 0
    rows = json.loads((out / "report.json").read_text())["methods"]
    found = sorted((row["name"], row["seed"], row["finetune_seed"]) for row in rows)
    names = ["dense", own, "magnitude"]
    assert found == sorted((n, s * (n != "magnitude"), s) for n in names for s in range(2))
    assert {row["bytes_up"] for row in rows if row["name"] == own} == {7, 8}
    assert all(row["test_score_finetuned"] > 1.0 for row in rows)
    assert main(["verify", str(out), "--threads", "1"]) == 0
    capsys.readouterr()
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    (chosen,) = copy.glob("chosen/magnitude-0/model.safetensors")
    content = chosen.read_bytes()
    chosen.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["verify", str(copy), "--threads", "1"]) == 2
    assert str(chosen) in capsys.readouterr().err
    (out / "report.json").unlink()  # killed before its end
    shutil.rmtree(next(out.glob("cells/*")))
    assert main(command) == 0
    again = json.loads((out / "report.json").read_text())["methods"]
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]


SEARCH = (
    *("--keep-params", "0.8", "--networks", "26", "--agent.update-size", "4"),
    *("--agent.surrogate-steps", "2", "--agent.distill-steps", "1"),
)


@pytest.mark.slow
def test_all_rows_of_a_comparison_of_neurons_learn_from_the_dense_network(
    words: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ["compare", *words, *SEARCH, "--methods", "random_search"]
    command += ["--seeds", "1", "--finetune-epochs", "1", "--distill", "0.5", "--workers", "1"]
    assert main([*command, "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    recipe = report["recipe"]
    assert (recipe["distill_weight"], recipe["epochs"], recipe["optimizer"]) == (0.5, 1, "adamw")
    rows = {row["name"]: row for row in report["methods"]}
    assert {"agent", "random_search", "prior"} <= rows.keys()
    for row in (row for name, row in rows.items() if name != "prior"):  # a beginning
        assert row["test_score_finetuned"] < row["test_score_recalibrated"]  # fresh weights learn
    assert rows["agent"]["search_score"] > 1.0  # a perplexity, as all others have
    assert main(["verify", str(out), "--threads", "1"]) == 0


@pytest.mark.slow
def test_a_policy_of_one_language_model_is_applied_to_another(
    words: list[str], tmp_path: Path
) -> None:
    run, other, out = tmp_path / "run", tmp_path / "deeper", tmp_path / "out"
    alone = ["--search-seeds", "1", "--baselines", "none", "--finetune-epochs", "0"]
    assert main(["train", *words, *SEARCH, *alone, "--out", str(run)]) == 0
    assert main(["verify", str(run), "--threads", "1"]) == 0
    model = tiny_llama(num_hidden_layers=3, hidden_size=24, max_position_embeddings=128)
    save_pretrained_layout(model, byte_tokenizer(), other)
    command = ["apply", "--policy", str(run), *words[:3], str(other), *words[4:]]
    command += ["--keep-params", "0.8", "--finetune-epochs", "0", "--out", str(out)]
    assert main(command) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["decision"]["start"]
    (own,) = (row for row in report["methods"] if row["name"].startswith("policy:"))
    assert own["params"] <= 0.8 * sum(item.numel() for item in model.parameters())
    assert main(["verify", str(out), "--threads", "1"]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--sparsity 0.5 --dataset digits", "--dataset is of --task image_classification"),
        ("--sparsity 0.5 --magnitude.block 3", "magnitude has no option 'block'; it has none"),
        ("--sparsity 0.5 --clients 3", "--clients is an option of fedmap and fedavg, not run here"),
        (
            "--sparsity 0.5 --thanos.block 3",
            "--thanos.block is an option of thanos, not run here: drop it",
        ),
        ("--keep-macs 0.5", "needs a sparsity: give one, as 0.5, in place of keep_macs=0.5"),
        ("--sparsity 0.5 --weights nowhere", "there is no folder nowhere"),
        ("--sparsity 0.5 --pretrain-epochs 1", "--weights and --pretrain-epochs exclude each"),
        ("--sparsity 0.5 --test-text nowhere.txt", "no file or folder"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    more: str, message: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["prune", "magnitude", *words, *more.split(), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_texts_are_of_language_models_alone(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", "l1/uniform", *words[6:]]) == 2
    assert "--calibration-text is of --task causal_lm" in capsys.readouterr().err
    assert main(["prune", "l1/uniform", "--no-bos"]) == 2
    assert "--no-bos is of --task causal_lm" in capsys.readouterr().err


def test_a_field_of_a_method_is_an_option(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["prune", "thanos", *words, "--pattern", "2:4"]
    assert main([*command, "--thanos.block-size", "64", "--out", str(out)]) == 0
    assert yaml.safe_load((out / "config.yaml").read_text())["method_options"] == [
        "thanos.block_size=64"
    ]
    assert "--thanos.block-size 64" in (out / "report.html").read_text()
    assert main(["verify", str(out), "--threads", "1"]) == 0
    capsys.readouterr()
    assert main([*command, "--thanos.block-size", "32", "--out", str(out)]) == 2
    assert "other options (method_options" in capsys.readouterr().err
    assert main([*command, "--thanos.block-size", "many"]) == 2
    assert "thanos.block_size='many' is not a int" in capsys.readouterr().err

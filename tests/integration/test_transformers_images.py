"""Classifiers of images of transformers, from a folder to a pruned one."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import prunegraph as pg
from prunegraph.cli.main import main
from prunegraph.data.digits import DIGITS_MEAN, DIGITS_STD
from prunegraph.models import build_model
from prunegraph.runs.options.config import NetworkConfig
from prunegraph.runs.tasks import image_classification

transformers = pytest.importorskip("transformers")

SMALL = ("--calibration-images", "64", "--threads", "1", "--keep-macs", "0.6")
TINY_SEARCH = (
    *("--networks", "24", "--agent.update-size", "4", "--agent.subset", "64"),
    *("--agent.surrogate-steps", "2", "--agent.distill-steps", "1"),
)
OTHERS = ("resnet", "convnext")
DIGITS = {"num_channels": 1, "num_labels": 10}


def made(family: str) -> nn.Module:
    """Return a small network of transformers for the digits."""
    torch.manual_seed(0)
    if family == "vit":
        config = transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            **DIGITS,
        )
        return transformers.ViTForImageClassification(config).eval()
    if family == "convnext":
        config = transformers.ConvNextConfig(
            num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], patch_size=2, **DIGITS
        )
        return transformers.ConvNextForImageClassification(config).eval()
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **DIGITS
    )
    return transformers.ResNetForImageClassification(config).eval()


def saved(family: str, folder: Path) -> Path:
    """Return the folder of such a network with its image processor."""
    made(family).save_pretrained(folder / family)
    processor = {"image_mean": DIGITS_MEAN, "image_std": DIGITS_STD, "rescale_factor": 1 / 255}
    (folder / family / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder / family


@pytest.mark.parametrize(
    "family", ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_a_folder_is_pruned_verified_exported_and_reloaded(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = saved(family, tmp_path), tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    words = ["prune", "taylor/per_mac", "--arch", f"hf:{family}", "--out", "run", *SMALL]
    assert main([*words, "--finetune-epochs", "1"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["arch"] == f"hf:{folder}"  # found from any folder
    monkeypatch.chdir("/")
    assert main(["verify", str(out), "--threads", "1"]) == 0
    assert main(["export", str(out), "--format", "torch-export"]) == 0

    def build() -> nn.Module:
        return build_model(f"hf:{folder}", num_classes=10, image_shape=(1, 8, 8))

    small = pg.load_pruned(out / "pruned", build).model
    assert sum(p.numel() for p in small.parameters()) == report["pruned"]["params"]
    program = torch.export.load(out / "pruned.pt2").module()
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(program(images)["logits"], small(images).logits)


def test_uniform_widths_and_zeros_make_a_folder_of_transformers(tmp_path: Path) -> None:
    folder = saved("vit", tmp_path)
    words = ["--arch", f"hf:{folder}", "--calibration-images", "64", "--finetune-epochs", "0"]
    uniform = ["l1/global", "--keep-macs", "0.6", "--uniform"]
    for number, more in enumerate((uniform, ["magnitude", "--sparsity", "0.5"])):
        out = tmp_path / f"run{number}"
        assert main(["prune", *more, *words, "--out", str(out)]) == 0
        assert main(["verify", str(out), "--threads", "1"]) == 0
        kind = transformers.AutoModelForImageClassification
        small = kind.from_pretrained(out / "pruned").eval()
        report = json.loads((out / "report.json").read_text())
        assert sum(p.numel() for p in small.parameters()) == report["pruned"]["params"]
        kept = (folder / "preprocessor_config.json").read_bytes()
        assert (out / "pruned" / "preprocessor_config.json").read_bytes() == kept


def test_images_of_a_folder_get_the_size_and_numbers_of_the_network(tmp_path: Path) -> None:
    config = made("vit").config.to_dict()  # type: ignore[union-attr,operator]  # of transformers
    config |= {"image_size": 16, "num_channels": 3, "num_labels": 2}
    folder = tmp_path / "vit"
    for name in ("id2label", "label2id"):
        del config[name]
    network = transformers.ViTForImageClassification(transformers.ViTConfig(**config))
    network.save_pretrained(folder)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    for number in range(40):
        path = tmp_path / "images" / ("test", "train")[number % 5 > 0] / "ab"[number % 2]
        path.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 80), (number, 0, 0)).save(path / f"{number}.png")
    target = image_classification.load(
        NetworkConfig(arch=f"hf:{folder}", dataset="folder", data_dir=tmp_path / "images")
    )
    assert target.saved.example_shape == (1, 3, 16, 16)
    assert (target.saved.mean, target.saved.std) == ((0.5,) * 3, (0.25,) * 3)
    weight = "classifier.weight"
    assert torch.equal(target.model.state_dict()[weight], network.state_dict()[weight])


def test_inspect_builds_it_for_the_images_that_options_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inspect", "--arch", f"hf:{saved('vit', tmp_path)}", "--json"]
    assert main([*words, "--image-size", "16", "--num-classes", "5"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert main(words) == 0
    own = json.loads(capsys.readouterr().out)
    heads = [
        next(group["size"] for group in found["groups"] if group["name"] == "classifier")
        for found in (other, own)
    ]
    assert heads == [5, 10]
    assert other["macs"] > 2 * own["macs"]


@pytest.mark.parametrize(
    "command", ["compare", pytest.param("apply", marks=pytest.mark.slow), "train"]
)
def test_every_command_that_prunes_takes_it(command: str, tmp_path: Path) -> None:
    words = ["--arch", f"hf:{saved('resnet', tmp_path)}", "--out", str(tmp_path / "run"), *SMALL]
    more = {
        "compare": ["--methods", "l1/uniform", "--no-agent"],
        "apply": ["--policy", "resnet-cifar"],
        "train": ["--baselines", "none", "--search-seeds", "1", *TINY_SEARCH],
    }[command]
    assert main([command, *words, *more, "--finetune-epochs", "0"]) == 0
    assert main(["verify", str(tmp_path / "run"), "--threads", "1"]) == 0


def test_one_call_prunes_it_and_distils_and_its_folder_reloads(tmp_path: Path) -> None:
    model = made("vit")
    images = torch.randn(64, 1, 8, 8)
    data = [{"pixel_values": images, "labels": torch.arange(64) % 10}]
    result = pg.prune(model, "taylor/global", pg.Budget(keep_macs=0.6, uniform=True), data=data)
    assert torch.equal(result.task.train.source.labels, torch.arange(64) % 10)
    recipe = pg.FinetuneConfig(epochs=1, batch_size=32, distill_weight=0.5)
    pg.finetune(result.model, result.task, recipe, seed=0, teacher=model)
    pg.save_pretrained(result, tmp_path / "small")
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(again(images).logits, result.model(images).logits)
    own = pg.load_pruned(tmp_path / "small", lambda: made("vit")).model
    assert torch.equal(own(images).logits, result.model(images).logits)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["hf:vit"],
            "holds no preprocessor_config.json, which says how images are normalised: put",
        ),
        (["hf:nowhere"], "give a folder, or copy the repository nowhere into"),
        (["hf:text"], "is of no classifier of images"),
        (
            ["hf:five"],
            "five is of another network: classifier.weight has shape (5, 16) instead of (10,",
        ),
        (["hf:vit", "--weights", "vit"], "or give --arch hf:vit if save_pretrained"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    processor = (saved("vit", tmp_path) / "preprocessor_config.json").read_text()
    Path("vit/preprocessor_config.json").unlink()
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.BertForSequenceClassification(config).save_pretrained("text")
    network = made("vit")
    network.config.num_labels = 5  # type: ignore[union-attr,assignment]  # of transformers
    type(network)(network.config).save_pretrained("five")  # type: ignore[operator]
    for name in ("text", "five"):
        Path(name, "preprocessor_config.json").write_text(processor)
    capsys.readouterr()
    assert main(["prune", "l1/uniform", "--arch", *words, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("run").exists()

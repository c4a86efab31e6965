"""Folders in the layouts of ImageNet and CIFAR-100 go through the whole job."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prunegraph.cli.main import main
from prunegraph.core.console import Console
from prunegraph.runs.dense import ensure_dense
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.config import NetworkConfig
from prunegraph.runs.prepare import never_flipped
from prunegraph.runs.tasks.registry import load_target

NUM_COLOURS = 8


def write_images(
    folder: Path, num_classes: int, per_class: int, size: Callable[[int], tuple[int, int]]
) -> None:
    """Write images whose colour and stripes tell their class."""
    rng = np.random.default_rng(0)
    for label in range(num_classes):
        target = folder / f"class{label:03d}"
        target.mkdir(parents=True)
        for number in range(per_class):
            width, height = size(number)
            stripes = np.sin(np.arange(width) * (1 + label // NUM_COLOURS) / 4)
            colour = 40 + 20 * np.array([label % 2, label // 2 % 2, label // 4 % 2]) * 4
            pixels = colour + 30 * stripes[None, :, None] + rng.normal(0, 10, (height, width, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(target / f"{number}.jpg", quality=90)


def run(*argv: str) -> None:
    assert main(list(argv)) == 0


def check_train_apply_verify(tmp_path: Path, arch: str, data: list[str]) -> None:
    small = ["--keep-macs", "0.5", "--finetune-epochs", "1", "--batch-size", "16"]
    small += ["--calibration-images", "32"]
    search = [
        "--search-seeds",
        "1",
        "--networks",
        "48",
        "--agent.subset",
        "16",
        "--agent.update-size",
        "4",
    ]
    search += ["--baselines", "none"]
    train, applied = tmp_path / "train", tmp_path / "applied"
    run(
        *["train", "--arch", arch, "--pretrain-epochs", "1"],
        *[*data, *small, *search, "--out", str(train)],
    )
    run("verify", str(train))
    run(
        *["apply", "--policy", str(train), "--weights", str(train / "dense.safetensors")],
        *[*data, *small, "--out", str(applied)],
    )
    run("verify", str(applied))
    for folder in (train, applied):
        report = json.loads((folder / "report.json").read_text())
        assert 0 < report["pruned"]["macs"] <= 0.5 * report["dense"]["macs"]
        assert 0 <= report["pruned"]["test_accuracy_finetuned"] <= 1


def test_weights_remember_the_size_of_their_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, weights = tmp_path / "images", tmp_path / "w.safetensors"
    for split in ("train", "val"):
        write_images(data / split, 2, 4, lambda _: (24, 24))
    folder = ["--dataset", "folder", "--data-dir", str(data)]
    small = ["--arch", "digits_resnet8_w4", "--image-size", "12", "--epochs", "1"]
    run("pretrain", *folder, *small, "--out", str(weights))
    shown = ["inspect", "--weights", str(weights), "--data-dir", str(data), "--json"]
    capsys.readouterr()
    run(*shown)
    remembered = json.loads(capsys.readouterr().out)["macs"]
    run(*shown, "--image-size", "24")
    assert json.loads(capsys.readouterr().out)["macs"] > 3 * remembered
    config = NetworkConfig(weights=weights, data_dir=data)
    assert load_target(config).dataset.image_shape == (3, 12, 12)


def test_what_weights_tell_of_their_images_is_not_of_other_ones(tmp_path: Path) -> None:
    data, weights = tmp_path / "images", tmp_path / "w.safetensors"
    for split in ("train", "val"):
        write_images(data / split, 2, 4, lambda _: (24, 24))
    small = ["--arch", "digits_resnet8_w4", "--image-size", "12", "--no-flip", "--epochs", "1"]
    run("pretrain", "--dataset", "folder", "--data-dir", str(data), *small, "--out", str(weights))
    for dataset, flips, shape in (("folder", False, (3, 12, 12)), ("imagenet", True, (3, 24, 24))):
        config = NetworkConfig(weights=weights, data_dir=data, dataset=dataset)
        target = load_target(config)
        assert target.dataset.image_shape == shape
        assert never_flipped(config, target.info) is not flips
        (tmp_path / dataset).mkdir()
        dense = ensure_dense(target, config, RunFolder(path=tmp_path / dataset), Console())
        record = json.loads(dense.with_suffix(".json").read_text())
        assert ("no_flip" in record, "image_size" in record) == (not flips, not flips)


@pytest.mark.slow
def test_an_imagenet_layout_with_torchvision_resnet18_at_224(tmp_path: Path) -> None:
    data = tmp_path / "images"
    write_images(data / "train", 8, 12, lambda number: (240 + 8 * number, 300 - 6 * number))
    write_images(data / "val", 8, 4, lambda number: (230 + 8 * number, 260))
    write_images(data / "test", 8, 4, lambda number: (260, 230 + 8 * number))
    options = ["--dataset", "imagenet", "--data-dir", str(data)]
    check_train_apply_verify(tmp_path, "torchvision:resnet18", options)


@pytest.mark.slow
def test_a_cifar100_layout_of_100_classes(tmp_path: Path) -> None:
    data = tmp_path / "images"
    for split, per_class in (("train", 6), ("val", 2), ("test", 2)):
        write_images(data / split, 100, per_class, lambda _: (32, 32))
    options = ["--dataset", "cifar100", "--data-dir", str(data)]
    check_train_apply_verify(tmp_path, "resnet20", options)

"""Every format of ``prunegraph export``, read back by the library that it is meant for."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import prunegraph as pg
from prunegraph.artefacts.export import export_recipe
from prunegraph.artefacts.pruned import read_info
from prunegraph.cli.main import main
from prunegraph.core.errors import ExportError
from prunegraph.core.files import write_json
from prunegraph.runs.export import input_details
from prunegraph.runs.report.plots import Findings

USER_MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.left, self.right = nn.Conv2d(12, 8, 3), nn.Conv2d(12, 4, 3)
        self.head = nn.Linear(12, classes)

    def forward(self, images):
        x = torch.relu(self.norm(self.stem(images)))
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.head(x.relu().mean((2, 3)))

def build(num_classes=10):
    return Net(num_classes)
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"user_net_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(USER_MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.fixture
def run(user_module: str, tmp_path: Path) -> tuple[Path, nn.Module]:
    """A run folder with a pruned network of the user's own code, and that network."""
    torch.manual_seed(0)
    dense = importlib.import_module(user_module).build().eval()
    dense.norm.running_mean.normal_()
    graph = pg.analyse(dense, torch.randn(1, 1, 8, 8))
    scores = np.random.default_rng(0).normal(size=graph.num_units).astype(np.float32)
    mask = graph.project(scores, pg.Budget(keep_macs=0.5))
    small = pg.apply_mask(dense, graph, mask)
    info = pg.PrunedInfo(
        arch=f"{user_module}:build",
        num_classes=10,
        example_shape=(1, 1, 8, 8),
        mean=(0.25,),
        std=(0.5,),
        extra={"classes": [*"abcdefghi", "\x1b"]},
    )
    pg.save_pruned(tmp_path / "run", model=small, mask=mask, graph=graph, info=info)
    return tmp_path / "run", small.eval()


def trust(folder: Path) -> tuple[str, str]:
    """Return the option without which no code is run that a file names."""
    return "--arch", read_info(folder).arch


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_onnx_is_read_by_onnxruntime(run: tuple[Path, nn.Module]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, small = run
    assert main(["export", str(folder), *trust(folder), "--format", "onnx"]) == 0
    session = onnxruntime.InferenceSession(folder / "pruned.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), outputs(small, IMAGES))


def test_a_torch_program_needs_torch_alone(run: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, small = run
    assert main(["export", str(folder), *trust(folder), "--format", "torch-export"]) == 0
    save_file({"images": IMAGES}, tmp_path / "images.safetensors")
    code = (
        "import sys, torch\n"
        "from safetensors.torch import load_file, save_file\n"
        "images = load_file('images.safetensors')['images']\n"
        f"found = torch.export.load({str(folder / 'pruned.pt2')!r}).module()(images)\n"
        "assert 'prunegraph' not in sys.modules\n"
        "save_file({'found': found.detach()}, 'found.safetensors')\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = load_file(tmp_path / "found.safetensors")["found"]
    torch.testing.assert_close(found, outputs(small, IMAGES))


def test_images_of_any_size_are_asked_for_by_their_axes(
    run: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, small = run
    path, images = tmp_path / "any.pt2", torch.randn(3, 1, 12, 20)
    words = ["export", str(folder), *trust(folder), "--format", "torch-export", "--out", str(path)]
    assert main([*words, "--dynamic-axes", "2", "3"]) == 0
    assert "inputs of shape [batch, 1, any, any]" in capsys.readouterr().out
    found = torch.export.load(path).module()(images)
    torch.testing.assert_close(found, outputs(small, images))
    assert main([*words[:-1], str(tmp_path / "other.pt2"), "--dynamic-axes", "4"]) == 2
    assert "dynamic_axes holds 4: name axes from 1 to 3" in capsys.readouterr().err


def test_the_recipe_cuts_a_freshly_built_network_of_the_users_code(
    run: tuple[Path, nn.Module], user_module: str, tmp_path: Path
) -> None:
    folder, small = run
    path = tmp_path / "elsewhere" / "net.safetensors"
    assert (
        main(["export", str(folder), *trust(folder), "--format", "safetensors", "--out", str(path)])
        == 0
    )
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "net.recipe.json",
        "net.safetensors",
    ]
    torch.manual_seed(99)  # other weights than those that were pruned
    loaded = pg.load_pruned(path, importlib.import_module(user_module).build)
    torch.testing.assert_close(outputs(loaded.model, IMAGES), outputs(small, IMAGES))
    assert loaded.model.stem.out_channels == small.stem.out_channels < 12
    assert loaded.info.arch == f"{user_module}:build"


def test_the_command_line_reads_an_exported_recipe(
    run: tuple[Path, nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    assert main(["export", str(folder), *trust(folder), "--format", "safetensors", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["files"]
    assert written == [
        str(folder / "exported.safetensors"),
        str(folder / "exported.recipe.json"),
    ]
    assert main(["inspect", "--run", written[0], *trust(folder), "--json"]) == 0
    assert "kept" in json.loads(capsys.readouterr().out)
    words = ["export", written[0], *trust(folder), "--format", "torch-export", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["files"] == [str(folder / "pruned.pt2")]


def test_changed_user_code_is_refused(
    run: tuple[Path, nn.Module], user_module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    module = importlib.import_module(user_module)
    module.build = lambda num_classes=10: nn.Sequential(
        nn.Conv2d(1, 12, 3), nn.Conv2d(12, 8, 3), nn.Flatten(), nn.Linear(128, num_classes)
    )
    assert main(["export", str(folder), *trust(folder), "--format", "safetensors"]) == 2
    assert "describes a network of another structure" in capsys.readouterr().err
    assert not (folder / "exported.safetensors").exists()


def test_a_recipe_that_computes_something_else_is_not_written(
    run: tuple[Path, nn.Module], user_module: str, tmp_path: Path
) -> None:
    folder, _ = run
    build = importlib.import_module(user_module).build
    saved = pg.load_pruned(folder, build)

    def stateful() -> nn.Module:  # computes with something that no file holds
        model = build()
        model.head.register_forward_hook(lambda _module, _inputs, output: 1.01 * output)
        return model

    with pytest.raises(ExportError, match="outputs differ"):
        export_recipe(saved, IMAGES, tmp_path / "net.safetensors", stateful)
    assert not list(tmp_path.glob("net.*"))


@pytest.mark.parametrize(
    ("format_name", "out", "there"),
    [
        ("onnx", "net.onnx", "net.onnx"),
        ("torch-export", "run/pruned.pt2", "run/pruned.pt2"),
        ("safetensors", "run/pruned.safetensors", "run/pruned.safetensors"),
        ("safetensors", "net.safetensors", "net.recipe.json"),
    ],
)
def test_a_file_that_exists_is_not_replaced(
    run: tuple[Path, nn.Module],
    format_name: str,
    out: str,
    there: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = run
    if not (tmp_path / there).exists():
        (tmp_path / there).write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    words = ["export", str(folder), *trust(folder), "--format", format_name]
    assert main([*words, "--out", str(tmp_path / out)]) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path / there} exists" in err
    assert err.endswith("give another --out\n")
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


@pytest.mark.parametrize(
    ("format_name", "name"),
    [("onnx", "shop.py"), ("torch-export", "net.onnx"), ("safetensors", "net.pt2")],
)
def test_a_format_needs_its_suffix(
    run: tuple[Path, nn.Module],
    format_name: str,
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = run
    words = ["export", str(folder), *trust(folder), "--format", format_name]
    assert main([*words, "--out", str(tmp_path / name)]) == 2
    suffix = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}[format_name]
    assert f"{name} must end in {suffix}" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_an_earlier_export_in_the_run_is_replaced(run: tuple[Path, nn.Module]) -> None:
    folder, _ = run
    (folder / "exported.safetensors").write_text("of an earlier export")
    assert main(["export", str(folder), *trust(folder), "--format", "safetensors"]) == 0
    assert load_file(folder / "exported.safetensors")


def test_an_exported_file_says_what_it_eats(
    run: tuple[Path, nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    words = ["export", str(folder), *trust(folder), "--format", "torch-export"]
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    known = {
        "input_shape": [1, 8, 8],
        "mean": [0.25],
        "std": [0.5],
        "classes": [*"abcdefghi", "\x1b"],
    }
    assert json.loads(printed.out).items() >= known.items()
    assert printed.err.splitlines()[-1] == (
        "it takes inputs of shape [batch, 1, 8, 8], pixels in [0, 1] minus mean [0.25], divided by "
        "std [0.5]; its 10 classes: a, b, c, d, e, f, g, h, i, ?"
    )
    extra = dict.fromkeys(known, "")
    torch.export.load(folder / "pruned.pt2", extra_files=extra)
    assert {name: json.loads(text) for name, text in extra.items()} == known


def test_an_onnx_file_says_what_it_eats(run: tuple[Path, nn.Module]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, _ = run
    assert main(["export", str(folder), *trust(folder)]) == 0
    session = onnxruntime.InferenceSession(folder / "pruned.onnx")
    found = session.get_modelmeta().custom_metadata_map
    assert [json.loads(found[name]) for name in ("mean", "std", "input_shape")] == [
        [0.25],
        [0.5],
        [1, 8, 8],
    ]


def test_what_is_not_known_of_the_inputs_is_left_out() -> None:
    info = pg.PrunedInfo(arch="a:b", num_classes=2, example_shape=(1, 4), extra={"classes": 3})
    assert input_details(info) == {"input_shape": [4]}


def test_of_a_comparison_the_cell_of_the_pruned_network_is_named(
    make_findings: Callable[..., Findings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [dict(row) for row in make_findings().content["methods"]]
    rows[0]["cell"] = "cells/ab"
    for cell, words in (
        ("cells/ab", f"name {tmp_path / 'cells' / 'ab'}, its pruned network"),
        (None, f"name {tmp_path}/cells/..., one of its cells"),
    ):
        rows[0]["cell"] = cell
        content = make_findings(methods=rows, command="compare").content
        write_json(tmp_path / "report.json", content)
        for command in (["export"], ["inspect", "--run"]):
            assert main([*command, str(tmp_path)]) == 2
            err = capsys.readouterr().err
            assert err == f"prunegraph: {tmp_path} is a comparison of many networks: {words}\n"
    write_json(tmp_path / "report.json", make_findings(command="train").content)
    assert main(["export", str(tmp_path)]) == 2
    assert "mask.json" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(
    run: tuple[Path, nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    words = ["export", str(folder), *trust(folder), "--device", "nosuchdevice"]
    assert main(words) == 2
    assert "device 'nosuchdevice' cannot be used" in capsys.readouterr().err
    assert not (folder / "pruned.onnx").exists()


def test_code_that_a_file_names_is_not_run(
    run: tuple[Path, nn.Module], user_module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    del sys.modules[user_module]
    for words in (["export", str(run[0])], ["inspect", "--run", str(run[0])]):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert f"trust it with --arch {user_module}:build" in err
        assert err.count("\n") == 1
    assert user_module not in sys.modules
    weights = run[0] / "weights.safetensors"
    weights.with_suffix(".json").write_text(json.dumps({"arch": f"{user_module}:build"}))
    save_file({"a": torch.zeros(1)}, weights)
    assert main(["inspect", "--weights", str(weights), "--dataset", "digits"]) == 2
    assert f"trust it with --arch {user_module}:build" in capsys.readouterr().err
    assert user_module not in sys.modules

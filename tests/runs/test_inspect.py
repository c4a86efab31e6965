import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from prunegraph.artefacts.pruned import PrunedInfo, save_pruned
from prunegraph.cli.main import main
from prunegraph.core.budget import Budget
from prunegraph.graph import analyse
from prunegraph.graph.apply import apply_mask
from prunegraph.models import build_model
from prunegraph.runs.inspect import params_by_group, tied_in_words

USER_MODELS = """
import torch
from torch import nn

class Fails(nn.Module):
    def forward(self, images):
        return images @ torch.zeros(5, 5)

class TwoInputs(nn.Module):
    def forward(self, images, other):
        return images + other

class Nothing(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)
    def forward(self, images):
        return self.fc(images.flatten(1))

class NotANumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))
        nn.init.constant_(self.body[0].weight, float("nan"))
    def forward(self, images):
        return self.body(images)

class Flips(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.ModuleDict({"[/x]": nn.Conv2d(8, 8, 3)})
        self.fc = nn.Linear(8, 10)
    def forward(self, images):
        x = self.second["[/x]"](self.first(images)).softmax(1)
        return self.fc(x.mean((2, 3)))

def literal():
    return 3
"""


@pytest.fixture
def user_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"user_models_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(USER_MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Fails", "the forward of Fails fails"),
        ("TwoInputs", "missing 1 required positional argument"),
        ("Nothing", "othing"),
        ("NotANumber", "NaN"),
        ("literal", "must return a torch.nn.Module"),
        ("absent", "has no callable 'absent'"),
    ],
)
def test_unusable_user_models_give_one_line(
    user_models: str, factory: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["inspect", "--arch", f"{user_models}:{factory}", "--dataset", "digits"])
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_frozen_groups_are_shown_with_their_reason(
    user_models: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--arch", f"{user_models}:Flips", "--dataset", "digits"]) == 0
    out = capsys.readouterr().out
    assert "softmax" in out
    assert "[/x]" in out  # no markup
    assert "8 of 26 prunable units can be removed, in 1 groups" in out


@pytest.fixture
def pruned_run(tmp_path: Path) -> Path:
    """A saved pruned network, as a run folder holds it."""
    model = build_model("digits_resnet", num_classes=10, image_shape=(1, 8, 8))
    graph = analyse(model, torch.randn(1, 1, 8, 8))
    scores = np.arange(graph.num_units, dtype=np.float32)
    mask = graph.project(scores, Budget(keep_macs=0.5))
    info = PrunedInfo(arch="digits_resnet", num_classes=10, example_shape=(1, 1, 8, 8))
    model = apply_mask(model, graph, mask)
    save_pruned(tmp_path / "run", model=model, mask=mask, graph=graph, info=info)
    return tmp_path / "run"


def test_a_run_shows_what_it_kept(pruned_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = pruned_run / "groups.png"
    assert main(["inspect", "--run", str(pruned_run), "--json", "--plot", str(plot)]) == 0
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert content["arch"] == "digits_resnet"
    assert 0 < content["kept"]["macs"] <= 0.5 * content["macs"]
    assert content["kept"]["widths"]["layer1.0.conv1"] < 16
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", "--run", str(pruned_run)]) == 0
    assert "kept" in capsys.readouterr().out


def test_an_architecture_is_drawn(tmp_path: Path) -> None:
    plot = tmp_path / "groups.png"
    assert main(["inspect", "--arch", "digits_resnet", "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot", "groups.pdf"], "plot=groups.pdf must be a PNG file"),
        (["--run", "run", "--arch", "resnet20"], "--run names the network itself: drop --arch"),
        (["--pretrain-epochs", "7"], "unknown option '--pretrain-epochs' of `prunegraph inspect`;"),
        (["--run", "run", "--attention", "width"], "drop --attention"),
        (["--run", "nowhere"], "nowhere holds no mask.json: name the --out of"),
    ],
)
def test_contradictory_options_give_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_config_file_needs_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "options.yaml").write_text("arch: digits_resnet\n")
    assert main(["inspect", "--config", str(tmp_path / "options.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arch"] == "digits_resnet"
    (tmp_path / "options.yaml").write_text("arch: digits_resnet\npretrain_epochs: 7\n")
    assert main(["inspect", "--config", str(tmp_path / "options.yaml")]) == 2
    assert "inspect makes no use of pretrain_epochs" in capsys.readouterr().err


def test_modules_that_stay_as_they_are_are_frozen_with_that_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["inspect", "--json", "--exclude", "layer2.*", "--keep-at-least", "fc=0.5"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    reasons = {group["name"]: group["frozen"] for group in groups}
    assert reasons["layer2.0.conv1"] == "excluded by 'layer2.*'"
    assert reasons["layer1.0.conv1"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--exclude", "layr2.*"], "exclude='layr2.*' matches no module with weights"),
        (["--keep-at-least", "layer2.*"], "which is not MODULES=SHARE"),
        (["--keep-at-least", "layer2.*=most"], "which is not MODULES=SHARE"),
        (["--keep-at-least", "layer2.*=8"], "must lie in (0, 1]"),
    ],
)
def test_modules_that_there_are_not_are_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_table_shows_25_groups_and_all_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", "--arch", "resnet56"]
    assert main(words) == 0
    few = capsys.readouterr().out
    assert main([*words, "--all"]) == 0
    whole = capsys.readouterr().out
    rows = [sum(line.startswith("│") for line in text.splitlines()) for text in (few, whole)]
    assert rows[0] < rows[1]
    assert re.search(r"^(\d+) more groups: --all shows them$", few, re.MULTILINE)
    assert "more groups" not in whole
    assert "layer3.8.conv1" in whole
    assert "layer3.8.conv1" not in few


def test_groups_tell_their_parameters_and_what_is_tied_to_them() -> None:
    model = build_model("digits_resnet", num_classes=10, image_shape=(1, 8, 8))
    graph = analyse(model, torch.randn(1, 1, 8, 8))
    names = [group.name for group in graph.groups]
    params, words = params_by_group(graph), tied_in_words(graph)
    assert params.sum() == sum(parameter.numel() for parameter in model.parameters())
    assert params[names.index("layer1.0.conv1")] == 16 * 16 * 9 + 2 * 16
    stream = words[names.index("conv1")]
    assert stream == "summed with layer1.0.conv2; read by layer1.0.conv1, layer2.0.conv1"
    assert words[names.index("layer1.0.conv1")] == "read by layer1.0.conv2"

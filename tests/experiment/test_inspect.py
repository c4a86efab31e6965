from pathlib import Path

import pytest

from prunegraph.experiment.cli import main

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
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 10)
    def forward(self, images):
        x = self.second(self.first(images)).softmax(1)
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
    assert "8 of 26 channel classes can be removed, in 1 groups" in out

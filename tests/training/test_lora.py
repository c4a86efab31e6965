"""Fine-tunes by LoRA: what changes, what stays, and that a plain network is left."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prunegraph as pg
from prunegraph.core.errors import ConfigError, ModelError
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import copy_network
from prunegraph.training.loop import FinetuneConfig, finetune
from prunegraph.training.lora import adapters
from prunegraph.training.masked import MaskPlan
from support.language import TEXT, encode, tiny_llama

pytest.importorskip("peft")

CONFIG = FinetuneConfig(
    epochs=2, batch_size=4, peak_lr=1e-2, optimizer="adamw", autocast=False, lora_rank=2
)


@pytest.fixture
def task() -> Any:
    return pg.tasks.causal_lm(
        tiny_llama(), encode, calibration=[TEXT], window=16, calibration_tokens=128
    )


def changes(model: nn.Module, before: nn.Module) -> dict[str, Any]:
    """Return the difference of each parameter that has changed."""
    old = dict(before.named_parameters())
    found = {name: (item - old[name]).detach() for name, item in model.named_parameters()}
    return {name: change for name, change in found.items() if change.any()}


def test_linear_layers_alone_change_and_by_no_more_than_the_rank(task: Any) -> None:
    model = copy_network(task.model)
    result = finetune(model, task, CONFIG, seed=0)
    assert result.losses[-1] < result.losses[0]
    found = changes(model, task.model)
    assert {name.split(".")[-2] for name in found} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    for change in found.values():
        assert torch.linalg.matrix_rank(change, rtol=1e-4) <= 2
    assert model.state_dict().keys() == task.model.state_dict().keys()
    assert not hasattr(model, "peft_config")
    assert all(item.requires_grad for item in model.parameters())
    assert all(not type(module).__module__.startswith("peft") for module in model.modules())


def test_a_teacher_and_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    before = copy_network(model)
    with adapters(model, 1, seed=0):
        model[0].lora_B["default"].weight.data += 1.0
        wanted = model(torch.ones(2, 1, 8, 8))
    assert torch.allclose(model(torch.ones(2, 1, 8, 8)), wanted, atol=1e-5)
    assert changes(model, before).keys() == {"0.weight"}


def test_what_is_frozen_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    before = copy_network(model)
    with adapters(model, 1, seed=0):
        for name, item in model.named_parameters():
            item.data += "lora_B" in name
    assert changes(model, before).keys() == {"1.weight"}
    assert [item.requires_grad for item in model.parameters()] == [False, False, True, True]
    with pytest.raises(ModelError, match="unfreeze"), adapters(model[0], 1, seed=0):
        pass


def test_a_killed_training_goes_on_to_the_same_network(task: Any, tmp_path: Path) -> None:
    whole, half = copy_network(task.model), copy_network(task.model)
    finetune(whole, task, CONFIG, seed=0)

    def stop(done: int, *_: float) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        finetune(half, task, CONFIG, seed=0, checkpoint=path, progress=stop)
    half = copy_network(task.model)
    assert finetune(half, task, CONFIG, seed=0, checkpoint=path).resumed_epochs == 1
    assert not changes(half, whole)


def test_what_it_refuses(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = task.model.model.layers[0].mlp.up_proj.weight
    mask = WeightMask(keep={"model.layers.0.mlp.up_proj.weight": weight > 0})
    zeros = MaskPlan.holding(mask, task)
    with pytest.raises(ConfigError, match="lora_rank exclude one another: give one of them"):
        finetune(copy_network(task.model), task, CONFIG, seed=0, masks=zeros)
    with pytest.raises(ModelError, match="leave lora_rank out"), adapters(nn.ReLU(), 1, 0):
        pass
    with adapters(task.model, 1, 0), pytest.raises(ModelError, match=r"q_proj.*merge_and_unload"):
        pg.tasks.causal_lm(task.model, encode, calibration=[TEXT], window=16)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'prunegraph\[lora\]'"):
        finetune(task.model, task, CONFIG, seed=0)

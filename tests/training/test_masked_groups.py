"""Masks of languages in training: scores of their own, one mask by all, resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunegraph.core.weight_mask import WeightMask
from prunegraph.training.loop import FinetuneConfig, FinetuneResult, finetune
from prunegraph.training.masked import MaskedWeights, MaskPlan, agreement, dense_mask
from prunegraph.training.schedules import Cubic
from support.speech import tiny_task

CONFIG = FinetuneConfig(epochs=2, batch_size=8, optimizer="adamw", peak_lr=1e-3, autocast=False)


def train(
    checkpoint: Path | None = None, watch: Any = None, **plan: Any
) -> tuple[nn.Module, FinetuneResult]:
    task = tiny_task()
    masks = dict.fromkeys(task.languages, dense_mask(task.model))
    given = {"schedule": Cubic(0.8, end=10, every=2), "every": 2, "emphasis": 1.0} | plan
    whole = MaskPlan(masks=masks, group_of=task.group_of, **given)
    trained = finetune(
        task.model, task, CONFIG, seed=0, masks=whole, checkpoint=checkpoint, watch=watch
    )
    return task.model, trained


def test_each_language_has_its_own_mask_of_the_asked_size() -> None:
    model, trained = train()
    sizes = {mask.num_kept for mask in trained.masks.values()}
    size = dense_mask(model).size
    assert sizes == {size - round(0.8 * size)}
    active, union, overlap = agreement(trained.masks)
    assert active < union < 2 * active
    assert 0.3 < overlap < 1.0
    assert trained.history[-1][1:] == (active, union, overlap)
    assert trained.history[0][1] > 0.5


def test_one_mask_by_all_scores_is_one() -> None:
    model, trained = train(joint=True)
    first, second = trained.masks.values()
    assert first == second
    assert first.sparsity == pytest.approx(0.8, abs=1e-3)
    first.check_zeros(model)


def test_by_absolute_values_alone_languages_agree() -> None:
    _, trained = train(emphasis=None)
    assert agreement(trained.masks)[2] > 0.98


@pytest.mark.parametrize("reselect", [False, True])
def test_a_killed_training_goes_on_to_the_same_result(tmp_path: Path, reselect: bool) -> None:
    class Killed(Exception):
        pass

    def kill(done: float, _: float) -> None:
        if done > 1.0:
            raise Killed

    wanted, whole = train(reselect=reselect)
    with pytest.raises(Killed):
        train(tmp_path / "c.safetensors", kill, reselect=reselect)
    model, trained = train(tmp_path / "c.safetensors", reselect=reselect)
    assert trained.resumed_epochs == 1
    assert trained.masks == whole.masks
    assert repr([*trained.history]) == repr([*whole.history])  # a file shows 5 and 5.0 apart
    for name, value in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_count_where_the_mask_keeps_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1, bias=False).to(dtype), torch.randn(8, 4, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    half = WeightMask({"weight": torch.tensor([[True, True, False, False]])})
    masked = MaskedWeights(model, optimizer, {"en": half, "uk": half}, decay=0.5)
    masked.use("uk")
    before = masked.values()["weight"]
    (model(x).sum()).backward()
    gradient = x.sum(0)
    optimizer.step()
    wanted = gradient.abs().float() * 0.5**0.5
    assert torch.allclose(masked.rms("uk")["weight"][0], wanted, rtol=1e-5 + torch.finfo(dtype).eps)
    assert masked.rms("en")["weight"].abs().sum() == 0.0
    after = masked.values()["weight"]
    assert torch.equal(after[0, 2:], before[0, 2:])
    assert not torch.equal(after[0, :2], before[0, :2])

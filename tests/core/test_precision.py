"""Bfloat16 where the processor has instructions for it, float32 elsewhere."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from prunegraph.core.precision import as_elsewhere, autocasting, computes_bfloat16
from prunegraph.core.splits import Dataset
from prunegraph.layerwise.recalibrate import recalibrate_bn
from prunegraph.tasks.classification import evaluate
from prunegraph.tasks.image_classification import training_task
from prunegraph.training.loop import FinetuneConfig, finetune


class Watched(nn.Sequential):
    """Notes in which type its layers compute."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
        self.types: set[torch.dtype] = set()

    def forward(self, input: Tensor) -> Tensor:
        logits: Tensor = super().forward(input)
        self.types.add(logits.dtype)
        return logits


@pytest.fixture(params=["avx512_bf16", "amx_bf16", "avx2", "bf16"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A processor that has one kind of instructions; ``bf16`` is an ARM one's."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {request.param: True}, raising=False)
    yield request.param


def test_networks_run_in_bfloat16_where_it_is_fast(instructions: str, digits: Dataset) -> None:
    has = instructions in {"avx512_bf16", "amx_bf16"}
    assert computes_bfloat16("cpu") == has
    model = Watched()
    task = training_task(model, digits.train.sample(64, 0))
    for run in (
        lambda: finetune(model, task, FinetuneConfig(epochs=1), seed=0),
        lambda: evaluate(model, digits.search),
        lambda: recalibrate_bn(model, digits.train.batches(64), autocast=True),
    ):
        model.types.clear()
        run()
        assert (torch.bfloat16 in model.types) == has


@pytest.mark.parametrize("instructions", ["avx512_bf16"], indirect=True)
def test_nothing_runs_in_bfloat16_that_shall_not(instructions: str, digits: Dataset) -> None:
    model = Watched()
    evaluate(model, digits.search, autocast=False)
    recalibrate_bn(model, digits.train.batches(64))
    assert model.types == {torch.float32}, instructions


@pytest.mark.parametrize("native", [False, True])
def test_older_torches_tell_it_otherwise(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
    assert computes_bfloat16("cpu") == native


def test_where_torch_cannot_tell_it_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert not computes_bfloat16("cpu")
    assert not computes_bfloat16("mps")


@pytest.mark.parametrize("instructions", ["avx512_bf16", "avx2"], indirect=True)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_networks_run_as_they_did_elsewhere(
    instructions: str, bfloat16: bool, digits: Dataset
) -> None:
    model, own = Watched(), instructions == "avx512_bf16"
    with as_elsewhere(bfloat16=bfloat16):
        evaluate(model, digits.search)
        assert model.types == {torch.bfloat16 if bfloat16 else torch.float32}
        with autocasting(torch.device("cpu"), wanted=False):
            assert not torch.is_autocast_enabled("cpu")
        assert computes_bfloat16("cpu") == own
    with autocasting(torch.device("cpu"), wanted=True):
        assert torch.is_autocast_enabled("cpu") == own


@pytest.mark.parametrize("native", [False, True])
def test_a_gpu_that_emulates_it_does_not(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native
    )
    assert computes_bfloat16(torch.device("cuda", 0)) == native


@pytest.mark.parametrize("learns", [True, False])
def test_copies_of_weights_are_kept_for_gradients_alone(learns: bool) -> None:
    with torch.set_grad_enabled(learns), autocasting(torch.device("cpu"), wanted=True):
        assert torch.is_autocast_cache_enabled() == learns

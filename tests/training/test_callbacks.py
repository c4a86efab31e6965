"""Masks in the loops of transformers and Lightning, with the real libraries."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prunegraph.core.errors import ConfigError
from prunegraph.core.weight_mask import WeightMask
from prunegraph.training.callbacks import LoopMasks, lightning_callback, trainer_callback
from prunegraph.training.masked import MaskPlan, dense_mask, least_mask
from prunegraph.training.schedules import Cubic, Levels

Logged = list[tuple[int, dict[str, float]]]


def kept(logged: Logged) -> Any:
    return lambda step, metrics: logged.append((step, dict(metrics)))


def sparsity_of(model: nn.Module, mask: WeightMask) -> float:
    weights = mask.parameters_of(model).values()
    return float(sum((w == 0).sum() for w in weights) / sum(w.numel() for w in weights))


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def train_llama(
    model: nn.Module, folder: Path, callback: Any, resume: Path | None = None, **more: Any
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(32, (64, 8), generator=generator)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        weight_decay=0.1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **({"save_strategy": "no"} | more),
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, callbacks=[callback]
    ).train(resume_from_checkpoint=None if resume is None else str(resume))


def test_zeros_of_a_mask_stay_zero_in_the_trainer(tmp_path: Path) -> None:
    model, logged = llama(), Logged()
    weights = {n: p.detach().abs() for n, p in dense_mask(model).parameters_of(model).items()}
    mask = least_mask(weights, 0.5)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    callback = trainer_callback(MaskPlan(masks=mask), log=kept(logged))
    train_llama(model, tmp_path, callback)
    after = dict(model.named_parameters())
    for name, keep in mask.keep.items():
        assert not after[name][~keep].any()
        assert not torch.equal(after[name][keep], before[name][keep])
    assert [step for step, _ in logged][:3] == [1, 2, 3]
    assert all(metrics["sparsity"] == mask.sparsity for _, metrics in logged)
    assert "loss" in logged[0][1]


def test_the_trainer_prunes_at_a_step(tmp_path: Path) -> None:
    model, logged = llama(), Logged()
    plan = MaskPlan(schedule=Levels([(4, 0.6)]))
    callback = trainer_callback(plan, log=kept(logged))
    train_llama(model, tmp_path, callback)
    sparsities = {step: metrics["sparsity"] for step, metrics in logged}
    assert sparsities[4] == 0.0
    assert sparsities[5] == pytest.approx(0.6, abs=1e-3)
    assert sparsity_of(model, callback.masked.mask) == pytest.approx(0.6, abs=1e-3)


def test_the_network_is_free_after_the_training(tmp_path: Path) -> None:
    model = llama()
    callback = trainer_callback(MaskPlan(schedule=Levels([(1, 0.5)])))
    train_llama(model, tmp_path, callback)
    name, keep = next(iter(callback.masked.mask.keep.items()))
    weight = dict(model.named_parameters())[name]
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight[~keep].all()


GOING_ON = {
    "emphasis": {"emphasis": 0.5},
    "reselect": {"reselect": True, "emphasis": 0.5},
    "sizes": {},
}
"""Plans whose masks a checkpoint has to hold, but for the last."""


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", GOING_ON)
def test_a_resumed_trainer_ends_with_the_same_weights(
    name: str, given: bool, tmp_path: Path
) -> None:
    def plan() -> MaskPlan:
        mask = None
        if given:
            sizes = dense_mask(llama()).parameters_of(llama())
            mask = least_mask({n: p.detach().abs() for n, p in sizes.items()}, 0.2)
        return MaskPlan(masks=mask, schedule=Cubic(0.7, end=6), **GOING_ON[name])

    saving = {"save_strategy": "steps", "save_steps": 4}
    whole, before = llama(), trainer_callback(plan())
    train_llama(whole, tmp_path, before, **saving)
    elsewhere = tmp_path / "checkpoint-4"
    elsewhere = elsewhere.rename(tmp_path / "copied")
    resumed, after = llama(), trainer_callback(plan())
    train_llama(resumed, tmp_path / "again", after, elsewhere)
    assert after.masked.mask == before.masked.mask
    assert after.masked.mask.sparsity == pytest.approx(0.7, abs=1e-3)
    assert after.masked.history == before.masked.history
    for (at, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), at
    other_plan = MaskPlan(schedule=Cubic(0.7, end=6), emphasis=0.1)
    with pytest.raises(ConfigError, match="masks in the checkpoint are of another plan"):
        train_llama(llama(), tmp_path / "again", trainer_callback(other_plan), elsewhere)


def test_a_checkpoint_without_masks_is_told(tmp_path: Path) -> None:
    plan = MaskPlan(schedule=Cubic(0.7, end=6), emphasis=0.5)
    callback = trainer_callback(plan)
    saving = {"save_strategy": "steps", "save_steps": 4, "save_only_model": True}
    train_llama(llama(), tmp_path, callback, **saving)
    again = trainer_callback(plan)
    with pytest.warns(UserWarning, match="the checkpoint holds no masks"):
        train_llama(llama(), tmp_path / "again", again, tmp_path / "checkpoint-4")
    assert again.masked.mask.sparsity == pytest.approx(0.7, abs=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # Lightning asks torch for what is deprecated
def test_lightning_follows_a_schedule() -> None:
    library = pytest.importorskip("pytorch_lightning")

    class Module(library.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16))
            self.head = nn.Linear(16, 3)

        def training_step(self, batch: Any, _: int) -> Any:
            loss = F.cross_entropy(self.head(self.body(batch[0])), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    torch.manual_seed(0)
    model, logged = Module(), Logged()
    data = torch.utils.data.TensorDataset(torch.randn(80, 6), torch.randint(3, (80,)))
    callback = lightning_callback(MaskPlan(schedule=Cubic(final=0.5, end=8)), log=kept(logged))
    library.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    ).fit(model, torch.utils.data.DataLoader(data, batch_size=8))
    sparsities = [metrics["sparsity"] for _, metrics in logged]
    assert len(sparsities) == 10
    assert sparsities == sorted(sparsities)
    assert 0.0 < sparsities[1] < 0.5
    assert sparsities[-1] == pytest.approx(0.5, abs=1e-3)
    assert "loss" in logged[-1][1]
    assert sparsity_of(model, callback.masked.mask) == pytest.approx(0.5, abs=1e-3)


def lightning_module() -> Any:
    library = pytest.importorskip("pytorch_lightning")

    class Module(library.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))

        def training_step(self, batch: Any, _: int) -> Any:
            return F.cross_entropy(self.body(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    return Module()


def lightning_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(10)
    ]


def fit(module: Any, callbacks: list[Any], epochs: int = 1, resume: Path | None = None) -> None:
    library = pytest.importorskip("pytorch_lightning")
    library.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=len(callbacks) > 1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    ).fit(
        module,
        torch.utils.data.DataLoader(lightning_batches(), batch_size=None),
        ckpt_path=None if resume is None else str(resume),
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")  # Lightning asks torch for what is deprecated
def test_lightning_chooses_the_masks_of_a_loop_of_ones_own() -> None:
    plan = MaskPlan(schedule=Cubic(0.6, end=8), emphasis=0.1, reselect=True)
    callback, trained = lightning_callback(plan), lightning_module()
    fit(trained, [callback])

    own, loop = lightning_module(), LoopMasks(plan)
    optimizer = own.configure_optimizers()
    loop.attach(own, optimizer)
    for step, batch in enumerate(lightning_batches()):
        loop.begin(step)
        optimizer.zero_grad()
        own.training_step(batch, step).backward()
        optimizer.step()
    loop.finish()
    assert loop.masked is not None
    assert callback.masked.mask == loop.masked.mask
    assert loop.masked.mask.sparsity > 0.5
    assert all(map(torch.equal, trained.parameters(), own.parameters()))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # Lightning asks torch for what is deprecated
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_lightning_ends_with_the_same_weights(tmp_path: Path) -> None:
    library = pytest.importorskip("pytorch_lightning")
    plan = MaskPlan(schedule=Cubic(0.6, end=16), emphasis=0.1, reselect=True)
    whole, before = lightning_module(), lightning_callback(plan)
    keeping = library.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(whole, [before, keeping], epochs=2)
    resumed, after = lightning_module(), lightning_callback(plan)
    keeping = library.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(resumed, [after, keeping], epochs=2, resume=tmp_path / "epoch=0.ckpt")
    assert after.masked.mask == before.masked.mask
    assert after.masked.history == before.masked.history
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


@pytest.mark.parametrize("given", [False, True])
def test_zeros_hold_in_a_training_that_goes_on(given: bool) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(8, 8), torch.randn(16, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    masks = dense_mask(model) if given else None
    plan = MaskPlan(masks=masks, schedule=Cubic(0.5, end=4), every=4, until=8)
    found = []
    for start, end in ((0, 5), (5, 7), (7, 12)):  # of each a process of its own
        loop = LoopMasks(plan)
        loop.attach(model, optimizer)
        for step in range(start, end):
            loop.begin(step)
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        loop.finish()
        assert loop.masked is not None
        found.append(loop.masked.mask)
        found[-1].check_zeros(model)
    assert [mask.sparsity for mask in found] == [0.5] * 3
    assert found[0] == found[1] == found[2]


def test_batches_whose_gradients_are_added_up_choose_masks_once() -> None:
    model = nn.Linear(8, 8)
    loop = LoopMasks(MaskPlan(schedule=Cubic(0.5, end=4), every=1))
    loop.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in (0, 0, 1, 1):
        loop.begin(step)
    assert loop.masked is not None
    assert [step for step, *_ in loop.masked.history] == [0, 1]


def test_masks_of_groups_are_refused() -> None:
    network = nn.Linear(4, 4)
    plan = MaskPlan(masks={"a": dense_mask(network)}, group_of=lambda _: "a")
    with pytest.raises(ConfigError, match=r"use pg\.finetune"):
        LoopMasks(plan)


def test_a_tracker_is_told_numbers_alone() -> None:
    network, logged = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), Logged()
    training = LoopMasks(MaskPlan(masks=dense_mask(network)), kept(logged))
    training.attach(network, torch.optim.SGD(network.parameters(), lr=0.1))
    metrics: Mapping[str, Any] = {"loss": 1, "note": "fine"}
    training.tell(3, metrics)
    assert logged == [(3, {"loss": 1.0, "sparsity": 0.0})]

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import prunegraph as pg
from prunegraph.core.errors import (
    ArtefactError,
    ConfigError,
    DataError,
    ModelError,
    PruneGraphError,
)
from prunegraph.core.splits import Batch, Dataset, TrainSplit
from prunegraph.core.tensors import read_safetensors
from prunegraph.tasks.classification import evaluate
from prunegraph.tasks.image_classification import ImageClassification, training_task
from prunegraph.training.loop import FinetuneConfig, finetune
from prunegraph.training.schedules import learning_rate_at


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.head(self.drop(nn.functional.max_pool2d(x, 2).flatten(1)))


def make_net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Small()


@pytest.fixture
def task(digits: Dataset) -> ImageClassification:
    return training_task(make_net(), digits.train.sample(300, seed=0))


CONFIG = FinetuneConfig(epochs=3, peak_lr=0.05, warmup_epochs=1, autocast=False)


def stop_after(epochs: int) -> Callable[..., None]:
    def progress(done: int, *_: float) -> None:
        if done == epochs:
            raise KeyboardInterrupt

    return progress


def test_training_learns_digits(digits: Dataset) -> None:
    model = make_net()
    calls = []
    config = FinetuneConfig(epochs=4, peak_lr=0.1, warmup_epochs=0.5)
    result = finetune(
        model,
        training_task(model, digits.train),
        config,
        seed=0,
        progress=lambda *values: calls.append(values),
    )
    assert evaluate(model, digits.search).accuracy > 0.9
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert [call[:2] for call in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert calls[-1][2:] == (result.losses[-1], result.seconds)
    assert not model.training


def test_an_interrupted_training_resumes_bit_equal(
    task: ImageClassification, tmp_path: Path
) -> None:
    whole, halved = make_net(), make_net()
    expected = finetune(whole, task, CONFIG, seed=1)
    path = tmp_path / "run" / "training.safetensors"
    with pytest.raises(KeyboardInterrupt):
        finetune(halved, task, CONFIG, seed=1, checkpoint=path, progress=stop_after(2))
    torch.rand(7)  # the global generator must not matter
    resumed = make_net()
    result = finetune(resumed, task, CONFIG, seed=1, checkpoint=path)
    assert result.resumed_epochs == 2
    assert result.losses == expected.losses
    state = whole.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())
    again = make_net()
    assert finetune(again, task, CONFIG, seed=1, checkpoint=path).resumed_epochs == 3
    assert torch.equal(again.head.weight, whole.head.weight)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def stop_within(monkeypatch: pytest.MonkeyPatch, epochs: float) -> Callable[..., None]:
    """Write a checkpoint after every step, and stop after some."""
    monkeypatch.setattr(sys.modules[finetune.__module__], "CHECKPOINT_SECONDS", 0.0)

    def watch(done: float, loss: float) -> None:
        assert loss > 0.0
        if done == pytest.approx(epochs):
            raise KeyboardInterrupt

    return watch


@pytest.mark.parametrize("within", [1 / 3, 4 / 3])
def test_a_training_that_is_interrupted_within_an_epoch_resumes_bit_equal(
    within: float, task: ImageClassification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = make_net(), make_net()
    expected = finetune(whole, task, CONFIG, seed=1)
    path, stop = tmp_path / "training.safetensors", stop_within(monkeypatch, within)
    with pytest.raises(KeyboardInterrupt):
        finetune(make_net(), task, CONFIG, seed=1, checkpoint=path, watch=stop)
    torch.rand(7)  # the global generator must not matter
    steps: list[float] = []
    result = finetune(
        resumed, task, CONFIG, seed=1, checkpoint=path, watch=lambda done, _: steps.append(done)
    )
    assert result.resumed_epochs == int(within)
    assert steps[0] == pytest.approx(within + 1 / 3)
    assert result.losses == expected.losses
    state = whole.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [{"step": 3}, {"step": -1}, {"random.cpu": torch.zeros(5056, dtype=torch.uint8)}],
)
def test_a_damaged_state_within_an_epoch_is_refused(
    change: dict[str, Any],
    task: ImageClassification,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, stop = tmp_path / "training.safetensors", stop_within(monkeypatch, 1 / 3)
    with pytest.raises(KeyboardInterrupt):
        finetune(make_net(), task, CONFIG, seed=1, checkpoint=path, watch=stop)
    tensors, metadata = read_safetensors(path)
    record = json.loads(metadata["training"])
    tensors |= {name: value for name, value in change.items() if name in tensors}
    record["done"] |= {name: value for name, value in change.items() if name in record["done"]}
    save_file(tensors, path, {"training": json.dumps(record)})
    with pytest.raises(ArtefactError, match="the state within an epoch is damaged: delete"):
        finetune(make_net(), task, CONFIG, seed=1, checkpoint=path)


def test_the_seed_and_only_the_seed_decides(task: ImageClassification) -> None:
    config = FinetuneConfig(epochs=1)
    nets = [make_net() for _ in range(3)]
    before = torch.random.get_rng_state()
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        finetune(net, task, config, seed=seed)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(nets[0].head.weight, nets[1].head.weight)
    assert not torch.equal(nets[0].head.weight, nets[2].head.weight)


def test_a_checkpoint_of_another_training_is_refused(
    task: ImageClassification, tmp_path: Path
) -> None:
    path = tmp_path / "training.safetensors"
    finetune(make_net(), task, CONFIG, seed=1, checkpoint=path)
    with pytest.raises(ArtefactError, match=r"training\.safetensors.*different seed\)"):
        finetune(make_net(), task, CONFIG, seed=2, checkpoint=path)
    with pytest.raises(ArtefactError, match=r"different network\)"):
        finetune(make_net(seed=5), task, CONFIG, seed=1, checkpoint=path)
    with pytest.raises(ArtefactError, match=r"different images\)"):
        finetune(
            make_net(),
            training_task(make_net(), task.train.sample(200, 0)),
            CONFIG,
            seed=1,
            checkpoint=path,
        )
    with pytest.raises(ArtefactError, match=r"different config\)"):
        finetune(make_net(), task, FinetuneConfig(epochs=9), seed=1, checkpoint=path)


def test_a_damaged_checkpoint_is_refused(task: ImageClassification, tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    finetune(make_net(), task, CONFIG, seed=1, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtefactError, match=r"training\.safetensors is truncated"):
        finetune(make_net(), task, CONFIG, seed=1, checkpoint=path)


def test_a_diverging_loss_is_an_error(task: ImageClassification) -> None:
    config = FinetuneConfig(epochs=2, peak_lr=1e30, autocast=False)
    with pytest.raises(PruneGraphError, match=r"training loss is .* lower the learning rate"):
        finetune(make_net(), task, config, seed=0)


def test_an_image_that_is_no_number_is_blamed(task: ImageClassification) -> None:
    model, (images, labels) = make_net(), next(task.train.batches(64))
    images[3, 0, 2, 2] = torch.nan
    broken = pg.tasks.custom(
        *(model, images[:1]), train=[(images, labels)], score=lambda _: 1.0, higher_is_better=True
    )
    with pytest.raises(DataError, match="the train data hold NaN or infinite values: repair"):
        finetune(model, broken, CONFIG, seed=0)


def test_zero_epochs_leave_the_weights(task: ImageClassification) -> None:
    model, untouched = make_net(), make_net()
    result = finetune(model, task, FinetuneConfig(epochs=0), seed=0)
    assert result.losses == ()
    assert torch.equal(model.head.weight, untouched.head.weight)


def test_distillation_follows_the_teacher(digits: Dataset) -> None:
    train = digits.train
    teacher = make_net(seed=3)
    finetune(teacher, training_task(teacher, train), FinetuneConfig(epochs=3, peak_lr=0.1), seed=0)
    teacher.train()
    kept = {name: value.clone() for name, value in teacher.state_dict().items()}
    config = FinetuneConfig(epochs=3, peak_lr=0.05, distill_weight=1.0)
    student = make_net()
    swapped = _with_wrong_labels(train)  # at weight 1 labels must not matter
    finetune(student, training_task(student, swapped), config, seed=0, teacher=teacher)
    assert evaluate(student, digits.search).accuracy > 0.8
    assert teacher.training
    assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())


def _with_wrong_labels(train: TrainSplit) -> TrainSplit:
    class Wrong:
        labels = (train.images.labels + 1) % 10
        num_classes = 10
        image_shape = train.images.image_shape

        def load(self, index: Tensor, augment: torch.Generator | None = None) -> Batch:
            return train.source.load(index, augment)[0], self.labels[index]

        def fingerprint(self) -> str:
            return "wrong"

    return TrainSplit(Wrong(), train.index)


def test_a_last_batch_of_one_image_is_left_out(digits: Dataset) -> None:
    class OnePixel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 10, 8)
            self.bn = nn.BatchNorm2d(10)  # raises on a batch of one image here

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)).flatten(1)

    train = digits.train.sample(33, seed=0)
    config = FinetuneConfig(epochs=1, batch_size=16)
    assert math.isfinite(
        finetune(OnePixel(), training_task(OnePixel(), train), config, seed=0).losses[0]
    )
    with pytest.raises(ConfigError, match="too few"):
        finetune(
            OnePixel(), training_task(OnePixel(), digits.train.sample(1, seed=0)), config, seed=0
        )


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate_at(s, steps=12, warmup_steps=2, peak=0.1) for s in range(12)]
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert rates[7] == pytest.approx(0.05)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0.0 < rates[-1] < 0.005


def test_the_default_peak_follows_the_length() -> None:
    assert FinetuneConfig(epochs=20).learning_rate == 0.02
    assert FinetuneConfig(epochs=100).learning_rate == 0.1
    assert FinetuneConfig(epochs=5, peak_lr=0.3).learning_rate == 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": -1},
        {"epochs": 1, "batch_size": 1},
        {"epochs": 1, "peak_lr": 0.0},
        {"epochs": 1, "distill_weight": 1.5},
        {"epochs": 1, "warmup_epochs": float("nan")},
    ],
)
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    name = list(options)[-1]
    with pytest.raises(ConfigError, match=name):
        FinetuneConfig(**options)


def test_a_teacher_and_its_weight_go_together(task: ImageClassification) -> None:
    with pytest.raises(ConfigError, match="needs a teacher"):
        finetune(make_net(), task, FinetuneConfig(epochs=1, distill_weight=0.5), seed=0)
    with pytest.raises(ConfigError, match="needs a teacher"):
        finetune(make_net(), task, FinetuneConfig(epochs=1), seed=0, teacher=make_net())


def test_a_loader_in_place_of_a_split_is_one_clear_error() -> None:
    loader: Any = [(torch.randn(4, 1, 8, 8), torch.arange(4))]
    with pytest.raises(DataError, match="list is no task: make one"):
        finetune(nn.Linear(1, 1), loader, FinetuneConfig(epochs=1), seed=0)


def test_a_frozen_network_is_one_clear_error(task: ImageClassification) -> None:
    with pytest.raises(ModelError, match="no weight of the network requires a gradient"):
        finetune(make_net().requires_grad_(False), task, CONFIG, seed=0)
    none = FinetuneConfig(epochs=0)
    assert finetune(make_net().requires_grad_(False), task, none, seed=0).losses == ()


def test_a_network_with_a_mask_of_minus_infinity_is_resumed(
    task: ImageClassification, tmp_path: Path
) -> None:
    for resumed in (0, 3):
        model = make_net()
        model.register_buffer("causal", torch.tensor([0.0, -torch.inf]))
        result = finetune(model, task, CONFIG, seed=0, checkpoint=tmp_path / "c.safetensors")
        assert result.resumed_epochs == resumed

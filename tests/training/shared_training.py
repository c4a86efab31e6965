"""What each rank of test_ranks.py runs: trainings shared by the processes of a group."""

import json
import os
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, distributed, nn

from prunegraph.core.splits import TrainSplit
from prunegraph.data import load_dataset
from prunegraph.graph import analyse
from prunegraph.models import build_model
from prunegraph.tasks.image_classification import training_task
from prunegraph.training.distributed import current_ranks
from prunegraph.training.loop import FinetuneConfig, finetune
from prunegraph.training.slimmable import Subnets

EPOCHS = 3


class Unusual(nn.Module):
    """Batch norm without weights, cumulative averages, a layer that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6, affine=False, momentum=None)
        self.flat = nn.BatchNorm1d(6 * 16)
        self.head = nn.Linear(6 * 16, 10)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.head(self.flat(nn.functional.max_pool2d(x, 2).flatten(1)))


def make(name: str, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name == "unusual":
            return Unusual()
        return build_model("digits_resnet8_w4", num_classes=10, image_shape=(1, 8, 8))


def subnets(name: str) -> Subnets | None:
    """Return the parts to train in slimmable training."""
    if name != "slimmable":
        return None
    graph = analyse(make(name, seed=0).eval(), torch.rand(1, 1, 8, 8))
    return Subnets(graph=graph, least_macs=0.3)


def images() -> TrainSplit:
    """Return images whose last batch of 32 is odd, so that the ranks' parts differ."""
    return load_dataset("digits").train.sample(301, seed=0)


def train(name: str, out: Path, *, autocast: bool = False, stop_after: int | None = None) -> None:
    """Train, and let rank 0 write weights and losses."""
    ranks = current_ranks()
    config = FinetuneConfig(
        epochs=EPOCHS, batch_size=32, peak_lr=0.05, autocast=autocast, distill_weight=0.2
    )

    def stop(done: int, *_: float) -> None:
        if done == stop_after:
            raise KeyboardInterrupt

    model = make(name, seed=0 if ranks is None else ranks.rank)  # rank 0's weights count
    checkpoint = out.with_suffix(".checkpoint")
    try:
        result = finetune(
            model,
            training_task(model, images()),
            config,
            seed=1,
            teacher=make(name, seed=5),
            checkpoint=checkpoint if ranks is None or ranks.first else out / "nowhere",
            progress=stop,
            ranks=ranks,
            subnets=subnets(name),
        )
    except KeyboardInterrupt:
        return
    if ranks is None or ranks.first:
        safetensors.torch.save_file(
            {key: value.contiguous() for key, value in model.state_dict().items()}, out
        )
        record = {"losses": result.losses, "resumed": result.resumed_epochs}
        out.with_suffix(".json").write_text(json.dumps(record))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    assert os.environ["RANK"] == str(distributed.get_rank())
    train("digits", folder / "digits.safetensors")
    train("unusual", folder / "unusual.safetensors")
    train("slimmable", folder / "slimmable.safetensors")
    train("digits", folder / "bfloat16.safetensors", autocast=True)
    train("digits", folder / "cut.safetensors", stop_after=2)
    train("digits", folder / "cut.safetensors")
    distributed.destroy_process_group()

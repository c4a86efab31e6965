import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prunegraph.core.errors import BudgetError, MaskError
from prunegraph.core.masks import FloatArray
from prunegraph.core.splits import Dataset
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.apply import zero_mask
from prunegraph.layerwise.recalibrate import recalibrate_bn
from prunegraph.models import build_model
from prunegraph.tasks.image_classification import training_task
from prunegraph.training.loop import FinetuneConfig, finetune
from prunegraph.training.slimmable import Subnets

CONFIG = FinetuneConfig(epochs=2, peak_lr=0.05, batch_size=64, autocast=False)


def make_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model("digits_resnet8_w8", num_classes=10, image_shape=(1, 8, 8))


def make_subnets(model: nn.Module, least_macs: float = 0.3) -> Subnets:
    graph = analyse(model.eval(), torch.rand(2, 1, 8, 8))
    return Subnets(graph=graph, least_macs=least_macs)


def share(graph: StructureGraph, subnets: Subnets, seed: int) -> float:
    return graph.cost(subnets.draw(seed)).macs / graph.cost(graph.dense_mask()).macs


def test_masks_keep_all_shares_down_to_the_least() -> None:
    subnets = make_subnets(make_net())
    shares = [share(subnets.graph, subnets, seed) for seed in range(200)]
    assert min(shares) > 0.25
    assert np.quantile(shares, (0.1, 0.5, 0.9)) == pytest.approx((0.37, 0.65, 0.93), abs=0.06)
    assert subnets.draw(3) == subnets.draw(3)
    assert len({subnets.draw(seed).digest() for seed in range(200)}) > 190


def test_the_whole_network_gets_the_gradients_of_the_part() -> None:
    model = make_net().double()
    subnets = make_subnets(make_net())
    images, labels = torch.rand(16, 1, 8, 8).double(), torch.arange(16) % 10
    part = subnets.cut(model.train(), seed=5)
    assert part.mask == subnets.draw(5) != subnets.graph.dense_mask()
    F.cross_entropy(part.model(images), labels).backward()
    part.hand_back()
    silenced = zero_mask(model, subnets.graph, subnets.draw(5)).train()
    F.cross_entropy(silenced(images), labels).backward()
    pairs = zip(model.named_parameters(), silenced.parameters(), strict=True)
    for (name, whole), masked in pairs:
        assert whole.grad is not None, name
        assert masked.grad is not None, name
        kept = whole.grad != 0
        assert kept.any(), name
        torch.testing.assert_close(whole.grad[kept], masked.grad[kept], msg=name)


def test_a_slimmable_network_loses_less(digits: Dataset) -> None:
    model = make_net()
    finetune(
        model, training_task(model, digits.train), FinetuneConfig(epochs=4, peak_lr=0.1), seed=0
    )
    subnets = make_subnets(model)
    images, labels = next(iter(digits.train.batches(500)))

    def loss(net: nn.Module) -> float:
        parts = [subnets.cut(net.train(), seed).model for seed in range(8)]
        with torch.no_grad():  # in training mode: batch norm of these images
            return float(np.mean([float(F.cross_entropy(part(images), labels)) for part in parts]))

    plain, recipe = copy.deepcopy(model), FinetuneConfig(epochs=8, peak_lr=0.05)
    task = training_task(model, digits.train)
    finetune(plain, task, recipe, seed=0)
    finetune(model, task, recipe, seed=0, subnets=subnets)
    assert loss(model) < 0.95 * loss(plain)


def test_an_interrupted_slimmable_training_resumes_bit_equal(
    digits: Dataset, tmp_path: Path
) -> None:
    task = training_task(make_net(), digits.train.sample(300, seed=0))
    whole, cut, resumed = make_net(), make_net(), make_net()
    finetune(whole, task, CONFIG, seed=1, subnets=make_subnets(make_net()))
    path = tmp_path / "training.safetensors"

    def stop(*_: float) -> None:
        raise KeyboardInterrupt

    subnets = make_subnets(make_net())
    with pytest.raises(KeyboardInterrupt):
        finetune(
            cut,
            task,
            CONFIG,
            seed=1,
            subnets=subnets,
            checkpoint=path,
            progress=stop,
        )
    result = finetune(resumed, task, CONFIG, seed=1, subnets=subnets, checkpoint=path)
    assert result.resumed_epochs == 1
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    norms = [module for module in whole.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked == 4 for norm in norms)  # 300 images, recalibrated


def test_images_in_the_order_of_their_classes_do_not_mislead_batch_norm(digits: Dataset) -> None:
    train = digits.train.take(torch.argsort(digits.train.labels, stable=True)[:900])
    model = make_net()
    subnets = make_subnets(model)
    finetune(model, training_task(model, train), CONFIG, seed=0, subnets=subnets)
    variances = [norm.running_var for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    measured = [value.clone() for value in variances if value is not None]
    images, _ = next(iter(train.batches(900)))
    recalibrate_bn(model, [images])
    for before, after in zip(measured, variances, strict=True):
        assert after is not None
        torch.testing.assert_close(before, after, rtol=0.08, atol=1e-3)


@pytest.mark.parametrize(
    ("least", "scores", "error"),
    [
        (1.5, None, BudgetError),
        (0.0, None, BudgetError),
        (math.nan, None, BudgetError),
        (1e-6, None, BudgetError),
        (0.5, np.zeros(3, dtype=np.float32), MaskError),
    ],
)
def test_subnets_that_cannot_be_drawn_are_refused(
    least: float, scores: FloatArray | None, error: type[Exception]
) -> None:
    graph = make_subnets(make_net()).graph
    with pytest.raises(error):
        Subnets(graph=graph, least_macs=least, scores=scores)

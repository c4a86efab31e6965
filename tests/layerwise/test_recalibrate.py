from typing import cast

import pytest
import torch
from torch import Tensor, nn

from prunegraph.core.errors import DataError
from prunegraph.core.splits import Dataset, ImageSource
from prunegraph.layerwise.recalibrate import measuring_batch_norm, recalibrate_bn, recalibrate_on
from support.tasks import image_task


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [3.0 + torch.randn(16, 3, 8, 8, generator=generator) for _ in range(4)]


def test_buffers_are_the_cumulative_average() -> None:
    norm = nn.BatchNorm2d(3, momentum=0.3)
    norm.running_mean.fill_(99.0)
    recalibrate_bn(norm, batches())
    means = torch.stack([b.mean((0, 2, 3)) for b in batches()]).mean(0)
    variances = torch.stack([b.var((0, 2, 3)) for b in batches()]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert norm.momentum == 0.3
    again = nn.BatchNorm2d(3)
    recalibrate_bn(again, [(batch, torch.zeros(len(batch))) for batch in batches()])
    torch.testing.assert_close(again.running_mean, means)


def test_only_batch_norm_buffers_change(mixed: nn.Module) -> None:
    mixed.train()
    mixed.bn.eval()
    flags = [module.training for module in mixed.modules()]
    before = {n: t.clone() for n, t in [*mixed.named_parameters(), *mixed.named_buffers()]}
    recalibrate_bn(mixed, batches())
    after = dict([*mixed.named_parameters(), *mixed.named_buffers()])
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    assert [module.training for module in mixed.modules()] == flags


def test_dropout_is_off_meanwhile() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3)).train()
    recalibrate_bn(model, batches())
    assert 2.5 < float(model[1].running_mean.mean()) < 3.5
    assert float(model[1].running_var.max()) < 2.0  # dropout would give about 90


def test_an_exception_restores_the_buffers(mixed: nn.Module) -> None:
    before = [buffer.clone() for buffer in mixed.bn.buffers()]
    with pytest.raises(RuntimeError, match="channels"), measuring_batch_norm(mixed):
        mixed(batches()[0])
        mixed(torch.zeros(1, 4, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(before, mixed.bn.buffers(), strict=True))
    assert mixed.bn.momentum == 0.1


def test_no_batches_are_refused_and_restore_the_buffers(mixed: nn.Module) -> None:
    before = mixed.bn.running_mean.clone()
    with pytest.raises(DataError, match="no batches to calibrate batch norm on: give"):
        recalibrate_bn(mixed, [])
    assert torch.equal(mixed.bn.running_mean, before)
    frozen = nn.BatchNorm2d(3, track_running_stats=False)
    recalibrate_bn(frozen, [])  # it measures nothing


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_no_numbers_are_refused(mixed: nn.Module, value: float) -> None:
    broken = batches()
    broken[1][3, 0, 2, 2] = value
    before = mixed.bn.running_var.clone()
    with pytest.raises(DataError, match="calibration data hold NaN or infinite values"):
        recalibrate_bn(mixed, broken)
    assert torch.equal(mixed.bn.running_var, before)
    reader = nn.BatchNorm2d(3)  # of a forward that looks after them
    recalibrate_bn(reader, broken, forward=lambda net, x: net(x.nan_to_num(posinf=0.0)))
    assert bool(reader.running_var.isfinite().all())


def test_few_samples_are_told() -> None:
    images = torch.cat(batches())
    with pytest.warns(UserWarning, match=r"fewer than 32 samples \(31\), .*: give more"):
        recalibrate_bn(nn.BatchNorm2d(3), images[:31].split(16))
    norm = nn.BatchNorm2d(3)
    recalibrate_bn(norm, images[:32].split(16))
    assert norm.num_batches_tracked == 2


def test_channels_that_do_not_vary_are_told() -> None:
    images = torch.cat(batches())
    images[:, 1:] = 0.0
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.warns(UserWarning, match="2 of 3 channels of 0 do not vary.*as varied as"):
        recalibrate_bn(model, [images])
    recalibrate_bn(model, [images])  # nor did they before
    assert model[0].running_var[1:].tolist() == [0.0, 0.0]
    images = torch.cat(batches())
    images[:, 2] = 0.0
    recalibrate_bn(nn.BatchNorm2d(3), [images])  # one of three may be dead


def test_a_network_without_batch_norm_runs_nothing() -> None:
    calls = []
    model = nn.Conv2d(3, 4, 1)
    model.register_forward_hook(lambda *_: calls.append(1))
    recalibrate_bn(model, batches())
    assert calls == []


def test_one_image_is_too_few_for_norms_of_vectors() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * 8 * 8))
    before = model[1].running_mean.clone()
    with pytest.raises(DataError, match="a batch of 1 is too few to calibrate"):
        recalibrate_bn(model, [batches()[0][:1]])
    assert torch.equal(model[1].running_mean, before)
    with pytest.warns(UserWarning, match=r"fewer than 32 samples \(1\)"):
        recalibrate_bn(nn.BatchNorm2d(3), [batches()[0][:1]])  # its positions are enough


def test_the_order_of_samples_does_not_count(digits: Dataset) -> None:
    labels = cast(ImageSource, digits.train.source).labels[digits.train.index]
    by_class = digits.train.take(labels.argsort(stable=True)[:600])
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))
    recalibrate_on(model, image_task(model, by_class), by_class)
    images = by_class.source.load(by_class.index)[0].flatten(1)
    measured, varies = model[1].running_var, images.var(0) > 0.01
    assert float((measured / images.var(0))[varies].mean()) > 0.95  # by class it is 0.8


@pytest.mark.parametrize(("samples", "batches"), [(100, 1), (200, 1), (256, 2)])
def test_a_smaller_last_batch_alone_is_left_out(
    digits: Dataset, samples: int, batches: int
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))
    recalibrate_on(model, image_task(model, digits.train), digits.train.sample(samples, 0))
    assert int(model[1].num_batches_tracked) == batches

"""A model of what masks reach: held-out masks, its own doubt, going on from a file."""

import numpy as np
import pytest
import torch

from prunegraph.agent.gaussian_process import GaussianProcess
from prunegraph.core.masks import Float64Array
from support.toy_env import toy_graph

GRAPH = toy_graph((16, 16, 16), (4, 4, 2, 1))
IMPORTANCE = np.random.default_rng(0).gamma(2.0, size=GRAPH.num_units)


def draw_masks(count: int, seed: int) -> torch.Tensor:
    """Return masks ``[count, N]`` of many allocations."""
    rng = np.random.default_rng(seed)
    share = rng.uniform(0.2, 0.9, size=(count, len(GRAPH.groups)))[:, GRAPH.group_of]
    keep = (rng.random((count, GRAPH.num_units)) < share) | GRAPH.frozen
    return torch.from_numpy(keep)


def worth(masks: torch.Tensor) -> Float64Array:
    """Return an invented metric ``[count]``: concave in widths, with a few precious channels."""
    keep = masks.numpy().astype(np.float64)
    widths = [keep[:, GRAPH.group_of == group].mean(axis=1) for group in (1, 2, 3)]
    precious = keep[:, np.flatnonzero(GRAPH.free)[[0, 20, 40]]].sum(axis=1)
    result: Float64Array = sum(np.sqrt(width) for width in widths) + 0.05 * precious
    return result


def make_model(count: int = 160, *, per_update: int = 16) -> GaussianProcess:
    model = GaussianProcess(GRAPH, IMPORTANCE)
    rng = np.random.default_rng(1)
    masks = draw_masks(count, seed=1)
    for number, (mask, metric) in enumerate(zip(masks, worth(masks), strict=True)):
        update = number // per_update
        shared = np.random.default_rng(update).normal(scale=0.05)
        model.add(mask.numpy(), float(metric + shared + rng.normal(scale=0.01)), update)
        if number % per_update == per_update - 1:
            model.fit()
    return model


def test_it_predicts_masks_that_were_never_run() -> None:
    masks = draw_masks(200, seed=2)
    mean, deviation = make_model().predict(masks)
    truth = worth(masks)
    assert np.corrcoef(mean.numpy(), truth)[0, 1] > 0.9
    errors = np.abs(mean.numpy() - truth - (mean.numpy() - truth).mean())
    assert errors.mean() < 1.5 * float(deviation.mean())  # and it knows how well


def test_more_episodes_predict_better() -> None:
    masks = draw_masks(200, seed=2)
    few, many = (
        1.0 - np.corrcoef(make_model(count).predict(masks)[0].numpy(), worth(masks))[0, 1]
        for count in (16, 160)
    )
    assert many < 0.2 * few


def test_it_doubts_what_is_far_from_all_it_has_seen() -> None:
    model = make_model()
    seen = draw_masks(160, seed=1)
    far = torch.from_numpy(GRAPH.frozen.copy())[None]
    assert float(model.predict(far)[1]) > 2.0 * float(model.predict(seen)[1].mean())


def test_equal_metrics_are_no_error() -> None:
    model = GaussianProcess(GRAPH, IMPORTANCE)
    for mask in draw_masks(4, seed=0).numpy():
        model.add(mask, 0.5, 0)
    model.fit()
    mean, deviation = model.predict(draw_masks(3, seed=1))
    assert mean.numpy() == pytest.approx(0.5, abs=1e-6)
    assert bool(torch.isfinite(deviation).all())

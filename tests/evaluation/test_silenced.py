import numpy as np
import pytest
import torch

from prunegraph.core.budget import Budget
from prunegraph.core.seeding import seeded
from prunegraph.evaluation.silenced import Silenced, can_silence
from prunegraph.graph import analyse
from prunegraph.graph.surgery import apply_mask
from prunegraph.layerwise.silenced import SilencedReconstruction
from prunegraph.models import build_model

SHAPE = (3, 16, 16)


@pytest.mark.parametrize("family", ["basic", "inverted", "squeeze", "concat", "grouped", "mixer"])
def test_masks_one_after_another_give_what_cut_networks_give(family: str) -> None:
    with seeded(0):
        model = build_model(f"random_{family}_3", num_classes=10, image_shape=SHAPE)
        for _ in range(20):
            model(torch.randn(16, *SHAPE))
        images = torch.randn(4, *SHAPE)
    model.eval()
    graph = analyse(model, images[:1])
    assert can_silence(model, graph)
    silenced, rng = Silenced(model, graph), np.random.default_rng(0)
    before = model(images)
    for share in (0.3, 0.7, 0.5):
        scores = rng.normal(size=graph.num_units).astype(np.float32)
        mask = graph.project(scores, Budget(keep_macs=share))
        with torch.no_grad():
            found = silenced.silence(mask)(images)
            expected = apply_mask(model, graph, mask)(images)
        assert expected.std() > 0
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.std()))
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("family", ["plain", "grouped", "mixer"])
def test_it_is_fitted_as_a_cut_network_is(family: str) -> None:
    with seeded(0):
        model = build_model(f"random_{family}_3", num_classes=10, image_shape=SHAPE)
        for _ in range(20):
            model(torch.randn(16, *SHAPE))
        images = torch.randn(64, *SHAPE)
    model.eval()
    graph = analyse(model, images[:1])
    fit = SilencedReconstruction(model, graph, lambda network: network(images)).unguarded()
    silenced, rng = Silenced(model, graph), np.random.default_rng(0)
    for share in (0.3, 0.6):
        scores = rng.normal(size=graph.num_units).astype(np.float32)
        mask = graph.project(scores, Budget(keep_macs=share))
        cut = apply_mask(model, graph, mask)
        fit.apply(cut, mask)
        network = silenced.silence(mask)
        with torch.no_grad():
            plain = network(images[:4])
            fit.fit_silenced(silenced.parameters, mask)
            found, expected = network(images[:4]), cut(images[:4])
        scale = float(expected.std())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * scale)
        assert float((plain - expected).abs().max()) > 0.01 * scale


def test_a_network_whose_forward_goes_by_its_channels_is_cut() -> None:
    model = build_model("digits_resnet8_w8_gn", num_classes=10, image_shape=(1, 8, 8)).eval()
    assert not can_silence(model, analyse(model, torch.zeros(1, 1, 8, 8)))

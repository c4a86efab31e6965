import numpy as np
import pytest
import torch

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ModelError
from prunegraph.core.seeding import seeded
from prunegraph.graph import analyse
from prunegraph.models import build_model
from prunegraph.models.random_family import FAMILIES
from prunegraph.testing import assert_masked_equals_pruned

SHAPE = (3, 16, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_pruned_to_a_quarter(family: str) -> None:
    with seeded(0):
        model = build_model(f"random_{family}_3", num_classes=7, image_shape=SHAPE)
        for _ in range(20):  # else the signal dies in the deeper layers
            model(torch.randn(16, *SHAPE))
        example = torch.randn(2, *SHAPE)
    model.eval()
    assert model(example).shape == (2, 7)
    graph = analyse(model, example[:1])
    scores = np.random.default_rng(0).normal(size=graph.num_units).astype(np.float32)
    mask = graph.project(scores, Budget(keep_macs=0.25))
    assert_masked_equals_pruned(model, graph, mask, example[:1])


def test_the_name_fixes_the_network_and_seeds_differ() -> None:
    def sizes(name: str) -> list[torch.Size]:
        model = build_model(name, num_classes=10, image_shape=(1, 8, 8))
        return [parameter.shape for parameter in model.parameters()]

    assert sizes("random_basic_1") == sizes("random_basic_1")
    assert sizes("random_basic_1") != sizes("random_basic_2")
    assert sizes("random_basic_1") != sizes("random_plain_1")


def test_an_unknown_family_is_named_in_the_error() -> None:
    with pytest.raises(ModelError, match="random_resnet_1"):
        build_model("random_resnet_1", num_classes=10, image_shape=SHAPE)

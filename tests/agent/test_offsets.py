import numpy as np
import pytest
import torch

from prunegraph.agent.config import PPOConfig
from prunegraph.agent.offsets import InstanceOffsets
from prunegraph.graph import StructureGraph, analyse
from prunegraph.models import build_model


@pytest.fixture(scope="module")
def graph() -> StructureGraph:
    model = build_model("digits_resnet", num_classes=10, image_shape=(1, 8, 8))
    return analyse(model, torch.randn(1, 1, 8, 8))


def test_offsets_start_at_zero_and_groups_reach_their_channels(graph: StructureGraph) -> None:
    offsets = InstanceOffsets({0: graph})
    assert not offsets(0).any()
    with torch.no_grad():
        offsets.groups["0"][2] = 0.5
    expected = np.where(graph.group_of == 2, 0.5, 0.0)
    assert offsets(0).detach().numpy() == pytest.approx(expected)


def test_a_step_is_the_mean_of_advantage_times_surprise(graph: StructureGraph) -> None:
    """The gradient of the per-bit loss, undone by ``scale``, moves a channel by A (b - p)."""
    offsets = InstanceOffsets({0: graph})
    temperature, num_free, size = 0.2, float(graph.free.sum()), graph.num_units
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 2, size)).float()
    logits = offsets(0) / temperature
    advantage = 1.5
    bernoulli = torch.distributions.Bernoulli(logits=logits)
    (-advantage * bernoulli.log_prob(bits).sum() / num_free).backward()
    half = torch.full((size,), 0.5)
    scale = torch.full((size,), num_free * temperature)
    offsets.ascend(0, half, rate=0.1, group_rate=0.0, scale=scale)
    assert offsets(0).detach() == pytest.approx(0.1 * advantage * (bits - 0.5).numpy())
    assert offsets.channels["0"].grad is None
    offsets.channels["0"].grad = torch.full((size,), -1e9)
    offsets.groups["0"].grad = torch.zeros(len(graph.groups))
    before = offsets(0).detach().clone()
    offsets.ascend(0, half, rate=0.1, group_rate=0.0, scale=torch.ones(size))
    assert (offsets(0).detach() - before).tolist() == pytest.approx([0.1] * size)


def test_a_group_follows_the_episodes_that_decide_on_it_alone(graph: StructureGraph) -> None:
    offsets, first = InstanceOffsets({0: graph}), graph.groups[0].units[0]
    mask = torch.zeros(3, graph.num_units, dtype=torch.bool)
    mask[0, graph.group_of == graph.group_of[first]] = True
    gains = torch.tensor([2.0, 5.0, 7.0])[:, None].expand(3, len(graph.groups))
    offsets.follow(0, gains, mask, 0.1)
    expected = np.where(np.arange(len(graph.groups)) == graph.group_of[first], 0.2, 0.0)
    assert offsets.groups["0"].detach().numpy() == pytest.approx(expected)


def test_noise_and_temperature_are_geometric_and_noise_can_be_off() -> None:
    config = PPOConfig(group_noise_start=0.4, group_noise_end=0.1)
    assert [config.group_noise(x) for x in (0.0, 0.5, 1.0)] == pytest.approx([0.4, 0.2, 0.1])
    assert PPOConfig(group_noise_start=0.0).group_noise(0.7) == 0.0

"""Symmetries of the network, which takes PyG graphs of any size."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_geometric.data import Data

from prunegraph.agent.network import NetworkConfig, PruningNetwork
from prunegraph.agent.threshold import BudgetThreshold, join, with_features
from prunegraph.core.errors import ConfigError
from support.toy_env import draw_signs, toy_graphs

GRAPHS = toy_graphs()
CONTEXT = torch.tensor([[0.5, 1.0, 1.0, 0.0]])


@pytest.fixture
def make_network(network_config: Callable[..., NetworkConfig]) -> Callable[..., PruningNetwork]:
    def make(**options: object) -> PruningNetwork:
        torch.manual_seed(0)
        network = PruningNetwork(network_config(**options))
        for head in (network.channel_head, network.group_head):
            torch.nn.init.normal_(head[-1].weight)
        return network.double()

    return make


def draw(index: int, seed: int = 0) -> Data:
    features, _ = draw_signs(GRAPHS[index], np.random.default_rng(seed))
    data = BudgetThreshold.of(GRAPHS[index]).data
    doubled = {name: value.double() for name, value in data if value_is_float(value)}
    return with_features(Data(**{**data.to_dict(), **doubled}), torch.from_numpy(features).double())


def value_is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def run(network: PruningNetwork, graphs: list[Data], context: Tensor = CONTEXT) -> Tensor:
    """Return scores of all channels."""
    data = join(graphs)
    return network.scores(data, network.encode(data), context.double().expand(len(graphs), -1))


def permute(data: Data, channels: Tensor, ops: Tensor, groups: Tensor) -> Data:
    """Renumber nodes and groups: new channel i is old channel ``channels[i]``, ..."""
    old_nodes = torch.cat([channels, data.num_channels + ops])
    new_of_old = torch.empty_like(old_nodes)
    new_of_old[old_nodes] = torch.arange(len(old_nodes))
    edges = torch.randperm(data.edge_index.shape[1])
    return Data(
        **{
            **data.to_dict(),
            "x": data.x[channels],
            "op_x": data.op_x[ops],
            "edge_index": new_of_old[data.edge_index][:, edges],
            "edge_attr": data.edge_attr[edges],
            "group_of": groups[data.group_of[channels]],
        }
    )


@pytest.mark.parametrize("index", range(3))
def test_logits_are_equivariant(make_network: Callable[..., PruningNetwork], index: int) -> None:
    network, data = make_network(), draw(index)
    channels = torch.randperm(data.num_channels)
    groups = torch.randperm(int(data.group_of.max()) + 1)
    other = permute(data, channels, torch.randperm(data.num_ops), groups)
    scores, other_scores = run(network, [data]), run(network, [other])
    torch.testing.assert_close(other_scores, scores[channels])
    assert not torch.allclose(other_scores, scores)  # the test can tell


def test_a_batch_equals_singles(make_network: Callable[..., PruningNetwork]) -> None:
    network = make_network()
    graphs = [draw(0), draw(2), draw(1), draw(0, seed=1)]
    singles = [run(network, [graph]) for graph in graphs]
    torch.testing.assert_close(run(network, graphs), torch.cat(singles))


def test_shuffled_edges_change_the_logits(make_network: Callable[..., PruningNetwork]) -> None:
    network, data = make_network(), draw(0)
    ends = data.edge_index.clone()
    forward = data.edge_attr[:, 0] > 0
    ends[1, forward] = ends[1, forward][torch.randperm(int(forward.sum()))]
    shuffled = Data(**{**data.to_dict(), "edge_index": ends})
    assert not torch.allclose(run(network, [shuffled]), run(network, [data]))


def test_without_edges_neither_edges_nor_ops_matter(
    make_network: Callable[..., PruningNetwork],
) -> None:
    network, data = make_network(use_edges=False), draw(0)
    changed = Data(**{**data.to_dict(), "edge_index": data.edge_index.flip(1)})
    torch.testing.assert_close(run(network, [changed]), run(network, [data]))


def test_relations_are_told_apart(make_network: Callable[..., PruningNetwork]) -> None:
    network, data = make_network(), draw(0)
    swapped = Data(**{**data.to_dict(), "edge_attr": data.edge_attr[:, [3, 1, 2, 0]]})
    assert not torch.allclose(run(network, [swapped]), run(network, [data]))


def test_an_untrained_network_scores_the_prior(
    network_config: Callable[..., NetworkConfig],
) -> None:
    network = PruningNetwork(network_config()).double()
    data = draw(1)
    data.x[:, -1] = torch.randn(len(data.x), dtype=torch.double)
    assert torch.equal(run(network, [data]), data.x[:, -1])


def test_gradients_reach_everything(make_network: Callable[..., PruningNetwork]) -> None:
    network, data = make_network(), draw(0)
    run(network, [data]).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    # what an attention over a single op, or the last round's ops, would weigh has no effect
    silent = [name for name, p in network.named_parameters() if not p.grad.abs().sum() > 0]
    assert all("convolutions" in name for name in silent), silent
    assert not any(name.endswith("lin_l.weight") and "layers.0" in name for name in silent), silent


def test_scores_depend_on_the_budget(make_network: Callable[..., PruningNetwork]) -> None:
    network = make_network()
    lower = torch.tensor([[0.3, 1.0, 1.0, 0.0]])
    assert not torch.allclose(run(network, [draw(0)], lower), run(network, [draw(0)]))


def test_inference_equals_training(make_network: Callable[..., PruningNetwork]) -> None:
    network = make_network().float()
    features, _ = draw_signs(GRAPHS[2], np.random.default_rng(0))
    data = BudgetThreshold.of(GRAPHS[2]).data
    logits = network.logits(data, features, CONTEXT[0].numpy())
    joined = join([with_features(data, torch.from_numpy(features))])
    expected = network.scores(joined, network.encode(joined), CONTEXT)
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=1e-6)


def test_scores_begin_with_zero_where_no_prior_is_read() -> None:
    network = PruningNetwork(NetworkConfig(feature_names=("l1", "taylor")))
    data = BudgetThreshold.of(GRAPHS[0]).data
    features = np.random.default_rng(0).normal(size=(GRAPHS[0].num_units, 2)).astype(np.float32)
    assert not network.logits(data, features, CONTEXT[0].numpy()).any()


def test_shuffled_edges_carry_messages_between_other_channels() -> None:
    config = NetworkConfig(feature_names=("l1", "taylor"))
    torch.manual_seed(0)
    whole = PruningNetwork(config)
    shuffled = PruningNetwork(dataclasses.replace(config, shuffle_edges=True))
    shuffled.load_state_dict(whole.state_dict())
    graphs = [
        with_features(BudgetThreshold.of(graph).data, torch.randn(graph.num_units, 2))
        for graph in GRAPHS[:2]
    ]
    alone = shuffled.encode(join(graphs[:1]))
    assert not torch.allclose(whole.encode(join(graphs[:1])), alone)
    torch.testing.assert_close(shuffled.encode(join(graphs))[: len(alone)], alone)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers": 0}, "layers=0"),
        ({"hidden": 30, "heads": 4}, "heads=4"),
    ],
)
def test_contradictory_options_raise(options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        NetworkConfig(**options)  # type: ignore[arg-type]

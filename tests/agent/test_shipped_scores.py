"""What the shipped policy says of a fixed network: a change of it changes masks of all users."""

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from prunegraph.agent.policies import TrainedPolicy, load_policy
from prunegraph.core.masks import Float64Array
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.pyg import to_pyg
from prunegraph.models import build_model
from prunegraph.policies import shipped_policies

CONTEXT = {"keep_macs": 0.5, "keep_params": 0.7, "cost_so_far": 1.0}
"""The columns that are not zero."""

EXPECTED = np.array(
    [
        [-0.0838, -0.3893],
        [-0.1800, -0.4961],
        [0.2505, -0.1996],
        [0.0803, 0.3132],
        [0.1253, 0.7132],
        [-0.7731, -1.2906],
        [-0.0229, -0.1850],
    ]
)
"""The mean score of each group, and that of its first channel."""

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def policy() -> TrainedPolicy:
    return load_policy(shipped_policies()["resnet-cifar"])


@pytest.fixture(scope="module")
def graph() -> StructureGraph:
    torch.manual_seed(0)
    model = build_model("digits_resnet8_w4", num_classes=10, image_shape=(1, 8, 8)).eval()
    return analyse(model, torch.linspace(0, 1, 64).reshape(1, 1, 8, 8))


def scores(policy: TrainedPolicy, graph: StructureGraph, data: Data) -> Float64Array:
    """Return the mean score of each group and its first channel's, features being sines."""
    config = policy.network.config
    place = np.arange(graph.num_units)[:, None] * 1.7
    features = np.sin(place + np.arange(len(config.feature_names)) * 2.3).astype(np.float32)
    context = [CONTEXT.get(name, 0.0) for name in config.context_names]
    found = policy.logits(data, features, np.array(context, dtype=np.float32))
    groups = [found[group.units] for group in graph.groups]
    return np.array([[group.mean(), group[0]] for group in groups], dtype=np.float64)


def test_the_shipped_policy_scores_a_network_as_it_did(
    policy: TrainedPolicy, graph: StructureGraph
) -> None:
    assert scores(policy, graph, to_pyg(graph)) == pytest.approx(EXPECTED, abs=TOLERANCE)


@pytest.mark.parametrize("kind", ["reversed", "none", "relations swapped"])
def test_other_messages_would_be_noticed(
    policy: TrainedPolicy, graph: StructureGraph, kind: str
) -> None:
    data = to_pyg(graph)
    if kind == "reversed":
        data.edge_index = data.edge_index.flip(0)
    elif kind == "none":
        data.edge_index, data.edge_attr = data.edge_index[:, :0], data.edge_attr[:0]
    else:
        data.edge_attr = data.edge_attr.flip(1)
    difference = np.abs(scores(policy, graph, data) - EXPECTED)
    assert difference.max() > 100 * TOLERANCE

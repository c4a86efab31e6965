import dataclasses

import numpy as np
import pytest
import torch

from prunegraph.core.masks import FloatArray, IntArray
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.costs.macs import CostModel
from prunegraph.graph.features import FEATURE_NAMES, OP_FEATURE_NAMES, node_features, op_features
from prunegraph.graph.pyg import RELATION_NAMES, to_pyg
from prunegraph.models import build_model

SHAPES = {"resnet56": (3, 32, 32), "mobilenetv2": (3, 32, 32), "digits_resnet": (1, 8, 8)}


def graph_of(spec: str) -> StructureGraph:
    model = build_model(spec, num_classes=10, image_shape=SHAPES[spec])
    return analyse(model, torch.zeros(1, *SHAPES[spec]), trial=False)


def permute(graph: StructureGraph, new: IntArray) -> StructureGraph:
    """Return the same structure with class ``i`` called ``new[i]``."""
    order = np.argsort(new)
    terms = [
        dataclasses.replace(term, axes=tuple(new[axis] for axis in term.axes))
        for term in graph.cost_model.terms
    ]
    return dataclasses.replace(
        graph,
        groups=tuple(dataclasses.replace(group, units=new[group.units]) for group in graph.groups),
        group_of=graph.group_of[order],
        frozen=graph.frozen[order],
        ops=tuple(
            dataclasses.replace(op, in_units=new[op.in_units], out_units=new[op.out_units])
            for op in graph.ops
        ),
        param_units={},
        gathers={},
        cost_model=CostModel(graph.num_units, terms),
        summed=graph.summed[order],
    )


def random_statistics(graph: StructureGraph) -> dict[str, FloatArray]:
    rng = np.random.default_rng(0)
    names = ("taylor", "l1", "l2", "bn_scale", "fpgm", "lamp", "activation_mean", "apoz")
    arrays = {name: rng.lognormal(size=graph.num_units) for name in names}
    arrays["twin_similarity"] = rng.random(graph.num_units)
    arrays["twin_rank"] = rng.integers(2, size=graph.num_units)
    return {name: values.astype(np.float32) for name, values in arrays.items()}


def test_edges_grow_as_the_sum_of_widths() -> None:
    graph = graph_of("resnet56")
    data = to_pyg(graph)
    widths = sum(len(set(op.in_units)) + len(set(op.out_units)) for op in graph.ops)
    products = sum(len(set(op.in_units)) * len(set(op.out_units)) for op in graph.ops)
    assert data.edge_index.shape == (2, 2 * widths)
    assert data.edge_index.shape[1] < products / 10
    assert data.edge_index.shape[1] < 10_000


@pytest.mark.parametrize("spec", SHAPES)
def test_the_layout_is_as_documented(spec: str) -> None:
    graph = graph_of(spec)
    data = to_pyg(graph)
    data.validate()
    assert (data.num_channels, data.num_ops) == (graph.num_units, len(graph.ops))
    assert data.op_x.shape == (len(graph.ops), len(OP_FEATURE_NAMES))
    assert data.op_x.abs().max() <= 5.0
    assert data.edge_attr.shape == (data.edge_index.shape[1], len(RELATION_NAMES))
    assert torch.equal(data.edge_attr.sum(1), torch.ones(data.edge_index.shape[1]))
    assert torch.equal(data.free, torch.from_numpy(graph.free))
    touched = set(data.edge_index.flatten().tolist())
    assert touched == set(range(graph.num_units + len(graph.ops)))


@pytest.mark.parametrize("spec", SHAPES)
def test_each_relation_joins_what_it_says(spec: str) -> None:
    graph = graph_of(spec)
    data = to_pyg(graph)
    edges = {
        name: set(zip(*data.edge_index[:, data.edge_attr[:, i] == 1].tolist(), strict=True))
        for i, name in enumerate(RELATION_NAMES)
    }
    num_channels = graph.num_units
    reads, writes = set(), set()
    for position, op in enumerate(graph.ops):
        inputs = op.read_units
        reads |= {(int(index), num_channels + position) for index in inputs}
        writes |= {(num_channels + position, int(index)) for index in op.out_units}
    assert edges["reads"] == reads
    assert edges["writes"] == writes
    assert edges["read_by"] == {(b, a) for a, b in reads}
    assert edges["written_by"] == {(b, a) for a, b in writes}


def test_renaming_the_nodes_renames_the_graph_and_its_features() -> None:
    graph = graph_of("digits_resnet")
    new = np.random.default_rng(0).permutation(graph.num_units)
    order = np.argsort(new)
    other = permute(graph, new)
    data, moved = to_pyg(graph), to_pyg(other)
    rename = np.append(new, np.arange(graph.num_units, graph.num_units + len(graph.ops)))
    for relation in range(len(RELATION_NAMES)):
        old_edges = data.edge_index[:, data.edge_attr[:, relation] == 1].numpy()
        new_edges = moved.edge_index[:, moved.edge_attr[:, relation] == 1].numpy()
        assert set(map(tuple, rename[old_edges].T.tolist())) == set(
            map(tuple, new_edges.T.tolist())
        )
    np.testing.assert_array_equal(op_features(graph), op_features(other))
    statistics = random_statistics(graph)
    features = node_features(graph, statistics)
    permuted = node_features(other, {name: values[order] for name, values in statistics.items()})
    np.testing.assert_allclose(permuted, features[order], atol=2e-6)
    assert not np.allclose(permuted, features, atol=0.1)
    assert features.shape[1] == len(FEATURE_NAMES)

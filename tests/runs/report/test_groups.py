from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from prunegraph.core.budget import Budget
from prunegraph.core.masks import ChannelMask
from prunegraph.graph import StructureGraph, analyse
from prunegraph.models import build_model
from prunegraph.runs.report.groups import (
    MAX_COLUMNS,
    MAX_LEFT,
    MAX_STACK,
    draw_groups,
    first_writes,
    group_depths,
    group_links,
)
from support.toy_env import toy_graph


@pytest.fixture(scope="module")
def graph() -> StructureGraph:
    model = build_model("digits_resnet", num_classes=10, image_shape=(3, 8, 8))
    return analyse(model, torch.randn(1, 3, 8, 8))


@pytest.fixture(scope="module")
def mask(graph: StructureGraph) -> ChannelMask:
    scores = np.random.default_rng(0).normal(size=graph.num_units).astype(np.float32)
    return graph.project(scores, Budget(keep_macs=0.5))


def index_of(graph: StructureGraph, name: str) -> int:
    return [group.name for group in graph.groups].index(name)


def texts(axes: Axes) -> Iterator[str]:
    return (text.get_text() for text in axes.texts)


def bar_heights(figure: Figure) -> list[float]:
    return [bar.get_height() for bar in figure.axes[1].patches]


def test_a_chain_goes_from_left_to_right() -> None:
    links = group_links(toy_graph((4, 4, 2), (4, 2, 2, 1)))
    assert sorted(links.edges) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert links.edges[1, 2]["op"] == "conv2"
    assert group_depths(links).tolist() == [0, 1, 2, 3, 4]


def test_a_residual_stream_stands_before_what_it_feeds(graph: StructureGraph) -> None:
    links = group_links(graph)
    depths = group_depths(links)
    stream, inner = index_of(graph, "conv1"), index_of(graph, "layer1.0.conv1")
    next_inner, next_stream = (index_of(graph, f"layer2.0.conv{number}") for number in (1, 2))
    assert links.has_edge(inner, stream)  # the block writes into the stream, which was read
    assert links.has_edge(stream, next_stream)  # the shortcut's channel gather
    assert depths[inner] == depths[next_inner] == depths[stream] + 1
    assert depths[next_stream] == depths[next_inner] + 1
    assert depths[index_of(graph, "input")] == 0
    assert first_writes(graph)[index_of(graph, "input")] == -1


def test_a_projected_shortcut_does_not_pull_its_stream_forward() -> None:
    model = build_model("torchvision:resnet50", num_classes=10, image_shape=(3, 32, 32))
    graph = analyse(model, torch.randn(1, 3, 32, 32), trial=False)
    depths = group_depths(group_links(graph))
    names = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.0.conv3", "layer1.1.conv1")
    assert [int(depths[index_of(graph, name)]) for name in names] == [1, 2, 3, 4, 5]


def test_the_macs_of_all_groups_are_those_of_the_network(
    graph: StructureGraph, mask: ChannelMask
) -> None:
    for keep in (graph.dense_mask(), mask):
        assert graph.macs_by_group(keep.keep).sum() == pytest.approx(graph.cost(keep).macs)


def test_the_picture_names_widths_and_stacks_the_macs(
    graph: StructureGraph, mask: ChannelMask
) -> None:
    figure = draw_groups(graph, "title", mask)
    widths = graph.group_widths(mask)
    shown = set(texts(figure.axes[0]))
    assert f"layer1.0.conv1\n16 → {widths['layer1.0.conv1']}" in shown
    assert "fc\n10" in shown
    assert sum(bar_heights(figure)) == pytest.approx(graph.dense_cost.macs / 1e6)
    kept = bar_heights(figure)[: len(bar_heights(figure)) // 2]
    assert sum(kept) == pytest.approx(graph.cost(mask).macs / 1e6)


def test_without_a_mask_the_bars_are_whole(graph: StructureGraph) -> None:
    figure = draw_groups(graph, "title")
    assert len(bar_heights(figure)) == len(graph.groups) - 1  # nothing is written into the input
    assert sum(bar_heights(figure)) == pytest.approx(graph.dense_cost.macs / 1e6)
    assert "layer1.0.conv1\n16" in set(texts(figure.axes[0]))


@pytest.mark.parametrize("depth", [5, 40])
def test_deep_networks_go_on_in_the_next_row(depth: int) -> None:
    figure = draw_groups(toy_graph((4,) * depth, (1,) * (depth + 1)), "title")
    left, right = figure.axes[0].get_xlim()
    rows = {round(text.xy[1], 3) for text in figure.axes[0].texts}  # type: ignore[attr-defined]
    assert right - left <= MAX_COLUMNS + MAX_LEFT + 1
    assert (len(rows) > 1) == (depth > MAX_COLUMNS)


def test_long_names_keep_their_ends() -> None:
    inner = OrderedDict(encoder=nn.Linear(8, 40), a_projection_of_everything=nn.Linear(40, 4))
    network = nn.Sequential(OrderedDict(outermost=nn.Sequential(inner), last=nn.Linear(4, 2)))
    figure = draw_groups(analyse(network, torch.randn(1, 8)), "title")
    assert "outermost.encoder\n40" in set(texts(figure.axes[0]))
    assert "…rojection_of_everything\n4" in set(texts(figure.axes[0]))


def test_many_groups_of_one_depth_stand_in_several_columns() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
            self.inner = nn.ModuleList(nn.Linear(4, 5) for _ in range(25))
            self.back = nn.ModuleList(nn.Linear(5, 4) for _ in range(25))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for inner, back in zip(self.inner, self.back, strict=True):
                x = x + back(inner(x).relu())
            return self.out(x)

    figure = draw_groups(analyse(Wide(), torch.randn(1, 3)), "title")
    bottom, top = figure.axes[0].get_ylim()
    assert top - bottom <= MAX_STACK + 1
    places = {tuple(text.xy) for text in figure.axes[0].texts}  # type: ignore[attr-defined]
    assert len(places) == len(figure.axes[0].texts)  # no two in one place

"""What is written at places that are computed, sums with vectors, transforms, plain attributes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_geometric.nn as geometric
from torch import Tensor, nn

from prunegraph.graph import StructureGraph, analyse

NODES, INPUTS, WIDTH, INNER, CLASSES = 11, 6, 16, 20, 5
NUM_EXPERTS = 3
EDGES = torch.randint(NODES, (2, 40), generator=torch.Generator().manual_seed(0))


Check = Callable[[nn.Module, Any], StructureGraph]


def free_sizes(graph: StructureGraph) -> list[int]:
    return sorted(len(group.units) for group in graph.groups if group.frozen is None)


def into_zeros(x: Tensor, places: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(x).index_add(0, places, y)


def in_place(x: Tensor, places: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out.index_add_(0, places, y)
    return out


def by_index(x: Tensor, places: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[places] += y
    return out


def by_mask(x: Tensor, places: Tensor, y: Tensor) -> Tensor:
    mask = torch.zeros(len(x), dtype=torch.bool)
    mask[places] = True
    out = torch.zeros_like(x)
    out[mask] = y
    return out


def scattered(x: Tensor, places: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(x).scatter_add(0, places[:, None].expand_as(y), y)


def largest(x: Tensor, places: Tensor, y: Tensor) -> Tensor:
    where = places[:, None].expand_as(y)
    return torch.zeros_like(x).scatter_reduce(0, where, y, "amax", include_self=False)


def of_a_number_of_nodes(x: Tensor, places: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros(len(x), y.shape[1])
    return x + out.index_copy_(0, places, y)


WRITES = [into_zeros, in_place, by_index, by_mask, scattered, largest, of_a_number_of_nodes]


class Experts(nn.Module):
    """Each third of the rows goes to an expert of its own."""

    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.write, self.first, self.last = write, nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, 5)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH))
            for _ in range(NUM_EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            places = torch.arange(number, len(x), NUM_EXPERTS)
            total = total + self.write(x, places, expert(x[places]))
        out: Tensor = self.last(total)
        return out


@pytest.mark.parametrize("write", WRITES)
def test_rows_that_are_written_at_places(
    write: Callable[[Tensor, Tensor, Tensor], Tensor],
    check_all: Check,
) -> None:
    torch.manual_seed(0)
    graph = check_all(Experts(write), torch.randn(NODES, INPUTS))
    assert free_sizes(graph) == [WIDTH, INNER, INNER, INNER]


class Channels(nn.Module):
    """Writes at channels that are named by numbers: they all stay."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, WIDTH), nn.Linear(INPUTS, 3)
        self.inner, self.last = nn.Linear(WIDTH, INNER), nn.Linear(INNER, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.tensor([1, 4, 9])
        wide = self.first(x).index_add(1, places, self.second(x))
        out: Tensor = self.last(self.inner(wide.relu()).relu())
        return out


def test_channels_that_are_written_at_places_stay(check_all: Check) -> None:
    torch.manual_seed(0)
    graph = check_all(Channels(), torch.randn(NODES, INPUTS))
    assert free_sizes(graph) == [INNER]
    assert "written at places that are computed" in {item.reason for item in graph.frozen_ops}


@pytest.mark.parametrize(
    ("model", "free"),
    [
        (lambda: geometric.GCN(INPUTS, WIDTH, 3, CLASSES), [WIDTH, WIDTH]),
        (lambda: geometric.GraphSAGE(INPUTS, WIDTH, 3, CLASSES), [WIDTH, WIDTH]),
        (lambda: geometric.GIN(INPUTS, WIDTH, 2, CLASSES), [CLASSES, WIDTH, WIDTH]),
        (lambda: geometric.GAT(INPUTS, WIDTH, 3, CLASSES, heads=4), [4, 4, 4]),
        (lambda: geometric.GAT(INPUTS, WIDTH, 3, CLASSES, heads=4, v2=True), [4, 4, 4]),
        (lambda: geometric.EdgeCNN(INPUTS, WIDTH, 2, CLASSES), [CLASSES, WIDTH, WIDTH]),
    ],
)
def test_graph_networks(model: Callable[[], nn.Module], free: list[int], check_all: Check) -> None:
    torch.manual_seed(0)
    assert free_sizes(check_all(model(), (torch.randn(NODES, INPUTS), EDGES))) == free


class Gated(nn.Module):
    """A gate that is the product of every row with one vector."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.product, self.vector = product, nn.Parameter(torch.randn(WIDTH))
        self.first, self.last = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        out: Tensor = self.last(x * self.product(x, self.vector).sigmoid()[..., None])
        return out


@pytest.mark.parametrize(
    "product", [torch.mv, lambda x, vector: torch.dot(x[0], vector), lambda x, vector: x @ vector]
)
def test_products_with_a_vector(
    product: Callable[[Tensor, Tensor], Tensor], check_all: Check
) -> None:
    torch.manual_seed(0)
    assert free_sizes(check_all(Gated(product), torch.randn(NODES, INPUTS))) == [WIDTH]


class Projected(nn.Module):
    """A stored matrix times one vector of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, WIDTH), nn.Linear(INNER, CLASSES)
        self.matrix = nn.Parameter(torch.randn(INNER, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.mv(self.matrix, self.first(x[0]).relu()).relu())
        return out


def test_a_matrix_times_a_vector_of_channels(check_all: Check) -> None:
    torch.manual_seed(0)
    graph = check_all(Projected(), torch.randn(NODES, INPUTS))
    assert free_sizes(graph) == [WIDTH, INNER]


class Filtered(nn.Module):
    """Filters images by their spectra, or mixes channels by theirs."""

    def __init__(self, axes: tuple[int, int]) -> None:
        super().__init__()
        self.axes, self.first, self.last = axes, nn.Conv2d(3, WIDTH, 1), nn.Conv2d(INNER, 5, 1)
        self.inner = nn.Conv2d(WIDTH, INNER, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        spectrum = torch.fft.rfft2(x, dim=self.axes)
        low = torch.fft.fft(spectrum * 0.5, dim=self.axes[0])
        x = torch.fft.irfft2(low, s=[x.shape[axis] for axis in self.axes], dim=self.axes)
        out: Tensor = self.last(self.inner(x).relu())
        return out


@pytest.mark.parametrize(("axes", "free"), [((2, 3), [WIDTH, INNER]), ((2, 1), [INNER])])
def test_fourier_transforms(axes: tuple[int, int], free: list[int], check_all: Check) -> None:
    torch.manual_seed(0)
    assert free_sizes(check_all(Filtered(axes), torch.randn(2, 3, 8, 8))) == free


class Plain(nn.Module):
    """Adds a table that is a tensor, and neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn(1, NODES, WIDTH)
        self.first, self.last = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last((self.first(x) + self.table.to(x)).relu())
        return out


def test_tensors_that_are_plain_attributes_are_pruned(check_all: Check) -> None:
    torch.manual_seed(0)
    model = Plain()
    assert free_sizes(check_all(model, torch.randn(2, NODES, INPUTS))) == [WIDTH]
    assert model.table.shape == (1, NODES, WIDTH)


class Adjacent(nn.Module):
    """Kipf's: a sparse matrix of the edges times the nodes' channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, INNER)
        self.last = nn.Linear(INNER, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = torch.sparse.mm(adjacency, self.first(x)).relu()
        out: Tensor = self.last(torch.spmm(adjacency, self.inner(x)).relu())
        return out


class Made(Adjacent):
    """Makes the matrix of a list of edges."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        ones = torch.ones(edges.shape[1], dtype=x.dtype)
        matrix = torch.sparse_coo_tensor(edges, ones, (len(x), len(x)), check_invariants=False)
        return super().forward(x, matrix)


def sparse_edges() -> Tensor:
    ones = torch.ones(EDGES.shape[1])
    return torch.sparse_coo_tensor(EDGES, ones, (NODES, NODES), check_invariants=False)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state.*:UserWarning")
@pytest.mark.parametrize(
    ("kind", "matrix"),
    [
        (Adjacent, sparse_edges),
        (Adjacent, lambda: sparse_edges().coalesce().to_sparse_csr()),
        (Made, lambda: EDGES),
    ],
)
def test_sparse_matrices_of_edges(
    kind: type[nn.Module], matrix: Callable[[], Tensor], check_all: Check
) -> None:
    torch.manual_seed(0)
    graph = check_all(kind(), (torch.randn(NODES, INPUTS), matrix()))
    assert free_sizes(graph) == [WIDTH, INNER]


class Cached(nn.Module):
    """Keeps a table that it makes anew for other lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if self.table is None or len(self.table) != x.shape[1]:
            self.table = (torch.arange(x.shape[1])[:, None] * torch.arange(x.shape[2])).to(x).sin()
        out: Tensor = self.last(self.inner(x + self.table).relu())
        return out


def test_a_cache_is_no_table() -> None:
    torch.manual_seed(0)
    model, x = Cached().eval(), torch.randn(2, NODES, INPUTS)
    cold = free_sizes(analyse(model, x))
    model(x)
    assert free_sizes(analyse(model, x)) == cold == [WIDTH]


class Coordinates(nn.Module):
    """A layer reads waves that are made of stored places alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.waves = nn.Linear(4, WIDTH)
        self.register_buffer("places", torch.linspace(0, 1, NODES)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.sin(self.get_buffer("places") * torch.arange(1.0, 5.0))
        out: Tensor = self.last((self.first(x) + self.waves(waves)).relu())
        return out


def test_a_layer_that_reads_stored_places_makes_channels(check_all: Check) -> None:
    torch.manual_seed(0)
    assert free_sizes(check_all(Coordinates(), torch.randn(2, NODES, INPUTS))) == [WIDTH]

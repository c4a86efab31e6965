from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError, MaskError, ModelError
from prunegraph.core.weight_mask import WeightMask
from prunegraph.env.task import PruningTask, make_pair
from prunegraph.layerwise.weights import check_pattern, prunable_weights
from prunegraph.methods.method import Problem
from prunegraph.methods.obs.choose import divide_zeros
from prunegraph.methods.obs.magnitude import Magnitude, magnitude_mask
from prunegraph.methods.registry import make_method


class Conv1D(nn.Module):
    """The linear layer of GPT-2, as transformers writes it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Transformer(nn.Module):
    """One block that reads tokens; the classifier is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.qkv = Conv1D(24, 8)
        self.out = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        logits: Tensor = self.head(x + self.down(self.up(x).relu()))
        return logits


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 7, 3), nn.BatchNorm2d(7), nn.Conv2d(7, 8, 1), nn.Flatten(), nn.Linear(8, 3)
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 16), nn.Linear(16, 5))


NETWORKS = {"cnn": cnn, "mlp": mlp, "transformer": Transformer}


@pytest.fixture(params=NETWORKS)
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    torch.manual_seed(0)
    network = NETWORKS[request.param]()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    yield network
    after = network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.77, 0.9, 0.99])
def test_exactly_the_asked_share_goes_the_same_in_each_layer(
    model: nn.Module, sparsity: float
) -> None:
    mask = magnitude_mask(model, Budget(sparsity=sparsity))
    weights = prunable_weights(model)
    assert mask.keep.keys() == weights.keys()
    number = sum(weight.size for weight in weights.values())
    masked = mask.apply(model)
    assert sum(int((masked.get_parameter(name) == 0.0).sum()) for name in weights) == round(
        sparsity * number
    )
    assert mask.size - mask.num_kept == round(sparsity * number)
    for name, bits in mask.keep.items():
        zeros = int((~bits).sum())
        assert abs(zeros - sparsity * bits.numel()) <= 1.0
        values = model.get_parameter(name).detach().abs()
        if 0 < zeros < bits.numel():
            assert values[bits].min() >= values[~bits].max()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2"])
@pytest.mark.parametrize("build", [mlp, Transformer])
def test_every_group_keeps_its_largest(build: Callable[[], nn.Module], pattern: str) -> None:
    torch.manual_seed(0)
    model = build()
    mask = magnitude_mask(model, Budget(pattern=pattern))
    kept, group = map(int, pattern.split(":"))
    check_pattern(mask, model)
    assert mask.sparsity == 1.0 - kept / group
    for name, weight in prunable_weights(model).items():
        rows = weight.matrix(model.get_parameter(name).detach().abs()).reshape(-1, group)
        bits = weight.matrix(mask.keep[name]).reshape(-1, group)
        assert bool((bits.sum(1) == kept).all())
        for values, own in zip(rows, bits, strict=True):
            assert values[own].min() >= values[~own].max()


def test_groups_run_along_the_inputs_of_a_convolution() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 3, 3)
    mask = magnitude_mask(layer, Budget(pattern="2:4"))
    assert bool((mask.keep["weight"].reshape(3, 9, 4).sum(2) == 2).all())
    transposed = nn.ConvTranspose2d(4, 3, 1)
    mask = magnitude_mask(transposed, Budget(pattern="2:4"))
    assert bool((mask.keep["weight"].sum(0) == 2).all())


def test_of_equal_weights_the_first_stay() -> None:
    layer = nn.Linear(4, 2)
    nn.init.ones_(layer.weight)
    bits = magnitude_mask(layer, Budget(sparsity=0.375)).keep["weight"]
    assert bits.int().tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    bits = magnitude_mask(layer, Budget(pattern="2:4")).keep["weight"]
    assert bits.int().tolist() == [[1, 1, 0, 0]] * 2


def test_groups_that_do_not_divide_the_inputs_are_refused() -> None:
    odd = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 6), nn.Linear(6, 4))
    with pytest.raises(BudgetError, match=r"^pattern=2:4 does not fit 3\.weight, .* 6 inputs each"):
        magnitude_mask(odd, Budget(pattern="2:4"))


def test_other_budgets_are_refused() -> None:
    with pytest.raises(BudgetError, match=r"a sparsity: .* in place of keep_macs=0\.5$"):
        magnitude_mask(mlp(), Budget(keep_macs=0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ties_and_odd_numbers_do_not_change_the_count(dtype: torch.dtype) -> None:
    layer = nn.Linear(16, 16, dtype=dtype)
    layer.weight.data.copy_(torch.randint(-3, 4, (16, 16)))
    layer.weight.data[3, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for sparsity in (0.0, 0.3, 0.5, 0.9, 0.999):
        bits = magnitude_mask(layer, Budget(sparsity=sparsity)).keep["weight"].flatten()
        values = layer.weight.detach().abs().double().nan_to_num(nan=torch.inf).flatten()
        assert int((~bits).sum()) == round(sparsity * 256)
        first = values.argsort(descending=True, stable=True)[: int(bits.sum())]
        assert bool(bits[first].all())


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.floats(0.0, 0.999))
def test_zeros_are_divided_by_largest_remainders(sizes: list[int], sparsity: float) -> None:
    layers = {str(index): size for index, size in enumerate(sizes)}
    zeros = divide_zeros(layers, sparsity)
    assert sum(zeros.values()) == round(sparsity * sum(sizes))
    for name, size in layers.items():
        assert 0 <= zeros[name] <= size
        assert abs(zeros[name] - sparsity * size) <= 1.0 + 1e-9
        assert zeros[name] < size or (1.0 - sparsity) * size <= 1.0 + 1e-9


def test_the_last_weight_of_a_layer_goes_only_if_it_must() -> None:
    assert divide_zeros({"small": 2, "large": 64}, 0.96875) == {"small": 1, "large": 63}
    assert divide_zeros({"one": 1, "other": 1}, 0.9) == {"one": 1, "other": 1}


def test_a_problem_is_checked_before_any_work(make_problem: Callable[..., Problem]) -> None:
    method = make_method("magnitude")
    assert Magnitude() == method
    assert (method.role, method.kind) == ("baseline", "weights")
    assert not method.searches
    assert not method.per_seed
    with pytest.raises(BudgetError, match=r"does not fit .*weight, whose outputs read \d+ inputs"):
        method.check(make_problem(budget=Budget(pattern="2:4")))
    with pytest.raises(BudgetError, match="needs a sparsity"):
        method.check(make_problem(budget=Budget(keep_macs=0.5)))


def test_a_method_of_weights_runs_no_network_and_changes_none(
    make_problem: Callable[..., Problem],
) -> None:
    problem = make_problem(budget=Budget(sparsity=0.6))
    before = {name: value.clone() for name, value in problem.task.model.state_dict().items()}
    method = make_method("magnitude")
    method.check(problem)
    result = method.prune(problem)
    assert isinstance(result.mask, WeightMask)
    assert (result.model, result.networks) == (None, 0)
    assert result.mask.sparsity == round(0.6 * result.mask.size) / result.mask.size
    after = problem.task.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert method.prune(problem).mask == result.mask


@pytest.mark.parametrize("name", ["l1/uniform", "cem", "netadapt", "amc", "tp_taylor/global"])
def test_methods_of_channels_refuse_a_sparsity(
    name: str, make_problem: Callable[..., Problem]
) -> None:
    problem = make_problem(budget=Budget(sparsity=0.5))
    with pytest.raises(BudgetError, match=r"^a budget of sparsity=0\.5 zeroes single weights"):
        make_method(name).check(problem)
    assert problem.evaluator.num_networks == 0


def test_structure_and_environment_refuse_a_sparsity(make_problem: Callable[..., Problem]) -> None:
    problem = make_problem()
    graph, budget = problem.graph, Budget(sparsity=0.5)
    scores, keep = np.zeros(graph.num_units, np.float32), graph.dense_mask().keep
    task = PruningTask(
        name="digits",
        graph=graph,
        node_features=np.zeros((graph.num_units, 2), np.float32),
        evaluator=problem.evaluator,
        budget=budget,
    )
    refused: list[Callable[[], object]] = [
        lambda: graph.project(scores, budget),
        lambda: graph.repair(keep, budget, np.random.default_rng(0)),
        lambda: graph.fits(keep, budget),
        lambda: graph.cost_ratio(keep, budget),
        lambda: graph.limits(budget),
        lambda: make_pair(0, task, budget),
        lambda: problem.project(scores, budget),
    ]
    for call in refused:
        with pytest.raises(BudgetError, match="zeroes single weights, and channels are chosen"):
            call()


def test_a_computed_weight_is_refused() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(ModelError, match="computed from other parameters"):
        magnitude_mask(layer, Budget(sparsity=0.5))


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_of_a_convolution_lose_inputs_of_their_own(transposed: bool) -> None:
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(4, 6, 1, groups=2)
    sizes = torch.tensor([[1.0, 2.0], [4.0, 3.0]])  # of the inputs of each group
    rows = sizes.repeat_interleave(3, dim=0)
    with torch.no_grad():
        (weight,) = prunable_weights(layer).values()
        layer.weight.copy_(weight.tensor(rows))
    mask = magnitude_mask(layer, Budget(sparsity=0.5, pattern="columns"))
    keep = weight.matrix(mask.keep["weight"])
    assert torch.equal(keep, (rows == 2.0) | (rows == 4.0))
    check_pattern(mask, layer)
    other = WeightMask({"weight": weight.tensor(keep.roll(1, 0))}, mask.pattern)
    with pytest.raises(MaskError, match="do not follow the pattern columns"):
        check_pattern(other, layer)

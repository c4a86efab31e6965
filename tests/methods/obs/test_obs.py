"""Wanda, SparseGPT, Thanos, APT: what their papers promise, on single matrices and networks."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import prunegraph as pg
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ArtefactError, BudgetError, ConfigError
from prunegraph.core.pattern import UNSTRUCTURED, Pattern
from prunegraph.core.weight_mask import WeightMask
from prunegraph.layerwise.solve import Hessian
from prunegraph.layerwise.weights import check_pattern
from prunegraph.methods.context import Context, make_problem
from prunegraph.methods.method import Problem
from prunegraph.methods.obs.apt import APT, best_set
from prunegraph.methods.obs.base import BlockwiseMethod
from prunegraph.methods.obs.sparsegpt import SparseGPT, sweep
from prunegraph.methods.obs.thanos import Thanos
from prunegraph.methods.obs.wanda import Wanda
from prunegraph.methods.registry import WEIGHT_METHODS, make_method
from prunegraph.tasks.causal_lm import causal_lm
from support.language import EXPERTS, TEXT, encode, tiny_experts, tiny_llama

PATTERNS = ["unstructured", "2:4", "4:8", "1:2"]
COLUMNS = Pattern.parse("columns")


def layer(rows: int = 24, columns: int = 48, seed: int = 0) -> tuple[Tensor, Hessian]:
    """A weight, and the Hessian of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    scale = torch.rand(columns, generator=generator) + 0.1
    inputs = torch.randn(400, columns, generator=generator) @ (torch.eye(columns) + mix) * scale
    weight = torch.randn(rows, columns, generator=generator)
    return weight, Hessian(inputs.T @ inputs / 400)


def error(method: BlockwiseMethod, pattern: str, seed: int = 0) -> float:
    weight, hessian = layer(seed=seed)
    zeros = weight.numel() // 2
    changed, keep = method.prune_matrix(weight, hessian, zeros, Pattern.parse(pattern))
    assert int((~keep).sum()) == zeros
    assert not bool(changed[~keep].any())
    return hessian.error(changed - weight)


@pytest.mark.parametrize(("pattern", "seed"), [*itertools.product(PATTERNS, range(3))])
def test_updates_by_multiple_removal_lose_less(pattern: str, seed: int) -> None:
    single, multiple = (error(APT(mask="s", update=way), pattern, seed) for way in ("s", "m"))
    assert multiple <= single * (1 + 1e-6)
    joint_single, joint = (error(APT(mask="m", update=way), pattern, seed) for way in ("s", "m"))
    assert joint <= joint_single * (1 + 1e-6)
    assert joint <= 1.02 * multiple  # 1.005 on matrices of real networks


@pytest.mark.parametrize("pattern", PATTERNS)
def test_single_mask_and_update_are_sparsegpt(pattern: str) -> None:
    weight, hessian = layer()
    zeros = weight.numel() // 2
    one = SparseGPT().prune_matrix(weight, hessian, zeros, Pattern.parse(pattern))
    other = APT(mask="s", update="s").prune_matrix(weight, hessian, zeros, Pattern.parse(pattern))
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_sparsegpt_equals_columns_removed_one_by_one() -> None:
    weight, hessian = layer(6, 12)
    keep = torch.rand(6, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = weight.double()
    matrix = hessian.matrix.double()
    for column in range(12):
        tail = torch.linalg.inv(matrix[column:, column:])
        gone = expected[:, column] * ~keep[:, column]
        expected[:, column:] -= gone[:, None] * tail[0] / tail[0, 0]
    changed, kept = sweep(weight, hessian.upper, keep=keep)
    assert torch.equal(kept, keep)
    torch.testing.assert_close(changed.double(), expected * keep, rtol=1e-4, atol=1e-4)


def thanos_by_definition(weight: Tensor, hessian: Hessian, zeros: int, block: int) -> Tensor:
    """Algorithm 1, with an inverse a block and a solve a row, in float64."""
    weight, matrix = weight.double().clone(), hessian.matrix.double()
    rows, columns = weight.shape
    left = zeros
    for start in range(0, columns, block):
        end = min(start + block, columns)
        scores = weight[:, start:].abs() * hessian.norms[start:].double()
        gone = torch.zeros(scores.numel(), dtype=torch.bool)
        gone[scores.flatten().argsort(stable=True)[:left]] = True
        gone = gone.reshape(scores.shape)[:, : end - start]
        left -= int(gone.sum())
        inverse = torch.linalg.inv(matrix[start:, start:])
        for row in range(rows):
            index = gone[row].nonzero().flatten()
            if len(index):
                values = torch.linalg.solve(inverse[index][:, index], weight[row, start + index])
                weight[row, start:] -= values @ inverse[index]
                weight[row, start + index] = 0.0
    return weight


@pytest.mark.parametrize("block", [1, 8, 48])
def test_thanos_equals_its_definition(block: int) -> None:
    weight, hessian = layer(10, 48)
    expected = thanos_by_definition(weight, hessian, 240, block)
    changed, keep = Thanos(block_size=block).prune_matrix(weight, hessian, 240, UNSTRUCTURED)
    assert int((~keep).sum()) == 240
    torch.testing.assert_close(changed.double(), expected, rtol=1e-3, atol=1e-3)


def test_thanos_keeps_outlier_rows_dense() -> None:
    weight, hessian = layer(20, 48)
    weight[3] *= 100.0
    for pattern in (COLUMNS, Pattern.parse("2:4")):
        changed, keep = Thanos(outlier_rows=0.1).prune_matrix(weight, hessian, 288, pattern)
        dense = keep.all(1)
        assert int(dense.sum()) == 2
        assert bool(dense[3])
        assert torch.equal(changed[dense], weight[dense])
    whole = Thanos().prune_matrix(weight, hessian, 288, COLUMNS)[1]
    assert int((~whole).all(0).sum()) == 15  # 14.4, rounded up
    spared = Thanos(outlier_rows=0.1).prune_matrix(weight, hessian, 288, COLUMNS)[1]
    assert int((~spared).any(0).sum()) == 16


def test_wanda_removes_as_many_of_each_row() -> None:
    weight, hessian = layer()
    changed, keep = Wanda().prune_matrix(weight, hessian, 24 * 20 + 5, UNSTRUCTURED)
    gone = (~keep).sum(1)
    assert int(gone.sum()) == 485
    assert sorted(set(gone.tolist())) == [20, 21]
    assert torch.equal(changed, weight * keep)
    scores = weight.abs() * hessian.norms
    assert all(float(s[~k].max()) <= float(s[k].min()) for s, k in zip(scores, keep, strict=True))


def test_the_set_of_least_joint_error_is_found() -> None:
    weight, hessian = layer(5, 4)
    keep = torch.tensor([[True, True, False, False]]).expand(5, -1)
    best = best_set(weight, hessian.upper, keep)
    inverse = hessian.inverse
    for row in range(5):
        losses = {}
        for gone in itertools.combinations(range(4), 2):
            part = weight[row, list(gone)]
            losses[gone] = float(part @ torch.linalg.inv(inverse[list(gone)][:, list(gone)]) @ part)
        assert tuple((~best[row]).nonzero().flatten().tolist()) == min(
            losses, key=losses.__getitem__
        )


def test_staged_masks_lose_least() -> None:
    assert error(APT(mask="staged"), "unstructured") < error(APT(), "unstructured")


@pytest.mark.parametrize("name", [name for name in WEIGHT_METHODS if name != "magnitude"])
def test_whole_columns_go(name: str) -> None:
    weight, hessian = layer()
    method = make_method(name)
    assert isinstance(method, BlockwiseMethod)
    changed, keep = method.prune_matrix(weight, hessian, weight.numel() // 4, COLUMNS)
    assert int((~keep).all(0).sum()) == 12
    assert bool((keep == keep[0]).all())
    assert not bool(changed[~keep].any())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: APT(mask="x"), "mask='x' is none of s, m, staged"),  # type: ignore[arg-type]
        (lambda: APT(mask="staged", update="s"), "give update=m"),
        (lambda: Thanos(block_size=0), "block_size=0 must be at least 1"),
        (lambda: Thanos(outlier_rows=1.0), "outlier_rows=1.0 must lie in"),
        (lambda: Wanda(damping=0.0), "damping=0.0 must lie in"),
    ],
)
def test_options_out_of_range_are_named(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def pose(budget: Budget, folder: Path | None = None, **sizes: int) -> Problem:
    task = causal_lm(tiny_llama(**sizes), encode, calibration=[TEXT], window=32)
    return Context(task=task, structure=None, seed=0).problem(budget, folder=folder)


def test_blocks_that_are_not_there_are_refused_before_any_work() -> None:
    problem = pose(Budget(sparsity=0.5))
    Wanda(blocks="model.layers.*").check(problem)
    with pytest.raises(ConfigError, match="blocks='nowhere' names no module with prunable"):
        Wanda(blocks="nowhere").check(problem)


@pytest.mark.parametrize("pattern", [None, "2:4", "columns"])
@pytest.mark.parametrize("name", list(WEIGHT_METHODS))
def test_a_language_model_is_pruned_to_the_budget(name: str, pattern: str | None) -> None:
    problem = pose(Budget(sparsity=0.5, pattern=pattern))
    before = {key: value.clone() for key, value in problem.task.model.state_dict().items()}
    result = make_method(name).prune(problem)
    assert isinstance(result.mask, WeightMask)
    assert result.mask.sparsity == 0.5
    check_pattern(result.mask, problem.task.model)
    if result.model is not None:
        result.mask.check_zeros(result.model)
        assert max(result.details["errors"].values()) < 1.0
    after = problem.task.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    whole = SparseGPT().prune(pose(Budget(sparsity=0.5)))
    problem = pose(Budget(sparsity=0.5), tmp_path)
    SparseGPT().prune(problem)
    (tmp_path / "block-0001.safetensors").unlink()
    again = SparseGPT().prune(problem)
    assert again.mask.digest() == whole.mask.digest()
    assert again.details == whole.details
    with pytest.raises(ArtefactError, match="give another folder"):
        Wanda().prune(problem)


def test_a_pattern_that_does_not_divide_names_the_layer() -> None:
    problem = pose(Budget(pattern="4:8"), intermediate_size=36)
    with pytest.raises(BudgetError, match=r"pattern=4:8 does not fit .*down_proj.*36 inputs"):
        SparseGPT().check(problem)


def part_of_the_network(family: str, method: str) -> tuple[float, float]:
    """Prune half of the weights with a warning; return the share warned of, and that of zeros."""
    task = causal_lm(tiny_experts(family), encode, calibration=[TEXT], window=16)
    with pytest.warns(UserWarning, match=r"of the network: .*experts\.\w+ and .* stay") as raised:
        result = pg.prune(task, method, Budget(sparsity=0.5))
    (told,) = {str(item.message) for item in raised}
    assert len(told.split()) <= 25
    shown = result.report["pruned"]
    params = list(result.model.parameters())
    zeros = sum(int((item == 0).sum()) for item in params)
    zeros -= sum(int((item == 0).sum()) for item in task.model.parameters())
    size = sum(item.numel() for item in params)
    assert shown["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert shown["network_sparsity"] == pytest.approx(zeros / size, abs=1e-6)
    reached = float(told.split(" % ")[0].split()[-1]) / 100
    return reached, shown["network_sparsity"]


@pytest.mark.parametrize("family", EXPERTS)
def test_what_share_of_a_network_with_experts_is_reached_is_told(family: str) -> None:
    reached, zeros = part_of_the_network(family, "magnitude")
    assert zeros == pytest.approx(reached / 2, abs=0.001)
    assert 0.02 < zeros < 0.2


@pytest.mark.parametrize("method", [name for name in WEIGHT_METHODS if name != "magnitude"])
def test_every_method_of_weights_tells_it(method: str) -> None:
    reached, zeros = part_of_the_network("Mixtral", method)
    assert zeros == pytest.approx(reached / 2, abs=0.001)


@pytest.mark.data
@pytest.mark.parametrize(
    ("method", "budget", "most"),
    [
        (APT(), Budget(sparsity=0.5), 17.3),
        (Thanos(), Budget(sparsity=0.5), 16.6),
        (APT(mask="staged"), Budget(sparsity=0.5), 14.5),
        (APT(), Budget(pattern="2:4"), 28.0),
        (Thanos(), Budget(pattern="2:4"), 30.5),
    ],
    ids=str,
)
def test_a_real_network_keeps_its_perplexity(
    method: BlockwiseMethod, budget: Budget, most: float, shared_dir: Path
) -> None:
    folder = shared_dir / "pack" / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("needs ../shared/pack, which is absent")
    rows = np.load(folder / "stories-257.npy", allow_pickle=False)
    texts = {"calibration": rows[:64], "search": rows[152:170], "test": rows[65:152]}
    task = dataclasses.replace(causal_lm(folder, calibration_tokens=None, **texts), autocast=False)
    problem = make_problem(task, None, budget)
    single = SparseGPT().prune(problem)
    result = method.prune(problem)
    found, other = (task.score(item.model, task.test).value for item in (result, single))
    assert found <= most < other

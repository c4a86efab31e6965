"""What must hold for the structure of any network, checked with random masks."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError, one_line
from prunegraph.core.masks import BoolArray, ChannelMask, FloatArray
from prunegraph.graph import (
    ExampleInputs,
    StructureGraph,
    analyse,
    call_forward,
    cast_inputs,
    copy_network,
    evaluation_mode,
)
from prunegraph.graph.apply import apply_mask
from prunegraph.testing.oracle import TOLERANCE, NothingComparedError, assert_masked_equals_pruned

HALF = Budget(keep_macs=0.5)
KINDS = ("analysis", "budget", "masked = pruned", "surgery of surgery", "side effects")
"""What a failure can be about."""
MAX_DRAWS = 5
SINGLE_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Something that does not hold.

    Attributes:
        kind: one of ``KINDS``.
        message: what was raised.
    """

    kind: str
    message: str


@dataclass(kw_only=True)
class StructureFindings:
    """What a check found.

    Attributes:
        failures: what does not hold.
        num_compared: masks whose silenced and pruned networks were found equal.
        reaches_half: the least that must stay is at most half of the multiply-adds.
        frozen_reasons: why channels cannot be pruned, the network's own ends left out.
    """

    failures: list[Failure] = field(default_factory=list)
    num_compared: int = 0
    reaches_half: bool = False
    frozen_reasons: frozenset[str] = frozenset()


def check_structure(
    model: nn.Module, example: ExampleInputs, *, seed: int, num_masks: int = 2
) -> StructureFindings:
    """Check the analysis, budgets, surgery and costs of one network.

    Random scores are projected to random budgets: the masks must be legal, meet their budget and
    leave no room for another unit; masked and pruned networks must agree in float64 (in float32
    to 1e-3 where the network does not run in float64), and costs with those counted. The last
    pruned network, if something is left to prune, is analysed and pruned again, and must pass the
    same. The model itself must stay as it is.

    Args:
        model: the network; it is left as it is.
        example: inputs of the shape to analyse.
        seed: of scores and budgets.
        num_masks: masks to try, at least one.
    """
    found = StructureFindings()
    rng = np.random.default_rng(seed)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    with _noted(found, "analysis"):
        graph = analyse(model, example)
        found.reaches_half = can_reach(graph, HALF)
        found.frozen_reasons = frozenset(item.reason for item in graph.frozen_ops)
        masks = [
            _checked_mask(found, "masked = pruned", model, graph, example, rng)
            for _ in range(num_masks)
        ]
        if masks[-1] is not None and max(graph.group_widths(masks[-1]).values()) > 1:
            with _noted(found, "surgery of surgery"):
                small = apply_mask(model, graph, masks[-1])
                again = analyse(small, example)
                _checked_mask(found, "surgery of surgery", small, again, example, rng)
    with _noted(found, "side effects"):
        after = model.state_dict()
        assert before.keys() == after.keys(), "the state dict has other keys"
        changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
        assert not changed, f"changed: {changed}"
        assert modes == [module.training for module in model.modules()], "training flags changed"
    return found


def precision(model: nn.Module, example: ExampleInputs) -> tuple[torch.dtype, float]:
    """Return the type in which a network can be compared, and the tolerance."""
    doubled = copy_network(model).double()
    inputs = cast_inputs(example, torch.float64)
    try:
        with evaluation_mode(doubled):
            call_forward(doubled, inputs)
    except RuntimeError:  # it casts to float32 itself, or calls a kernel that float64 has not
        return torch.float32, SINGLE_TOLERANCE
    return torch.float64, TOLERANCE


def random_scores(graph: StructureGraph, rng: np.random.Generator) -> FloatArray:
    """Return ``[N]`` normally distributed scores."""
    return rng.normal(size=graph.num_units).astype(np.float32)


def random_mask(
    graph: StructureGraph, rng: np.random.Generator, *, least: float = 0.3
) -> tuple[ChannelMask, Budget]:
    """Return a mask projected from random scores, and its budget.

    The budget keeps ``least`` to 0.9 of the multiply-adds; more if the network cannot lose that
    much.
    """
    scores, share = random_scores(graph, rng), float(rng.uniform(least, 0.9))
    while True:
        budget = Budget(keep_macs=share)
        try:
            return graph.project(scores, budget), budget
        except BudgetError:
            share = min(share + 0.1, 1.0)


def assert_budget_met(graph: StructureGraph, mask: ChannelMask, budget: Budget) -> None:
    """Assert that a projected mask is legal, within the budget, and has no room left.

    Raises:
        AssertionError: the cost exceeds the budget, or some removed unit would still fit.
        MaskError: the mask is not legal.
    """
    graph.mask(mask.keep)
    limits = graph.limits(budget)[:2]

    def fits(keep: BoolArray) -> bool:
        cost = graph.cost(keep)
        return bool((np.array([cost.macs, cost.params]) <= limits).all())

    assert fits(mask.keep), f"{graph.cost(mask)} exceeds the limits {limits}"
    for removed in np.flatnonzero(~mask.keep):
        more = mask.keep.copy()
        more[removed] = True
        assert not fits(more), f"class {removed} would still fit within {limits}"


def _checked_mask(
    found: StructureFindings,
    kind: str,
    model: nn.Module,
    graph: StructureGraph,
    example: ExampleInputs,
    rng: np.random.Generator,
) -> ChannelMask | None:
    """Draw a mask, check budget and surgery, and return the mask if surgery is right.

    A mask can cut the outputs off from the inputs (a layer norm of one channel is constant); then
    others are drawn, of larger budgets; if all do, nothing is compared.
    """
    dtype, tolerance = precision(model, example)
    for attempt in range(MAX_DRAWS):
        mask, budget = random_mask(graph, rng, least=0.3 + 0.1 * attempt)
        with _noted(found, "budget"):
            assert_budget_met(graph, mask, budget)
        before = len(found.failures)
        with _noted(found, kind):
            try:
                assert_masked_equals_pruned(
                    model, graph, mask, example, dtype=dtype, tolerance=tolerance
                )
            except NothingComparedError:
                continue
            found.num_compared += 1
        return mask if len(found.failures) == before else None
    return None


def can_reach(graph: StructureGraph, budget: Budget) -> bool:
    """Tell if what must stay lies within a budget."""
    try:
        graph.project(np.zeros(graph.num_units, dtype=np.float32), budget)
    except BudgetError:
        return False
    return True


@contextmanager
def _noted(found: StructureFindings, kind: str) -> Iterator[None]:
    """Note whatever is raised as a failure: a check of many networks must not stop at the first."""
    try:
        yield
    except Exception as error:  # what a network may raise is anyone's guess
        text = one_line(error, 300)
        found.failures.append(Failure(kind=kind, message=text))

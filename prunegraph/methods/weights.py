"""What methods of single weights share: what they say of themselves, what they cannot serve."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import nn

from prunegraph.core.errors import BudgetError
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import unwrap
from prunegraph.layerwise.weights import prunable_weights
from prunegraph.methods.method import Kind, Problem, Result, Role
from prunegraph.methods.obs.choose import check_weights


class WeightMethod(ABC):
    """What most of them are: a dataclass of options, a baseline that runs no pruned networks."""

    name: ClassVar[str]
    role: ClassVar[Role] = "baseline"
    kind: ClassVar[Kind] = "weights"
    searches: ClassVar[bool] = False
    per_seed: ClassVar[bool] = True

    def check(self, problem: Problem) -> None:
        """Raise BudgetError or ModelError if the network's weights cannot meet the budget."""
        check_weights(prunable_weights(unwrap(problem.task.model)), problem.budget)

    @abstractmethod
    def prune(self, problem: Problem) -> Result:
        """Choose the mask."""


class TrainedWeights(WeightMethod):
    """A method that trains a network while single weights go, of all layers together."""

    def check(self, problem: Problem) -> None:
        """Say before any work what it cannot serve.

        Raises:
            BudgetError: the budget is no sparsity, has a pattern, asks for fewer zeros than
                there are, or leaves no weight.
        """
        self.check_sparsity(problem)
        sparsity, left = problem.budget.sparsity or 0.0, nonzero_mask(problem.task.model)
        if round(sparsity * left.size) < left.size - left.num_kept:
            msg = (
                f"{left.sparsity:.2%} of the weights of {problem.task.name} are zero already, "
                f"sparsity={sparsity:g} asks for fewer: give a higher one"
            )
            raise BudgetError(msg)

    def check_sparsity(self, problem: Problem) -> None:
        """Raise BudgetError if the budget is no sparsity, has a pattern, or leaves no weight."""
        super().check(problem)
        if problem.budget.sparsity is None or problem.budget.pattern not in (None, "unstructured"):
            msg = f"{self.name} prunes single weights of all layers: give a sparsity, no pattern"
            raise BudgetError(msg)
        size = sum(weight.size for weight in prunable_weights(unwrap(problem.task.model)).values())
        if round(problem.budget.sparsity * size) == size:
            asked = f"sparsity={problem.budget.sparsity}"
            msg = f"{asked} leaves none of {size:,} weights: give a lower one"
            raise BudgetError(msg)


def nonzero_mask(model: nn.Module) -> WeightMask:
    """Return the mask of the prunable weights that are not zero."""
    model = unwrap(model)
    names = prunable_weights(model)
    return WeightMask({name: (model.get_parameter(name).detach() != 0.0).cpu() for name in names})

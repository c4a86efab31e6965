"""Exact removal of many weights of a layer at once, by its damped Hessian.

A layer is a matrix W ``[C, B]`` (outputs, inputs) that reads rows x. The squared error of its
outputs is quadratic in W with the Hessian H, the mean of x x^T over positions, whatever the row.
Removing the set Q of a row w, with the best change of what stays (Hassibi & Stork 1993, *Second
order derivatives for network pruning: Optimal Brain Surgeon*, for many weights at once):

    dw = -w_Q ([H^-1]_QQ)^-1 [H^-1]_Q,:        error = w_Q ([H^-1]_QQ)^-1 w_Q^T

That equals least squares on the weights that stay.
"""

from functools import cached_property

import torch
from torch import Tensor

from prunegraph.core.errors import ModelError

DAMPING = 0.01
"""Times the mean of the diagonal, added to it: what SparseGPT's authors take."""

TOLERANCE = 1e-7
"""Of the squared residual of conjugate gradients, relative to that at the beginning."""

REMOVAL_TOLERANCE = 1e-4
"""The same where nothing is chosen by the weights that come out.

The squared error of a layer's outputs is then at most 0.04 % above the least one; column by
column it is 36 to 64 % above, on SmolLM2-135M.
"""

MOST_STEPS = 60
"""Of conjugate gradients; 10 to 20 are usual. Rows that need more are solved by Cholesky."""


class Hessian:
    """What a layer's outputs lose when its weights change, with the factors that methods need.

    Args:
        gram: ``[B, B]`` mean of x x^T over the positions that the layer reads.
        damping: share of the mean of the diagonal that is added to it.
        name: of the layer, in errors.

    Raises:
        ModelError: the Gram matrix holds NaN or infinite values.
    """

    def __init__(self, gram: Tensor, *, damping: float = DAMPING, name: str = "the layer") -> None:
        if not bool(torch.isfinite(gram).all()):
            msg = (
                f"{name} reads values that are not finite on the calibration data: check the "
                "network and the data, or calibrate in float32"
            )
            raise ModelError(msg)
        self._gram, self._damping, self._name = gram, damping, name

    def with_damping(self, damping: float) -> "Hessian":
        """Return it with another damping; itself, with its factors, if it is the same."""
        if damping == self._damping:
            return self
        return Hessian(self._gram, damping=damping, name=self._name)

    @cached_property
    def matrix(self) -> Tensor:
        """``[B, B]`` the damped Hessian; inputs that are always 0 have a diagonal of 1."""
        matrix = self._gram.double()
        diagonal = matrix.diagonal()
        dead = diagonal <= 0.0
        added = self._damping * diagonal.mean() + dead.to(diagonal)
        return (matrix + torch.diag(added)).to(self._gram)

    @cached_property
    def norms(self) -> Tensor:
        """``[B]`` root mean square of each input, not damped."""
        return self._gram.diagonal().clamp_min(0.0).sqrt()

    @cached_property
    def inverse(self) -> Tensor:
        """``[B, B]`` the inverse of ``matrix``.

        Raises:
            ModelError: the matrix is not positive.
        """
        return self._inverse.to(self._gram)

    @cached_property
    def upper(self) -> Tensor:
        """``[B, B]`` U, upper triangular, with U^T U = H^-1.

        It gives the inverse of every trailing part: ``(H[i:, i:])^-1 = U[i:, i:]^T U[i:, i:]``.
        """
        factor: Tensor = torch.linalg.cholesky(self._inverse, upper=True)
        return factor.to(self._gram)

    @cached_property
    def _inverse(self) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(self.matrix.double())
        if int(failed):
            msg = (
                f"the Hessian of {self._name} is not positive with a damping of {self._damping:g}: "
                "give a larger one, or more calibration data"
            )
            raise ModelError(msg)
        return torch.cholesky_inverse(factor)

    def error(self, change: Tensor) -> float:
        """Return the mean squared change of the outputs, summed over them, for a change of W."""
        return float(((change @ self.matrix.to(change)) * change).sum())


def remove(weight: Tensor, keep: Tensor, hessian: Hessian) -> Tensor:
    """Return the weights with those removed that ``keep`` does not mark, the others changed best.

    Args:
        weight: ``[C, B]``.
        keep: ``[C, B]`` booleans, True = keep.
        hessian: of the layer.
    """
    gone = ~keep
    if not bool(gone.any()):
        return weight.clone()
    inverse = hessian.inverse.to(weight)
    factors = solve_selected(inverse, gone, weight * gone, tolerance=REMOVAL_TOLERANCE)
    return (weight - factors @ inverse) * keep


def remove_columns(weight: Tensor, columns: Tensor, hessian: Hessian) -> Tensor:
    """Return the weights ``[C, B]`` without the inputs that ``columns`` names, others changed.

    All rows lose the same set, indices or booleans ``[B]``, so one factorisation serves them all.
    """
    inverse = hessian.inverse.double()
    factor = torch.linalg.cholesky(inverse[columns][:, columns])
    factors = torch.cholesky_solve(weight[:, columns].double().T, factor).T  # [C, Q]
    changed = (weight.double() - factors @ inverse[columns]).to(weight)
    changed[:, columns] = 0.0
    return changed


def solve_selected(
    matrix: Tensor,
    selected: Tensor,
    right: Tensor,
    *,
    tolerance: float = TOLERANCE,
    most_steps: int = MOST_STEPS,
) -> Tensor:
    """Return X ``[C, B]``, zero where nothing is selected, with ``(X A)_Q = R_Q`` in each row.

    Conjugate gradients for all rows at once, with the diagonal as preconditioner (Hestenes &
    Stiefel 1952): matrix products only. Rows that do not meet the tolerance are solved by Cholesky.

    Args:
        matrix: A ``[B, B]``, symmetric and positive, shared by the rows.
        selected: ``[C, B]`` booleans: the unknowns Q of each row.
        right: R ``[C, B]``.
        tolerance: of the rows' squared residuals, relative to those at the beginning.
        most_steps: after which what is left is solved by Cholesky.
    """
    mask, scale = selected.to(matrix), matrix.diagonal().rsqrt()
    scaled = matrix * scale[:, None] * scale  # its diagonal is 1
    residual = right * mask * scale
    solution, direction = torch.zeros_like(residual), residual.clone()
    product = torch.empty_like(residual)
    size = first = residual.square().sum(1)  # [C]
    for _ in range(most_steps):
        if size.sum() <= tolerance * first.sum():
            return solution.mul_(scale)
        torch.mm(direction, scaled, out=product).mul_(mask)
        step = (size / (direction * product).sum(1).clamp_min(1e-30))[:, None]
        solution.addcmul_(direction, step)
        residual.addcmul_(product, -step)
        previous, size = size, residual.square().sum(1)
        direction.mul_((size / previous.clamp_min(1e-30))[:, None]).add_(residual)
    solution.mul_(scale)
    for row in (size > tolerance * first.mean()).nonzero().flatten().tolist():
        solution[row] = solve_row(matrix, selected[row], right[row])
    return solution


def solve_row(matrix: Tensor, selected: Tensor, right: Tensor) -> Tensor:
    """Return one row of ``solve_selected`` by a Cholesky factorisation in float64: its oracle."""
    index = selected.nonzero().flatten()
    solution = torch.zeros_like(right)
    if len(index):
        factor = torch.linalg.cholesky(matrix[index][:, index].double())
        values = torch.cholesky_solve(right[index, None].double(), factor)
        solution[index] = values.flatten().to(right)
    return solution

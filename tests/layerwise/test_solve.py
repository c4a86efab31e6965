import pytest
import torch
from torch import Tensor

from prunegraph.core.errors import ModelError
from prunegraph.layerwise.solve import Hessian, remove, remove_columns, solve_row, solve_selected


def gram(columns: int, seed: int = 0, rows: int = 200) -> Tensor:
    """The Gram matrix of correlated inputs, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mix
    return inputs.T @ inputs / rows


def draw(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def least_squares(weight: Tensor, keep: Tensor, matrix: Tensor) -> Tensor:
    """Each row's least squares on its kept columns: H_KK v = (H w)_K."""
    changed = torch.zeros_like(weight)
    for row in range(len(weight)):
        kept = keep[row].nonzero().flatten()
        right = (matrix @ weight[row])[kept]
        changed[row, kept] = torch.linalg.solve(matrix[kept][:, kept], right)
    return changed


@pytest.mark.parametrize("density", [0.1, 0.5, 0.95])
def test_removal_equals_least_squares_on_the_kept_columns(density: float) -> None:
    weight, hessian = draw(13, 24), Hessian(gram(24))
    keep = torch.rand(13, 24, generator=torch.Generator().manual_seed(2)) < density
    expected = least_squares(weight, keep, hessian.matrix)
    factors = solve_selected(hessian.inverse, ~keep, weight * ~keep, tolerance=1e-20)
    changed = (weight - factors @ hessian.inverse) * keep
    torch.testing.assert_close(changed, expected, rtol=1e-6, atol=1e-6)
    near = hessian.error(remove(weight, keep, hessian) - weight)
    assert near == pytest.approx(hessian.error(expected - weight), rel=1e-3)


def test_rows_that_do_not_converge_are_solved_by_cholesky() -> None:
    matrix, right = Hessian(gram(24)).inverse, draw(5, 24)
    selected = torch.rand(5, 24, generator=torch.Generator().manual_seed(2)) < 0.5
    solved = solve_selected(matrix, selected, right, tolerance=1e-20, most_steps=1)
    expected = torch.stack([solve_row(matrix, *row) for row in zip(selected, right, strict=True)])
    torch.testing.assert_close(solved, expected)
    product = (solved @ matrix - right)[selected]
    assert float(product.abs().max()) < 1e-9


def test_removed_columns_are_one_set_for_all_rows() -> None:
    weight, hessian = draw(6, 12), Hessian(gram(12))
    columns = torch.tensor([1, 4, 5])
    keep = torch.ones(6, 12, dtype=torch.bool)
    keep[:, columns] = False
    changed = remove_columns(weight, columns, hessian)
    torch.testing.assert_close(changed, least_squares(weight, keep, hessian.matrix))


def test_nothing_removed_changes_nothing() -> None:
    weight = draw(3, 8)
    assert torch.equal(remove(weight, torch.ones(3, 8, dtype=torch.bool), Hessian(gram(8))), weight)


def test_the_factor_gives_the_inverse_of_every_trailing_part() -> None:
    hessian = Hessian(gram(10))
    for start in (0, 3, 9):
        tail = hessian.upper[start:, start:]
        expected = torch.linalg.inv(hessian.matrix[start:, start:])
        torch.testing.assert_close(tail.T @ tail, expected)


def test_dead_inputs_do_not_make_a_hessian_singular() -> None:
    inputs = gram(6)
    inputs[2], inputs[:, 2] = 0.0, 0.0
    hessian = Hessian(inputs)
    assert float(hessian.matrix[2, 2]) >= 1.0
    assert bool(torch.isfinite(hessian.inverse).all())
    assert bool(torch.isfinite(Hessian(torch.zeros(4, 4)).upper).all())


def test_values_that_are_not_finite_are_named() -> None:
    inputs = gram(4)
    inputs[1, 1] = torch.nan
    with pytest.raises(ModelError, match=r"layer\.weight reads values that are not finite"):
        Hessian(inputs, name="layer.weight")


def test_a_hessian_that_is_not_positive_is_named() -> None:
    with pytest.raises(ModelError, match="the Hessian of x is not positive"):
        _ = Hessian(torch.tensor([[1.0, 5.0], [5.0, 1.0]]), name="x").inverse

"""Which weights of a row go, against sorting them."""

import pytest
import torch
from torch import Tensor

from prunegraph.methods.obs.choose import all_but_least_of_rows


def by_sorting(scores: Tensor, zeros: int) -> Tensor:
    """All but the first of each sorted row; one more where the next score is least."""
    each, more = divmod(zeros, len(scores))
    order = scores.argsort(dim=1, stable=True)
    keep = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :each], False)
    if more:
        following = order[:, each]
        chosen = scores.gather(1, following[:, None]).flatten().argsort(stable=True)[:more]
        keep[chosen, following[chosen]] = False
    return keep


@pytest.mark.parametrize("kind", ["equal", "distinct", "infinite"])
def test_rows_lose_what_comes_first_when_sorted(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for zeros in range(7 * 12 + 1):
        scores = torch.rand(7, 12, generator=generator)
        if kind != "distinct":
            scores = (4 * scores).floor()
        if kind == "infinite":
            scores[scores == 3.0] = torch.inf
        keep = all_but_least_of_rows(scores, zeros)
        assert torch.equal(keep, by_sorting(scores, zeros))
        assert int((~keep).sum()) == zeros


def test_not_a_number_stays() -> None:
    scores = torch.tensor([[1.0, torch.nan, 3.0, 2.0]])
    assert all_but_least_of_rows(scores, 3).tolist() == [[False, True, False, False]]

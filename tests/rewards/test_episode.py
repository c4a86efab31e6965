import numpy as np
import pytest

from prunegraph.core.masks import pack_bits, unpack_bits
from prunegraph.rewards import Episode


def episode(*, raw: float, repaired: float) -> Episode:
    return Episode(
        pair="net",
        accuracy=0.5,
        kl=None,
        raw_cost_ratio=raw,
        cost_ratio=repaired,
        bits="80",
    )


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1121])
def test_bits_round_trip(size: int) -> None:
    keep = np.random.default_rng(size).random(size) < 0.5
    assert np.array_equal(unpack_bits(pack_bits(keep), size), keep)


def test_chance_is_not_overshoot() -> None:
    assert episode(raw=1.05, repaired=1.0).overshoot == 0.0
    assert episode(raw=1.25, repaired=1.0).overshoot == pytest.approx(0.2)

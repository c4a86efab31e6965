import pytest

from prunegraph.rewards import LagrangianMultiplier, RewardConfig


def test_it_steps_on_the_slower_clock() -> None:
    config = RewardConfig(
        multiplier_period=2, multiplier_step=2.0, multiplier_limit=1.5, overshoot_tolerance=0.1
    )
    multiplier = LagrangianMultiplier(value=1.0)
    values = []
    # means of two: 0.3, 0.1 (the tolerance), 0.0, 0.7 (the limit)
    for overshoot in (0.2, 0.4, 0.1, 0.1, 0.0, 0.0, 0.6, 0.8):
        multiplier = multiplier.update(overshoot, config)
        values.append(multiplier.value)
    assert values == pytest.approx([1.0, 1.4, 1.4, 1.4, 1.4, 1.2, 1.2, 1.5])
    assert multiplier.num_steps == 4


def test_it_never_rewards_overshoot() -> None:
    config = RewardConfig(multiplier_period=1, multiplier_step=50.0, overshoot_tolerance=0.1)
    assert LagrangianMultiplier(value=1.0).update(0.0, config).value == 0.0

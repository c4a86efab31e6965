from typing import Any

import pytest

from prunegraph.core.errors import ConfigError
from prunegraph.rewards import RewardConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"self_competition": "amc"}, "best, ema, accuracy"),
        ({"metric": "top5"}, "accuracy, soft_accuracy, kl"),
        ({"constraint": "none"}, "bias, lagrangian"),
        ({"ema_decay": -0.1}, "ema_decay"),
        ({"floor": -11.0}, "floor=-11.0"),
        ({"multiplier_step": float("nan")}, "multiplier_step"),
    ],
)
def test_bad_options_say_what_is_valid(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardConfig(**options)

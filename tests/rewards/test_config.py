from typing import Any

import pytest

from prunegraph.core.errors import ConfigError
from prunegraph.rewards import FORMS, RewardConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"self_competition": "amc"}, "best, ema, accuracy, lagrangian"),
        ({"metric": "top5"}, "accuracy, soft_accuracy, kl"),
        ({"constraint": "none"}, "bias, lagrangian"),
        ({"ema_decay": -0.1}, "ema_decay"),
        ({"floor": -11.0}, "floor=-11.0"),
        ({"multiplier_start": 20.0}, "multiplier_start=20.0"),
        ({"gain": float("nan")}, "gain"),
    ],
)
def test_bad_options_say_what_is_valid(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardConfig(**options)


@pytest.mark.parametrize("form", FORMS)
def test_the_multiplier_is_used_where_it_was_asked_for(form: Any) -> None:
    assert RewardConfig(self_competition=form).uses_multiplier == (form == "lagrangian")
    assert RewardConfig(self_competition=form, constraint="lagrangian").uses_multiplier

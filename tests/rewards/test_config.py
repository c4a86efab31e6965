from types import SimpleNamespace
from typing import Any, cast

import pytest

from prunegraph.core.errors import ConfigError
from prunegraph.core.task import Task
from prunegraph.rewards import RewardConfig
from prunegraph.rewards.config import metric_of


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


def test_networks_without_classes_are_compared_by_the_divergence() -> None:
    searched = SimpleNamespace(search=object(), score_name="perplexity")
    classes = SimpleNamespace(search=object(), score_name="accuracy")
    own = SimpleNamespace(search=None, score_name="perplexity")  # a score of the user's
    found = [metric_of(cast(Task, task), "soft_accuracy") for task in (searched, classes, own)]
    assert found == ["kl", "soft_accuracy", "accuracy"]
    assert metric_of(cast(Task, searched), "accuracy") == "accuracy"

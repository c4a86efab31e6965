"""Every form against a sequence of eight episodes worked out by hand."""

import dataclasses
from typing import Any

import pytest

from prunegraph.core.errors import ConfigError
from prunegraph.rewards import Episode, RewardConfig, SelfCompetitionLedger, score

ACCURACIES = (0.50, 0.60, 0.55, 0.60, 0.59, 0.70, 0.40, 0.71)
NO_MORE = (1.0,) * 8
RAW = (1.35, 1.25, 1.45, 1.0, 1.15, 1.0, 1.0, 1.0)  # 1.05 is where overshoot begins


def play(
    config: RewardConfig,
    *,
    raw: tuple[float, ...] = NO_MORE,
    multiplier: float = 0.0,
    **figures: Any,
) -> list[float]:
    """Score eight episodes one after another, each compared with all before it."""
    ledger = SelfCompetitionLedger()
    rewards = []
    for number, accuracy in enumerate(ACCURACIES):
        episode = Episode(
            pair="net@keep_macs=0.5",
            accuracy=accuracy,
            cost_ratio=1.0,
            raw_cost_ratio=raw[number],
            bits=f"{number:02x}",
            **figures,
        )
        reward = score(config, ledger, episode, multiplier=multiplier)
        rewards.append(reward.value)
        ledger = ledger.update(episode, config)
    return rewards


def test_best_compares_with_the_best_so_far() -> None:
    #        first   0.6>0.5  -0.05*10  -0*10  -0.01*10  0.7>0.6  -0.3*10  0.71>0.7
    expected = [1.0, 1.0, -0.5, 0.0, -0.1, 1.0, -1.0, 1.0]
    assert play(RewardConfig(self_competition="best")) == pytest.approx(expected)


def test_ema_compares_with_the_running_average() -> None:
    # with a quarter of the past the average before each episode is
    expected = [0.5, 0.575, 0.55625, 0.5890625, 0.589765625, 0.67244140625, 0.4681103515625]
    config = RewardConfig(self_competition="ema", ema_decay=0.25)
    ledger, bars = SelfCompetitionLedger(), []
    for accuracy in ACCURACIES:
        bars.append(ledger.ema_metric)
        ledger = ledger.update(_episode(accuracy), config)
    assert bars[0] is None
    assert bars[1:] == pytest.approx(expected)
    assert play(config) == [0.0, 1.0, -1.0, 1.0, 1.0, 1.0, -1.0, 1.0]


def test_the_plain_comparator_returns_the_metric() -> None:
    config = RewardConfig(self_competition="accuracy")
    assert play(config, raw=RAW, multiplier=2.0) == pytest.approx(list(ACCURACIES))


def test_lagrangian_takes_the_raw_overshoot_off() -> None:
    # accuracy - 2 * (0.3 0.2 0.4 0 0.1 0 0 0)
    expected = [-0.1, 0.2, -0.25, 0.6, 0.39, 0.7, 0.4, 0.71]
    config = RewardConfig(self_competition="accuracy", constraint="lagrangian")
    assert play(config, raw=RAW, multiplier=2.0) == pytest.approx(expected)


def test_the_multiplier_joins_any_form() -> None:
    config = RewardConfig(self_competition="best", constraint="lagrangian")
    expected = [1.0 - 0.6, 1.0 - 0.4, -0.5 - 0.8, 0.0, -0.1 - 0.2, 1.0, -1.0, 1.0]
    assert play(config, raw=RAW, multiplier=2.0) == pytest.approx(expected)


def test_forms_compare_the_chosen_metric() -> None:
    alike = play(RewardConfig(self_competition="best", metric="kl"), kl=0.25)
    assert alike == [1.0] + [0.0] * 7
    by_kl = play(RewardConfig(self_competition="accuracy", metric="kl"), kl=0.25)
    assert by_kl == [-0.25] * 8
    softly = play(
        RewardConfig(self_competition="accuracy", metric="soft_accuracy"), soft_accuracy=0.3
    )
    assert softly == [0.3] * 8


@pytest.mark.parametrize(("metric", "fix"), [("kl", "kl=True"), ("soft_accuracy", "soft=True")])
def test_what_was_not_measured_is_an_error_that_names_the_remedy(metric: Any, fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        play(RewardConfig(self_competition="best", metric=metric))


@pytest.mark.parametrize("kl", [1e9, float("inf"), float("nan")])
def test_rewards_are_bounded(kl: float) -> None:
    episode = dataclasses.replace(_episode(0.1), kl=kl, raw_cost_ratio=1e6)
    for form in ("accuracy", "ema", "best"):
        config = RewardConfig(self_competition=form, metric="kl")  # type: ignore[arg-type]
        reward = score(config, SelfCompetitionLedger(), episode, multiplier=10.0)
        assert -10.0 <= reward.value <= 10.0


def test_terms_add_up_and_name_their_sources() -> None:
    config = RewardConfig(self_competition="best", constraint="lagrangian")
    ledger = SelfCompetitionLedger().update(_episode(0.60), config)
    episode = dataclasses.replace(_episode(0.58), raw_cost_ratio=1.25)
    reward = score(config, ledger, episode, multiplier=3.0)
    assert reward.terms == pytest.approx(
        {
            "competition": -0.2,
            "constraint": -0.6,
            "metric": 0.58,
            "bar": 0.60,
            "overshoot": 0.2,
            "multiplier": 3.0,
        }
    )
    assert reward.value == pytest.approx(-0.8)


def _episode(accuracy: float) -> Episode:
    return Episode(
        pair="net@keep_macs=0.5",
        accuracy=accuracy,
        raw_cost_ratio=1.0,
        cost_ratio=1.0,
        bits="80",
    )

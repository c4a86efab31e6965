import copy

import pytest

from prunegraph.core.errors import ConfigError
from prunegraph.rewards import Episode, RewardConfig, SelfCompetition

CELL, OTHER = "net@keep_macs=0.5", "net@keep_macs=0.3"


def episode(accuracy: float, *, pair: str = CELL, raw: float = 1.0, name: str = "a") -> Episode:
    return Episode(
        pair=pair,
        accuracy=accuracy,
        raw_cost_ratio=raw,
        cost_ratio=1.0,
        bits=name,
    )


def values(competition: SelfCompetition, *episodes: Episode) -> list[float]:
    return [reward.value for reward in competition.score(episodes)]


def test_a_block_is_compared_with_the_ledger_at_its_start() -> None:
    competition = SelfCompetition(RewardConfig())
    assert values(competition, episode(0.5), episode(0.4)) == [1.0, 1.0]
    competition.begin_block(1)
    assert values(competition, episode(0.6), episode(0.55), episode(0.45)) == pytest.approx(
        [1.0, 1.0, -0.5]
    )


def test_rewards_do_not_depend_on_how_many_workers_finish_together() -> None:
    blocks = [[0.5, 0.7, 0.6, 0.4], [0.65, 0.71, 0.3, 0.72], [0.6, 0.7, 0.75, 0.68]]
    results = []
    for workers in (1, 2, 4):
        competition = SelfCompetition(RewardConfig(constraint="lagrangian"))
        rewards: list[float] = []
        for number, block in enumerate(blocks):
            competition.begin_block(number)
            episodes = [episode(accuracy, raw=1.0 + accuracy) for accuracy in block]
            for first in range(0, 4, workers):
                rewards += values(competition, *episodes[first : first + workers])
        results.append((rewards, competition.ledgers, competition.multipliers))
    assert results[0] == results[1] == results[2]
    assert len(set(results[0][0])) > 3


def test_the_best_mask_is_measured_once_a_block() -> None:
    competition = SelfCompetition(RewardConfig())
    assert competition.mask_to_measure(CELL) is None
    values(competition, episode(0.5, name="a"), episode(0.9, name="lucky"))
    assert competition.mask_to_measure(CELL) is None
    competition.begin_block(1)
    assert competition.mask_to_measure(CELL) == "lucky"
    competition.set_bar(CELL, episode(0.6, name="lucky"))
    assert competition.mask_to_measure(CELL) is None
    assert competition.ledger(CELL).best_metric == 0.6
    assert values(competition, episode(0.7)) == [1.0]
    competition.begin_block(2)
    assert competition.mask_to_measure(CELL) == "a"


def test_the_first_bar_of_a_cell_is_what_was_measured() -> None:
    competition = SelfCompetition(RewardConfig())
    competition.set_bar(CELL, episode(0.6, name="own"))
    assert competition.ledger(CELL).best_bits == "own"
    assert values(competition, episode(0.55), episode(0.7)) == pytest.approx([-0.5, 1.0])


def test_beginning_a_block_twice_changes_nothing() -> None:
    competition = SelfCompetition(RewardConfig())
    values(competition, episode(0.5))
    competition.begin_block(1)
    competition.set_bar(CELL, episode(0.4))
    values(competition, episode(0.6))
    before = copy.deepcopy(vars(competition))
    competition.begin_block(1)
    assert vars(competition) == before
    with pytest.raises(ConfigError, match="blocks come in order"):
        competition.begin_block(0)


def test_cells_compete_apart() -> None:
    competition = SelfCompetition(RewardConfig(constraint="lagrangian", multiplier_period=1))
    values(competition, episode(0.9, raw=1.55), episode(0.2, pair=OTHER))
    competition.begin_block(1)
    assert competition.ledger(CELL).best_metric == 0.9
    assert competition.ledger(OTHER).best_metric == 0.2
    assert competition.multiplier(CELL).value > 0.0 == competition.multiplier(OTHER).value
    assert values(competition, episode(0.3, pair=OTHER)) == [1.0]

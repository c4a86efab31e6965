import dataclasses

from prunegraph.rewards import Episode, RewardConfig, SelfCompetitionLedger

CONFIG = RewardConfig()


def episode(accuracy: float, name: str = "a") -> Episode:
    return Episode(
        pair="net",
        accuracy=accuracy,
        raw_cost_ratio=1.4,
        cost_ratio=1.0,
        bits=name,
    )


def test_an_equal_mask_does_not_replace_the_best() -> None:
    ledger = SelfCompetitionLedger().update(episode(0.5, name="first"), CONFIG)
    assert ledger.update(episode(0.5, name="second"), CONFIG).best_bits == "first"
    assert ledger.update(episode(0.51, name="second"), CONFIG).best_bits == "second"


def test_the_bar_can_be_measured_anew() -> None:
    ledger = SelfCompetitionLedger().update(episode(0.9, name="lucky"), CONFIG).set_bar(0.6)
    assert (ledger.best_bits, ledger.best_metric) == ("lucky", 0.6)
    assert ledger.update(episode(0.7, name="better"), CONFIG).best_bits == "better"


def test_an_update_leaves_the_ledger_as_it_was() -> None:
    before = SelfCompetitionLedger().update(episode(0.5), CONFIG)
    copy = dataclasses.replace(before)
    before.update(episode(0.7), CONFIG)
    assert before == copy

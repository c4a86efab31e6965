"""Checks of options."""

from dataclasses import dataclass

import pytest

from prunegraph.core.checks import (
    check_at_least,
    check_at_most,
    check_fields,
    check_positive,
    check_range,
)
from prunegraph.core.errors import ConfigError


@pytest.mark.parametrize("value", ["2", [2], 1j])
def test_what_is_no_number_is_named(value: object) -> None:
    checks = (
        lambda given: check_at_least("epochs", given, 0),
        lambda given: check_at_most("epochs", given, 9),
        lambda given: check_positive("epochs", given),
        lambda given: check_range("epochs", given, 0, 9),
    )
    for check in checks:
        check(2.5)
        with pytest.raises(ConfigError, match=r"epochs=.* must be a number, not of type"):
            check(value)


@dataclass
class Options:
    rounds: float = 8
    rate: float = 0.5


def test_what_counts_is_a_whole_number() -> None:
    check_fields(Options(rounds=2, rate=0.3), rounds=0, rate=0)
    with pytest.raises(ConfigError, match=r"rounds=2\.5 must be a whole number"):
        check_fields(Options(rounds=2.5), rounds=0, rate=0)

"""Checks of options."""

import pytest

from prunegraph.core.checks import check_at_least, check_at_most, check_positive, check_range
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

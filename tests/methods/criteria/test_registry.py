"""A criterion is one decorated function in one file: by that it is everywhere."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from prunegraph.core.errors import ConfigError
from prunegraph.methods import criteria
from prunegraph.methods.allocation import ALLOCATIONS
from prunegraph.methods.criteria.registry import CRITERIA, importance
from prunegraph.methods.registry import baseline_names, make_method, method_groups, method_names
from prunegraph.runs.choose import check_names

SOURCE = """\
import numpy as np

from prunegraph.core.masks import Float64Array
from prunegraph.methods.criteria.dense import Dense
from prunegraph.methods.criteria.registry import Given, criterion, measured_criterion


@criterion("geometric", of_the_layer=True, reads_images=False)
def geometric(given: Given) -> Float64Array:
    return np.sqrt(given.statistics["l1"].astype(np.float64) * given.statistics["l2"])


@measured_criterion("reads", num_samples=32)
def number_of_reads(dense: Dense) -> Float64Array:
    count = np.zeros(dense.graph.num_units)
    dense.show_reads(lambda read: np.add.at(count, read.unique, 1.0), 16)
    return count
"""


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Add a file to the folder of criteria."""
    (tmp_path / "added.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.setattr(criteria, "__path__", [*criteria.__path__, str(tmp_path)])
    known = dict(CRITERIA)
    yield importlib.import_module("prunegraph.methods.criteria.added")
    CRITERIA.clear()
    CRITERIA.update(known)


@pytest.mark.usefixtures("added")
def test_a_criterion_of_twenty_lines_is_in_every_list() -> None:
    assert len(SOURCE.splitlines()) <= 20
    for name in ("geometric", "reads"):
        rows = [f"{name}/{allocation}" for allocation in ALLOCATIONS]
        assert {*rows} <= {*method_names()}
        assert {*rows} <= {*method_groups()["heuristics"]}
        assert {*rows} <= {*baseline_names()}
        check_names(rows)
    assert make_method("reads/uniform").per_seed
    assert not make_method("geometric/uniform").per_seed
    assert make_method("geometric/sensitivity").per_seed
    statistics = {"l1": np.float32([1, 4]), "l2": np.float32([4, 4])}
    np.testing.assert_array_equal(importance("geometric", statistics, 2), [2.0, 4.0])


def test_what_nobody_added_is_not_there() -> None:
    assert not [name for name in method_names() if "geometric" in name]
    with pytest.raises(ConfigError, match="unknown criterion 'geometric'"):
        importance("geometric", {}, 1)


def test_every_criterion_says_whether_it_depends_on_images_or_chance() -> None:
    alone = {name for name, found in CRITERIA.items() if not found.per_seed}
    assert alone == {"l1", "l2", "bn_scale", "fpgm", "lamp"}
    scaled = {name for name, found in CRITERIA.items() if found.of_the_layer}
    layers = {"l1", "l2", "fpgm", "activation", "apoz", "hrank", "chip", "wanda", "flap", "obs"}
    assert scaled == layers

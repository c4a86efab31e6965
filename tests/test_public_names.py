"""Public names stay, or warn: code that was written with the last commit's names still runs."""

import importlib
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prunegraph as pg
from prunegraph.graph.graph import Group, OpNode

LISTED = (Path(__file__).parent / "support" / "public_names.txt").read_text().split()
MODULES = ("prunegraph", "prunegraph.methods", "prunegraph.tasks", "prunegraph.testing")
RENAMED = (
    *("prunegraph.Compensation", "prunegraph.KeepMask", "prunegraph.SequentialCompensation"),
    *("prunegraph.StructureGraph.num_classes", "prunegraph.StructureGraph.param_classes"),
    "prunegraph.StructureGraph.channels_per_class",
)


def public_names() -> Iterator[str]:
    """Yield the names that the package shows, and those of its classes' attributes."""
    for module in MODULES:
        home = importlib.import_module(module)
        for name in home.__all__:
            yield f"{module}.{name}"
            if inspect.isclass(value := getattr(home, name)):
                attributes = {*dir(value), *getattr(value, "__dataclass_fields__", ())}
                yield from (f"{module}.{name}.{a}" for a in attributes if not a.startswith("_"))


def is_there(name: str) -> bool:
    module = max((m for m in MODULES if name.startswith(f"{m}.")), key=len)
    value: Any = importlib.import_module(module)
    for part in name.removeprefix(f"{module}.").split("."):
        if part in getattr(value, "__dataclass_fields__", ()):
            return True
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def test_every_public_name_of_the_last_commit_is_there_or_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert [name for name in (*LISTED, *RENAMED) if not is_there(name)] == []
    assert not is_there("prunegraph.StructureGraph.num_channels")  # the test can fail


def test_every_public_name_is_listed() -> None:
    missing = {*public_names()} - {*LISTED} - {*RENAMED}
    assert sorted(missing) == [], "add these lines to tests/support/public_names.txt"
    assert sorted({*LISTED}) == LISTED


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("num_classes", "num_units"),
        ("param_classes", "param_units"),
        ("channels_per_class", "channels_per_unit"),
    ],
)
def test_old_names_of_a_graph_warn(mixed_graph: pg.StructureGraph, old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"StructureGraph.{old} is now {new}") as told:
        value = getattr(mixed_graph, old)
    assert value is getattr(mixed_graph, new)
    assert told[0].filename == __file__


def test_old_names_of_a_graphs_parts_warn(mixed_graph: pg.StructureGraph) -> None:
    parts: tuple[tuple[Group | OpNode, str, str], ...] = (
        (mixed_graph.groups[0], "classes", "units"),
        (mixed_graph.ops[0], "in_classes", "in_units"),
        (mixed_graph.ops[0], "out_classes", "out_units"),
    )
    for part, old, new in parts:
        with pytest.warns(DeprecationWarning, match=f"{type(part).__name__}.{old} is now {new}"):
            assert getattr(part, old) is getattr(part, new)


def test_old_names_of_the_package_warn() -> None:
    with pytest.warns(DeprecationWarning, match="prunegraph.KeepMask is now ChannelMask"):
        from prunegraph import KeepMask
    assert KeepMask is pg.ChannelMask
    for old, new in pg._RENAMED.items():
        with pytest.warns(DeprecationWarning, match=new):
            assert getattr(pg, old) is getattr(pg, new)

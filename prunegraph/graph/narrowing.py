"""What a user wants to keep: modules that stay as they are, and widths that stay at least."""

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from prunegraph.core.errors import ConfigError, nearest
from prunegraph.graph.graph import StructureGraph
from prunegraph.graph.rounding import restrict


def narrow(
    graph: StructureGraph,
    exclude: Sequence[str] = (),
    keep_at_least: Mapping[str, float] | None = None,
) -> StructureGraph:
    """Return the structure with less to prune; its fingerprint stays.

    A pattern is the name of a module, which stands for all that it holds, or a glob of such names
    (``"layer1.*"``). A group lies in a module if any weight of the module is cut with it.

    Args:
        graph: the structure.
        exclude: modules whose weights keep their shapes.
        keep_at_least: from modules to the share, in (0, 1], of each group in them that stays.

    Raises:
        ConfigError: a pattern matches no module with weights, or a share is out of range.
    """
    whole = {
        number: f"excluded by {pattern!r}"
        for pattern in exclude
        for number in _groups_in(graph, pattern, "exclude")
        if graph.groups[number].frozen is None
    }
    least: dict[int, int] = {}
    for pattern, share in (keep_at_least or {}).items():
        if not 0.0 < share <= 1.0:
            msg = f"keep_at_least={share:g} of {pattern!r} must lie in (0, 1]: it is a share"
            raise ConfigError(msg)
        for number in _groups_in(graph, pattern, "keep_at_least"):
            asked = math.ceil(round(share * len(graph.groups[number].units), 6))
            least[number] = max(asked, graph.groups[number].min_keep, least.get(number, 0))
    return restrict(graph, whole, graph.widths, least) if whole or least else graph


def _groups_in(graph: StructureGraph, pattern: str, option: str) -> list[int]:
    """Return the numbers of the groups that lie in the modules of a pattern."""
    paths = [{path for name in group.members for path in _paths(name)} for group in graph.groups]
    found = [
        number
        for number, own in enumerate(paths)
        if any(fnmatchcase(path, pattern) for path in own)
    ]
    if not found:
        names = sorted(set().union(*paths), key=lambda path: (path.count("."), path))
        msg = f"{option}={pattern!r} matches no module with weights that channels belong to; "
        raise ConfigError(msg + f"the nearest: {nearest(pattern.strip('.*'), names)}")
    return found


def _paths(member: str) -> Iterator[str]:
    """Yield a parameter's name and those of the modules that hold it, of ``"name:axis"``."""
    path, _, _ = member.rpartition(":")
    while path:
        yield path
        path, _, _ = path.rpartition(".")

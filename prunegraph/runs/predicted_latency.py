"""The latency that searches go by: layers timed once, kept in the run folder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import sparse
from torch import nn

from prunegraph.core.budget import SHAPES, Budget
from prunegraph.core.console import Console
from prunegraph.core.errors import ArtefactError, BudgetError
from prunegraph.core.files import write_json
from prunegraph.core.reading import checked, read_json
from prunegraph.graph import ExampleInputs, StructureGraph
from prunegraph.graph.costs.clock import Latency
from prunegraph.graph.costs.latency import LatencyTable, measure_latency_table
from prunegraph.graph.costs.latency_budget import TOLERANCE, project_latency
from prunegraph.graph.features import rank_in_group
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.target import Target

TABLE = {
    "positions": list[list[int]],
    "widths": list[list[list[float]]],
    "times": list[list[list[float]]],
    "dense": Latency,
    "smallest": Latency,
    "scale": float,
    "offset": float,
    "excess": float,
    "rates": list[float],
}
"""What the file holds: a ``LatencyTable``, its positions as rows, columns and counts."""


def with_prediction(target: Target, budget: Budget, folder: RunFolder, console: Console) -> Target:
    """Return a network whose structure predicts its latency, if a budget limits that.

    The layers are timed at the first start of a run.

    Raises:
        BudgetError: the latency cannot be met, or the whole network meets it, the only limit.
        ArtefactError: the file in the run folder is damaged.
    """
    if budget.max_latency is None:
        return target
    path = folder.file(RunFolder.LATENCY)
    if path.is_file():
        return predicting(target, path)
    console.say("timing the layers at several widths, for the latency")
    table = layer_times(
        target.as_loaded(),
        target.graph,
        budget,
        target.example_inputs,
        path=path,
        name=target.arch,
    )
    if table.dense.disturbed is not None:
        console.say(
            f"warning: {table.dense.disturbed}: its times are too long; when the machine does "
            "less, give the command again with a new --out"
        )
    return replace(target, structure=replace(target.graph, latency_model=table))


def predicting(target: Target, path: Path) -> Target:
    """Return a network whose structure predicts its latency by the layer times of a run."""
    table = read_table(path, target.graph)
    return replace(target, structure=replace(target.graph, latency_model=table))


def layer_times(
    model: nn.Module,
    graph: StructureGraph,
    budget: Budget,
    example_inputs: ExampleInputs,
    *,
    path: Path | None,
    name: str,
) -> LatencyTable:
    """Return a network's layer times; they are measured once, and kept in a file.

    Args:
        model: the dense network, laid out as it is to be timed.
        graph: its structure.
        budget: what may remain, a latency among it.
        example_inputs: what its forward takes.
        path: the file; None = they are not kept.
        name: of the network, for errors.

    Raises:
        BudgetError: the latency cannot be met, or the whole network meets it, the only limit.
        ArtefactError: the file is damaged, or of another network.
    """
    if path is not None and path.is_file():
        return read_table(path, graph)
    table = _measured(model, graph, budget, example_inputs, name)
    if path is not None:
        write_table(path, table)
    return table


def _measured(
    model: nn.Module,
    graph: StructureGraph,
    budget: Budget,
    example_inputs: ExampleInputs,
    name: str,
) -> LatencyTable:
    """Time the layers and whole networks, and see that the latency can be met.

    Searches find what a prediction thinks too little of: if networks of uneven widths miss theirs
    by more than is allowed, all are predicted that much more.
    """
    table = measure_latency_table(model, graph, example_inputs, budget=budget)
    others = budget.as_dict().keys() - SHAPES - {"max_latency"}
    meets = budget.max_latency is not None and table.dense.least <= budget.max_latency
    if meets and not others:
        msg = (
            f"{name}: the whole network takes {table.dense.least:.3g} ms, which meets "
            f"max_latency={budget.max_latency:g}: give fewer"
        )
        raise BudgetError(msg)
    even = rank_in_group(graph, np.zeros(graph.num_units)).astype(np.float32)
    project_latency(model, graph, even, budget, example_inputs, table=table)  # raises
    return table.slower_by(max(table.excess / TOLERANCE, 1.0))


def write_table(path: Path, table: LatencyTable) -> None:
    """Keep the layer times of a run."""
    positions = table.positions.tocoo()
    content = {
        "positions": [axis.tolist() for axis in (*positions.coords, positions.data.astype(int))],
        "widths": table.widths.tolist(),
        "times": table.times.tolist(),
        **{name: vars(getattr(table, name)) for name in ("dense", "smallest")},
        **{name: getattr(table, name) for name in ("scale", "offset", "excess")},
        "rates": table.rates.tolist(),
    }
    write_json(path, content, indent=None)


def read_table(path: Path, graph: StructureGraph) -> LatencyTable:
    """Return the layer times of a run.

    Raises:
        ArtefactError: the file is missing or damaged, or of another network.
    """
    content = checked(read_json(path), TABLE, str(path))
    try:
        times, widths = (np.array(content[name], dtype=np.float64) for name in ("times", "widths"))
        rows, columns, counts = (np.array(part) for part in content["positions"])
        shape = (2 * len(times), graph.num_units)
        positions = sparse.csr_array((counts.astype(np.float64), (rows, columns)), shape=shape)
        grid = times.shape[1:]
        fits = len(grid) == 2 and min(grid) == max(grid) > 1
        fits = fits and widths.shape == (2, len(times), grid[0])
        fits = fits and len(content["rates"]) == graph.num_units
    except (ValueError, OverflowError):  # ragged, or classes that the network has not
        fits = False
    if not fits:
        msg = f"{path} does not fit the network: it is damaged, give a new --out"
        raise ArtefactError(msg)
    whole = {name: content[name] for name in ("dense", "smallest", "scale", "offset", "excess")}
    return LatencyTable(
        positions=positions, widths=widths, times=times, rates=np.array(content["rates"]), **whole
    )

"""How many samples a network is run on at once: as many as memory allows."""

import math
import warnings

from prunegraph.core.task import Task
from prunegraph.graph import StructureGraph
from prunegraph.layerwise.sampling import ROWS_AN_INPUT
from prunegraph.tasks.batches import num_samples, num_tokens
from prunegraph.tasks.classification import BATCH_SIZE

MOST_SAMPLES, MEMORY = 1024, 2**31
"""Of the batch that a network is fitted on; bytes of its activations in the dense network."""

FORWARD_MEMORY = 2**29
"""Bytes of activations of a forward without gradients: batches of large images are smaller."""

TOKENS = 2**33
"""Bytes of activations of a whole forward of the tokens that a network is fitted on; what one block
of it holds is far less."""

LEAST = 4
"""Samples of a batch, if there are so many: batch norms average over them."""


def most_samples(
    graph: StructureGraph, samples: int, most: int = MOST_SAMPLES, memory: int = MEMORY
) -> int:
    """Return how many samples a network can be fitted on.

    Args:
        graph: the structure of the dense network.
        samples: of the example that it was analysed with.
        most: samples, at most.
        memory: bytes of activations that are alive at once, at most.
    """
    each = graph.peak_memory(graph.dense_mask()) // max(samples, 1)
    return max(1, min(most, memory // max(each, 1)))


def most_fitted(
    task: Task, graph: StructureGraph, most: int = MOST_SAMPLES, memory: int = MEMORY
) -> int:
    """Return how many samples of a task its network is fitted on layer by layer.

    Of tokens as many as the widest layer needs, which are fitted block by block.

    Args:
        task: the network and its example.
        graph: its structure.
        most: samples, at most.
        memory: see ``most_samples``; of networks that read tokens it is ``TOKENS``.
    """
    example = task.example_inputs
    tokens = num_tokens(example)
    if not tokens:
        return most_samples(graph, num_samples(example), most, memory)
    needed = math.ceil(ROWS_AN_INPUT * widest(graph) / tokens)
    return most_samples(graph, num_samples(example), min(most, needed), TOKENS)


def widest(graph: StructureGraph) -> int:
    """Return what the widest layer reads of those that may lose inputs; at least 1."""
    widths = [op.in_units.size for op in graph.ops if graph.free[op.in_units].any()]
    return max(widths, default=1)


def too_few(tokens: int, units: int) -> str | None:
    """Say that tokens, if there are any, are fewer than a layer has units: they cannot fit it."""
    if not 0 < tokens < units:
        return None
    return (
        f"the calibration data have {tokens} tokens, fewer than the {units} units of a layer: "
        f"give {ROWS_AN_INPUT * units} or more"
    )


def warn_of_few(tokens: int, units: int) -> None:
    """Warn of what ``too_few`` says."""
    if told := too_few(tokens, units):
        warnings.warn(told, stacklevel=4)


def batch_size(task: Task, graph: StructureGraph, most: int = BATCH_SIZE) -> int:
    """Return how many samples of a task, ``most`` or fewer, a forward without gradients takes."""
    bounded = most_samples(graph, num_samples(task.example_inputs), most, FORWARD_MEMORY)
    return max(bounded, min(most, LEAST))

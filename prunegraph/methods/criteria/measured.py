"""Statistics that take longer than a look: measured when a method first asks for them."""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from prunegraph.core.errors import ModelError
from prunegraph.core.masks import FloatArray
from prunegraph.core.task import Task
from prunegraph.graph import StructureGraph
from prunegraph.methods.criteria.dense import Dense
from prunegraph.methods.criteria.registry import CRITERIA
from prunegraph.methods.criteria.taylor import STATISTIC_NAMES, fill_unseen
from prunegraph.methods.criteria.weights import filter_statistics


def costly_names() -> tuple[str, ...]:
    """Return the criteria that look at the network itself (``measured_criterion``)."""
    return tuple(name for name, found in CRITERIA.items() if found.measure is not None)


def measure_costly(
    name: str,
    task: Task,
    graph: StructureGraph,
    *,
    num_samples: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> FloatArray:
    """Measure one of ``costly_names`` on a copy of a dense network.

    Args:
        name: of the criterion.
        task: the dense network and its train data.
        graph: its structure.
        num_samples: how many, without augmentation; None = as many as the criterion says.
        seed: fixes which samples.
        device: where the network runs; None = where it is.

    Returns:
        ``[N]`` float32, higher = keep; filled as ``measure`` does.

    Raises:
        ModelError: a value is not finite.
    """
    found = CRITERIA[name]
    assert found.measure is not None
    train = task.train.sample(found.num_samples if num_samples is None else num_samples, seed)
    dense = Dense(task=task, graph=graph, train=train, seed=seed, device=device)
    values = found.measure(dense)
    if np.isinf(values).any():
        msg = f"{name} is infinite: check the network's weights and its train data"
        raise ModelError(msg)
    return fill_unseen(graph, values, lambda: filter_statistics(dense.model, graph)["l2"])


class LazyStatistics(dict[str, FloatArray]):
    """Measured arrays ``[N]`` by name, each measured once, when it is first asked for.

    Args:
        usual: measures ``STATISTIC_NAMES``, all in one look.
        costly: measures one of ``costly_names``, by its name.
    """

    def __init__(
        self, usual: Callable[[], Mapping[str, FloatArray]], costly: Callable[[str], FloatArray]
    ) -> None:
        super().__init__()
        self._usual, self._costly = usual, costly

    def __missing__(self, name: str) -> FloatArray:
        """Measure what is asked for."""
        valid = (*STATISTIC_NAMES, *costly_names())
        if name not in valid:
            msg = f"no statistic {name!r}; there are {', '.join(valid)}"
            raise KeyError(msg)
        self.update(self._usual() if name in STATISTIC_NAMES else {name: self._costly(name)})
        for values in self.values():
            values.flags.writeable = False  # all methods read them
        return self[name]

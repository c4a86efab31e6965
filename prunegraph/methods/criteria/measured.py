"""Statistics that take longer than a look: measured when a method first asks for them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import nn

from prunegraph.core.errors import ModelError
from prunegraph.core.masks import Float64Array, FloatArray
from prunegraph.core.splits import TrainSplit
from prunegraph.core.task import Task
from prunegraph.graph import StructureGraph
from prunegraph.methods.criteria.feature_maps import average_rank, channel_independence
from prunegraph.methods.criteria.obd import fisher_saliency
from prunegraph.methods.criteria.residual_taylor import residual_taylor
from prunegraph.methods.criteria.taylor import fill_unseen, measurable
from prunegraph.methods.criteria.thinet import removal_errors
from prunegraph.methods.criteria.weights import filter_statistics

COSTLY_STATISTICS: Mapping[str, int] = {
    "hrank": 256,
    "chip": 128,
    "obd": 256,
    "thinet": 256,
    "residual_taylor": 512,
}
"""Name -> train samples that it is measured on, by default."""

Measure = Callable[[nn.Module, StructureGraph, Task, TrainSplit], Float64Array]
"""Of the dense network in eval mode, on samples of its task."""


def measure_costly(
    name: str,
    task: Task,
    graph: StructureGraph,
    *,
    num_samples: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> FloatArray:
    """Measure one of ``COSTLY_STATISTICS`` on a copy of a dense network.

    Args:
        name: ``"hrank"`` (``map_statistics.average_rank``), ``"chip"``
            (``map_statistics.channel_independence``), ``"obd"``
            (``weight_saliency.fisher_saliency``), ``"thinet"`` (``reconstruction.removal_errors``)
            or ``"residual_taylor"`` (``residual_taylor.residual_taylor``).
        task: gives the dense network, which is never changed, and train samples, which are taken
            without augmentation.
        graph: structure of the network.
        num_samples: how many; None = as many as ``COSTLY_STATISTICS`` says.
        seed: fixes which samples.
        device: where the network runs; None = where it is.

    Returns:
        ``[N]`` float32, higher = keep; filled as ``measure`` does.

    Raises:
        ModelError: a value is not finite.
    """
    dense = measurable(task, device)
    count = COSTLY_STATISTICS[name] if num_samples is None else num_samples
    samples = task.train.sample(count, seed)
    measures: Mapping[str, Measure] = {
        "hrank": average_rank,
        "chip": channel_independence,
        "obd": fisher_saliency,
        "thinet": partial(removal_errors, seed=seed),
        "residual_taylor": partial(residual_taylor, seed=seed),
    }
    values = measures[name](dense, graph, task, samples)
    if np.isinf(values).any():
        msg = f"{name} is infinite: check the network's weights and its data"
        raise ModelError(msg)
    return fill_unseen(graph, values, lambda: filter_statistics(dense, graph)["l2"])


@dataclass(frozen=True, eq=False)
class LazyStatistics(Mapping[str, FloatArray]):
    """Measured arrays ``[N]`` by name, costly ones measured once, when they are first asked for.

    Args:
        measured: what is there.
        measure: measures one of ``COSTLY_STATISTICS`` by its name.
    """

    measured: Mapping[str, FloatArray]
    measure: Callable[[str], FloatArray]
    _costly: dict[str, FloatArray] = field(default_factory=dict, init=False)

    def __getitem__(self, name: str) -> FloatArray:
        if name in self.measured:
            return self.measured[name]
        if name not in self._costly:
            if name not in COSTLY_STATISTICS:
                msg = f"no statistic {name!r}; there are {', '.join(self)}"
                raise KeyError(msg)
            self._costly[name] = self.measure(name)
            self._costly[name].flags.writeable = False  # all methods read it
        return self._costly[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.measured, **COSTLY_STATISTICS})

    def __len__(self) -> int:
        return len({**self.measured, **COSTLY_STATISTICS})

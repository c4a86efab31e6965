"""The networks of a search evaluated by the nodes of a Ray cluster.

A network's evaluation is a Ray task: it goes to a free CPU of any node, and to another node if its
own dies. Networks and images lie in the object store, from where each node fetches them once; every
worker process unpacks them once and keeps them.
"""

import socket
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prunegraph.core.errors import ConfigError, PruneGraphError, first_line
from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.runs.parallel.machine import keep_freed_memory

POLL = 5.0
"""Seconds between two looks at the nodes while an evaluation is awaited."""

PATIENCE = 60.0
"""Seconds without any node after which the search ends: nodes may be on their way."""

CONNECT = 10.0
"""Seconds in which a cluster must answer."""

RETRIES = 20
"""How often a network is evaluated again because its worker died."""


class RayPool:
    """A Ray cluster as the pool of a search.

    Args:
        address: of the cluster; ``auto`` = the one that this machine belongs to, ``local`` = one
            that is started here.
        evaluators: score the masks of each network.

    Raises:
        ConfigError: Ray is not installed, there is no cluster, or a GPU other than the first is
            named.
    """

    threads = 1

    def __init__(self, address: str, evaluators: Sequence[Evaluator]) -> None:
        device = evaluators[0].device
        if device.index:
            msg = f"--ray gives each worker one GPU, its first: --device cuda in place of {device}"
            raise ConfigError(msg)
        self._ray = load_ray()
        try:
            _check_answers(address)
            self._ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError) as error:
            reason = first_line(error)
            msg = f"no Ray cluster at {address!r} ({reason}): start one with `ray start --head`"
            raise ConfigError(msg) from error
        gpus = int(device.type == "cuda")
        self._needs = {"CPU": 1.0, "GPU": float(gpus)}
        remote = self._ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)
        self._task = remote(evaluate_here)
        self._evaluators = self._ray.put(list(evaluators))
        self._last_seen = time.monotonic()

    def evaluate(self, network: int, mask: ChannelMask, subset: Tensor | None) -> Outcome:
        """Return the outcome of a mask; called from many threads at once.

        Raises:
            PruneGraphError: no node of the cluster is left.
        """
        ray = self._ray
        self._last_seen = time.monotonic()
        try:
            result = self._task.remote([self._evaluators], network, mask, subset)
            while not ray.wait([result], timeout=POLL)[0]:
                self._check_nodes()
            outcome: Outcome = ray.get(result)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # what the evaluation itself raised
        except ray.exceptions.RayError as error:
            reason = first_line(error)
            msg = f"the Ray cluster failed ({reason}): give the same command again to go on"
            raise PruneGraphError(msg) from error
        return outcome

    def _check_nodes(self) -> None:
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if any(all(own.get(k, 0.0) >= n for k, n in self._needs.items()) for own in alive):
            self._last_seen = time.monotonic()
        if time.monotonic() - self._last_seen > PATIENCE:
            on_gpus = " on a GPU" * (self._needs["GPU"] > 0)
            msg = (
                f"no node of the Ray cluster is left to evaluate networks{on_gpus}: start nodes "
                "with `ray start` and give the same command again to go on, or go on here without "
                "--ray"
            )
            raise PruneGraphError(msg)

    def close(self) -> None:
        """Leave the cluster."""
        self._ray.shutdown()


def load_ray() -> Any:
    """Return the module ``ray``, an optional dependency.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        msg = f"--ray needs {error.name}: pip install ray"
        raise ConfigError(msg) from error
    return ray


def _check_answers(address: str) -> None:
    """Raise OSError if nothing listens at ``HOST:PORT``: Ray tries for minutes, then exits."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        socket.create_connection((host, int(port)), timeout=CONNECT).close()


_unpacked: dict[Any, list[Evaluator]] = {}
"""What a worker process keeps: the evaluators of the search that it last worked for."""


def evaluate_here(
    evaluators: Sequence[Any], network: int, mask: ChannelMask, subset: Tensor | None
) -> Outcome:
    """Return the outcome of a mask: what a worker process does.

    Args:
        evaluators: one reference to those in the object store; in a list, Ray leaves it as it is.
        network: position of the mask's network.
        mask: the mask.
        subset: positions in the search split; None = all.
    """
    (reference,) = evaluators
    if reference not in _unpacked:
        warnings.simplefilter("ignore")  # as the command line does
        keep_freed_memory()
        torch.set_num_threads(RayPool.threads)
        _unpacked.clear()
        _unpacked[reference] = load_ray().get(reference)
    return _unpacked[reference][network].evaluate(mask, subset)

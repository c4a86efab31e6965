"""The evaluator that scores masks, for any task."""

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from prunegraph.core.errors import DataError, one_line
from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.core.splits import Batch, ReadyBatches, SearchSplit, Split, TrainSplit
from prunegraph.core.task import Scores, Task
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.evaluation.silenced import Silenced, can_silence
from prunegraph.graph import StructureGraph, copy_network, unwrap
from prunegraph.graph.branches import without_blocks
from prunegraph.graph.surgery import apply_mask
from prunegraph.layerwise import room
from prunegraph.layerwise.recalibrate import forget_statistics, has_batch_norm, recalibrate_bn
from prunegraph.layerwise.reconstruct import Reconstruction
from prunegraph.layerwise.silenced import SilencedReconstruction
from prunegraph.rewards.config import Metric
from prunegraph.tasks.classification import model_device

PRELOAD_LIMIT = 1 << 28
"""Samples of more bytes than this are loaded anew for every network."""

QUICK_CALIBRATION = 512
"""Samples that recalibrate a network that a search scores: more rank masks no better."""


def metric_of(task: Task, wanted: Metric) -> Metric:
    """Return what networks of a task are compared by, if it does not have what is wanted.

    Without search samples that is the score; where there are no classes, of which the right one has
    a probability, it is the divergence.
    """
    if task.search is None:
        return "accuracy"
    return "kl" if wanted == "soft_accuracy" and task.score_name != "accuracy" else wanted


class Evaluator:
    """Scores masks: surgery, reconstruction, batch-norm recalibration, the task's score.

    Networks are scored on the task's search split and recalibrated on its train split, which are
    of different types, so that test data cannot leak into a search. A task without a search split
    has a score that looks at data of its own; subsets mean nothing there. Results are cached by
    mask and subset; a cached result costs no network. Data are loaded once if they fit in
    ``PRELOAD_LIMIT`` bytes.

    Args:
        task: network, data and score.
        graph: structure of the task's network.
        reconstruction: changes the weights that stay in a pruned network; None = they stay as they
            are.
        quick_reconstruction: in its place for networks that are scored on a subset of the samples,
            be it all of them: ``None`` asks for the other one.
        num_calibration: train samples that recalibrate batch norm, without augmentation, drawn
            without order by ``seed``; networks that are scored on a subset of the search samples,
            as in searches, get ``QUICK_CALIBRATION`` at most.
        batch_size: samples a forward; None = ``BATCH_SIZE``, fewer of large ones.
        seed: fixes the calibration samples.
        device: where networks run; None = where the task's network is.
        metric: what outcomes are compared by: the score, the soft accuracy, or ``"kl"``, the
            divergence from the dense network's outputs.
        autocast: run in bfloat16 where that is safe and the device computes it.
        search: what masks are scored on; None = the task's search split.
        recalibrate: False = batch norm goes by the very batch that is scored, and the network is
            silenced and reconstructed at once, not cut, where that is possible: milliseconds a mask
            of a small network.
        log: what an earlier start of the same search measured; it counts as if it were run now.

    Attributes:
        num_networks: pruned networks run so far.
        seconds: wall time of their surgery, recalibration and evaluation.
        recalled: of it, in an earlier start of the search.
    """

    def __init__(
        self,
        task: Task,
        graph: StructureGraph,
        *,
        reconstruction: Reconstruction | None = None,
        quick_reconstruction: Reconstruction | None = None,
        num_calibration: int = 1024,
        batch_size: int | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
        metric: Metric = "accuracy",
        autocast: bool = True,
        search: SearchSplit | None = None,
        recalibrate: bool = True,
        log: OutcomeLog | None = None,
    ) -> None:
        self.task = task
        self.recalibrate = recalibrate
        self.search = search or task.search
        given: object = self.search
        if given is not None and not isinstance(given, SearchSplit):
            msg = f"{type(given).__name__} is no SearchSplit: see docs/own.md"
            raise DataError(msg)
        self.model = unwrap(task.model)
        self.graph = graph
        self.calibration = _drawn(task.train, num_calibration, seed)
        self.reconstruction = reconstruction
        self.quick_reconstruction = quick_reconstruction
        self.batch_size = batch_size or room.batch_size(task, graph)
        self.device = model_device(self.model) if device is None else torch.device(device)
        self.autocast = autocast and task.autocast
        self.metric = metric
        self.num_networks = 0
        self.seconds = 0.0
        self.recalled = 0.0
        self._log = log
        self._report: Callable[[int], None] | None = None
        self._cache: dict[tuple[str, str], Outcome] = {}

    @property
    def num_samples(self) -> int:
        """Search samples; 0 if the score looks at data of its own."""
        return 0 if self.search is None else len(self.search)

    def evaluate(self, mask: ChannelMask, subset: Tensor | None = None) -> Outcome:
        """Prune, reconstruct if asked for, recalibrate, and score one mask.

        Args:
            mask: which units stay.
            subset: ``[k]`` int64 positions in the search split; None = all of it.

        Returns:
            The outcome; an equal call returns the same one without running a network.
        """
        subset = self.narrow(subset)
        key = (mask.digest(), subset_digest(subset))
        if key not in self._cache:
            known = None if self._log is None else self._log.get(*key)
            outcome = known or self._measure(mask, subset)
            if known is not None:
                self.recalled += known.seconds
            elif self._log is not None:
                self._log.add(outcome, key[1])
            self.num_networks += 1
            if self._report is not None:
                self._report(self.num_networks)
            self.seconds += outcome.seconds
            self._cache[key] = outcome
        return self._cache[key]

    @contextmanager
    def watched(self, report: Callable[[int], None] | None) -> Iterator[None]:
        """Call ``report(networks run so far)`` after every network, while the block runs."""
        self._report = report
        try:
            yield
        finally:
            self._report = None

    def narrow(self, subset: Tensor | None) -> Tensor | None:
        """Return a subset; None, which is all samples, if it holds all and nothing else differs."""
        if self.search is None:
            return None
        if subset is None or self.quick_reconstruction is not None:
            return subset
        return None if len(subset) == self.num_samples else subset

    def evaluate_all(self, masks: Sequence[ChannelMask]) -> list[Outcome]:
        """Return the outcomes of masks on all search samples."""
        return [self.evaluate(mask) for mask in masks]

    def is_cached(self, mask: ChannelMask, subset: Tensor | None = None) -> bool:
        """Return whether ``evaluate`` would run no network."""
        return (mask.digest(), subset_digest(self.narrow(subset))) in self._cache

    def draw_subset(self, size: int, seed: int) -> Tensor:
        """Return ``[size]`` sorted random positions in the search split, fixed by ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(self.num_samples, generator=generator)[:size]
        return drawn.sort().values

    def prune(
        self,
        mask: ChannelMask,
        reconstruction: Reconstruction | None = None,
        num_calibration: int | None = None,
    ) -> nn.Module:
        """Return the pruned, recalibrated network on the evaluator's device; not counted.

        Args:
            mask: what stays.
            reconstruction: another one than the evaluator's own.
            num_calibration: samples that recalibrate it; default: all.
        """
        pruned = apply_mask(self._dense, self.graph, mask)
        reconstruction = reconstruction or self.reconstruction
        if reconstruction is not None:
            reconstruction.fit(pruned, mask)
        if not self.recalibrate:
            forget_statistics(pruned)
        elif has_batch_norm(pruned):
            batches = self._calibration_batches(num_calibration or len(self.calibration))
            recalibrate_bn(pruned, batches, forward=self.task.forward, autocast=self.autocast)
        return without_blocks(pruned, self.graph, mask.keep)

    def nearest(self, mask: ChannelMask, *ways: Callable[[], Reconstruction]) -> nn.Module:
        """Return ``prune(mask)``, or the network with another reconstruction if it is the nearer.

        To the dense network, by the outputs on the search samples, without labels; by the score if
        the task has no such samples. The first of the other ways that succeeds is tried, and none
        need succeed.
        """
        networks, problem = [self.prune(mask)], None
        for way in ways:
            try:
                networks.append(self.prune(mask, way()))
            except Exception as error:  # memory, a batch of another size
                problem = one_line(error)
            else:
                break
        if len(networks) == 1:
            if problem is not None:
                msg = f"the network is not reconstructed layer by layer: {problem}"
                warnings.warn(msg, stacklevel=2)
            return networks[0]
        if self.search is None:  # what its owner has said of the first is known
            better = self._scores(networks[1], None, diverging=False).accuracy
            return networks[better > self.evaluate(mask).accuracy]
        found = [self._scores(network, None, diverging=True).kl or 0.0 for network in networks]
        return networks[found[1] < found[0]]

    @cached_property
    def dense_outputs(self) -> Tensor | None:
        """What the divergence is measured from: a row for each search sample; None = nothing."""
        return self.task.dense_outputs(
            self._dense, self._search_batches(None), autocast=self.autocast
        )

    def _measure(self, mask: ChannelMask, subset: Tensor | None) -> Outcome:
        self._prepare()
        start = time.perf_counter()
        reconstruction, samples = None, len(self.calibration)
        if subset is not None:
            reconstruction, samples = self.quick_reconstruction, min(samples, QUICK_CALIBRATION)
        if self._silenced is not None:
            pruned = self._silenced.silence(mask)
            if isinstance(self.reconstruction, SilencedReconstruction):
                self.reconstruction.fit_silenced(self._silenced.parameters, mask)
        else:
            pruned = self.prune(mask, reconstruction, samples)
        scores = self._scores(pruned, subset, diverging=self.metric == "kl")
        seconds = time.perf_counter() - start
        return Outcome(
            accuracy=scores.accuracy,
            loss=scores.loss,
            kl=scores.kl if self.metric == "kl" else None,
            num_images=max(self.num_samples, 1) if subset is None else int(subset.numel()),
            cost=self.graph.cost(mask),
            digest=mask.digest(),
            seconds=seconds,
            soft_accuracy=scores.soft_accuracy if self.metric == "soft_accuracy" else None,
        )

    def _scores(self, model: nn.Module, subset: Tensor | None, *, diverging: bool) -> Scores:
        dense = self.dense_outputs if diverging else None
        return self.task.measure(
            model,
            self._search_batches(subset),
            autocast=self.autocast,
            dense_outputs=dense if dense is None or subset is None else dense[subset],
        )

    def _prepare(self) -> None:
        """Load what is made once, so that it is not timed as a network's cost."""
        if self._preloads_search:
            _ = self._search_data
        if self._preloads_calibration:
            _ = self._calibration_data
        if self.metric == "kl":
            _ = self.dense_outputs

    @cached_property
    def _dense(self) -> nn.Module:
        """A copy of the dense network on the evaluator's device."""
        return self.task.place_model(copy_network(self.model), self.device).eval()

    @cached_property
    def _silenced(self) -> Silenced | None:
        """What takes the place of surgery; None = nothing does."""
        if self.recalibrate or not can_silence(self._dense, self.graph):
            return None
        silenced = Silenced(self._dense, self.graph)
        forget_statistics(silenced.model)
        return silenced

    @cached_property
    def _preloads_calibration(self) -> bool:
        return self._size(self.calibration) < PRELOAD_LIMIT

    @cached_property
    def _preloads_search(self) -> bool:
        return self._size(self.calibration) + self._size(self.search) < PRELOAD_LIMIT

    @staticmethod
    def _size(split: Split | None) -> float:
        """Return the bytes of a split's samples; ready batches are where they are."""
        if split is None or isinstance(split.source, ReadyBatches):
            return math.inf
        sample = split.source.load(split.index[:1])
        return float(len(split) * sum(leaf.nbytes for leaf in tree_leaves(sample)))

    @cached_property
    def _search_data(self) -> Batch:
        assert self.search is not None
        return self._load(self.search)

    @cached_property
    def _calibration_data(self) -> Batch:
        return self._load(self.calibration)

    def _load(self, split: Split) -> Batch:
        """Return a split as one batch, on the device."""
        batches = [self.task.place(each, self._dense) for each in split.batches(self.batch_size)]
        return tree_map(lambda *parts: torch.cat(parts), *batches)

    def _search_batches(self, subset: Tensor | None) -> Iterable[Batch]:
        """Return the samples to score on: from memory if they fit there."""
        if self.search is None:
            return ()
        if not self._preloads_search:
            taken = self.search if subset is None else self.search.take(subset)
            return taken.batches(self.batch_size)
        data = self._search_data
        if subset is not None:
            data = tree_map(lambda part: part[subset.to(part.device)], data)
        return _parts(data, lambda part: part.split(self.batch_size))

    def _calibration_batches(self, num_samples: int) -> Iterable[Batch]:
        """Return so many calibration samples in batches of equal size (to one)."""
        num_batches = math.ceil(num_samples / self.batch_size)
        if not self._preloads_calibration:
            taken = self.calibration.take(torch.arange(num_samples))
            return taken.equal_batches(num_batches)
        return _parts(
            self._calibration_data, lambda part: part[:num_samples].tensor_split(num_batches)
        )


def _drawn(split: TrainSplit, num_samples: int, seed: int) -> TrainSplit:
    """Return samples drawn without order; the first of ready batches."""
    if isinstance(split.source, ReadyBatches):
        return split.sample(num_samples, seed)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.take(order[:num_samples])


def _parts(data: Batch, split: Callable[[Tensor], Sequence[Tensor]]) -> Iterator[Batch]:
    """Yield the parts that a function makes of every tensor of a batch."""
    leaves, form = tree_flatten(data)
    for parts in zip(*map(split, leaves), strict=True):
        yield tree_unflatten(parts, form)


def subset_digest(subset: Tensor | None) -> str:
    """Name a subset; the empty string is the whole split."""
    return "" if subset is None else hashlib.sha256(subset.numpy().tobytes()).hexdigest()[:16]

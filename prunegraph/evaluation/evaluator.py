"""The evaluator that scores masks on the search split."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from prunegraph.core.errors import DataError
from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.core.splits import SearchSplit, Split, TrainSplit
from prunegraph.evaluation.log import OutcomeLog
from prunegraph.graph import StructureGraph, copy_network, unwrap
from prunegraph.graph.apply import apply_mask
from prunegraph.layerwise.recalibrate import recalibrate_bn
from prunegraph.layerwise.reconstruct import Reconstruction
from prunegraph.tasks.classification import (
    BATCH_SIZE,
    WORST,
    Scores,
    compute_logits,
    evaluate,
    place_images,
    place_model,
)

PRELOAD_LIMIT = 1 << 30
"""Images of more bytes than this are loaded anew for every network."""

QUICK_CALIBRATION = 512
"""Images that recalibrate a network that a search scores: more rank masks no better."""


class Evaluator:
    """Scores masks: surgery, batch-norm recalibration, evaluation on search images.

    It takes a ``SearchSplit`` to score on and a ``TrainSplit`` to recalibrate on, so that test
    images cannot leak into a search. Results are cached by mask and image subset; a cached
    result costs no network. The images to score and to recalibrate on are loaded once if they fit
    in ``PRELOAD_LIMIT`` bytes.

    Args:
        model: the dense network; never changed.
        graph: its structure.
        search: images to score on.
        calibration: images to recalibrate batch norm on, without augmentation.
        num_calibration: how many of them, drawn without order by ``seed``; networks that are
            scored on a subset of the images, as in searches, get ``QUICK_CALIBRATION`` at most.
        batch_size: images a forward.
        seed: fixes the calibration images.
        device: where networks run.
        autocast: run in bfloat16 where that is safe and the device computes it.
        kl: also measure the KL divergence from the dense network's outputs.
        soft: also measure the soft accuracy.
        reconstruction: changes the weights that stay in a pruned network; None = they stay as they
            are.
        quick_reconstruction: in its place for networks that are scored on a subset of the images,
            be it all of them: ``None`` asks for the other one.
        log: what an earlier start of the same search measured; it counts as if it were run now.

    Attributes:
        num_networks: pruned networks run so far.
        seconds: wall time of their surgery, recalibration and evaluation.
        recalled: of it, in an earlier start of the search.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: StructureGraph,
        *,
        search: SearchSplit,
        calibration: TrainSplit,
        num_calibration: int = 1024,
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
        device: str | torch.device = "cpu",
        autocast: bool = True,
        kl: bool = False,
        soft: bool = False,
        reconstruction: Reconstruction | None = None,
        quick_reconstruction: Reconstruction | None = None,
        log: OutcomeLog | None = None,
    ) -> None:
        kinds: list[tuple[object, type[Split]]]
        kinds = [(search, SearchSplit), (calibration, TrainSplit)]
        for given, kind in kinds:
            if not isinstance(given, kind):
                msg = (
                    f"{type(given).__name__} is no {kind.__name__}: masks are scored on search "
                    "images and recalibrated on train images, see docs/data.md"
                )
                raise DataError(msg)
        self.model = unwrap(model)
        self.graph = graph
        self.search = search
        order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(seed))
        self.calibration = calibration.take(order[:num_calibration])
        self.reconstruction = reconstruction
        self.quick_reconstruction = quick_reconstruction
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.autocast = autocast
        self.kl = kl
        self.soft = soft
        self.num_networks = 0
        self.seconds = 0.0
        self.recalled = 0.0
        self._log = log
        self._report: Callable[[int], None] | None = None
        self._cache: dict[tuple[str, str], Outcome] = {}

    def evaluate(self, mask: ChannelMask, subset: Tensor | None = None) -> Outcome:
        """Prune, reconstruct if asked for, recalibrate, and score one mask.

        Args:
            mask: which classes stay.
            subset: ``[k]`` int64 positions in the search split; None = all of it.

        Returns:
            The outcome; an equal call returns the same one without running a network.
        """
        subset = self.narrow(subset)
        key = (mask.digest(), _subset_digest(subset))
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
        """Return a subset; None, which is all images, if it holds all and nothing else differs."""
        if subset is None or self.quick_reconstruction is not None:
            return subset
        return None if len(subset) == len(self.search) else subset

    def evaluate_all(self, masks: Sequence[ChannelMask]) -> list[Outcome]:
        """Return the outcomes of masks on all search images."""
        return [self.evaluate(mask) for mask in masks]

    def is_cached(self, mask: ChannelMask, subset: Tensor | None = None) -> bool:
        """Return whether ``evaluate`` would run no network."""
        return (mask.digest(), _subset_digest(self.narrow(subset))) in self._cache

    def known(self) -> list[Outcome]:
        """Return the outcomes of masks on subsets that hold all search images."""
        return [found for (_, subset), found in self._cache.items() if subset == self._whole]

    def remember(self, outcomes: Sequence[Outcome]) -> None:
        """Know such outcomes, which an earlier start has run and counted."""
        for outcome in outcomes:
            self._cache[outcome.digest, self._whole] = outcome

    @cached_property
    def _whole(self) -> str:
        """Name of the subsets that hold all search images."""
        return _subset_digest(self.narrow(self.draw_subset(len(self.search), 0)))

    def draw_subset(self, size: int, seed: int) -> Tensor:
        """Return ``[size]`` sorted random positions in the search split, fixed by ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(self.search), generator=generator)[:size]
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
            num_calibration: images that recalibrate it; default: all.
        """
        pruned = apply_mask(self._dense, self.graph, mask)
        reconstruction = reconstruction or self.reconstruction
        if reconstruction is not None:
            reconstruction.apply(pruned, mask)
        self._recalibrate(pruned, num_calibration or len(self.calibration))
        return pruned

    def _recalibrate(self, pruned: nn.Module, images: int) -> None:
        recalibrate_bn(pruned, self._calibration_batches(images), autocast=self.autocast)

    def nearest(self, mask: ChannelMask, other: Reconstruction) -> nn.Module:
        """Return ``prune(mask)``, or the network with another reconstruction if it is the nearer.

        To the dense network, by the outputs on the search images; no label is read.
        """
        networks = [self.prune(mask, way) for way in (self.reconstruction, other)]
        self._prepare()
        found = [self._scores(network, None).kl for network in networks]
        return min(zip(found, networks, strict=True), key=lambda pair: pair[0] or 0.0)[1]

    @cached_property
    def dense_logits(self) -> Tensor:
        """``[n, classes]`` logits of the dense network on the whole search split."""
        data = self._search_data(None)
        return compute_logits(self._dense, data, batch_size=self.batch_size, autocast=self.autocast)

    def _measure(self, mask: ChannelMask, subset: Tensor | None) -> Outcome:
        self._prepare()
        start = time.perf_counter()
        reconstruction, images = None, len(self.calibration)
        if subset is not None:
            reconstruction, images = self.quick_reconstruction, min(images, QUICK_CALIBRATION)
        pruned = self.prune(mask, reconstruction, images)
        scores = self._scores(pruned, subset)
        seconds = time.perf_counter() - start
        return Outcome(
            accuracy=scores.accuracy,
            loss=scores.loss,
            kl=scores.kl,
            num_images=len(self.search) if subset is None else int(subset.numel()),
            cost=self.graph.cost(mask),
            digest=mask.digest(),
            seconds=seconds,
            soft_accuracy=scores.soft_accuracy if self.soft else None,
        )

    def _scores(self, model: nn.Module, subset: Tensor | None) -> Scores:
        dense = self.dense_logits if self.kl else None
        return evaluate(
            model,
            self._search_data(subset),
            batch_size=self.batch_size,
            autocast=self.autocast,
            dense_logits=dense if dense is None or subset is None else dense[subset],
            worst=WORST,
        )

    def _prepare(self) -> None:
        """Load what is made once, so that it is not timed as a network's cost."""
        if self._preloads_search:
            _ = self._search_images
        if self._preloads_calibration:
            _ = self._calibration_images
        if self.kl:
            _ = self.dense_logits

    @cached_property
    def _dense(self) -> nn.Module:
        """A copy of the dense network on the evaluator's device."""
        images, _ = next(iter(self.calibration.batches(1)))
        return place_model(copy_network(self.model), self.device, images)

    @cached_property
    def _preloads_calibration(self) -> bool:
        return self._size(self.calibration) < PRELOAD_LIMIT

    @cached_property
    def _preloads_search(self) -> bool:
        return self._size(self.calibration) + self._size(self.search) < PRELOAD_LIMIT

    @staticmethod
    def _size(split: Split) -> int:
        """Return the bytes of a split's images."""
        return 4 * len(split) * math.prod(split.source.image_shape)

    @cached_property
    def _search_images(self) -> Tensor:
        return self._load(self.search)

    @cached_property
    def _calibration_images(self) -> Tensor:
        return self._load(self.calibration)

    def _load(self, split: Split) -> Tensor:
        batches = [
            place_images(images, self._dense) for images, _ in split.batches(self.batch_size)
        ]
        return torch.cat(batches)

    def _search_data(self, subset: Tensor | None) -> Split | tuple[Tensor, Tensor]:
        """Return the images to score on: tensors if they fit in memory, else the split."""
        if not self._preloads_search:
            return self.search if subset is None else self.search.take(subset)
        images, labels = self._search_images, self.search.labels
        if subset is None:
            return images, labels
        return images[subset.to(images.device)], labels[subset]

    def _calibration_batches(self, num_images: int) -> Iterator[Tensor]:
        """Yield so many calibration images in batches of equal size (to one image)."""
        num_batches = math.ceil(num_images / self.batch_size)
        if self._preloads_calibration:
            yield from self._calibration_images[:num_images].tensor_split(num_batches)
            return
        for images in self.calibration.take(torch.arange(num_images)).equal_batches(num_batches):
            yield place_images(images, self._dense)


def _subset_digest(subset: Tensor | None) -> str:
    """Name an image subset; the empty string is the whole split."""
    return "" if subset is None else hashlib.sha256(subset.numpy().tobytes()).hexdigest()[:16]

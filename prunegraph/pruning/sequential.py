"""Least squares layer by layer: each makes up for what the fitted layers before it leave."""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prunegraph.graph import StructureGraph, copy_network
from prunegraph.graph.module_sizes import slim_all_attentions
from prunegraph.pruning.compensation import Compensation
from prunegraph.pruning.evaluation import model_device
from prunegraph.pruning.moments import fitted_change
from prunegraph.pruning.reads import Read, readable_copy, reads
from prunegraph.pruning.recalibration import measuring_batch_norm
from prunegraph.pruning.sampling import sampled_inputs, sampled_outputs
from prunegraph.pruning.streams import Place, Stream, held_at, streams
from prunegraph.types import KeepMask, TrainSplit

ROWS = 4096
"""Outputs that are sampled of each layer, at least, where there are so many."""

ENOUGH = 0.5
"""Outputs an input that stays, at least: on far fewer a fit follows their noise."""

MOST_VALUES = 2**29
"""Sampled outputs that are held of all layers: 2 GiB."""

PIXELS, MOST_IMAGES = 2**21, 512
"""Of the batch that ``on_images`` takes."""


class SequentialCompensation(Compensation):
    """Fits the layers of a pruned network one after the other.

    ``Compensation`` fits all layers at once, on what they read in the dense network; but in the
    pruned one they read what the layers before have made of it. Here each layer, in the order in
    which they run, gets the weights ``V`` that on what it reads now, ``x'``, are nearest to what it
    gave, ``W x``: with ``W_K`` those that stay, ``V = W_K + (W x - W_K x') x'^T (x' x'^T +
    ridge)^-1`` (the asymmetric reconstruction of Zhang et al. 2016, IEEE TPAMI 38 (10), section
    3.2, for pruning: He et al. 2017). Layers that lose nothing are fitted, too. One forward does it
    all; batch norm takes the statistics of its batch: recalibrate it afterwards. No label is read.

    Layers that a forward calls several times, that read one sample for each head, of which the
    forward shows too few outputs (``ENOUGH``), and the last of a large network (``MOST_VALUES``)
    are compensated as by ``Compensation``.

    Args:
        model: the dense network; never changed.
        graph: its structure.
        run: runs the network that it is given on training data, on the same each time. Layers are
            fitted in its first forward: give it a large batch.
        seed: fixes which outputs are sampled.
        device: where the network runs; None = where it is.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: StructureGraph,
        run: Callable[[nn.Module], None],
        *,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__(model, graph, run, seed=seed, device=device)
        self._run, self._seed = run, seed
        self._wanted: dict[str, Tensor] = {}
        self._streams: dict[str, Stream] = {}
        calls: Counter[str] = Counter()
        forwards: list[None] = []
        dense = readable_copy(model, device or model_device(model), None)
        dense.register_forward_pre_hook(lambda *_: forwards.append(None))

        def visit(read: Read) -> None:
            name = str(read.op.param)
            calls[name] += len(forwards) == 1
            room = MOST_VALUES - sum(held.numel() for held in self._wanted.values())
            if name in self._weights and len(forwards) == 1 and room > 0:
                groups = getattr(read.module, "groups", 1)
                rows = self._rows(name, read.module, read.activation).chunk(groups, dim=1)
                weights = self._weights[name].flatten(1).float().chunk(groups)
                given = [own @ part.T for own, part in zip(rows, weights, strict=True)]
                self._wanted[name] = torch.cat(given, dim=1)  # [S, out]

        adding = streams(dense, self._wanted, self._sampled_outputs)
        shown = reads(dense, graph, visit, attentions=True)
        with torch.no_grad(), adding as self._streams, shown:
            run(dense)
        for name in [name for name in self._wanted if calls[name] > 1]:
            del self._wanted[name]

    @staticmethod
    def _batches(images: TrainSplit) -> Iterable[Tensor]:
        """Return the first images as one batch."""
        pixels = math.prod(images.source.image_shape[1:])
        number = max(1, min(MOST_IMAGES, PIXELS // pixels))
        return [images.source.load(images.index[:number])]

    def _rows(self, name: str, module: nn.Module, inputs: Tensor) -> Tensor:
        """Return what sampled outputs are made of: the same ones in each network."""
        return sampled_inputs(module, inputs, *self._drawn(name, inputs))

    def _sampled_outputs(self, name: str, module: nn.Module, outputs: Tensor) -> Tensor:
        """Return the outputs that they are made into."""
        return sampled_outputs(module, outputs, *self._drawn(name, outputs))

    def _drawn(self, name: str, batch: Tensor) -> tuple[torch.Generator, int]:
        """Return what draws outputs, and how many of each sample."""
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ self._seed)
        return generator, ROWS // max(len(batch), 1)

    def _fit_all(self, pruned: nn.Module, mask: KeepMask) -> None:
        """Fit the layers in the order in which they run, the others on the dense network."""
        for name in self._moments.keys() - self._wanted.keys():
            self._fit_at_once(name, pruned, mask)
        shared = {id(item): item for item in (*pruned.parameters(), *pruned.buffers())}
        network = slim_all_attentions(copy_network(pruned, shared))
        modules = dict(network.named_modules(remove_duplicate=False))
        done: set[str] = set()
        held: dict[Place, Tensor] = {}

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def fit(module: nn.Module, args: tuple[Any, ...]) -> None:
                if name in done:
                    return
                done.add(name)
                rows = self._rows(name, module, args[0])
                enough = len(rows) >= ENOUGH * int(self._stays(name, mask)[1].sum())
                if enough and len(rows) == len(self._wanted[name]):
                    self._fit(name, pruned, mask, rows, self._target(name, module, mask, held))
                else:  # or heads lie along the batch, say, and some have gone
                    self._fit_at_once(name, pruned, mask)

            return fit

        for name in self._wanted:
            modules[name.rpartition(".")[0]].register_forward_pre_hook(hook(name))
        places = {stream.place for stream in self._streams.values()}
        with held_at(network, places, held.setdefault), measuring_batch_norm(network):
            self._run(network)
        for name in self._wanted.keys() - done:  # an expert that is not visited any more
            self._fit_at_once(name, pruned, mask)

    def _target(
        self, name: str, module: nn.Module, mask: KeepMask, held: dict[Place, Tensor]
    ) -> Tensor:
        """Return ``[S, kept outputs]`` what a layer should give.

        That is what it gave, and what the stream that it adds to has lost so far.
        """
        out, _ = self._stays(name, mask)
        target, stream = self._wanted[name][:, out], self._streams.get(name)
        now = None if stream is None else held.pop(stream.place, None)
        if stream is not None and now is not None:
            rows = self._sampled_outputs(name, module, stream.laid(now))
            if rows.shape == target.shape:
                target = target + stream.values[:, out] - rows * stream.scale[out]
        return target

    def _fit(
        self, name: str, pruned: nn.Module, mask: KeepMask, rows: Tensor, target: Tensor
    ) -> None:
        """Fit one layer of a pruned network, by what sampled outputs are made of and should be."""
        out, kept = self._stays(name, mask)
        groups = len(self._moments[name])
        stays = out.chunk(groups)
        parts = zip(
            rows.chunk(groups, dim=1),
            self._weights[name].flatten(1).float().chunk(groups),
            target.split([int(part.sum()) for part in stays], dim=1),
            stays,
            strict=True,
        )
        centred = float(name in self._centred)
        fitted, shifts = [], []
        for own, whole, wanted, staying in parts:
            weight = whole[staying][:, kept]
            missing = wanted - own @ weight.T
            mean, offset = own.mean(0) * centred, missing.mean(0) * centred
            change = fitted_change(own - mean, missing - offset)
            fitted.append(weight + change)
            shifts.append(offset - change @ mean)
        self._put(name, pruned, out, torch.cat(fitted), torch.cat(shifts))

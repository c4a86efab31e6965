"""Least squares layer by layer: each makes up for what the fitted layers before it leave."""

import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunegraph.core.masks import ChannelMask
from prunegraph.core.splits import Batch, ReadyBatches, TrainSplit
from prunegraph.graph import copy_network, evaluation_mode
from prunegraph.graph.analyse import repeatable
from prunegraph.graph.module_sizes import slim_all_attentions
from prunegraph.graph.slim_attention import is_dense_attention
from prunegraph.layerwise.capture import LinearCalls, Read, layer_inputs
from prunegraph.layerwise.chain import Chain, find_chain, run_first
from prunegraph.layerwise.order import hooked
from prunegraph.layerwise.recalibrate import measuring_batch_norm
from prunegraph.layerwise.reconstruct import Reconstruction
from prunegraph.layerwise.residual import Place, held_at, residual_branches
from prunegraph.layerwise.sampling import rows_needed, sampled_inputs, sampled_outputs
from prunegraph.layerwise.statistics import fitted_change
from prunegraph.tasks.batches import joined

ROWS = 4096
"""Outputs that are sampled of each layer, at least, where there are so many."""

ENOUGH = 0.5
"""Outputs an input that stays, at least: on far fewer a fit follows their noise."""

ALIKE, COMPARED = 0.2, 64
"""What a layer reads in both networks correlates by as much at least, over as many outputs."""

FEW = 4
"""Samples of tokens on which layers outside of the blocks are measured."""

MOST_VALUES = 2**29
"""Sampled outputs that are held of all layers: 2 GiB."""

SEARCH_SAMPLES, SEARCH_MEMORY = 128, 2**29
"""Of the batch that networks are fitted on in searches, and bytes of its activations: too few for
the best fit, enough to rank networks (docs/lab/trials.md)."""


class LayerwiseReconstruction(Reconstruction):
    """Fits the layers of a pruned network one after the other.

    ``Reconstruction`` fits all layers at once, on what they read in the dense network; but in the
    pruned one they read what the layers before have made of it. Here each layer, in the order in
    which they run, gets the weights ``V`` that on what it reads now, ``x'``, are nearest to what it
    gave, ``W x``: with ``W_K`` those that stay, ``V = W_K + (W x - W_K x') x'^T (x' x'^T +
    ridge)^-1`` (the asymmetric reconstruction of Zhang et al. 2016, IEEE TPAMI 38 (10), section
    3.2, for pruning: He et al. 2017). Layers that lose nothing are fitted, too. What a layer adds
    to a stream, ``s + W x``, is to make up for what that has lost: ``W x + s - s'`` takes the place
    of ``W x``. One forward does it all; batch norm takes the statistics of its batch: recalibrate
    it afterwards. No label is read.

    Networks that read tokens are fitted block by block on all positions: each block runs once in
    the dense network and once in the pruned one, and what one block reads and gives is held at a
    time. A stream of tokens carries activations that a fit must not miss (``ROWS_AN_INPUT``).

    Layers that a forward calls several times, that read one sample for each head, of which the
    forward shows too few outputs (``ENOUGH``), and the last of a large network (``MOST_VALUES``)
    are reconstructed as by ``Reconstruction``; so are, but for the mean of what they give, layers
    that read other positions there (``ALIKE``: a detector's proposals, what an expert is sent).

    Args:
        model: the dense network; never changed.
        graph: its structure.
        run: runs the network that it is given on training data, on the same each time. Layers are
            fitted in its first forward: give it a large batch.
        held_out: see ``Reconstruction``.
        seed: fixes which outputs are sampled.
        device: where the network runs; None = where it is.
    """

    def _prepare(self) -> Container[str]:
        """Find the blocks; return the weights in them."""
        self._chain = find_chain(self._dense, self._axes.keys(), self._run)
        blocks = () if self._chain is None else self._chain.blocks
        return {name for name in self._axes if name.startswith(tuple(f"{own}." for own in blocks))}

    def _look(self) -> None:
        """Run the dense network: of one with blocks, whose layers are looked at later, on a few."""
        if self._chain is None:
            super()._look()
        else:
            run_first(self._dense, self._run, FEW)

    def _finish(self) -> None:
        """Measure what all layers give, unless it is done block by block."""
        if self._chain is None:
            self._measure(partial(self._send, self._dense))

    @torch.no_grad()
    def _measure(self, send: Callable[[], None]) -> None:
        """Note what layers read and give while the dense network, or a block of it, runs."""
        self._wanted: dict[str, Tensor] = {}
        self._read: dict[str, Tensor] = {}
        calls: Counter[str] = Counter()
        forwards: list[None] = []
        counting = self._dense.register_forward_pre_hook(lambda *_: forwards.append(None))

        def visit(read: Read) -> None:
            name, first = str(read.op.param), len(forwards) < 2
            calls[name] += first
            room = MOST_VALUES - sum(held.numel() for held in self._wanted.values())
            if name in self._weights and first and (room > 0 or self._chain is not None):
                with torch.autocast(read.activation.device.type, enabled=False):
                    rows = self._rows(name, read.module, read.activation)
                    self._wanted[name] = self._given(name, read.module, rows)
                    self._read[name] = _some(rows).clone()

        adding = residual_branches(self._dense, self._wanted, self._sampled_outputs)
        shown = layer_inputs(self._dense, self._graph, visit, attentions=True)
        with counting, adding as found, shown as given:
            send()
        self._gives_weights = given.needed
        for name in [name for name in self._wanted if calls[name] > 1]:
            del self._wanted[name]
        self._branches = {name: found[name] for name in found.keys() & self._wanted.keys()}

    @staticmethod
    def _batches(samples: TrainSplit, size: int) -> Iterable[Batch]:
        """Return the samples as one batch; the first of ready batches that do not join."""
        del size
        if isinstance(samples.source, ReadyBatches):
            return [joined(list(samples.batches(1)))]
        return [samples.source.load(samples.index)]

    def _send(self, network: nn.Module) -> None:
        """Run a network: what the forward draws at random, noise say, is the same for each."""
        with repeatable(network, self._seed):
            self._run(network)

    def _rows(self, name: str, module: nn.Module, inputs: Tensor) -> Tensor:
        """Return what sampled outputs are made of: the same ones in each network."""
        least = self._least(name, module, inputs)
        return sampled_inputs(module, inputs, self._generator(name), least)

    def _sampled_outputs(self, name: str, module: nn.Module, outputs: Tensor) -> Tensor:
        """Return the outputs that they are made into."""
        least = self._least(name, module, outputs)
        return sampled_outputs(module, outputs, self._generator(name), least)

    def _least(self, name: str, module: nn.Module, values: Tensor) -> int:
        """Return how many outputs of a layer are sampled; all of tokens."""
        if self._chain is not None:
            return values.numel()
        return max(ROWS, rows_needed(module, values, self._weights[name][0].numel()))

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ self._seed)

    def _given(self, name: str, module: nn.Module, rows: Tensor) -> Tensor:
        """Return ``[S, out]`` what a layer gives, without bias."""
        groups = getattr(module, "groups", 1)
        weights = self._weights[name].flatten(1).float().chunk(groups)
        parts = zip(rows.chunk(groups, dim=1), weights, strict=True)
        return torch.cat([own @ part.T for own, part in parts], dim=1)

    def _fit_all(self, pruned: nn.Module, mask: ChannelMask) -> None:
        """Fit the layers in the order in which they run, the others on the dense network."""
        network = pruned
        if any(map(is_dense_attention, pruned.modules())):
            shared = {id(item): item for item in (*pruned.parameters(), *pruned.buffers())}
            network = slim_all_attentions(copy_network(pruned, shared))
        if self._chain is None:
            self._fit_others(pruned, mask)
            self._fit_running(network, pruned, mask, partial(self._send, network))
            return
        self._wanted = {}
        self._fit_others(pruned, mask)
        with evaluation_mode(network):
            streams = [Chain(each, self._chain, self._send) for each in (self._dense, network)]
        for number in range(len(self._chain.blocks)):
            self._measure(partial(streams[0].advance, number))
            self._fit_running(network, pruned, mask, partial(streams[1].advance, number))
        self._wanted, self._read, self._branches = {}, {}, {}

    def _fit_others(self, pruned: nn.Module, mask: ChannelMask) -> None:
        for name in self._input_statistics.keys() - self._wanted.keys():
            self._fit_at_once(name, pruned, mask)

    def _fit_running(
        self, network: nn.Module, pruned: nn.Module, mask: ChannelMask, send: Callable[[], None]
    ) -> None:
        """Fit the layers that were measured while a pruned network, or a block of it, runs."""
        modules = dict(network.named_modules(remove_duplicate=False))
        done: set[str] = set()
        held: dict[Place, Tensor] = {}

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def fit(module: nn.Module, args: tuple[Any, ...]) -> None:
                if name not in done:
                    done.add(name)
                    with torch.autocast(args[0].device.type, enabled=False):
                        self._fit(name, pruned, mask, module, args[0], self._now(name, held, done))

            return fit

        handles = (
            modules[name.rpartition(".")[0]].register_forward_pre_hook(hook(name))
            for name in self._wanted
            if hasattr(modules.get(name.rpartition(".")[0]), "weight")  # else it has left
        )
        places = {stream.place for stream in self._branches.values()}
        showing = held_at(network, places, held.setdefault)
        calling = LinearCalls(network) if self._gives_weights else nullcontext()
        with hooked(handles), showing, measuring_batch_norm(network), calling:
            send()
        for name in self._wanted.keys() - done:  # an expert that is not visited any more
            self._fit_at_once(name, pruned, mask)

    def _now(self, name: str, held: dict[Place, Tensor], done: set[str]) -> Tensor | None:
        """Return what the stream that a layer adds to holds; let it go if it is the last to."""
        if name not in self._branches:
            return None
        place = self._branches[name].place
        waiting = any(
            self._branches[other].place == place for other in self._branches.keys() - done
        )
        return held.get(place) if waiting else held.pop(place, None)

    def _fit(
        self,
        name: str,
        pruned: nn.Module,
        mask: ChannelMask,
        module: nn.Module,
        inputs: Tensor,
        stream: Tensor | None,
    ) -> None:
        """Fit one layer of a pruned network.

        Args:
            name: of its weight.
            pruned: the network.
            mask: what it keeps.
            module: the layer.
            inputs: what it reads now.
            stream: what it adds to, as it is now.
        """
        out, kept = self._stays(name, mask)
        if not (out.any() and kept.any()):
            return
        rows, wanted = self._rows(name, module, inputs), self._wanted[name][:, out]
        if len(rows) != len(wanted) or len(rows) < ENOUGH * int(kept.sum()):
            self._fit_at_once(name, pruned, mask)  # heads lie along the batch, say: some have gone
            return
        groups = rows.shape[1] // int(kept.sum())
        there = self._read[name][:, kept.repeat(groups)]
        alike = _alike(_some(rows), there)
        if stream is not None and alike:
            known = self._branches[name]
            now = self._sampled_outputs(name, module, known.laid(stream))
            if now.shape == wanted.shape == known.values[:, out].shape:
                wanted = wanted + known.values[:, out] - now * known.scale[out]
        stays = out.chunk(groups)
        parts = zip(
            rows.chunk(groups, dim=1),
            self._weights[name].flatten(1).float().chunk(groups),
            wanted.split([int(part.sum()) for part in stays], dim=1),
            stays,
            self._input_statistics.get(name, [None] * groups),
            strict=True,
        )
        centred = float(name in self._centred)
        fitted, shifts = [], []
        for own, whole, target, staying, statistics in parts:
            weight = whole[staying][:, kept]
            missing = target - own @ weight.T
            mean, offset = own.mean(0) * centred, missing.mean(0) * centred
            if alike:
                change = fitted_change(own - mean, missing - offset)
            elif statistics is not None:
                change = statistics.change(whole[staying], kept)
            else:  # an expert that other tokens visit now
                change = torch.zeros_like(weight)
            fitted.append(weight + change)
            shifts.append(offset - change @ mean)
        self._put(name, pruned, out, torch.cat(fitted), torch.cat(shifts))


def _some(rows: Tensor) -> Tensor:
    """Return some of sampled rows: at other positions in each sequence, whatever its length."""
    if len(rows) <= COMPARED:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, COMPARED).long().to(rows.device)]


def _alike(rows: Tensor, others: Tensor) -> bool:
    """Tell whether rows are of the same positions, though of different networks."""
    rows, others = rows - rows.mean(0), others - others.mean(0)
    return float((rows * others).sum()) >= ALIKE * float(rows.norm() * others.norm())

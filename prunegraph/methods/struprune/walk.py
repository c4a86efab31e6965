"""Modules of a network that are cut and fitted one after the other, on two streams.

What a layer should give is read in the dense network; what it is given, in the pruned one. One
block's rows are in memory at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunegraph.core.masks import IntArray
from prunegraph.graph import copy_network
from prunegraph.layerwise.admm import Rows, biased
from prunegraph.layerwise.block_files import BlockFiles
from prunegraph.layerwise.chain import Chain, Run, find_chain
from prunegraph.layerwise.order import Segment, hooked
from prunegraph.layerwise.residual import Place, Stream, held_at, residual_branches
from prunegraph.methods.struprune.fit import Layers, fit_module, flat
from prunegraph.methods.struprune.modules import Module

NOWHERE = BlockFiles()

Loss = Callable[[nn.Module], float]
"""Of a network on held-out calibration data."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Walked:
    """What a walk brings.

    Attributes:
        network: of the dense shape, with zeros in place.
        kept: units that stay of each module, by reader.
        errors: of each module on held-out rows: by least squares, and after each round.
    """

    network: nn.Module
    kept: dict[str, IntArray] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Walk:
    """A dense network, and what its layers are fitted on.

    Attributes:
        dense: the network, in eval mode.
        modules: what may lose units, in order.
        layers: weights of linear layers that are called once.
        run: runs the network that it is given on all samples.
        share: of the samples, the first ones, is fitted on; the others tell when to stop.
    """

    dense: nn.Module
    modules: Sequence[Module]
    layers: Sequence[str]
    run: Run
    share: float

    @cached_property
    def segment(self) -> Segment:
        """The blocks; a network is one block where no chain of them holds all modules."""
        chain = find_chain(self.dense, self.layers, self.run)
        blocks = () if chain is None else tuple(f"{path}." for path in chain.blocks)
        inside = all(module.reader.startswith(blocks) for module in self.modules)
        return chain if chain is not None and inside else Segment(blocks=("",))

    @torch.no_grad()
    def prune(
        self,
        counts: Mapping[str, int],
        rounds: int,
        files: BlockFiles = NOWHERE,
        progress: Callable[[int, int], None] | None = None,
    ) -> Walked:
        """Cut and fit all modules.

        Args:
            counts: units that stay, by reader.
            rounds: of ADMM, at most.
            files: where finished blocks are kept.
            progress: called with the number of finished blocks, and of all.
        """
        network, blocks = copy_network(self.dense), self.segment.blocks
        found = Walked(network=network)
        dense, pruned = (Chain(each, self.segment, self.run) for each in (self.dense, network))
        for number, path in enumerate(blocks):
            names = self._inside(path)
            if files.has(number):
                dense.advance(number)
                self._load(found, names, files, number)
            else:
                targets = _targets(self.dense, names, partial(dense.advance, number))
                with _Block(self, targets, counts, rounds, found).fitting():
                    pruned.look(number)
                self._save(found, names, files, number)
            pruned.advance(number)
            if progress is not None:
                progress(number + 1, len(blocks))
        return found

    @torch.no_grad()
    def measure(self, counts: Mapping[str, int], loss: Loss) -> dict[str, tuple[float, float]]:
        """Return what the loss gains when one module alone is cut, and the log of its error.

        The other weights of its reader make up for it, on what it reads in the dense network.

        Args:
            counts: units that stay, by reader.
            loss: of the network with one module cut.
        """
        network, found = copy_network(self.dense), {}
        chain, layers = Chain(self.dense, self.segment, self.run), Layers(network)
        before = loss(network)
        for number, path in enumerate(self.segment.blocks):
            inside, cut = self._inside(path), dict[str, tuple[Tensor, float]]()

            def look(module: Module, args: Any, into: Any = cut) -> None:
                values, weight = flat(args[0]), layers.read(module.reader)
                wanted = biased(values, weight) @ weight.T
                rows = Rows(inputs=values, wanted=wanted, scale=torch.ones_like(values[:, :1]))
                count = counts[module.reader]
                fitted = fit_module(module, layers, rows, None, self.share, count, 0)
                into[module.reader] = layers.read(module.reader), fitted.errors[0]
                layers.write(module.reader, weight)

            own = [module for module in self.modules if module.reader in inside]
            with hooked(_before(self.dense, item.reader, partial(look, item)) for item in own):
                chain.advance(number)
            for name, (weight, error) in cut.items():
                whole = layers.read(name)
                layers.write(name, weight)
                found[name] = loss(network) - before, float(np.log(max(error, 1e-30)))
                layers.write(name, whole)
        return found

    def _save(self, found: Walked, names: Sequence[str], files: BlockFiles, number: int) -> None:
        layers, readers = Layers(found.network), found.kept.keys() & set(names)
        tensors = {f"weight:{name}": layers.read(name) for name in names}
        tensors |= {f"kept:{name}": torch.from_numpy(found.kept[name]) for name in readers}
        tensors |= {f"errors:{name}": torch.tensor(found.errors[name]).double() for name in readers}
        files.save(number, tensors)

    def _load(self, found: Walked, names: Sequence[str], files: BlockFiles, number: int) -> None:
        layers, tensors = Layers(found.network), files.load(number)
        for name in names:
            weight = tensors.get(f"weight:{name}")
            if weight is None or weight.shape != layers.read(name).shape:
                raise files.misfit(number, name)
            layers.write(name, weight)
            if f"kept:{name}" in tensors:
                found.kept[name] = tensors[f"kept:{name}"].numpy()
                found.errors[name] = tensors[f"errors:{name}"].tolist()

    def _inside(self, path: str) -> list[str]:
        return [name for name in self.layers if not path or name.startswith(f"{path}.")]


def _before(network: nn.Module, name: str, see: Callable[[Any], Any]) -> Any:
    """Let a function see, or change, the arguments of the layer of a weight.

    What it computes of them is float32, even where the forward is in bfloat16.
    """

    def hook(_: nn.Module, args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return see(args)

    return network.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(hook)


@dataclass(frozen=True, eq=False)
class _Targets:
    """What layers of a block give in the dense network ``[S, out]``, and what they add to."""

    outputs: dict[str, Tensor]
    streams: Mapping[str, Stream]


def _targets(network: nn.Module, names: Sequence[str], advance: Callable[[], None]) -> _Targets:
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            outputs[name] = flat(output).clone()  # an activation may write into it

        return network.get_submodule(name.rpartition(".")[0]).register_forward_hook(hook)

    with hooked(map(note, names)), residual_branches(network, names, _all) as streams:
        advance()
    return _Targets(outputs, streams)


def _all(name: str, module: nn.Module, outputs: Tensor) -> Tensor:
    """Return all outputs of a layer as rows."""
    del name, module
    return flat(outputs)


@dataclass(eq=False)
class _Block:
    """Fits the layers of a block of the pruned network while it runs."""

    walk: Walk
    targets: _Targets
    counts: Mapping[str, int]
    rounds: int
    found: Walked

    def __post_init__(self) -> None:
        self._layers = Layers(self.found.network)
        self._modules = {module.reader: module for module in self.walk.modules}
        self._writers = {name for module in self.walk.modules for name in module.writers}
        self._inputs: dict[str, Tensor] = {}
        self._held: dict[Place, Tensor] = {}

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Fit each layer as it is reached."""
        network, names = self.found.network, list(self.targets.outputs)
        places = {stream.place for stream in self.targets.streams.values()}
        with ExitStack() as stack:
            hooks = (_before(network, name, partial(self._fit, name)) for name in names)
            stack.enter_context(hooked(hooks))
            stack.enter_context(held_at(network, places, self._held.setdefault))
            yield

    def _fit(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        given = args[0]
        inputs, wanted = flat(given), self.targets.outputs.pop(name)
        rows = self._with_stream(
            name, Rows(inputs=inputs, wanted=wanted, scale=torch.ones_like(wanted[:, :1]))
        )
        if name in self._modules:
            hidden = self._fit_module(self._modules[name], rows)
            return hidden.view(given.shape).to(given.dtype), *args[1:]
        own, _ = rows.parted(self.walk.share)
        self._layers.write(name, own.refitted(self._layers.read(name), own.inputs))
        if name in self._writers:
            self._inputs[name] = inputs
        return None

    def _with_stream(self, name: str, rows: Rows) -> Rows:
        """Return rows that also make up for what the stream that a layer adds to has lost.

        Errors count relative to what the stream holds afterwards: a norm divides by it.
        """
        stream = self.targets.streams.get(name)
        if stream is None or stream.place not in self._held:
            return rows
        lost = stream.values - flat(stream.laid(self._held[stream.place])) * stream.scale
        after = stream.values + rows.wanted
        scale = after.norm(dim=1, keepdim=True).clamp_min(1e-12).reciprocal()
        return replace(rows, wanted=rows.wanted + lost, scale=scale)

    def _fit_module(self, module: Module, rows: Rows) -> Tensor:
        inputs = [self._inputs.pop(name, None) for name in module.writers]
        alike = bool(inputs) and all(each is not None for each in inputs)
        fitted = fit_module(
            module,
            self._layers,
            rows,
            inputs[0] if alike else None,
            self.walk.share,
            self.counts[module.reader],
            self.rounds,
        )
        self.found.kept[module.reader] = fitted.kept
        self.found.errors[module.reader] = fitted.errors
        return fitted.hidden

"""Layers that add to a stream, ``x + f(x)``, and what the stream held before."""

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunegraph.graph.trace.calls import WatchedCalls
from prunegraph.layerwise.order import hooked

NEAR = 1e-3
"""Share of a variance that may be left of what is taken for a multiple."""

FAINT = 1e-2
"""Channels that are scaled down to less, of the largest scale, are left as they are."""

STILL = 1e-8
"""Variances that are a smaller share of an energy are rounding."""


class Place(NamedTuple):
    """Where a tensor is seen: what a module is first given, or returns, in one of its calls."""

    path: str
    returned: bool
    call: int


@dataclass(frozen=True, eq=False)
class Stream:
    """What a layer's outputs ``[S, out]`` are added to, each channel times a scale.

    Attributes:
        place: where it is seen before the layer runs.
        values: ``[S, out]`` what it holds, by the scale: in the unit of the layer's outputs.
        scale: ``[out]`` by which what the stream holds is multiplied for that.
        moved: its channels lie along axis 1, those of the outputs along the last (ConvNeXt).
    """

    place: Place
    values: Tensor
    scale: Tensor
    moved: bool

    def laid(self, held: Tensor) -> Tensor:
        """Return what is at the place laid as the outputs are."""
        return _laid(held, moved=self.moved)


@contextmanager
def held_at(
    model: nn.Module, places: Collection[Place], seen: Callable[[Place, Tensor], Any]
) -> Iterator[None]:
    """Show what is at some places while a network runs."""
    wanted = {place.path for place in places}
    with _places(model, wanted, lambda place, held: seen(place, held) if place in places else None):
        yield


@contextmanager
def residual_branches(
    model: nn.Module, layers: Container[str], sampled: Callable[[str, nn.Module, Tensor], Tensor]
) -> Iterator[dict[str, Stream]]:
    """Fill a dict with the streams that layers add to while a network runs, by weight.

    Between layer and sum may be what multiplies and shifts each channel: a batch norm in eval mode,
    a scale, dropout. Streams are known by the first positional argument and the result of modules.

    Args:
        model: the network.
        layers: names of weights; whether one is in it is asked when its layer returns.
        sampled: gives some ``[S, out]`` of the outputs of a layer, of a tensor of their shape.
    """
    watch = _Watch(layers, sampled)
    modules = _with_hooks(model)
    paths = modules.keys()
    handles = []
    for path, module in modules.items():
        if isinstance(getattr(module, "weight", None), Tensor):
            name = f"{path}.weight".removeprefix(".")
            handles.append(module.register_forward_pre_hook(watch.begin))
            handles.append(module.register_forward_hook(partial(watch.end, name)))
    with hooked(handles), _places(model, paths, watch.mark), WatchedCalls(watch.add):
        yield watch.found


def _with_hooks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by name but the scripted ones, which take no hooks."""
    items = model.named_modules()
    return {path: item for path, item in items if not isinstance(item, torch.jit.ScriptModule)}


@contextmanager
def _places(
    model: nn.Module, paths: Collection[str], seen: Callable[[Place, Tensor], Any]
) -> Iterator[None]:
    """Show what some modules are first given, and what they return."""
    calls: Counter[tuple[str, bool]] = Counter()

    def show(path: str, *, returned: bool, held: Any) -> None:
        place = Place(path, returned, calls[path, returned])
        calls[path, returned] += 1
        if isinstance(held, Tensor) and not held.is_inference():  # which has no versions
            seen(place, held)

    def given(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        show(path, returned=False, held=args[0] if args else None)

    def gives(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        show(path, returned=True, held=output)

    handles = []
    for path, module in _with_hooks(model).items():
        if path in paths:
            handles.append(module.register_forward_pre_hook(partial(given, path), prepend=True))
            handles.append(module.register_forward_hook(partial(gives, path)))
    with hooked(handles):
        yield


class _Seen(NamedTuple):
    """A tensor where it was first seen; ``clock`` counts what is seen."""

    tensor: weakref.ref[Tensor]
    place: Place
    version: int
    clock: int


class _Last(NamedTuple):
    """What the layer that ran last has returned, and the clock when it began."""

    name: str
    module: nn.Module
    output: Tensor
    version: int
    began: int


class _Watch:
    """Follows what layers return into the next sum."""

    def __init__(
        self, layers: Container[str], sampled: Callable[[str, nn.Module, Tensor], Tensor]
    ) -> None:
        self.found: dict[str, Stream] = {}
        self._layers = layers
        self._sampled = sampled
        self._seen: dict[int, _Seen] = {}
        self._clock = 0
        self._began = 0
        self._last: _Last | None = None

    def mark(self, place: Place, held: Tensor) -> None:
        """Name a tensor by where it is first seen."""
        self._clock += 1
        known = self._known(held)
        if known is None or known.version != held._version:
            self._seen[id(held)] = _Seen(weakref.ref(held), place, held._version, self._clock)

    def _known(self, held: Tensor) -> _Seen | None:
        """Return where a tensor was first seen; another may have had its number."""
        known = self._seen.get(id(held))
        return known if known is not None and known.tensor() is held else None

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note when a layer begins."""
        self._began = self._clock

    def end(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note what it returns."""
        if isinstance(output, Tensor) and name in self._layers and not output.is_inference():
            self._last = _Last(name, module, output, output._version, self._began)

    def add(self, function: Any, given: Sequence[Any], results: Sequence[Any]) -> None:
        """Look at a sum of two tensors."""
        named = getattr(function, "__name__", "") in ("add", "add_")
        if not named or len(given) != 2 or self._last is None:
            return
        layer, (total, *_) = self._last, results
        alike = all(isinstance(item, Tensor) and item.shape == total.shape for item in given)
        moved = total.shape != layer.output.shape
        laid = _laid(total, moved=moved) if alike else total
        if alike and laid.shape == layer.output.shape and layer.name not in self.found:
            for own, other in (given, given[::-1]):
                self._look(layer, own, other, total, moved=moved)

    def _look(
        self, layer: _Last, own: Tensor, other: Tensor, total: Tensor, *, moved: bool
    ) -> None:
        """Note the stream ``other``, if ``own`` is what has become of a layer's output.

        Of a sum in place, which is a version more than what was added to, that is restored.
        """
        known = self._known(other)
        if known is None or known.clock > layer.began or own is other:
            return
        if known.version != other._version - (other is total):
            return
        if layer.version != layer.output._version - (layer.output is total):
            return
        sampled = partial(self._sampled, layer.name, layer.module)
        added = sampled(_laid(total - other if own is total else own, moved=moved))
        output = added if own is layer.output else sampled(layer.output)
        scale = _scale(output, added)
        if scale is not None:
            held = sampled(_laid(total - own if other is total else other, moved=moved))
            self.found[layer.name] = Stream(known.place, held * scale, scale, moved)


def _laid(values: Tensor, *, moved: bool) -> Tensor:
    return values.movedim(1, -1) if moved and values.dim() > 1 else values


def _scale(output: Tensor, added: Tensor) -> Tensor | None:
    """Return ``[out]`` what undoes the scaling of outputs ``[S, out]``; None if it is none.

    0 for channels that do not vary.
    """
    least, least_added = (STILL * each.square().sum(0) for each in (output, added))
    output, added = output - output.mean(0), added - added.mean(0)
    energy, wanted = output.square().sum(0), added.square().sum(0)
    varies, varied = energy > least, wanted > least_added
    live = varies & varied
    factor = torch.where(live, (output * added).sum(0) / torch.where(live, energy, 1.0), 0.0)
    rest = (added - factor * output).square().sum(0)
    if bool((live & (rest > NEAR * wanted)).any()) or bool((varied & ~varies).any()):
        return None
    small = factor.abs() <= FAINT * factor.abs().max()
    return torch.where(small, 0.0, 1.0 / torch.where(small, 1.0, factor))

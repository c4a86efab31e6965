"""Configs of transformers for networks of other widths, found by trial.

A config is one number for all layers of a kind. Which number makes which axis wider is not looked
up by name: each is changed on the meta device, where a network is shapes alone.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence, Set
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunegraph.core.errors import ModelError
from prunegraph.graph import (
    ExampleInputs,
    StructureGraph,
    call_forward,
    evaluation_mode,
    unwrap,
)
from prunegraph.graph.rounding import restrict
from prunegraph.graph.trace.calls import CallMode

Shapes = dict[str, tuple[int, ...]]
"""Shape of each entry of a state, by name."""

Place = tuple[str, int]
"""An entry of a state, and an axis."""

PROBED = (8, 16)
"""What a number that a config leaves out is set to, to see what it does."""

HEAD_WIDTH = "head_dim"
"""Name of the number in configs that says how wide a head is."""

MOST_LAYERS = 512
"""Larger numbers of a config are no number of layers."""

MOST_WIDTHS = 128
"""Units of a layer, such as heads, of which each number is tried; of more all may stay, or none."""


FILLING = {"normal_", "uniform_", "trunc_normal_"}
"""Functions that draw values in place, of which shapes know nothing."""


class Unfilled(CallMode):
    """Leaves tensors on the meta device as they are: to draw no values took half of the time."""

    def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return the tensor that a function would fill; call any other function."""
        if getattr(function, "__name__", None) in FILLING:
            return args[0] if args else kwargs["tensor"]  # as functions of ``torch.nn.init`` say it
        return function(*args, **kwargs)


class ConfigSearch:
    """Finds the config of a network of transformers for given shapes.

    Args:
        model: the network; its config and class are taken.

    Raises:
        ModelError: it is none of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "save_pretrained"):
            msg = f"{type(model).__name__} is no network of transformers"
            raise ModelError(msg)
        self._model, self._config = type(model), type(config)
        self._values: dict[str, Any] = copy.deepcopy(config.to_dict())
        self.dense = self._shapes(self._values) or {}
        heads = getattr(config, "num_attention_heads", None)
        if self._values.get(HEAD_WIDTH) is None and isinstance(heads, int) and heads > 0:
            self._pin_head_width(config.hidden_size // heads)

    @property
    def name(self) -> str:
        """Name of the config's class."""
        return self._config.__name__

    def _pin_head_width(self, width: int) -> None:
        """Write down the width of a head, where it is read: else it follows from other numbers."""
        pinned, wider = (self._values | {HEAD_WIDTH: value} for value in (width, 2 * width))
        if self._shapes(pinned) == self.dense and self._shapes(wider) not in (None, self.dense):
            self._values = pinned

    def _shapes(self, values: dict[str, Any]) -> Shapes | None:
        """Return the shapes of a config's network; None if there is no such network."""
        logger = logging.getLogger("transformers")
        level = logger.level
        logger.setLevel(logging.ERROR)  # numbers that do not fit are what is looked for
        try:
            config = self._config.from_dict(copy.deepcopy(values))
            with torch.device("meta"), Unfilled():
                state = self._model(config).state_dict()
        except Exception:  # transformers raises about anything
            return None
        finally:
            logger.setLevel(level)
        return {name: tuple(value.shape) for name, value in state.items()}

    @cached_property
    def _slopes(self) -> dict[str, tuple[int, Shapes, dict[Place, float]]]:
        """What numbers do: of each a value, its shapes, and by how much axes grow with it."""
        found: dict[str, tuple[int, Shapes, dict[Place, float]]] = {}
        for name, value in self._values.items():
            number = value is None or (isinstance(value, int) and not isinstance(value, bool))
            if not number or name == HEAD_WIDTH:  # fewer heads look like narrower ones
                continue
            first, second = PROBED if value is None else (value, 2 * value)
            if first < 1:
                continue
            own = value is not None  # its network is the dense one
            before = self.dense if own else self._shapes(self._values | {name: first})
            after = self._shapes(self._values | {name: second})
            if before is None or after is None:
                continue
            if before.keys() == after.keys() == self.dense.keys():
                slopes = {
                    place: (_size(after, place) - _size(before, place)) / (second - first)
                    for place in _differences(before, after)
                }
                found |= {name: (first, before, slopes)} if slopes else {}
        return found

    def shorten(self, names: Set[str]) -> None:
        """Let the config have fewer layers, if that gives entries of these names.

        Lists that say the same of each layer get shorter, too.
        """
        for name, value in self._values.items():
            if not isinstance(value, int) or isinstance(value, bool) or value > MOST_LAYERS:
                continue
            for count in range(value - 1, 0, -1):
                lists = {
                    key: item[:count]
                    for key, item in self._values.items()
                    if isinstance(item, list)
                    and len(item) == value
                    and item.count(item[0]) == value
                }
                fewer = self._values | lists | {name: count}
                found = self._shapes(fewer)
                if found is None or found.keys() == self.dense.keys():
                    break
                if found.keys() == names:
                    self._values, self.dense = fewer, found
                    return

    def find(self, shapes: Shapes) -> Any:
        """Return the config of a network with such shapes; None if there is none.

        Args:
            shapes: of entries of the state by name.
        """
        values, left = self._values, _differences(self.dense, shapes)
        while left:
            tried = []
            for changed in self._proposals(values, shapes, left):
                found = self._shapes(changed)
                if found is not None and found.keys() == self.dense.keys():
                    tried.append((changed, _differences(found, shapes)))
                    if not tried[-1][1]:
                        break
            values, wrong = min(tried, key=lambda item: len(item[1]), default=(values, left))
            if len(wrong) >= len(left):
                return None
            left = wrong
        return self._config.from_dict(copy.deepcopy(values))

    def _proposals(
        self, values: dict[str, Any], shapes: Shapes, left: set[Place]
    ) -> Iterator[dict[str, Any]]:
        """Yield configs with one number changed so that it fits an axis which is still wrong."""
        for name, (value, before, slopes) in self._slopes.items():
            exact = {
                value + (_size(shapes, place) - _size(before, place)) / slopes[place]
                for place in left & slopes.keys()
            }
            whole = sorted(int(number) for number in exact if number >= 1 and number % 1 == 0)
            yield from (values | {name: number} for number in whole)


def _size(shapes: Shapes, place: Place) -> int:
    return shapes[place[0]][place[1]]


def _differences(own: Shapes, wanted: Shapes) -> set[Place]:
    """Return the axes of wanted entries that have another size in a network."""
    return {
        (name, axis)
        for name, shape in wanted.items()
        for axis, size in enumerate(shape)
        if own[name][axis] != size
    }


def resized_config(model: nn.Module) -> Any:
    """Return the config of a network of transformers whose channels were cut out.

    Raises:
        ModelError: no config can hold it; in one sentence.
    """
    search = ConfigSearch(model)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if shapes.keys() < search.dense.keys():
        search.shorten(shapes.keys())
    if odd := shapes.keys() ^ search.dense.keys():
        msg = f"{search.name} knows no {min(odd)}, or the network has none"
        raise ModelError(msg)
    config = search.find(shapes)
    if config is None:
        name, _ = min(_differences(search.dense, shapes))
        msg = (
            f"{search.name} holds one width for all layers of a kind, not {list(shapes[name])} for "
            f"{name} beside the others"
        )
        raise ModelError(msg)
    return config


def resized_network(model: nn.Module, example_inputs: ExampleInputs) -> nn.Module:
    """Return a network of the same weights that its own config makes again.

    Args:
        model: a network of transformers whose channels were cut out; it is left as it is.
        example_inputs: what its forward takes: both give the same outputs on them, to the bit.

    Raises:
        ModelError: no config gives the network; in one sentence.
    """
    model = unwrap(model)
    config = resized_config(model)
    weight = next(model.parameters())
    fresh: Any = type(model)(config).to(weight.device, weight.dtype).eval()
    fresh.load_state_dict(model.state_dict())
    if hasattr(model, "generation_config"):
        fresh.generation_config = copy.deepcopy(model.generation_config)
    with evaluation_mode(model):
        own, other = (tree_leaves(call_forward(each, example_inputs)) for each in (model, fresh))
    tensors = [
        (a, b) for a, b in zip(own, other, strict=False) if isinstance(a, Tensor) and a.numel()
    ]
    if len(own) != len(other) or not all(torch.equal(a, b) for a, b in tensors):
        msg = f"{type(config).__name__} gives a network of these shapes with other outputs"
        raise ModelError(msg)
    return fresh  # type: ignore[no-any-return]  # of transformers


def within_config(model: nn.Module, graph: StructureGraph) -> StructureGraph:
    """Return the structure with only that to prune which the network's config can hold.

    Each kind of layers is tried on its own. A network that is none of transformers has no config.

    Raises:
        ModelError: the config holds no other width at all; in one sentence.
    """
    model = unwrap(model)
    try:
        search = ConfigSearch(model)
    except ModelError:
        return graph
    whole: dict[int, str] = {}
    widths: dict[int, tuple[int, ...]] = {}
    for kind in np.unique(graph.kinds[graph.free_groups]):
        groups = np.flatnonzero(graph.kinds == kind).tolist()
        legal, first = _legal_widths(search, graph, groups), graph.groups[groups[0]]
        if len(legal) == 1:
            whole |= dict.fromkeys(groups, f"{search.name} holds no other width")
        elif len(legal) <= len(first.units) - first.min_keep:
            widths |= dict.fromkeys(groups, legal)
    if len(whole) == len(graph.free_groups):
        msg = (
            f"uniform=True: {search.name} holds no other width of any layer of "
            f"{type(model).__name__}: leave uniform out"
        )
        raise ModelError(msg)
    return restrict(graph, whole, widths)


def _legal_widths(
    search: ConfigSearch, graph: StructureGraph, groups: Sequence[int]
) -> tuple[int, ...]:
    """Return how many units of each of some groups of a kind may stay, ascending.

    A group that is alone, as a residual stream, may have any width or none but its own: which other
    numbers fit would depend on what else is cut.
    """
    first = graph.groups[groups[0]]
    size, least = len(first.units), first.min_keep
    each = len(groups) > 1 and size <= MOST_WIDTHS
    names = {
        member.rpartition(":")[0] for group in groups for member in graph.groups[group].members
    }

    def holds(width: int) -> bool:
        keep = np.ones(graph.num_units, dtype=bool)
        for group in groups:
            keep[graph.groups[group].units[width:]] = False
        shapes = {name: list(search.dense[name]) for name in names & search.dense.keys()}
        for name, shape in shapes.items():
            for axis, units in graph.param_units[name].items():
                shape[axis] = int(keep[units].sum())
        return search.find({name: tuple(shape) for name, shape in shapes.items()}) is not None

    legal = [width for width in range(least if each else size - 1, size) if holds(width)]
    if legal and not each:
        legal = [*range(least, size)]
    return (*legal, size)

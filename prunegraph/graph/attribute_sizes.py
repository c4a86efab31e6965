"""Integers among the attributes of a user's modules that may be sizes of what they compute with."""

import re
from collections import ChainMap
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import nn

from prunegraph.graph.graph import Place, SizeAttribute
from prunegraph.graph.trace.attribute_reads import WHOLE, chains_of, is_custom

WIDTH_WORDS = re.compile("dim|width|channel|feature|plane|hid|emb|head|filter|unit|inner|^d_|^dh$")
"""An attribute with such a word in its name may hold one."""

SPATIAL_WORDS = ("window", "patch", "kernel", "stride", "padding", "shift", "dilation", "depth")
"""An attribute with such a word in its name holds no number of channels or heads."""

OTHER_WORDS = re.compile("pad|token|eos|bos|vocab|block|max_|seed|index$")
"""Nor does one with such a word, unless it tells a width, too."""

COPIES_WORDS = re.compile("(key_value|kv)_groups|n_rep|num_rep|(queries|q|heads)_per_kv")
"""An attribute with such words in its name tells how many query heads share a head of keys."""

OF_A_HEAD = re.compile("dim|size|width|channels|features|^d_|^dh$|^d$")
"""An attribute with such a word in its name holds a width; with other words, a count of heads."""


Attribute = tuple[type, str, Place]
"""A class of modules, the name of an attribute, the place of an integer in it."""


@dataclass(kw_only=True)
class Reading:
    """How the integers among modules' attributes are read, as far as trials have told.

    Attributes:
        literal: paths of modules whose integers are no sizes: surgery leaves them as they are.
        last_named: paths of modules in which an attribute is the last size of those that it fits.
        checked: paths of modules that compare the width of their input with an attribute.
        checked_first: those of them in which that is what an attribute of this size is.
        ignored: classes of modules, and attributes of these that are no sizes.
        written: attributes that methods set, of whatever.
    """

    literal: set[str] = field(default_factory=set)
    last_named: set[str] = field(default_factory=set)
    checked: set[str] = field(default_factory=set)
    checked_first: set[str] = field(default_factory=set)
    ignored: set[Attribute] = field(default_factory=set)
    written: frozenset[str]


def tells_width(name: str) -> bool:
    """Return whether an attribute is a number of channels or heads by its name."""
    return WIDTH_WORDS.search(name.lower()) is not None


def tells_copies(name: str) -> bool:
    """Return whether an attribute tells by its name how many query heads share a head of keys."""
    return COPIES_WORDS.search(name.lower()) is not None


def attributes_of_size(owner: nn.Module, size: int, written: Set[str]) -> list[tuple[str, Place]]:
    """Return the integer attributes, and places in containers of integers, that hold a size.

    Those of an own class are among them: surgery gives the module one of its own. So it does with
    an object of settings, of which those attributes are found that methods read of it by name,
    unless methods write (``written``) what this class reads of it, or may read.
    """
    found: list[tuple[str, Place]] = []
    own_class: type = type(owner)
    classes = [vars(kind) for kind in reversed(type(owner).__mro__) if is_custom(kind)]
    for name, value in ChainMap(vars(owner), *reversed(classes)).items():
        if may_be_size(name):
            found += [(name, place) for place in _places_of(value, size, depth=2)]
    chains = chains_of(own_class)
    for name, key in sorted(chains):
        settings = vars(owner).get(name)
        other = isinstance(settings, nn.Module | type | Mapping)
        own = {} if other else getattr(settings, "__dict__", {})
        read = own if (name, WHOLE) in chains else {its for of, its in chains if of == name}
        if (
            written.isdisjoint(read)
            and type(own.get(key)) is int
            and own[key] == size
            and may_be_size(key)
        ):
            found.append((name, (key,)))
    return found


@cache
def may_be_size(name: str) -> bool:
    """Return whether an attribute may hold a number of channels or heads, by its name."""
    other = OTHER_WORDS.search(name.lower()) is not None and not tells_width(name)
    return not other and not any(word in name for word in SPATIAL_WORDS)


def _places_of(value: object, size: int, depth: int) -> Iterator[Place]:
    """Return where a value, or a container, holds an integer."""
    if type(value) is int and value == size:
        yield ()
    elif depth and type(value) in (tuple, list, dict, torch.Size):
        assert isinstance(value, tuple | list | dict)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            for place in _places_of(item, size, depth - 1):
                yield (key, *place)


def fit(item: SizeAttribute, part: int) -> tuple[bool, ...]:
    """Say how well a size fits an attribute: a count of heads or a width by its name, its place."""
    is_width = OF_A_HEAD.search(item.key.lower()) is not None
    by_name = (item.axis == item.units.ndim - 1) == is_width
    in_place = not item.place or item.place[0] in (part, item.axis)
    return (item.key == item.name and bool(item.place)) or by_name, in_place, item.varies

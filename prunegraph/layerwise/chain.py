"""The samples of one forward on their way through the blocks of a network, one after the other."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from prunegraph.layerwise.order import Arguments, Segment, find_segments, hooked, put
from prunegraph.layerwise.weights import PrunableWeight
from prunegraph.tasks.batches import num_samples, num_tokens

Run = Callable[[nn.Module], Any]


class Reached(Exception):  # no error: it ends a forward
    """The network has run as far as is needed."""


class Chain:
    """What the blocks of a network are given.

    Blocks run in the precision in which the network runs them.

    Args:
        network: the network.
        segment: its blocks, each of which is given what the one before returned.
        run: runs the network; what its first forward gives the blocks is taken: of those after the
            first all but the hidden states, unless it is the same.
    """

    def __init__(self, network: nn.Module, segment: Segment, run: Run) -> None:
        self._network, self._segment = network, segment
        self._given: dict[str, Arguments] = {}
        self._precision: AbstractContextManager[Any] = nullcontext()
        wanted = segment.blocks[:1] if segment.alike else segment.blocks

        def note(path: str) -> Any:
            def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
                given: Arguments = (args, dict(kwargs))
                self._precision = _present_precision(given)
                if self._given:
                    assert segment.place is not None
                    given = put(given, segment.place, None)
                self._given[path] = given
                if path == wanted[-1]:
                    raise Reached

            module = network.get_submodule(path)
            return module.register_forward_pre_hook(hook, with_kwargs=True)

        with hooked(note(path) for path in wanted), suppress(Reached):
            run(network)

    def look(self, number: int) -> None:
        """Run a block, which may write into what it is given; it is given the same again later."""
        given = self._given[self._segment.blocks[number]]
        self._call(number, tree_map_only(Tensor, Tensor.clone, given))

    def advance(self, number: int) -> None:
        """Run a block; the next one is given what it returns.

        Args:
            number: of the block; each is run once, in order.
        """
        blocks, place = self._segment.blocks, self._segment.place
        given = self._given.pop(blocks[number])
        outputs = self._call(number, given)
        if number + 1 < len(blocks):
            assert place is not None
            outputs = outputs[0] if self._segment.first else outputs
            others = given if self._segment.alike else self._given[blocks[number + 1]]
            self._given[blocks[number + 1]] = put(others, place, outputs)

    def _call(self, number: int, given: Arguments) -> Any:
        args, kwargs = given
        with self._precision:
            return self._network.get_submodule(self._segment.blocks[number])(*args, **kwargs)


def _present_precision(arguments: Arguments) -> torch.autocast:
    """Return a context as the one that a module is called in."""
    tensors = [item for item in tree_leaves(arguments) if isinstance(item, Tensor)]
    kind = tensors[0].device.type if tensors else "cpu"
    return torch.autocast(
        kind,
        torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )


def find_chain(network: nn.Module, names: Collection[str], run: Run) -> Segment | None:
    """Return the blocks of a network that reads tokens; None if there is no chain of them.

    Blocks are as in ``find_segments``. Tokens are whole numbers: images and sounds are none.

    Args:
        network: the network.
        names: of the weights that the blocks are to hold.
        run: runs the network; its first forward is looked at.
    """
    if not any(isinstance(module, nn.Embedding) for module in network.modules()):
        return None
    layers = {name: PrunableWeight(name.rpartition(".")[0], ()) for name in names}
    tokens: list[bool] = []
    segments = find_segments(network, layers, lambda: tokens.append(run_first(network, run, 1)))
    chains = [segment for segment in segments if segment.place is not None]
    return max(chains, key=lambda chain: len(chain.blocks), default=None) if all(tokens) else None


def run_first(network: nn.Module, run: Run, most: int) -> bool:
    """Run a network on the first samples of its first forward, if they are tokens.

    Args:
        network: the network.
        run: runs it.
        most: samples.

    Returns:
        Whether they are tokens.
    """
    seen: list[bool] = []

    def shorten(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if not num_tokens((args, kwargs)):
            raise Reached
        seen.append(True)
        count = num_samples((args, kwargs))

        def cut(item: Tensor) -> Tensor:
            return item[:most] if item.dim() and len(item) == count else item

        return tree_map_only(Tensor, cut, (args, kwargs))

    def end(*_: Any) -> None:  # what follows expects all samples
        raise Reached

    handles = [
        network.register_forward_pre_hook(shorten, with_kwargs=True),
        network.register_forward_hook(end),
    ]
    with hooked(handles), suppress(Reached), torch.no_grad():
        run(network)
    return bool(seen)

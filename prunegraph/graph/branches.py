"""Sub-layers of residual blocks that leave wholly, and what is put in their place."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from prunegraph.core.masks import BoolArray, IntArray
from prunegraph.graph.module_sizes import replace_module
from prunegraph.graph.trace.calls import tensors_in

if TYPE_CHECKING:  # it holds what leaves
    from prunegraph.graph.graph import StructureGraph


@dataclass(frozen=True, eq=False, kw_only=True)
class Leaving:
    """A module that leaves with the last of some units.

    Attributes:
        module: its path.
        units: their numbers; it leaves when none of them stays.
        kind: a branch is added to a residual stream, a norm is read by branches alone, and what a
            block adds to the stream are branches alone.
        results: entries of the tuple that a branch returns; 0 = a tensor.
        bias: name of a branch's bias, which stays.
    """

    module: str
    units: IntArray
    kind: Literal["branch", "norm", "block"]
    results: int = 0
    bias: str | None = None


class NoBranch(nn.Module):
    """Gives what a branch without units adds to the stream: its bias, or nothing.

    Args:
        bias: ``[C]``, or None.
        results: see ``Leaving``.
    """

    def __init__(self, bias: nn.Parameter | None, results: int) -> None:
        super().__init__()
        self.bias, self.results = bias, results

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return ``[..., C]``, of the shape of the first tensor that is given."""
        given: Tensor = next(iter(tensors_in((args, kwargs))))
        added = given.new_zeros(()) if self.bias is None else self.bias
        found = added.to(given.dtype).expand(given.shape)
        return (found, *[None] * (self.results - 1)) if self.results else found


def without_branches(pruned: nn.Module, graph: "StructureGraph", keep: BoolArray) -> nn.Module:
    """Put ``NoBranch`` in place of branches without units, and nothing in that of their norms.

    Args:
        pruned: the dense network without the units that go; changed in place.
        graph: the structure.
        keep: ``[N]`` keep bits.
    """
    for each in _gone(graph, keep):
        if each.kind == "branch":
            bias = None if each.bias is None else pruned.get_parameter(each.bias)
            pruned = replace_module(pruned, each.module, NoBranch(bias, each.results))
        elif each.kind == "norm":
            pruned = replace_module(pruned, each.module, nn.Identity())
    return pruned


def without_blocks(pruned: nn.Module, graph: "StructureGraph", keep: BoolArray) -> nn.Module:
    """Take blocks of which nothing is left out of a pruned network, in place; return it.

    Parameters of later blocks so get other names. Modules that hold their block's number, as those
    of a cache of keys and values do, are numbered anew, without those that have left.

    Args:
        pruned: what ``apply_mask`` of ``surgery`` has returned.
        graph: the structure.
        keep: ``[N]`` keep bits.
    """
    gone = _gone(graph, keep)
    if gone:
        modules = dict(pruned.named_modules())
        _drop(pruned, [each.module for each in gone if each.kind == "block"])
        alive = {id(module) for module in pruned.modules() if not isinstance(module, NoBranch)}
        for name, paths in graph.numbered:
            left = [modules[path] for path in paths if id(modules.get(path)) in alive]
            for number, module in enumerate(left):
                setattr(module, name, number)
    return pruned


def _gone(graph: "StructureGraph", keep: BoolArray) -> list[Leaving]:
    return [each for each in graph.leaving if not keep[each.units].any()]


def _drop(network: nn.Module, paths: Iterable[str]) -> None:
    """Take blocks out of the lists that hold them."""
    found: dict[str, set[str]] = {}
    for path in paths:
        where, _, own = path.rpartition(".")
        found.setdefault(where, set()).add(own)
    for where, names in found.items():
        left = [
            item for own, item in network.get_submodule(where).named_children() if own not in names
        ]
        replace_module(network, where, nn.ModuleList(left))


def numbered(network: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield an attribute and the paths of modules, one a block, in which it is the block's number.

    Args:
        network: the dense one.
    """
    for where, blocks in network.named_modules():
        if not isinstance(blocks, nn.ModuleList) or len(blocks) < 2:
            continue
        known: dict[tuple[str, str], list[str]] = {}
        for number, block in enumerate(blocks):
            for path, module in block.named_modules(prefix=f"{where}.{number}"):
                within = path.removeprefix(f"{where}.{number}")
                for name, value in vars(module).items():
                    if type(value) is int and value == number:
                        known.setdefault((within, name), []).append(path)
        for (_, name), paths in known.items():
            if len(paths) == len(blocks):
                yield name, tuple(paths)


class NoChannels(nn.Module):
    """A convolution that reads or writes no channels, which torch does not compute.

    Args:
        layer: the convolution; its bias stays.
    """

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.out_channels, self.bias = layer.out_channels, layer.bias
        self.sizes = [layer.kernel_size, layer.stride, layer.dilation]
        self.padding: Any = layer.padding

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, out, ...]``, the bias or zeros, as large as the convolution's output."""
        sizes = list(x.shape[2:])
        if self.padding != "same":
            pads = [0] * len(sizes) if self.padding == "valid" else self.padding
            each = zip(sizes, pads, *self.sizes, strict=True)
            sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, k, s, d in each]
        found = x.new_zeros((len(x), self.out_channels, *sizes))
        return found if self.bias is None else found + self.bias.view(-1, *[1] * len(sizes))


def fill_empty(network: nn.Module) -> nn.Module:
    """Put modules that run in place of convolutions and batch norms without channels; return it."""
    for path, module in list(network.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not module.weight.numel():
            network = replace_module(network, path, NoChannels(module))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.num_features:
            network = replace_module(network, path, nn.Identity())
    return network

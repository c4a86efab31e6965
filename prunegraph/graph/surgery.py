"""Surgery: a dense network and a keep mask give a smaller network, or the same one silenced.

Both functions return a new network and leave the one they are given as it is, bit for bit. They
live here because the trial that ends an analysis needs them; ``graph.apply`` adds the run on
example inputs and the optimizer.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from prunegraph.core.errors import MaskError, SurgeryError
from prunegraph.core.masks import BoolArray, ChannelMask
from prunegraph.graph.branches import fill_empty, without_branches
from prunegraph.graph.channel_gather import ZERO_CHANNEL, ChannelGather
from prunegraph.graph.copying import copy_network, drop_kept, like
from prunegraph.graph.graph import Place, StructureGraph
from prunegraph.graph.late_weights import LateWeight, can_be_late, change_of, late, narrowed
from prunegraph.graph.masked_norm import MaskedNorm, mean_over_kept
from prunegraph.graph.module_sizes import fix_module_sizes, replace_module, slim_attentions
from prunegraph.graph.trace.weight_views import constants

NUM_POWER_ITERATIONS = 50
"""Of a spectral norm, after which its largest singular value is near enough."""

Keep = Mapping[int, Tensor]
"""Axis -> ``[size]`` booleans, True = keep."""

Factors = Mapping[int, tuple[Tensor, ...]]
"""``id`` of a parameter -> ``[size]`` numbers for each axis, by which its values are multiplied."""


def apply_mask(
    model: nn.Module,
    graph: StructureGraph,
    mask: ChannelMask,
    *,
    lately: bool = False,
    factors: Factors | None = None,
) -> nn.Module:
    """Return a new network without the prunable units that the mask removes.

    Shared parameters stay shared; dtype, device, memory format, ``requires_grad``, hooks and each
    module's training flag are kept.

    Args:
        model: the dense network, without wrappers; it is left bit-equal.
        graph: the structure of ``model``.
        mask: which units stay.
        lately: large weights are made when they are read (``late_weights``), or are the dense
            network's own.
        factors: what the dense network's values are multiplied by.

    Raises:
        MaskError: the mask is not of this graph.
        SurgeryError: the graph is not of this network.
    """
    pruned, kept = _copied(model, graph, mask, cut=True, lately=lately, factors=factors)
    fix_module_sizes(model, pruned, kept)
    for attribute in graph.size_attributes:
        owner, size = pruned.get_submodule(attribute.module), attribute.kept(mask.keep)
        value = _put(getattr(owner, attribute.name), attribute.place, size)
        setattr(owner, attribute.name, value)
    drop_kept(pruned)
    pruned = slim_attentions(model, pruned, kept)
    return fill_empty(without_branches(pruned, graph, mask.keep))


def _copied(
    model: nn.Module,
    graph: StructureGraph,
    mask: ChannelMask,
    *,
    cut: bool,
    lately: bool,
    factors: Factors | None,
) -> tuple[nn.Module, dict[int, dict[int, Tensor]]]:
    """Return a copy without what a mask removes, and the ``slice_plans``.

    With ``cut`` the rest leaves, else it is zero; other arguments are those of ``apply_mask``.
    """
    tensors = stored(model, graph)
    kept = slice_plans(tensors, graph, mask)
    whole = set() if cut else {id(tensors.get(name)) for name in graph.divisors}
    made, now = _maker(cut=cut, lately=lately), take if cut else _zero
    by_id = {id(tensor): tensor for tensor in tensors.values()}
    memo = {key: made(by_id[key], keep) for key, keep in kept.items() if key not in whole}
    for key, length in _kept_lengths(model, kept):
        memo[key] = now(length, kept[key]) if key in kept else length
    memo |= _gathers(model, graph, mask.keep, cut=cut)
    if factors:
        multiply(model, memo, factors, kept if cut else {}, lately=lately)
    copied = copy_network(model, memo, share=lately)  # finds the new tensors in its memo
    _resolve_norms(copied)
    for module in copied.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # layers other than torch's own take none
    return copied, kept


@torch.no_grad()
def _kept_lengths(model: nn.Module, kept: Mapping[int, Keep]) -> Iterator[tuple[int, Tensor]]:
    """Yield ``id`` of a length of ``weight_norm``, and what it is without what its vector loses.

    So the weights that stay are what they were; at the old lengths they would be larger.
    """
    for length, vector, axis in _weight_norms(model):
        lost = {k: keep for k, keep in kept.get(id(vector), {}).items() if k != axis}
        if lost:
            before, after = (
                torch.norm_except_dim(each, 2, axis) for each in (vector, _zero(vector, lost))
            )
            share = torch.where(before > 0.0, after / before, 1.0)
            yield id(length), like(length, length.detach() * share)


def _weight_norms(model: nn.Module) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield the length and the vector of each ``weight_norm``, and the axis that has lengths."""
    for owner, norm in _norms(model):
        if isinstance(norm, WeightNorm):
            yield getattr(owner, f"{norm.name}_g"), getattr(owner, f"{norm.name}_v"), norm.dim
        elif isinstance(norm, _WeightNorm):
            yield owner.original0, owner.original1, norm.dim


def _norms(network: nn.Module) -> Iterator[tuple[Any, object]]:
    """Yield what may compute weights, hooks and parametrizations, after what holds the stored."""
    for module in network.modules():
        for hook in module._forward_pre_hooks.values():
            yield module, hook
        for made in getattr(module, "parametrizations", {}).values():
            for each in made:
                yield made, each


@torch.no_grad()
def _resolve_norms(network: nn.Module) -> None:
    """Compute the weights of ``weight_norm`` and ``spectral_norm`` anew.

    The singular vectors of the dense weight are none of the pruned one: the power method goes on.
    """
    for owner, norm in _norms(network):
        if isinstance(norm, WeightNorm):
            setattr(owner, norm.name, norm.compute_weight(owner))
        elif isinstance(norm, SpectralNorm):
            for _ in range(NUM_POWER_ITERATIONS):
                weight = norm.compute_weight(owner, do_power_iteration=True)
            setattr(owner, norm.name, weight)
        elif isinstance(norm, _SpectralNorm) and owner.original.ndim > 1:
            matrix = norm._reshape_weight_to_matrix(owner.original)
            norm._power_method(matrix, NUM_POWER_ITERATIONS)


def _put(value: Any, place: Place, size: int) -> Any:
    """Return a container, or object of settings, with a size in its place; () = the size."""
    if not place:
        return size
    if not isinstance(value, dict | tuple | list):
        copied = copy.copy(value)
        object.__setattr__(copied, str(place[0]), size)  # it may be frozen
        return copied
    entries = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    entries[place[0]] = _put(entries[place[0]], place[1:], size)
    return entries if isinstance(value, dict) else type(value)(entries.values())


def multiply(
    model: nn.Module,
    memo: dict[int, Tensor],
    factors: Factors,
    kept: Mapping[int, Keep],
    *,
    lately: bool,
) -> None:
    """Multiply parameters of a copy; those that it would share with its network get their own.

    Args:
        model: the network.
        memo: ``id`` of a tensor of it -> the copy's; changed.
        factors: by which numbers.
        kept: ``id`` of a tensor -> axis -> kept positions, where the copy's has these alone.
        lately: large weights are made when they are read.
    """
    made = _maker(cut=False, lately=lately)
    for parameter in model.parameters():
        key = id(parameter)
        if key not in factors:
            continue
        one = memo.get(key)
        one = made(parameter, {}) if one is None else one
        if isinstance(one, LateWeight):
            memo[key] = late(parameter, replace(one.change, factors=factors[key]))
            continue
        memo[key] = one
        for axis, by in enumerate(factors[key]):
            keep = kept.get(key, {}).get(axis)
            by = by if keep is None else by[keep]
            one.data.mul_(by.view([-1 if a == axis else 1 for a in range(parameter.ndim)]))


def zero_mask(
    model: nn.Module,
    graph: StructureGraph,
    mask: ChannelMask,
    *,
    lately: bool = False,
    factors: Factors | None = None,
) -> nn.Module:
    """Return a copy of the same shape in which the removed prunable units are silent.

    Every slice of every member of a removed unit is zeroed, the columns of its consumers included;
    layer and RMS norms over an axis that lost units normalise over the kept channels. Its outputs
    equal those of ``apply_mask``: that is the oracle of ``prunegraph.testing``.

    Args:
        model: the dense network, without wrappers; it is left bit-equal.
        graph: the structure of ``model``.
        mask: which units stay.
        lately: large weights are made when they are read (``late_weights``), or are the dense
            network's own.
        factors: what the dense network's values are multiplied by.

    Raises:
        MaskError: the mask is not of this graph.
        SurgeryError: the graph is not of this network.
    """
    silent, kept = _copied(model, graph, mask, cut=False, lately=lately, factors=factors)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        own = kept.get(id(getattr(module, "weight", None)))
        if own is None or isinstance(silent.get_submodule(path), MaskedNorm):
            continue  # one that lies in a container with two paths is wrapped already
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            parent = silent.get_submodule(path.rpartition(".")[0])
            in_encoder = isinstance(parent, nn.TransformerEncoderLayer)
            norm = MaskedNorm(silent.get_submodule(path), own, in_encoder=in_encoder)
            silent = replace_module(silent, path, norm)
        elif isinstance(module, nn.GroupNorm) and module.num_groups == 1:
            mean_over_kept(silent.get_submodule(path), (own[0], 0))
    computing = {op.name.partition("#")[0] for op in graph.ops if op.computed}
    for path in sorted(graph.means.keys() | computing):
        means = graph.means.get(path, ())
        kinds = [(torch.from_numpy(mask.keep[units]), axis) for units, axis in means]
        changed = [kind for kind in kinds if not bool(kind[0].all())]
        if changed or path in computing:
            mean_over_kept(silent.get_submodule(path), *changed)
    drop_kept(silent)
    return silent


def stored(model: nn.Module, graph: StructureGraph) -> dict[str, Tensor]:
    """Return the parameters and, where the structure has others, buffers and plain attributes."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    if not tensors.keys() >= graph.param_units.keys():
        tensors.update(constants(model))
    return tensors


def slice_plans(
    tensors: Mapping[str, Tensor], graph: StructureGraph, mask: ChannelMask
) -> dict[int, dict[int, Tensor]]:
    """Return what stays of the ``stored`` tensors that lose positions.

    By ``id``, for each axis that loses some ``[size]`` booleans on the tensor's device.

    Raises:
        MaskError: the mask is not of this graph.
        SurgeryError: the graph is not of this network.
    """
    _check_mask(graph, mask)
    plans: dict[int, dict[int, Tensor]] = {}
    for name, axes in graph.param_units.items():
        tensor = tensors.get(name)
        if tensor is None:
            msg = (
                f"the network has no parameter {name!r}: the structure graph is of another network"
            )
            raise SurgeryError(msg)
        for axis, units in axes.items():
            if tensor.dim() <= axis or tensor.shape[axis] != units.size:
                msg = (
                    f"{name} has shape {tuple(tensor.shape)}, the structure graph expects "
                    f"{units.size} at axis {axis}: it is of another network"
                )
                raise SurgeryError(msg)
            if mask.keep[units].all():
                continue
            keep = torch.from_numpy(mask.keep[units]).to(tensor.device)
            known = plans.setdefault(id(tensor), {}).setdefault(axis, keep)
            if not torch.equal(known, keep):
                msg = (
                    f"{name} is shared, and its names disagree on which channels of axis {axis} "
                    "stay"
                )
                raise SurgeryError(msg)
    return plans


def _check_mask(graph: StructureGraph, mask: object) -> None:
    if not isinstance(mask, ChannelMask):
        msg = f"the mask is of type {type(mask).__name__}: give graph.mask(keep bits)"
        raise MaskError(msg)
    if mask.keep.size != graph.num_units:
        msg = (
            f"the mask holds {mask.keep.size} units, the structure graph {graph.num_units}: "
            "make the mask with this graph's own mask() or project()"
        )
        raise MaskError(msg)
    lost = int((graph.frozen & ~mask.keep).sum())
    if lost:
        msg = f"the mask removes {lost} frozen units: make it with this graph's own mask()"
        raise MaskError(msg)


def take(tensor: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """Return a new tensor of the kept positions, of the same kind and memory format."""
    data = narrowed(tensor.detach(), keep)
    return like(tensor, data.contiguous(memory_format=_memory_format(tensor)))


def _zero(tensor: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """Return a new tensor with zeros at the removed positions."""
    data = tensor.detach().clone()
    for axis, kept in keep.items():
        data.index_fill_(axis, (~kept).nonzero().flatten(), 0)
    return like(tensor, data)


def _maker(*, cut: bool, lately: bool) -> Callable[[Tensor, Keep], Tensor]:
    """Return what makes a tensor of another: late, where it can be read later, or at once."""
    now = take if cut else _zero

    def make(tensor: Tensor, keep: Keep) -> Tensor:
        if not lately or not can_be_late(tensor):
            return now(tensor, keep)
        return late(tensor, replace(change_of(tensor), keep=keep, cut=cut))

    return make


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Return the memory format that a slice of the tensor should have."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    for dim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dim and tensor.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def _gathers(
    model: nn.Module, graph: StructureGraph, keep: BoolArray, *, cut: bool
) -> dict[int, Tensor]:
    """Return ``id(index) -> new index`` of each channel gather: removed inputs give zeros.

    Removed outputs leave, and places are the new ones; without ``cut`` they give zeros, too.
    """
    found = {}
    for path, (in_units, out_units) in graph.gathers.items():
        module = model.get_submodule(path)
        if not isinstance(module, ChannelGather):
            msg = f"{path} is no ChannelGather: the structure graph is of another network"
            raise SurgeryError(msg)
        index = module.index
        kept_in = torch.from_numpy(keep[in_units]).to(index.device)
        kept_out = torch.from_numpy(keep[out_units]).to(index.device)
        read = index.clamp(min=0)
        alive = (index >= 0) & kept_in[read] & kept_out
        places = (kept_in.cumsum(0) - 1)[read] if cut else index
        new = torch.where(alive, places, ZERO_CHANNEL)
        found[id(index)] = new[kept_out] if cut else new
    return found

"""Surgery: a dense network and a keep mask give a smaller network, or the same one silenced.

Both functions return a new network and leave the one they are given as it is, bit for bit. They
live here because the trial that ends an analysis needs them; ``graph.apply`` adds the run on
example inputs and the optimizer.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
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
from prunegraph.graph.module_sizes import (
    fix_module_sizes,
    replace_module,
    slim_attentions,
    use_no_nested_tensors,
)
from prunegraph.graph.trace.weight_views import constants

NUM_POWER_ITERATIONS = 50
"""Of a spectral norm, after which its largest singular value is near enough."""

Keep = Mapping[int, Tensor]
"""Axis -> ``[size]`` booleans, True = keep."""

Factors = Mapping[int, tuple[Tensor, ...]]
"""``id`` of a parameter -> ``[size]`` numbers for each axis, by which its values are multiplied."""


@dataclass(frozen=True)
class SlicePlan:
    """What happens to one parameter or buffer.

    Attributes:
        tensor: the dense network's own tensor.
        keep: axis -> ``[size]`` booleans on the tensor's device, True = keep; only axes that lose
            something.
    """

    tensor: Tensor
    keep: dict[int, Tensor]


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
    pruned, plans = _copied(model, graph, mask, cut=True, lately=lately, factors=factors)
    _resolve_norms(pruned)
    keep_first = {key: plan.keep[0] for key, plan in plans.items() if 0 in plan.keep}
    fix_module_sizes(model, pruned, keep_first)
    for attribute in graph.size_attributes:
        owner, size = pruned.get_submodule(attribute.module), attribute.kept(mask.keep)
        value = _put(getattr(owner, attribute.name), attribute.place, size)
        setattr(owner, attribute.name, value)
    drop_kept(pruned)
    pruned = slim_attentions(model, pruned, {key: plan.keep for key, plan in plans.items()})
    return fill_empty(without_branches(pruned, graph, mask.keep))


def _copied(
    model: nn.Module,
    graph: StructureGraph,
    mask: ChannelMask,
    *,
    cut: bool,
    lately: bool,
    factors: Factors | None,
) -> tuple[nn.Module, dict[int, SlicePlan]]:
    """Return a copy whose tensors have lost what a mask removes, and what that is of each.

    With ``cut`` it leaves, else it becomes zero; other arguments are those of ``apply_mask``.
    """
    plans = slice_plans(model, graph, mask)
    tensors = {} if cut else _stored(model, graph.divisors)
    whole = {id(tensors.get(name)) for name in graph.divisors}
    made, now = _maker(cut=cut, lately=lately), take if cut else _zero
    memo = {key: made(plan.tensor, plan.keep) for key, plan in plans.items() if key not in whole}
    for key, length in _kept_lengths(model, plans):
        memo[key] = now(length, plans[key].keep) if key in plans else length
    memo |= _gathers(model, graph, mask.keep, cut=cut)
    keeps = {key: plan.keep for key, plan in plans.items()} if cut else None
    multiply(model, memo, factors or {}, keeps, lately=lately)
    return copy_network(model, memo, share=lately), plans  # which finds them in its memo


@torch.no_grad()
def _kept_lengths(model: nn.Module, plans: Mapping[int, SlicePlan]) -> Iterator[tuple[int, Tensor]]:
    """Yield ``id`` of a length of ``weight_norm``, and what it is without what its vector loses.

    So the weights that stay are what they were; at the old lengths they would be larger.
    """
    for length, vector, axis in _weight_norms(model):
        plan = plans.get(id(vector))
        lost = {} if plan is None else {k: keep for k, keep in plan.keep.items() if k != axis}
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
    kept: Mapping[int, Mapping[int, Tensor]] | None = None,
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
            keep = {} if kept is None else kept.get(key, {})
            by = by[keep[axis]] if axis in keep else by
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
    silent, plans = _copied(model, graph, mask, cut=False, lately=lately, factors=factors)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        plan = plans.get(id(getattr(module, "weight", None)))
        if plan is None or isinstance(silent.get_submodule(path), MaskedNorm):
            continue  # one that lies in a container with two paths is wrapped already
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            parent = silent.get_submodule(path.rpartition(".")[0])
            in_encoder = isinstance(parent, nn.TransformerEncoderLayer)
            norm = MaskedNorm(silent.get_submodule(path), plan.keep, in_encoder=in_encoder)
            silent = replace_module(silent, path, norm)
        elif isinstance(module, nn.GroupNorm) and module.num_groups == 1:
            mean_over_kept(silent.get_submodule(path), (plan.keep[0], 0))
    computing = {op.name.partition("#")[0] for op in graph.ops if op.computed}
    for path in sorted(graph.means.keys() | computing):
        kinds = graph.means.get(path, ())
        kept = [(torch.from_numpy(mask.keep[units]), axis) for units, axis in kinds]
        changed = [kind for kind in kept if not bool(kind[0].all())]
        if changed or path in computing:
            mean_over_kept(silent.get_submodule(path), *changed)
    use_no_nested_tensors(silent)
    _resolve_norms(silent)
    drop_kept(silent)
    return silent


def _stored(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the parameters and, if a name is of none, buffers and tensors that are attributes."""
    stored: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    if not stored.keys() >= set(names):
        stored.update(constants(model))
    return stored


def slice_plans(model: nn.Module, graph: StructureGraph, mask: ChannelMask) -> dict[int, SlicePlan]:
    """Return ``id(tensor) -> plan`` of the parameters and buffers that lose positions.

    Raises:
        MaskError: the mask is not of this graph.
        SurgeryError: the graph is not of this network.
    """
    _check_mask(graph, mask)
    tensors = _stored(model, graph.param_units)
    plans: dict[int, SlicePlan] = {}
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
            keep = mask.keep[units]
            if not keep.all():
                _add_axis(plans, name, tensor, axis, torch.from_numpy(keep).to(tensor.device))
    return plans


def _add_axis(
    plans: dict[int, SlicePlan], name: str, tensor: Tensor, axis: int, keep: Tensor
) -> None:
    """Add one axis to a tensor's plan; a tensor known by two names must be treated alike."""
    plan = plans.setdefault(id(tensor), SlicePlan(tensor, {}))
    known = plan.keep.setdefault(axis, keep)
    if known is not keep and not torch.equal(known, keep):
        msg = f"{name} is shared, and its names disagree on which channels of axis {axis} stay"
        raise SurgeryError(msg)


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

"""Copies of networks, and what their modules keep between calls."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode

from prunegraph.core.errors import ModelError
from prunegraph.graph.late_weights import SMALL, LateWeight
from prunegraph.graph.trace.attribute_reads import is_custom
from prunegraph.graph.trace.calls import tensors_in, written_by

ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})

CONTAINERS = frozenset({dict, OrderedDict, set, list})
"""Most of those that modules hold are empty, as those of hooks."""

Network = TypeVar("Network", bound=nn.Module)


def copy_network(
    model: Network, memo: Mapping[int, object] | None = None, *, share: bool = False
) -> Network:
    """Return a deep copy of a network, with what a forward has left in its modules.

    Results that modules keep while training (``self.features = x``) are detached in the copy: torch
    refuses to copy tensors that hang on a graph of gradients.

    Args:
        model: the network; it is left as it is.
        memo: ``id`` of a part -> what takes its place in the copy.
        share: large parameters that ``memo`` lacks have the memory of the network's own, unless a
            change of mode writes into some: nothing else may.

    Raises:
        ModelError: something that a module holds cannot be copied.
    """
    shared = _shared(model) if share and can_share(model) else {}
    plain: dict[type, bool] = {}
    try:
        with torch.no_grad():  # else the weights of scripted modules hang on the network's own
            copied = _copy_module(model, {**_detached(model), **shared, **(memo or {})}, plain)
    except TypeError as error:
        msg = (
            f"{type(model).__name__} cannot be copied ({error}): take what cannot be copied off "
            "its modules"
        )
        raise ModelError(msg) from error
    for path, module in () if all(plain.values()) else copied.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            pairs = zip(module.parameters(), model.get_submodule(path).parameters(), strict=True)
            for weight, own in pairs:
                weight.requires_grad_(own.requires_grad)
        if is_parametrized(module):  # by a unit that is made for it: the copy gets its own
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    return cast(Network, copied)


def like(tensor: Tensor, data: Tensor) -> Tensor:
    """Return data as a parameter, where a tensor is one."""
    if isinstance(tensor, nn.Parameter):
        kind = nn.Parameter if isinstance(tensor, LateWeight) else type(tensor)
        return kind(data, requires_grad=tensor.requires_grad)
    return data


def _shared(model: nn.Module) -> dict[int, object]:
    """Return parameters of the same memory, by ``id`` of the large ones of a network."""
    return {
        id(parameter): like(parameter, parameter.detach())
        for parameter in model.parameters()
        if parameter.numel() > SMALL and _is_strided(parameter)
    }


_CAN_SHARE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What ``can_share`` has found."""


def can_share(model: nn.Module) -> bool:
    """Return whether no module writes into weights when its mode changes, as LoRA's layers do."""
    if model not in _CAN_SHARE:
        watch = _Watch(model.parameters())
        if hears_of_training(model):
            copied = copy_network(model, _shared(model))
            try:
                with torch.no_grad(), watch:
                    for mode in (False, True, False):
                        copied.train(mode)
            except Exception:  # a user's may refuse, as fused modules do
                watch.seen = True
        _CAN_SHARE[model] = not watch.seen
    return _CAN_SHARE[model]


class _Watch(TorchDispatchMode):
    """Keeps operations from writing into the memory of tensors.

    Attributes:
        seen: whether one has tried.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._watched = {t.untyped_storage().data_ptr() for t in tensors if _has_memory(t)}
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, unless it writes."""
        kwargs = kwargs or {}
        if any(
            t.untyped_storage().data_ptr() in self._watched
            for t in written_by(func, args, kwargs)
            if _has_memory(t)
        ):
            self.seen = True
            msg = "an operation writes into memory that another network needs"
            raise RuntimeError(msg)
        return func(*args, **kwargs)


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided


def _has_memory(tensor: Tensor) -> bool:
    return _is_strided(tensor) and not isinstance(tensor, LateWeight)


def _copy_module(module: nn.Module, memo: dict[int, object], plain: dict[type, bool]) -> nn.Module:
    """Return what ``copy.deepcopy`` does, without its calls for each number, hook and module.

    Args:
        module: to copy.
        memo: ``deepcopy``'s.
        plain: classes of modules -> whether they leave it to ``deepcopy`` how they are copied.
    """
    kind = type(module)
    if kind not in plain:
        plain[kind] = _is_plain(kind)
    if id(module) in memo:
        return cast(nn.Module, memo[id(module)])
    if not plain[kind]:
        return copy.deepcopy(module, memo)
    copied = kind.__new__(kind)
    memo[id(module)] = copied
    state: dict[str, object] = {}
    for name, value in vars(module).items():
        held = type(value)
        if held in ATOMS:
            state[name] = value
        elif held in CONTAINERS and not value:
            state[name] = memo.setdefault(id(value), held())
        elif held is tuple and all(type(item) in ATOMS for item in value):
            state[name] = value
        elif name == "_modules":
            state[name] = {
                key: None if each is None else _copy_module(each, memo, plain)
                for key, each in value.items()
            }
        elif name in ("_parameters", "_buffers"):
            state[name] = {
                key: memo[id(each)] if id(each) in memo else copy.deepcopy(each, memo)
                for key, each in value.items()
            }
        else:
            state[name] = copy.deepcopy(value, memo)
    copied.__setstate__(state)
    return copied


def _is_plain(kind: type) -> bool:
    """Return whether modules of a class are copied as any object: attribute by attribute."""
    own = {name for base in kind.__mro__ if base not in (nn.Module, object) for name in vars(base)}
    ways = {"__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__slots__", "__new__"}
    return not own & (ways | {"__getnewargs__", "__getnewargs_ex__"})


def _detached(model: nn.Module) -> dict[int, object]:
    """Return copies, by ``id``, of tensors that hang on a graph of gradients."""
    held = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) not in ATOMS
        and name != "_modules"
        and (type(value) not in CONTAINERS or value)
    ]
    return {id(tensor): tensor.detach() for tensor in tensors_in(held) if not tensor.is_leaf}


def hears_of_training(model: nn.Module) -> bool:
    """Return whether some module does something of its own when training begins or ends."""
    kinds = {type(module) for module in model.modules()}
    bases = {base for kind in kinds for base in kind.__mro__ if is_custom(base)}
    return any("train" in vars(base) for base in bases)


def put_modes(modes: Mapping[nn.Module, bool]) -> None:
    """Put modules into training or eval mode; parents come first.

    Those that are in another are told, as by their user.
    """
    for module, mode in modes.items():
        if module.training != mode:
            module.train(mode)
    for module, mode in modes.items():
        module.training = mode


def drop_kept(network: nn.Module) -> None:
    """Let modules drop what they keep while evaluating, as they do when training begins.

    LeViT keeps a bias for each pair of positions, which would have the dense network's heads.
    """
    if not hears_of_training(network):
        return
    modes = {module: module.training for module in network.modules()}
    asking = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        network.train()
        put_modes(modes)
    except Exception:  # a user's may refuse, as fused modules do
        for module, mode in modes.items():
            module.training = mode
    for parameter, asked in asking:
        parameter.requires_grad_(asked)

"""Norms and means that see the kept channels only."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from prunegraph.graph.trace.calls import CallMode

_LAYER_NORM = ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable")
_RMS_NORM = ("input", "normalized_shape", "weight", "eps")
_NORMS: dict[object, tuple[str, ...]] = {
    torch.layer_norm: _LAYER_NORM,
    F.layer_norm: _LAYER_NORM,
    torch.rms_norm: _RMS_NORM,
    F.rms_norm: _RMS_NORM,
}
"""The names of the norms' positional arguments."""

_LAYERS = frozenset(
    getattr(owner, name)
    for owner in (torch, F)
    for name in ("conv1d", "conv2d", "conv3d", "linear", "matmul", "mm", "bmm")
    if hasattr(owner, name)
) | {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, Tensor.matmul, Tensor.__matmul__}
"""What reads weights, as the second argument."""

_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training")

_OVER_KEPT = frozenset(
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in ("mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean")
    if hasattr(owner, name)
)
"""What is taken over the kept channels alone."""


class MaskedNorm(nn.Module):
    """Wraps a norm: mean and variance are those of the kept positions, removed ones give zero.

    The wrapped module's own forward runs, so that subclasses which permute around the norm
    (torchvision's ``LayerNorm2d``) work unchanged; only the normalisation inside is replaced.

    Args:
        norm: an ``nn.LayerNorm`` or ``nn.RMSNorm`` with a weight.
        keep: axis of the weight -> ``[size]`` booleans, True = keep; axes not named stay whole.
        in_encoder: it lies in an ``nn.TransformerEncoderLayer``, which must take no fast path.
    """

    def __init__(
        self, norm: nn.Module, keep: Mapping[int, Tensor], *, in_encoder: bool = False
    ) -> None:
        super().__init__()
        self._in_encoder = in_encoder
        self.norm = norm
        weight = norm.get_parameter("weight")
        for axis, size in enumerate(weight.shape):
            kept = keep.get(axis, torch.ones(size, dtype=torch.bool, device=weight.device))
            shape = [-1 if other == axis else 1 for other in range(weight.dim())]
            self.register_buffer(f"index{axis}", kept.nonzero().view(shape), persistent=False)

    @property
    def eps(self) -> Any:
        """The norm's; NaN, equal to no other norm's, where that keeps from a fast path."""
        return math.nan if self._in_encoder else self.norm.eps

    def __getattr__(self, name: str) -> Any:
        """Return what the norm has: a forward may read its weight, or its shape."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("norm"), name)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input, of the same shape."""
        weight = self.norm.get_parameter("weight")
        index = tuple(self.get_buffer(f"index{axis}") for axis in range(weight.dim()))
        with _KeptOnly(index):
            out: Tensor = self.norm(x)
        return out


class _KeptOnly(CallMode):
    """Runs layer and RMS norms on the positions of ``index`` (an open mesh) alone."""

    def __init__(self, index: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.index = index

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func not in _NORMS:
            return func(*args, **kwargs)
        return _normed(func, dict(zip(_NORMS[func], args, strict=False)) | kwargs, self.index)


def _normed(func: Callable[..., Any], named: dict[str, Any], index: tuple[Tensor, ...]) -> Tensor:
    """Normalise over the kept positions of the last axes, an open mesh; the others are zero."""
    _take_affine(named, index)
    where: tuple[Any, ...] = (..., *index)
    x: Tensor = named["input"]
    named["input"] = x[where]
    named["normalized_shape"] = named["input"].shape[-len(index) :]
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)  # as the norms return it
    out[where] = func(**named)
    return out


def _sound(weight: Any) -> Any:
    """Return a computed weight without NaN."""
    if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter):
        return torch.where(weight.isnan(), 0, weight)
    return weight


def _take_affine(named: dict[str, Any], index: Tensor | tuple[Tensor, ...]) -> None:
    """Narrow a norm's weight and bias, where it has them, to the kept positions."""
    for name in ("weight", "bias"):
        if isinstance(named.get(name), Tensor):
            named[name] = named[name][index]


Kind = tuple[Tensor, int]
"""``[size]`` booleans of some channels, True = keep, and their axis, counted from the end."""


def mean_over_kept(module: nn.Module, *kinds: Kind) -> None:
    """Let a module's forward take its means over channels, and its group norm, over kept ones.

    Modules inside it have means of their own. A weight that it computes is zero where a removed
    row was divided by its length, zero.

    Args:
        module: changed in place; its ``forward`` is wrapped.
        kinds: of channels, told apart by their axis and number.
    """
    module.forward = _KeptForward(module.forward, _KeptMeans(kinds))


class _KeptForward:
    """A forward under a mode."""

    def __init__(self, forward: Callable[..., Any], mode: "_KeptMeans") -> None:
        self.forward, self.mode = forward, mode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.mode, self.mode.resting_inside():
            return self.forward(*args, **kwargs)


class _KeptMeans(CallMode):
    """Takes means, maxima and the like, norms, and group norms of one group over kept channels."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        super().__init__()
        self._kept = {(len(keep), axis): keep for keep, axis in kinds}
        self._depth = 0

    @contextmanager
    def resting_inside(self) -> Iterator[None]:
        """Leave the functions alone that modules call which are called while this is open."""

        def enter(*_: Any) -> None:
            self._depth += 1

        def leave(*_: Any) -> None:
            self._depth -= 1

        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(enter).remove)
            stack.callback(register_module_forward_hook(leave, always_call=True).remove)
            yield

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._depth:
            return func(*args, **kwargs)
        if func in _OVER_KEPT:
            return self._over_kept(func, args, kwargs)
        if func in _NORMS:
            return self._last_axis_norm(func, dict(zip(_NORMS[func], args, strict=False)) | kwargs)
        if func is F.multi_head_attention_forward and kwargs.get("average_attn_weights"):
            out, weights = func(*args, **kwargs | {"average_attn_weights": False})
            return out, None if weights is None else self._over_kept(torch.mean, (weights, -3), {})
        if func in _LAYERS:
            own = {name: _sound(v) if name == "weight" else v for name, v in kwargs.items()}
            return func(*args[:1], *map(_sound, args[1:2]), *args[2:], **own)
        if func is F.batch_norm:
            return self._batch_norm(func, dict(zip(_BATCH_NORM, args, strict=False)) | kwargs)
        if func in (torch.group_norm, F.group_norm):
            names = ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled")
            return self._group_norm(func, dict(zip(names, args, strict=False)) | kwargs)
        return func(*args, **kwargs)

    def _index(self, x: Tensor, axis: int) -> Tensor | None:
        """Return the kept positions of an axis, counted from the end; None if it is another."""
        keep = self._kept.get((x.shape[axis], axis))
        return None if keep is None else keep.nonzero().flatten().to(x.device)

    def _over_kept(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        x: Tensor = args[0] if args else kwargs.pop("input")
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        if dims is None or isinstance(dims, bool):  # over all; a flag of ``std`` comes first
            dims = range(-x.ndim, 0)
        if isinstance(dims, int):
            dims = [dims]
        for axis in () if isinstance(dims, Tensor) else dims:
            own = axis % x.ndim - x.ndim
            index = self._index(x, own)
            x = x if index is None else x.index_select(own, index)
        return func(x, *args[1:], **kwargs)

    def _last_axis_norm(self, func: Callable[..., Any], named: dict[str, Any]) -> Any:
        index = self._index(named["input"], -1)
        if index is None or len(named["normalized_shape"]) != 1:
            return func(**named)
        return _normed(func, named, (index,))

    def _batch_norm(self, func: Callable[..., Any], named: dict[str, Any]) -> Any:
        """Standardise weights ``[1, outputs, inputs]`` by the inputs that are kept."""
        x: Tensor = named["input"]
        index = self._index(x, -1)
        if index is None or not named.get("training"):
            return func(**named)
        return torch.zeros_like(x).index_copy(
            -1, index, func(**named | {"input": x.index_select(-1, index)})
        )

    def _group_norm(self, func: Callable[..., Any], named: dict[str, Any]) -> Any:
        x: Tensor = named["input"]
        keep = next((kept for (size, _), kept in self._kept.items() if size == x.shape[1]), None)
        if keep is None or named["num_groups"] != 1:
            return func(**named)
        index = keep.nonzero().flatten().to(x.device)
        _take_affine(named, index)
        return torch.zeros_like(x).index_copy(1, index, func(**named | {"input": x[:, index]}))

"""Where networks run in bfloat16."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_AS_ELSEWHERE: ContextVar[bool | None] = ContextVar("bfloat16", default=None)


def computes_bfloat16(device: torch.device | str) -> bool:
    """Return whether a device multiplies bfloat16 by instructions of its own.

    Where it has none it converts to float32 and back, or calls a kernel that nobody made fast: on
    CPUs without AVX-512 BF16 or AMX a training step then takes 10 to 16 times as long as in float32
    (docs/lab/trials.md). Of ARM's CPUs, oneDNN trains none fast so. Devices that torch tells
    nothing of count as having none.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        tell: Callable[[], Mapping[str, Any]] | None
        tell = getattr(torch.cpu, "get_capabilities", None)
        if tell is None:  # torch 2.10 has a private function in its place
            return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
        return any(tell().get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return kind == "cuda" and bool(torch.cuda.is_bf16_supported(including_emulation=False))


def autocasting(device: torch.device, *, wanted: bool) -> torch.autocast:
    """Return a context whose forwards run in bfloat16 if that is wanted and the device does it.

    Without gradients no copy of a weight is kept: a forward reads each about once, and the copies
    would take half of the network's memory again.
    """
    elsewhere = _AS_ELSEWHERE.get()
    able = computes_bfloat16(device) if elsewhere is None else elsewhere
    return torch.autocast(
        device.type,
        torch.bfloat16,
        enabled=wanted and able,
        cache_enabled=torch.is_grad_enabled(),
    )


@contextmanager
def as_elsewhere(*, bfloat16: bool) -> Iterator[None]:
    """Run networks in bfloat16, or not, as another device did: slowly where this one does not."""
    token = _AS_ELSEWHERE.set(bfloat16)
    try:
        yield
    finally:
        _AS_ELSEWHERE.reset(token)

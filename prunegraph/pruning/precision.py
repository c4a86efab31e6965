"""Where networks run in bfloat16."""

from collections.abc import Callable, Mapping
from typing import Any

import torch


def computes_bfloat16(device: torch.device | str) -> bool:
    """Return whether a device multiplies bfloat16 by instructions of its own.

    Where it has none it converts to float32 and back, or calls a kernel that nobody made fast: on
    CPUs without AVX-512 BF16 or AMX a training step then takes 10 to 16 times as long as in float32
    (docs/trials.md). Of ARM's CPUs, oneDNN trains none fast so. Devices that torch tells nothing of
    count as having none.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        tell: Callable[[], Mapping[str, Any]]
        tell = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.6 has none
        return any(tell().get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return kind == "cuda" and bool(torch.cuda.is_bf16_supported(including_emulation=False))


def autocasting(device: torch.device, *, wanted: bool) -> torch.autocast:
    """Return a context whose forwards run in bfloat16 if that is wanted and the device does it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and computes_bfloat16(device))

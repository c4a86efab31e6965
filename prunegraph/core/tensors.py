"""A network's tensors as safetensors: written once each, read within limits, loaded all or none."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from prunegraph.core.errors import ArtefactError
from prunegraph.core.reading import check_file

MAX_HEADER_BYTES = 100 * 10**6
"""The largest header that safetensors itself reads."""

MAX_TENSORS = 100_000
"""Tensors of a file; the largest language models have as many in all their files together."""

_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""A JSON text, or one without an end; possessive, so that no text takes more than one pass."""

MANY, SAMPLE = 1_000_000, 20_000
"""Numbers from which on a sample of so many is worth its time where one rank is looked for."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of numbers that networks are stored in."""


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the state dict (not copies); a shared one by its first name only.

    Raises:
        ArtefactError: it holds something else (``get_extra_state``), which would be lost.
    """
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor | None):
            msg = (
                f"{name} of the network's state is of type {type(value).__name__}, which a file of "
                "tensors cannot hold: make it a buffer"
            )
            raise ArtefactError(msg)
        if value is not None and id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found


def parameter_digest(model: nn.Module) -> str:
    """Return 16 hex digits that name the parameters' values; buffers do not count."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}:{tuple(parameter.shape)}:{parameter.dtype};".encode())
        flat = parameter.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def to_safetensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the tensors as the bytes of a safetensors file."""
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    content: bytes = safetensors.torch.save(copies, dict(metadata or {}))
    return content


def holds_numbers(tensor: Tensor) -> bool:
    """Tell whether a tensor holds finite real numbers of a type that networks are stored in."""
    return tensor.dtype in FLOATS and bool(torch.isfinite(tensor).all())


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        ArtefactError: the file is missing, no regular file, truncated or no safetensors file, or
            lists too many tensors.
    """
    check_file(path)
    try:
        with path.open("rb") as stream:
            _check_header(stream, path)
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
            return tensors, dict(file.metadata() or {})
    except ArtefactError:
        raise
    except Exception as error:  # a header that lies makes the reader raise about anything
        msg = f"{path} is truncated or no safetensors file ({error}): download or make it again"
        raise ArtefactError(msg) from error


def _check_header(stream: IO[bytes], path: Path) -> None:
    """Raise ArtefactError if a header lists more tensors than any file has; it is not parsed."""
    header = stream.read(min(int.from_bytes(stream.read(8), "little"), MAX_HEADER_BYTES))
    if _TEXT.sub(b"", header).count(b"{") > MAX_TENSORS:
        msg = f"{path} lists more than {MAX_TENSORS:,} tensors, which no network has: replace it"
        raise ArtefactError(msg)


def load_state(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into the network, all or none.

    Args:
        model: the network.
        tensors: one for each of ``state_tensors(model)``.
        path: the file that they came from, for messages.

    Raises:
        ArtefactError: a name, shape or type differs, or a value is NaN or infinite.
    """
    own = state_tensors(model)
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in own]
    for name in own.keys() & tensors.keys():
        have, want = tensors[name], own[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            problems.append(
                f"{name} is {tuple(have.shape)} {have.dtype}, "
                f"the network needs {tuple(want.shape)} {want.dtype}"
            )
        elif not bool((torch.isfinite(have) | (have == want)).all()):  # -inf of a causal mask
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        msg = (
            f"{path} does not fit the network: {sorted(problems)[0]} ({len(problems)} problems): "
            "use the file that was written for this network"
        )
        raise ArtefactError(msg)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _kth_least(flat: Tensor, rank: int) -> Tensor:
    """Return the number of a rank, counted from 1 = least; exact.

    Of many numbers a sample tells about where it lies, so that few have to be ordered.
    """
    if len(flat) > MANY:
        sample = flat[:: len(flat) // SAMPLE].sort().values
        near, margin = rank / len(flat) * len(sample), 4.0 * len(sample) ** 0.5
        low, high = sample[[max(int(near - margin), 0), min(int(near + margin), len(sample) - 1)]]
        below = int((flat < low).count_nonzero())
        between = flat[(flat >= low) & (flat <= high)]
        if below < rank <= below + len(between):
            return between.kthvalue(rank - below).values
    return flat.kthvalue(rank).values


def all_but_least(scores: Tensor, zeros: int) -> Tensor:
    """Return booleans of the scores' shape: False at exactly ``zeros`` of the least scores.

    Of equal ones the last go. NaN counts as infinite.
    """
    count = scores.numel() - zeros
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten().to(torch.promote_types(scores.dtype, torch.float32))
    flat = flat.nan_to_num(nan=torch.inf, posinf=torch.inf)
    least = _kth_least(flat, zeros + 1)
    keep = flat > least
    keep[(flat == least).nonzero().flatten()[: count - int(keep.count_nonzero())]] = True
    return keep.reshape(scores.shape)

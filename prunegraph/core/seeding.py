"""Random numbers of one's own, without a trace in the caller's."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, devices: Sequence[int] = ()) -> Iterator[None]:
    """Draw torch's random numbers from ``seed``; afterwards they go on as if nothing was drawn.

    Args:
        seed: of the CPU's generator and of those of ``devices``; no other is touched.
        devices: indices of CUDA devices.
    """
    with torch.random.fork_rng(devices):
        for generator in (
            torch.default_generator,
            *(torch.cuda.default_generators[index] for index in devices),
        ):
            generator.manual_seed(seed)
        yield


def derived_seed(words: str) -> int:
    """Return the seed of what words name, below 2^63: others have another one."""
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little") >> 1

"""Which prunable units stay, and keep bits as files hold them."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prunegraph.core.errors import MaskError

BoolArray = npt.NDArray[np.bool_]


IntArray = npt.NDArray[np.int64]


FloatArray = npt.NDArray[np.float32]


Float64Array = npt.NDArray[np.float64]


ByteArray = npt.NDArray[np.uint8]


def to_bytes(keep: BoolArray) -> ByteArray:
    """Return keep bits ``[N]`` eight a byte, the first the highest; the last byte ends in zeros."""
    return np.packbits(keep)


def from_bytes(packed: ByteArray, size: int) -> BoolArray:
    """Return the ``[size]`` keep bits that ``to_bytes`` wrote.

    Raises:
        ValueError: it writes other bytes for so many bits.
    """
    if packed.ndim != 1 or len(packed) != -(-size // 8):
        msg = f"{packed.size} bytes do not hold {size} bits"
        raise ValueError(msg)
    bits = np.unpackbits(packed)
    if bits[size:].any():
        msg = f"a bit is set behind the {size} bits"
        raise ValueError(msg)
    return bits[:size].astype(np.bool_)


def pack_bits(keep: BoolArray) -> str:
    """Return keep bits ``[N]`` as hex digits, eight bits a pair."""
    return to_bytes(keep).tobytes().hex()


def unpack_bits(bits: str, size: int) -> BoolArray:
    """Return the ``[size]`` keep bits that ``pack_bits`` wrote.

    Raises:
        ValueError: it writes other digits for so many bits.
    """
    return from_bytes(np.frombuffer(bytes.fromhex(bits), dtype=np.uint8), size)


@dataclass(frozen=True, eq=False, repr=False)
class ChannelMask:
    """Which prunable units stay; made by ``StructureGraph.mask``, which checks it.

    Attributes:
        keep: ``[N]`` booleans, True = keep, read-only.
    """

    keep: BoolArray

    def __post_init__(self) -> None:
        self.keep.flags.writeable = False

    @property
    def num_kept(self) -> int:
        """Number of units that stay."""
        return int(self.keep.sum())

    @property
    def density(self) -> float:
        """Share of the units that stay."""
        return self.num_kept / self.keep.size

    def nested(self, other: "ChannelMask") -> bool:
        """Return whether every unit that stays here stays in the other mask too."""
        return self._shared_with(other) == self.num_kept

    def overlap(self, other: "ChannelMask") -> float:
        """Return the share of units that both keep, of what the smaller one keeps; in [0, 1].

        It is 1 if one mask is nested in the other.
        """
        smaller = min(self.num_kept, other.num_kept)
        return self._shared_with(other) / smaller if smaller else 1.0

    def _shared_with(self, other: "ChannelMask") -> int:
        if self.keep.size != other.keep.size:
            msg = (
                f"masks of {self.keep.size} and of {other.keep.size} units belong to different "
                "networks: compare masks of one"
            )
            raise MaskError(msg)
        return int((self.keep & other.keep).sum())

    def digest(self) -> str:
        """Return 16 hex digits that name the mask."""
        packed = to_bytes(self.keep).tobytes()
        return hashlib.sha256(f"{self.keep.size}:".encode() + packed).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"ChannelMask({self.num_kept} of {self.keep.size} units, {self.digest()})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChannelMask) and np.array_equal(self.keep, other.keep)

    def __hash__(self) -> int:
        return hash(self.digest())

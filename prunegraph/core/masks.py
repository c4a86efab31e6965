"""Which prunable units stay."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]


IntArray = npt.NDArray[np.int64]


FloatArray = npt.NDArray[np.float32]


Float64Array = npt.NDArray[np.float64]


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

    def digest(self) -> str:
        """Return 16 hex digits that name the mask."""
        packed = np.packbits(self.keep).tobytes()
        return hashlib.sha256(f"{self.keep.size}:".encode() + packed).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"ChannelMask({self.num_kept} of {self.keep.size} units, {self.digest()})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChannelMask) and np.array_equal(self.keep, other.keep)

    def __hash__(self) -> int:
        return hash(self.digest())

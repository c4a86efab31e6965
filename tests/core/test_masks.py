import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunegraph.core.errors import MaskError
from prunegraph.core.masks import (
    BoolArray,
    ChannelMask,
    from_bytes,
    pack_bits,
    to_bytes,
    unpack_bits,
)

BITS = st.lists(st.booleans(), min_size=1, max_size=70).map(lambda bits: np.array(bits, dtype=bool))


@given(BITS)
def test_bits_come_back_from_bytes_and_digits(keep: BoolArray) -> None:
    packed = to_bytes(keep)
    assert len(packed) == (len(keep) + 7) // 8
    assert np.array_equal(from_bytes(packed, len(keep)), keep)
    assert np.array_equal(unpack_bits(pack_bits(keep), len(keep)), keep)
    assert unpack_bits(pack_bits(keep), len(keep)).dtype == np.bool_


def test_digits_are_those_of_older_files() -> None:
    assert pack_bits(np.array([True, False, True] + [False] * 6)) == "a000"


@pytest.mark.parametrize(
    ("digits", "size"), [("a0", 9), ("a000", 8), ("", 1), ("a1", 4), ("zz", 8), ("a", 4)]
)
def test_digits_of_other_bits_are_refused(digits: str, size: int) -> None:
    with pytest.raises(ValueError, match=r"hold|behind|hexadecimal|fromhex"):
        unpack_bits(digits, size)


@given(BITS, st.randoms(use_true_random=False))
def test_a_mask_of_fewer_units_is_nested(keep: BoolArray, random: object) -> None:
    order = list(range(len(keep)))
    random.shuffle(order)  # type: ignore[attr-defined]
    fewer = keep.copy()
    fewer[order[: len(order) // 2]] = False
    outer, inner = ChannelMask(keep), ChannelMask(fewer)
    assert inner.nested(outer)
    assert outer.nested(inner) == (outer == inner)
    assert inner.overlap(outer) == outer.overlap(inner) == 1.0
    assert outer.density == pytest.approx(keep.mean())


def test_overlap_is_the_share_of_the_smaller_mask() -> None:
    first = ChannelMask(np.array([True, True, True, False]))
    second = ChannelMask(np.array([False, True, False, True]))
    assert first.overlap(second) == 0.5
    assert not second.nested(first)
    with pytest.raises(MaskError, match="of 4 and of 3 units"):
        first.nested(ChannelMask(np.array([True] * 3)))


def test_masks_of_other_sizes_have_other_names_though_their_bits_are_packed_alike() -> None:
    short, long = np.ones(9, dtype=bool), np.array([True] * 9 + [False] * 3)
    assert np.array_equal(np.packbits(short), np.packbits(long))
    assert ChannelMask(short).digest() != ChannelMask(long).digest()
    assert ChannelMask(short) != ChannelMask(long)

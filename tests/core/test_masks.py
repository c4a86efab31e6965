import numpy as np

from prunegraph.core.masks import ChannelMask


def test_masks_of_other_sizes_have_other_names_though_their_bits_are_packed_alike() -> None:
    short, long = np.ones(9, dtype=bool), np.array([True] * 9 + [False] * 3)
    assert np.array_equal(np.packbits(short), np.packbits(long))
    assert ChannelMask(short).digest() != ChannelMask(long).digest()
    assert ChannelMask(short) != ChannelMask(long)

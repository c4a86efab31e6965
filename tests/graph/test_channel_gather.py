import copy

import torch
from torch.nn import functional as F

from prunegraph.graph.channel_gather import ZERO_CHANNEL, ChannelGather
from prunegraph.models.resnet import option_a_index


def test_gathers_channels_and_zeros() -> None:
    x = torch.arange(1.0, 4.0).view(1, 3, 1, 1)
    gather = ChannelGather(torch.tensor([ZERO_CHANNEL, 2, 0, ZERO_CHANNEL, 0]))
    assert gather(x).flatten().tolist() == [0.0, 3.0, 1.0, 0.0, 1.0]
    assert gather(x.expand(2, 3, 5, 4)).shape == (2, 5, 5, 4)


def test_equals_the_original_padding_of_option_a() -> None:
    x = torch.randn(2, 16, 4, 4)
    padded = F.pad(x, (0, 0, 0, 0, 8, 8))
    assert torch.equal(ChannelGather(option_a_index(16, 32))(x), padded)
    shifted = option_a_index(16, 32).roll(1)
    assert not torch.equal(ChannelGather(shifted)(x), padded)


def test_odd_widths_place_every_input_once() -> None:
    index = option_a_index(3, 6)
    assert sorted(index.tolist()) == [-1, -1, -1, 0, 1, 2]


def test_a_reindexed_gather_follows_removed_channels() -> None:
    # What surgery does: outputs 0 and 3 go, input 1 goes (its output reads zero), 2 becomes 1.
    x = torch.randn(1, 3, 2, 2)
    dense = ChannelGather(torch.tensor([-1, 0, 1, 2, -1, 2]))
    slim = copy.deepcopy(dense)
    slim.index = torch.tensor([0, -1, -1, 1])
    silenced = x.clone()
    silenced[:, 1] = 0
    assert torch.equal(slim(x[:, [0, 2]]), dense(silenced)[:, [1, 2, 4, 5]])


def test_index_is_no_state_and_stays_integer() -> None:
    gather = ChannelGather(torch.tensor([0, -1], dtype=torch.int32)).half()
    assert gather.state_dict() == {}
    assert gather.index.dtype == torch.int64
    assert "out_channels=2, zero_channels=1" in repr(gather)

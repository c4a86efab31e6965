import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunegraph.data.splits import stratified_cut


@settings(deadline=None)  # the machine may be busy
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_cut_divides_every_class(counts: list[int], share: float, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    index = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rest, cut = stratified_cut(labels, index, share, seed, len(counts))
    assert sorted([*rest.tolist(), *cut.tolist()]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        taken = int((labels[cut] == label).sum())
        assert abs(taken - share * count) <= 1
        assert taken < max(count, 1)
        assert taken >= min(count - 1, 1)


def test_cut_depends_on_the_seed_and_on_nothing_else() -> None:
    labels, index = torch.arange(100).remainder(4), torch.arange(100)
    first = stratified_cut(labels, index, 0.2, 0, 4)[1]
    torch.manual_seed(99)
    assert torch.equal(first, stratified_cut(labels, index, 0.2, 0, 4)[1])
    assert not torch.equal(first, stratified_cut(labels, index, 0.2, 1, 4)[1])
    assert first.tolist() != list(range(0, 100, 5))


@pytest.mark.parametrize("position", [0, 7])
def test_cut_stays_inside_the_positions_given(position: int) -> None:
    labels = torch.zeros(20, dtype=torch.int64)
    index = torch.arange(position, position + 10)
    rest, cut = stratified_cut(labels, index, 0.3, 0, 1)
    assert torch.equal(torch.cat([rest, cut]).sort().values, index)
    assert len(cut) == 3

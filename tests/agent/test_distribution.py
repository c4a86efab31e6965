import math

import pytest
import torch
from torch.distributions import Bernoulli

from prunegraph.agent.distribution import MaskedBernoulli


def make(rows: int = 3, bits: int = 10) -> tuple[MaskedBernoulli, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(rows, bits, generator=generator)
    mask = torch.rand(rows, bits, generator=generator) < 0.6
    return MaskedBernoulli(logits, mask), logits, mask


def test_entropy_at_zero_logits_counts_the_free_masks() -> None:
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, :5] = mask[1, 3:10] = True
    distribution = MaskedBernoulli(torch.zeros(2, 12), mask)
    assert distribution.entropy().exp().tolist() == pytest.approx([2**5, 2**7])
    assert distribution.mean_entropy().tolist() == pytest.approx([math.log(2)] * 2)


def test_agrees_with_torch_inside_the_mask() -> None:
    distribution, logits, mask = make()
    actions = distribution.sample(torch.Generator().manual_seed(1))
    reference = Bernoulli(logits=logits)
    expected = (reference.log_prob(actions) * mask).sum(1)
    torch.testing.assert_close(distribution.log_prob(actions), expected)
    torch.testing.assert_close(distribution.entropy(), (reference.entropy() * mask).sum(1))


def test_bits_outside_the_mask_carry_nothing() -> None:
    distribution, logits, mask = make()
    actions = distribution.sample(torch.Generator().manual_seed(1))
    flipped = torch.where(mask, actions, 1 - actions)
    other = MaskedBernoulli(torch.where(mask, logits, 9.0), mask)
    torch.testing.assert_close(distribution.log_prob(flipped), distribution.log_prob(actions))
    torch.testing.assert_close(other.log_prob(actions), distribution.log_prob(actions))
    torch.testing.assert_close(other.entropy(), distribution.entropy())
    inside = torch.where(mask, 1 - actions, actions)
    assert (distribution.log_prob(inside) != distribution.log_prob(actions)).all()


def test_mode_and_sample_keep_what_is_outside() -> None:
    distribution, logits, mask = make()
    sample = distribution.sample(torch.Generator().manual_seed(1))
    assert (distribution.mode()[~mask] == 1).all()
    assert (sample[~mask] == 1).all()
    assert ((distribution.mode() > 0) == (logits > 0))[mask].all()


def test_samples_have_their_probabilities() -> None:
    logits = torch.tensor([-2.0, 0.0, 1.0]).repeat(20_000, 1)
    mask = torch.ones_like(logits, dtype=torch.bool)
    sample = MaskedBernoulli(logits, mask).sample(torch.Generator())
    torch.testing.assert_close(sample.mean(0), torch.sigmoid(logits[0]), atol=0.015, rtol=0)


def test_noise_does_not_depend_on_how_rows_are_split() -> None:
    distribution, logits, mask = make(rows=6)
    whole = distribution.sample(torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    parts = [
        MaskedBernoulli(logits[rows], mask[rows]).sample(generator)
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_a_row_without_free_bits_is_finite() -> None:
    distribution = MaskedBernoulli(torch.zeros(1, 4), torch.zeros(1, 4) > 0)
    assert distribution.mean_entropy().item() == 0.0
    assert distribution.log_prob(torch.ones(1, 4)).item() == 0.0


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[200.0, -200.0]])
    distribution = MaskedBernoulli(logits, torch.ones(1, 2) > 0)
    assert distribution.log_prob(torch.tensor([[1.0, 0.0]])).item() == 0.0
    assert distribution.log_prob(torch.tensor([[0.0, 0.0]])).item() == pytest.approx(-200.0)

"""Layers of neurons are fitted by least squares and ADMM."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prunegraph.layerwise.admm import Neurons, Rows, _inner, admm_round, biased, fit_neurons

ACTIVATIONS = [F.silu, F.gelu, F.relu]


def layer(
    activation: Callable[[Tensor], Tensor], *, gated: bool, bias: bool = False
) -> tuple[Neurons, Rows, Rows]:
    """A layer that has lost half of its neurons, and what the whole one gives."""
    generator = torch.Generator().manual_seed(0)
    extra = int(bias)
    gate, up = (torch.randn(40, 12 + extra, generator=generator) / 3 for _ in range(2))
    down = torch.randn(10, 40 + extra, generator=generator) / 6
    inputs = torch.randn(3000, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    inputs = biased(inputs / 3, gate)
    whole = Neurons(gate=gate, up=up if gated else None, down=down, activation=activation)
    wanted = biased(whole.hidden(inputs), down) @ down.T
    columns = torch.arange(40 + extra) >= 20
    left = Neurons(
        gate=gate[20:],
        up=up[20:] if gated else None,
        down=down[:, columns],
        activation=activation,
    )
    rows = Rows(inputs=inputs, wanted=wanted, scale=torch.ones(3000, 1))
    return left, *rows.parted(2 / 3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rounds_are_better_than_least_squares(
    activation: Callable[[Tensor], Tensor], gated: bool, bias: bool
) -> None:
    own, rows, held_out = layer(activation, gated=gated, bias=bias)
    none = held_out.error(own.down, own.hidden(held_out.inputs))
    fitted, errors = fit_neurons(own, rows, held_out, rounds=6)
    assert errors[0] < 0.8 * none
    assert errors[-1] < 0.9 * errors[0] or min(errors) < 0.9 * errors[0]
    found = held_out.error(fitted.down, fitted.hidden(held_out.inputs))
    assert found == pytest.approx(min(errors))
    assert (fitted.up is None) == (not gated)
    assert fitted.down.shape == own.down.shape


def test_it_stops_where_held_out_rows_get_worse() -> None:
    own, rows, held_out = layer(F.silu, gated=True)
    few = rows[:30]  # fewer rows than weights: rounds follow their noise
    fitted, errors = fit_neurons(own, few, held_out, rounds=20)
    assert len(errors) < 21
    assert errors[-1] >= errors[-2]
    assert held_out.error(fitted.down, fitted.hidden(held_out.inputs)) == pytest.approx(errors[-2])


def test_least_squares_takes_the_weights_of_rows() -> None:
    own, rows, _ = layer(F.silu, gated=True)
    hidden = own.hidden(rows.inputs)
    scale = torch.where(torch.arange(2000)[:, None] < 1000, 1.0, 1e-3)
    noisy = rows.wanted.clone()
    noisy[1000:] += 10.0
    trusting = Rows(inputs=rows.inputs, wanted=noisy, scale=scale)
    weighted = trusting.refitted(own.down, hidden)
    clean = rows[:1000].refitted(own.down, hidden[:1000])
    blind = Rows(inputs=rows.inputs, wanted=noisy, scale=torch.ones_like(scale))
    assert (weighted - clean).norm() < 0.05 * (blind.refitted(own.down, hidden) - clean).norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_newton_steps_lower_what_they_minimise(activation: Callable[[Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    start, factor, hidden = (torch.randn(50, 7, generator=generator) for _ in range(3))

    def energy(inner: Tensor) -> float:
        made = activation(inner) * factor
        return float((inner - start).square().sum() + (made - hidden).square().sum())

    assert energy(_inner(activation, start, factor, hidden)) < 0.9 * energy(start)


def test_a_whole_layer_stays_as_it_is() -> None:
    own, rows, held_out = layer(F.silu, gated=True)
    wanted = [each.inputs for each in (rows, held_out)]
    exact = [
        Rows(inputs=each.inputs, wanted=own.hidden(inputs) @ own.down.T, scale=each.scale)
        for each, inputs in zip((rows, held_out), wanted, strict=True)
    ]
    changed = admm_round(own, exact[0])
    assert exact[1].error(changed.down, changed.hidden(exact[1].inputs)) < 1e-6

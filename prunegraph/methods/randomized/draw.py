"""Random masks: which weights stay, and how many of each layer.

After *Breaking through Deterministic Barriers: Randomized Pruning Mask Generation and Selection*
(Li et al. 2023, arXiv 2310.13183). It draws ``k`` of the weights without replacement, with a chance
that grows as a power of their absolute value, ``T`` times, and keeps the ``k`` most drawn ones.
The closed form of that is ours, and so are random shares of the layers.
"""

from collections.abc import Mapping

import numpy as np

from prunegraph.core.extras import Late
from prunegraph.core.masks import BoolArray, Float64Array

optimize = Late("scipy.optimize")

SURE = 50.0
"""``exp(-exp(50))`` is 0."""


def inclusion(magnitudes: Float64Array, keep: int, exponent: float) -> Float64Array:
    """Return the chance of each weight to be among ``keep`` that are drawn one after another.

    Weight i waits for an exponential time of rate ``p_i = |w_i|^exponent / sum``; the first
    ``keep`` are drawn. That many have come at about one time, ``tau``, so the chance is
    ``1 - exp(-p_i tau)``, and all chances sum to ``keep``.

    Args:
        magnitudes: ``[n]`` absolute values.
        keep: how many are drawn, at most n.
        exponent: 0 = all alike.

    Returns:
        ``[n]`` in [0, 1].
    """
    with np.errstate(divide="ignore"):  # as logarithms, large exponents do not underflow
        rates = exponent * np.log(magnitudes) if exponent else np.zeros_like(magnitudes)
    drawn = (rates > -np.inf) & (keep > 0)  # zeros never are
    if np.count_nonzero(drawn) <= keep:
        return drawn.astype(np.float64)
    rates -= rates.max()

    def chances(log_tau: float) -> Float64Array:
        return -np.expm1(-np.exp(np.minimum(rates + log_tau, SURE)))

    first = np.log(keep) - np.log(np.exp(rates).sum())  # 1 - exp(-x) <= x
    last = first + 1.0
    while chances(last).sum() < keep:
        last += last - first
    return chances(optimize.brentq(lambda tau: chances(tau).sum() - keep, first, last, xtol=1e-9))


def most_drawn(
    chances: Float64Array, keep: int, draws: int, generator: np.random.Generator
) -> BoolArray:
    """Return ``[n]`` booleans: True at the ``keep`` weights that so many draws hit most often.

    Each draw hits weight i with its own chance, so its hits follow a binomial law. Equal numbers of
    hits are told apart by chance. A single draw needs no law: the first to come are drawn.
    """
    if draws == 1:
        with np.errstate(divide="ignore"):  # chances of 1 and 0 come at once and never
            hits = -np.log1p(-chances) / generator.exponential(size=len(chances))
    else:
        hits = generator.binomial(draws, chances) + generator.random(len(chances))
    kept = np.zeros(len(chances), dtype=np.bool_)
    if keep:
        kept[np.argpartition(-hits, keep - 1)[:keep]] = True
    return kept


def largest(magnitudes: Float64Array, keep: int) -> BoolArray:
    """Return ``[n]`` booleans: True at the ``keep`` largest; of equal ones the first stay."""
    kept = np.zeros(len(magnitudes), dtype=np.bool_)
    kept[np.argsort(-magnitudes, kind="stable")[:keep]] = True
    return kept


def divide_kept(
    shares: Mapping[str, float], alive: Mapping[str, int], total: int
) -> dict[str, int]:
    """Return how many weights of each layer stay, ``total`` in all.

    As many as its share asks for, at most those that it has, at least one. By largest remainders.

    Args:
        shares: of each layer, in any unit, positive.
        alive: weights that each has.
        total: at least one a layer, at most all.
    """
    names = list(shares)
    share = np.array([shares[name] for name in names], dtype=np.float64)
    most = np.array([alive[name] for name in names], dtype=np.float64)
    least = np.minimum(most, 1.0)

    def wanted(scale: float) -> Float64Array:
        return np.clip(scale * share, least, most)

    top = float((most / share).max())
    scale = (
        top if total >= most.sum() else optimize.brentq(lambda s: wanted(s).sum() - total, 0.0, top)
    )
    exact = wanted(scale)
    kept = np.floor(exact)
    while (missing := round(total - kept.sum())) > 0:
        order = np.argsort(np.where(kept < most, kept - exact, np.inf), kind="stable")
        kept[order[: min(missing, int((kept < most).sum()))]] += 1.0
    return {name: int(count) for name, count in zip(names, kept, strict=True)}


def selection_gain(early: Float64Array, final: Float64Array) -> list[float]:
    """Return the mean final loss of the best of k candidates by early loss, for k = 1 to all.

    Over all ways to draw k of them: the one of rank r is the best with chance
    ``C(K - r, k - 1) / C(K, k)``.

    Args:
        early: ``[K]`` losses after the short training.
        final: ``[K]`` losses after the whole one.
    """
    ordered, number = final[np.argsort(early, kind="stable")], len(final)
    found = []
    for drawn in range(1, number + 1):
        chance, left, value = drawn / number, 1.0, 0.0
        for rank in range(number):
            value += left * chance * float(ordered[rank])
            left *= 1.0 - chance
            others = number - rank - 1
            chance = min(drawn / others, 1.0) if others else 1.0
        found.append(value)
    return found

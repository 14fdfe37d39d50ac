"""Rank correlations, how sure they are, and which of two is stronger."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lowland.pages import p_value

Array = NDArray[np.float64]

FEWEST = 5
"""With fewer pairs than this there is no correlation to speak of."""


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation.

    Attributes:
        rho: The correlation; NaN where a side does not vary, or pairs are too few.
        p: Of the hypothesis that there is none, two-sided.
        low, high: The middle 95 % of bootstrap samples.
        count: Pairs.
    """

    rho: float
    p: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        """``ρ = +0.37 [+0.19, +0.53], p < 0.001``."""
        if math.isnan(self.rho):
            return "ρ not defined"
        test = "" if math.isnan(self.p) else f", {p_value(self.p)}"
        return f"ρ = {self.rho:+.2f} [{self.low:+.2f}, {self.high:+.2f}]{test}"


def spearman(x: Array, y: Array, *, resamples: int, clusters: Array | None = None) -> Correlation:
    """The rank correlation of pairs; those in which a side is no number are left out.

    Args:
        x: One side.
        y: The other.
        resamples: Bootstrap samples for the interval.
        clusters: Of each pair what it hangs together with: whole clusters are drawn then, and there
            is no p-value, which would take the pairs to be independent.
    """
    whole = np.isfinite(x) & np.isfinite(y)
    x, y = x[whole], y[whole]
    if len(x) < FEWEST or not np.ptp(x) or not np.ptp(y):
        return Correlation(math.nan, math.nan, math.nan, math.nan, len(x))
    test = stats.spearmanr(x, y)
    drawn = _draws(len(x), resamples, None if clusters is None else clusters[whole])
    low, high = np.nanquantile([_rho(x[own], y[own]) for own in drawn], [0.025, 0.975])
    p = test.pvalue if clusters is None else math.nan
    return Correlation(float(test.statistic), float(p), float(low), float(high), len(x))


def lead(
    x: Array, rival: Array, y: Array, *, resamples: int, clusters: Array | None = None
) -> tuple[float, float, float]:
    """By how much ``|rho(x, y)|`` is larger than a rival's, and the bootstrap's middle 95 %."""
    whole = np.isfinite(x) & np.isfinite(rival) & np.isfinite(y)
    x, rival, y = x[whole], rival[whole], y[whole]
    if len(x) < FEWEST:
        return math.nan, math.nan, math.nan

    def difference(own: NDArray[np.intp]) -> float:
        return abs(_rho(x[own], y[own])) - abs(_rho(rival[own], y[own]))

    drawn = _draws(len(x), resamples, None if clusters is None else clusters[whole])
    low, high = np.nanquantile([difference(own) for own in drawn], [0.025, 0.975])
    return difference(np.arange(len(x))), float(low), float(high)


def _rho(x: Array, y: Array) -> float:
    """Of a sample, in which one value may be all there is."""
    ranks = stats.rankdata(np.stack([x, y]), axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    size = np.linalg.norm(ranks, axis=1)
    return float(ranks[0] @ ranks[1] / size.prod()) if size.all() else math.nan


def _draws(count: int, resamples: int, clusters: Array | None) -> list[NDArray[np.intp]]:
    random = np.random.default_rng(0)
    if clusters is None:
        return list(random.integers(0, count, (resamples, count)))
    members = [np.flatnonzero(clusters == own) for own in np.unique(clusters)]
    chosen = random.integers(0, len(members), (resamples, len(members)))
    return [np.concatenate([members[own] for own in row]) for row in chosen]

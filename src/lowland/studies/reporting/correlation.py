"""Rank correlations, how sure they are, and which of two is stronger."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lowland.studies.reporting.pages import p_value

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
    drawn = _resampled(np.stack([x, y]), resamples, None if clusters is None else clusters[whole])
    low, high = np.nanquantile(_rho(drawn[0], drawn[1]), [0.025, 0.975])
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

    def difference(rows: Array) -> Array:
        margin: Array = np.abs(_rho(rows[0], rows[2])) - np.abs(_rho(rows[1], rows[2]))
        return margin

    rows = np.stack([x, rival, y])
    drawn = _resampled(rows, resamples, None if clusters is None else clusters[whole])
    low, high = np.nanquantile(difference(drawn), [0.025, 0.975])
    return difference(rows[:, None]).item(), float(low), float(high)


def _rho(x: Array, y: Array) -> Array:
    """Of each row, without the entries that are no number; NaN where a side does not vary."""
    ranks = []
    for side in (x, y):
        rank = stats.rankdata(side, axis=1, nan_policy="omit")
        rank -= np.nanmean(rank, axis=1, keepdims=True)
        ranks.append(np.nan_to_num(rank))
    first, second = ranks
    size = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    with np.errstate(invalid="ignore"):  # no correlation where nothing varies
        rho: Array = (first * second).sum(1) / size
    return rho


def _resampled(rows: Array, resamples: int, clusters: Array | None) -> Array:
    """Bootstrap samples of columns, or of clusters of them: ``(rows, resamples, columns)``.

    Samples of clusters are filled up with NaN to one length.
    """
    random = np.random.default_rng(0)
    if clusters is None:
        return rows[:, random.integers(0, rows.shape[1], (resamples, rows.shape[1]))]
    names, own = np.unique(clusters, return_inverse=True)
    largest = np.bincount(own).max()
    table = np.full((len(rows), len(names), largest), np.nan)
    for index in range(len(names)):
        members = rows[:, own == index]
        table[:, index, : members.shape[1]] = members
    chosen = random.integers(0, len(names), (resamples, len(names)))
    return table[:, chosen].reshape(len(rows), resamples, -1)

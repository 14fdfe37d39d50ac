"""Statistical tests: when a difference is called one, and how sure a correlation is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from lowland.studies.reporting.numbers import p_value

Array = NDArray[np.float64]

SIGNIFICANCE = 0.05
"""P-values below this are called a difference."""

FEWEST = 5
"""With fewer pairs than this there is no correlation to speak of."""


# Several p-values


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number.

    References:
        S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of
        Statistics 6 (1979).
    """
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    stepped = np.maximum.accumulate(factors * np.asarray(p_values)[order])
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted.tolist()


def largest(p_values: Iterable[float]) -> float:
    """The p-value of a claim that needs every one of several tests; NaN if one of theirs is."""
    return float(np.max(list(p_values)))


# Differences


def paired_test(differences: NDArray[np.float64], test_fraction: float) -> float:
    r"""The two-sided p-value of the corrected resampled t-test.

    Random splits overlap, so differences are not independent and the ordinary paired t-test finds
    too much. The correction widens the variance of the mean of ``J`` differences:

    .. math:: t = \bar d / \sqrt{(1/J + n_\mathrm{test} / n_\mathrm{train})\, s_d^2}

    with ``J - 1`` degrees of freedom.

    Args:
        differences: One per split, method minus baseline.
        test_fraction: ``n_test / n_train``.

    References:
        C. Nadeau and Y. Bengio, Inference for the generalization error, Machine Learning 52 (2003).
    """
    count = len(differences)
    mean, variance = differences.mean(), differences.var(ddof=1)
    if variance == 0:  # then t is 0 / 0 or infinite
        return 1.0 if mean == 0 else 0.0
    t = mean / math.sqrt((1 / count + test_fraction) * variance)
    return float(2 * stats.t.sf(abs(t), count - 1))


def paired_greater(left: Array, right: Array, test_fraction: float) -> float:
    """The one-sided p-value of :func:`paired_test` that ``left`` exceeds ``right``.

    NaN where a difference is no number, as where training failed.
    """
    differences = left - right
    if not np.isfinite(differences).all():
        return math.nan
    p = paired_test(differences, test_fraction)
    return p / 2 if differences.mean() > 0 else 1 - p / 2


def signed_rank_greater(left: Array, right: Array) -> float:
    """The one-sided p-value of Wilcoxon's signed-rank test that ``left`` exceeds ``right``."""
    if np.array_equal(left, right):
        return 1.0
    return float(stats.wilcoxon(left, right, alternative="greater").pvalue)


def rank_sum_less(left: Array, right: Array) -> float:
    """The one-sided p-value of the Mann-Whitney test that ``left`` lies below ``right``."""
    return float(stats.mannwhitneyu(left, right, alternative="less").pvalue)


def sign_test(count: int, trials: int) -> float:
    """The one-sided p-value that more than half of all trials would end as ``count`` did."""
    return float(stats.binomtest(count, trials, alternative="greater").pvalue)


def equivalent(differences: Array, margin: float) -> float:
    """The p-value that the mean of paired differences lies beyond a margin on either side.

    Two one-sided t-tests: what is alike has to be shown, not only left unrefuted. NaN where there
    are fewer than two differences.
    """
    if len(differences) < 2:
        return math.nan
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    distance = margin - abs(differences.mean())
    if not error:
        return 0.0 if distance > 0 else 1.0
    return float(stats.t.sf(distance / error, len(differences) - 1))


def all_equivalent(groups: Iterable[Array], margin: float) -> float:
    """The p-value that some two of several paired groups differ by more than a margin."""
    return largest(equivalent(left - right, margin) for left, right in combinations(groups, 2))


def welch(left: Array, right: Array) -> tuple[float, float, float]:
    """By how much the mean of ``left`` is larger, its standard error, and Welch's p-value."""
    error = math.hypot(*(float(stats.sem(values)) for values in (left, right)))
    test = stats.ttest_ind(left, right, equal_var=False)
    return float(left.mean() - right.mean()), error, float(test.pvalue)


def shrinks(before: tuple[float, float], after: tuple[float, float]) -> float:
    """The one-sided p-value that an effect has lost size; each with its standard error."""
    (effect, error), (other, other_error) = before, after
    return float(stats.norm.sf((abs(effect) - abs(other)) / math.hypot(error, other_error)))


def interval(values: pd.Series[float], level: float = 0.95) -> tuple[float, float, float]:
    """The mean, and both ends of Student's confidence interval; NaN where there are too few."""
    if len(values) < 2:
        return float(values.mean()) if len(values) else math.nan, math.nan, math.nan
    error = values.std() / len(values) ** 0.5
    reach = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * error)
    return float(values.mean()), float(values.mean()) - reach, float(values.mean()) + reach


# Rank correlations


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
    """The rank correlation of each row; entries that are no number are left out."""
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

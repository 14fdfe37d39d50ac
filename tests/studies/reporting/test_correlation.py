import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lowland.studies.reporting.correlation import lead, spearman


def noisy(count, noise, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=count)
    return x, x + noise * random.normal(size=count)


@given(st.integers(5, 40), st.floats(0, 5), st.integers(0, 1000))
def test_the_correlation_and_its_p_value_are_scipys(count, noise, seed):
    x, y = noisy(count, noise, seed)
    found, expected = spearman(x, np.round(y), resamples=100), stats.spearmanr(x, np.round(y))
    assert found.count == count
    assert (found.rho, found.p) == pytest.approx(tuple(expected), nan_ok=True)
    if not math.isnan(found.rho):
        assert found.low <= found.high


def test_the_interval_is_the_bootstraps():
    x, y = noisy(80, 1.5)
    found = spearman(x, y, resamples=4000)
    expected = stats.bootstrap(
        (x, y),
        lambda a, b: stats.spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=1000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.04)
    assert str(found) == (f"ρ = {found.rho:+.2f} [{found.low:+.2f}, {found.high:+.2f}], p < 0.001")


def test_what_is_no_number_is_left_out():
    x, y = noisy(30, 1)
    holes = np.append(x, [np.nan, 1.0]), np.append(y, [2.0, np.inf])
    assert spearman(*holes, resamples=100) == spearman(x, y, resamples=100)


@pytest.mark.parametrize("y", [np.ones(9), np.arange(4.0)])
def test_no_correlation_is_made_up_where_there_is_none(y):
    found = spearman(np.arange(float(len(y))), y, resamples=100)
    assert math.isnan(found.rho)
    assert str(found) == "ρ not defined"


def test_copies_of_a_point_make_nothing_surer():
    """Every pair four times: the interval of clusters is that of the pairs themselves."""
    x, y = noisy(25, 1.5)
    clusters = np.repeat(np.arange(25.0), 4)
    alone = spearman(x, y, resamples=3000)
    copied = spearman(np.repeat(x, 4), np.repeat(y, 4), resamples=3000, clusters=clusters)
    naive = spearman(np.repeat(x, 4), np.repeat(y, 4), resamples=3000)
    assert copied.rho == pytest.approx(alone.rho)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))
    assert naive.high - naive.low < 0.7 * (copied.high - copied.low)
    assert math.isnan(copied.p)


def test_clusters_may_differ_in_size():
    x, y = noisy(30, 0.5)
    clusters = np.repeat(np.arange(5.0), [1, 2, 3, 4, 20])
    found = spearman(x, y, resamples=500, clusters=clusters)
    assert found.low < found.rho < found.high <= 1


def test_the_stronger_of_two_leads_whatever_its_sign():
    x, y = noisy(200, 0.3)
    rival = np.random.default_rng(5).normal(size=200)
    margin, low, high = lead(-x, rival, y, resamples=500)
    assert 0 < low < margin < high
    margin, low, high = lead(rival, -x, y, resamples=500)
    assert low < margin < high < 0
    assert all(map(math.isnan, lead(x[:3], rival[:3], y[:3], resamples=100)))

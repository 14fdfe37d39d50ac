import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lowland.studies.reporting.statistics import (
    all_equivalent,
    equivalent,
    holm,
    interval,
    largest,
    lead,
    paired_greater,
    paired_test,
    shrinks,
    sign_test,
    signed_rank_greater,
    spearman,
    welch,
)


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


def test_the_corrected_t_test_is_that_of_nadeau_and_bengio():
    differences = np.array([1.0, 2.0, 3.0, 6.0])
    # Mean 3, variance 14/3, and (1/4 + 1/2) * 14/3 = 3.5 under the root.
    expected = 2 * stats.t.sf(3 / math.sqrt(3.5), 3)
    assert paired_test(differences, 0.5) == pytest.approx(expected)
    assert paired_test(-differences, 0.5) == pytest.approx(expected)
    # Without overlap it is the ordinary paired test.
    assert paired_test(differences, 0.0) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)


def test_the_test_knows_equal_and_constant_differences():
    assert paired_test(np.zeros(5), 0.3) == 1.0
    assert paired_test(np.ones(5), 0.3) == 0.0


@pytest.mark.parametrize(
    ("raw", "adjusted"),
    [
        ([], []),
        ([0.02], [0.02]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.04, 0.01], [0.04, 0.02]),
        ([0.5, 0.6, 0.001], [1.0, 1.0, 0.003]),
    ],
)
def test_holm_by_hand(raw, adjusted):
    assert holm(raw) == pytest.approx(adjusted)


def test_the_interval_is_students():
    values = pd.Series(np.random.default_rng(0).normal(1, 2, 12))
    middle, low, high = interval(values)
    assert middle == values.mean()
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose([low, high], [expected.low, expected.high])
    assert np.isnan(interval(values[:1])[1:]).all()


def test_a_one_sided_test_is_half_of_the_two_sided_one():
    left, right = np.array([2.0, 3.0, 5.0, 4.0]), np.array([1.0, 2.5, 3.0, 4.5])
    both = paired_test(left - right, 0.5)
    assert paired_greater(left, right, 0.5) == pytest.approx(both / 2)
    assert paired_greater(right, left, 0.5) == pytest.approx(1 - both / 2)
    assert math.isnan(paired_greater(left, np.array([1.0, np.nan, 3.0, 4.0]), 0.5))


def test_equal_groups_are_neither_greater_nor_different():
    values = np.array([1.0, 2.0, 3.0])
    assert signed_rank_greater(values, values) == 1.0
    assert (
        signed_rank_greater(values + 1, values)
        == stats.wilcoxon([1.0] * 3, alternative="greater")[1]
    )
    assert equivalent(values - values, 0.1) == 0.0
    assert equivalent(np.full(3, 0.2), 0.1) == 1.0
    assert math.isnan(equivalent(np.array([0.0]), 0.1))


def test_every_pair_of_groups_has_to_be_alike():
    random = np.random.default_rng(0)
    groups = [random.normal(0, 0.01, 30) for _ in range(3)]
    assert all_equivalent(groups, 0.1) < 1e-6
    assert all_equivalent([*groups, groups[0] + 0.2], 0.1) > 0.9
    assert math.isnan(largest([0.1, math.nan]))


def test_equivalence_is_two_one_sided_t_tests():
    differences = np.random.default_rng(1).normal(0.02, 0.1, 20)
    sides = [
        stats.ttest_1samp(differences, -0.1, alternative="greater").pvalue,
        stats.ttest_1samp(differences, 0.1, alternative="less").pvalue,
    ]
    assert equivalent(differences, 0.1) == pytest.approx(max(sides))


def test_welchs_test_and_an_effect_that_shrinks():
    left, right = np.array([2.0, 3.0, 5.0, 4.0]), np.array([1.0, 2.0, 1.5])
    gain, error, p = welch(left, right)
    assert gain == pytest.approx(2.0)
    assert gain / error == pytest.approx(stats.ttest_ind(left, right, equal_var=False).statistic)
    assert p == stats.ttest_ind(left, right, equal_var=False).pvalue
    assert shrinks((-2.0, 0.3), (1.0, 0.4)) == pytest.approx(stats.norm.sf(2.0))
    assert sign_test(9, 10) == pytest.approx(11 / 1024)

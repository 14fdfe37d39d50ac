import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import linprog

from lowland import HessianMoments, brackets

# What rounding may cost a bound, as a share of the largest magnitude: where all eigenvalues are
# nearly equal, the square root of what the moments are rounded to.
ROUNDING = {torch.float64: 1e-7, torch.float32: 3e-3}

VALUE = st.floats(-5, 5).map(lambda value: round(value, 3))


@st.composite
def values(draw):
    """Eigenvalues in any order: random, of two or three values, nearly equal, bulk and outliers."""
    dim = draw(st.integers(1, 12) | st.sampled_from([50, 400]), label="dim")
    kind = draw(st.sampled_from(["random", "few", "nearly equal", "bulk"]))
    if kind == "few":
        levels = draw(st.lists(VALUE, min_size=1, max_size=3))
        cuts = draw(st.lists(st.integers(0, dim), min_size=2, max_size=2).map(sorted))
        level = np.searchsorted(cuts, np.arange(dim), side="right") % len(levels)
        return torch.tensor(levels, dtype=torch.float64)[level]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32), label="seed"))
    noise = torch.randn(dim, generator=generator, dtype=torch.float64)
    if kind == "random":
        return noise * noise.abs() ** draw(st.sampled_from([0, 1, 4]))
    small = 10 ** draw(st.floats(-12, 0), label="exponent") * noise
    if kind == "nearly equal":
        return draw(VALUE) + small
    outliers = draw(st.lists(VALUE, min_size=1, max_size=min(3, dim)))
    small[: len(outliers)] = torch.tensor(outliers, dtype=torch.float64)
    return small


@st.composite
def spectra(draw):
    """Eigenvalues in descending order, of any scale, in float64 or float32."""
    scale = draw(st.sampled_from([1e-8, 1.0, 1e8]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    return (scale * draw(values())).to(dtype).sort(descending=True).values


def some_of(dim):
    """All ``k`` of a small spectrum, the ends and the middle of a large one."""
    return sorted({*range(1, 9), dim // 2, dim - 1, dim} & {*range(1, dim + 1)})


def of(eigenvalues):
    """Moments of a spectrum, or of several, one a row."""
    first, second, third, fourth = (eigenvalues.pow(power).sum(-1) for power in (1, 2, 3, 4))
    return HessianMoments(eigenvalues.shape[-1], first, second, higher=(third, fourth))


def spectrum(*pairs):
    """Eigenvalues from pairs of a value and its multiplicity."""
    parts = [torch.full((times,), value, dtype=torch.float64) for value, times in pairs]
    return torch.cat(parts).sort(descending=True).values


@given(spectra())
def test_every_eigenvalue_lies_in_its_bracket(eigenvalues):
    moments = of(eigenvalues)
    rounding = ROUNDING[eigenvalues.dtype] * eigenvalues.abs().max()
    for k in some_of(moments.dim):
        low, high = moments.bracket(k, moments=4)
        assert low - rounding <= eigenvalues[k - 1] <= high + rounding


@given(spectra())
def test_four_moments_are_never_wider_than_two(eigenvalues):
    moments = of(eigenvalues)
    for k in some_of(moments.dim):
        low, high = moments.bracket(k)
        narrow_low, narrow_high = moments.bracket(k, moments=4)
        assert low <= narrow_low <= narrow_high <= high


@given(
    st.lists(VALUE, min_size=3, max_size=3, unique=True).map(sorted).filter(
        lambda levels: min(levels[1] - levels[0], levels[2] - levels[1]) > 0.1
    ),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 20),
)  # fmt: skip
def test_spectra_of_three_values_attain_the_bounds(levels, bottom, middle, top):
    eigenvalues = spectrum(*zip(levels, (bottom, middle, top), strict=True))
    moments, close = of(eigenvalues), {"abs": 1e-6}
    # The most mass on [x, oo) is what they have there, and so on either side.
    for k, level in ((top, 2), (top + middle, 1)):
        assert float(moments.bracket(k, 4)[1]) == pytest.approx(levels[level], **close)
        assert float(moments.bracket(k + 1, 4)[0]) == pytest.approx(levels[level - 1], **close)
    if bottom == 1:  # so the prescribed node is an eigenvalue, and the rule is the spectrum
        assert float(moments.bracket(1, 4)[0]) == pytest.approx(levels[2], **close)
    if top == 1:
        assert float(moments.bracket(moments.dim, 4)[1]) == pytest.approx(levels[0], **close)


@pytest.mark.parametrize("top", [1, 2, 5, 8, 9])
def test_two_values_are_known(top):
    eigenvalues = spectrum((3.0, top), (-1.0, 10 - top))
    for k, eigenvalue in enumerate(eigenvalues, start=1):
        for end in of(eigenvalues).bracket(k, moments=4):
            torch.testing.assert_close(end, eigenvalue, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_no_distribution_of_these_moments_reaches_further(seed):
    # The most mass that [x, oo) can have is a linear program over distributions on a grid.
    rng = np.random.default_rng(seed)
    eigenvalues = rng.normal(size=int(rng.integers(4, 9))) ** 3
    moments = of(torch.from_numpy(eigenvalues))
    mean, std = eigenvalues.mean(), eigenvalues.std()
    x = (eigenvalues - mean) / std
    grid = np.sort(np.concatenate([np.linspace(-8, 8, 4001), x]))
    powers = np.arange(5)[:, None]

    def most_mass(start):
        given_moments = (x**powers).mean(1)
        weights = linprog(-(grid >= start).astype(float), A_eq=grid**powers, b_eq=given_moments)
        return -weights.fun

    for k in range(1, moments.dim):
        end = (float(moments.bracket(k, moments=4)[1]) - mean) / std
        assert most_mass(end + 0.001) < k / moments.dim
        assert most_mass(end - 0.02) > k / moments.dim


@given(st.integers(2, 60), st.data(), st.floats(-5, 5))
def test_without_the_second_polynomial_the_brackets_are_wolkowicz_and_styans(dim, data, skewness):
    k = data.draw(st.integers(1, dim - 1), label="k")
    # An infinite fourth moment tells nothing.
    skewness, excess = torch.tensor([skewness, 1e14], dtype=torch.float64)
    end = brackets._kth_at_most(k, dim, skewness, excess)
    assert float(end) == pytest.approx(math.sqrt((dim - k) / k), rel=1e-6)
    # With the smallest eigenvalue's bound -sqrt(P - 1) as its node, Gauss and Radau's other one.
    node = -brackets._farthest(1, dim, -skewness, excess)
    other, _ = brackets._other_nodes(node, skewness, excess)
    assert float(other) == pytest.approx(1 / math.sqrt(dim - 1), rel=1e-6)


def test_outliers_are_told_from_the_bulk():
    # As in trained networks: a bulk near zero, a few large eigenvalues.
    eigenvalues = spectrum((10.0, 1), (4.0, 1), (2.0, 2), (0.02, 500), (-0.01, 496))
    moments = of(eigenvalues)
    (low, high), (narrow_low, narrow_high) = moments.bracket(1), moments.bracket(1, moments=4)
    assert high / 10 > 1.1
    assert narrow_high / 10 < 1.01
    assert low / 10 < 0.1
    assert narrow_low / 10 > 0.8


def test_brackets_of_an_ensemble_are_those_of_its_members():
    generator = torch.Generator().manual_seed(0)
    eigenvalues = torch.randn(2, 3, 9, generator=generator, dtype=torch.float64).pow(3)
    eigenvalues[0, 0] = 0  # without spread, and so without a third and a fourth moment
    eigenvalues[0, 1] = 1e-30 * eigenvalues[0, 2]
    for k in range(1, 10):
        together = torch.stack(of(eigenvalues).bracket(k, moments=4))
        assert together.shape == (2, 2, 3)
        for i in range(2):
            for j in range(3):
                alone = torch.stack(of(eigenvalues[i, j]).bracket(k, moments=4))
                torch.testing.assert_close(together[:, i, j], alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("value", [0.0, 1e-8, 0.1, -3.0, 1e8])
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_without_spread_the_eigenvalue_is_known(dim, value, dtype):
    eigenvalues = torch.full((dim,), value, dtype=dtype)
    rounding = ROUNDING[dtype] * abs(value)
    for k in range(1, dim + 1):
        for end in of(eigenvalues).bracket(k, moments=4):
            assert abs(end - eigenvalues[0]) <= rounding


@pytest.mark.parametrize(
    "higher",
    [(0.0, 1.0), (0.0, 0.0), (5.0, 5.0), (math.inf, math.inf), (math.nan, math.nan)],
)
def test_moments_that_no_spectrum_has_leave_the_bracket_from_two(higher):
    # Overflow and underflow of fourth powers are such; Tr H^4 is at least (Tr H^2)^2 / P.
    first, second, *higher = torch.tensor([0.0, 4.0, *higher], dtype=torch.float64)
    moments = HessianMoments(4, first, second, higher=tuple(higher))
    for k in range(1, 5):
        assert moments.bracket(k, moments=4) == moments.bracket(k)


def test_four_moments_have_no_gradients_and_two_keep_theirs():
    eigenvalues = torch.tensor([5.0, 1.0, 0.0, -2.0], dtype=torch.float64, requires_grad=True)
    moments = of(eigenvalues)
    assert not any(end.requires_grad for end in moments.bracket(2, moments=4))
    assert all(end.requires_grad for end in moments.bracket(2))


@given(spectra())
@example(torch.tensor([-2934289.0, -100000000.0]))  # whose ends rounding swaps
def test_the_upper_end_for_the_largest_is_that_of_the_bracket(eigenvalues):
    leaf = eigenvalues.clone().requires_grad_()
    moments = of(leaf)
    upper = moments.four_moment_upper
    expected = moments.bracket(1, moments=4)[1]
    torch.testing.assert_close(upper, expected, rtol=1e-6, atol=0)
    assert upper <= moments.upper
    (gradient,) = torch.autograd.grad(upper, leaf)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dim", [3, 4, 30])
def test_the_gradient_of_the_upper_end_is_that_of_differences(seed, dim):
    generator = torch.Generator().manual_seed(seed)
    leaf = torch.randn(dim, generator=generator, dtype=torch.float64) ** 3
    leaf.requires_grad_()
    (gradient,) = torch.autograd.grad(of(leaf).four_moment_upper, leaf)
    for way in torch.eye(dim, dtype=torch.float64):
        ends = [of((leaf + step * way).detach()).bracket(1, 4)[1] for step in (1e-6, -1e-6)]
        assert float(gradient @ way) == pytest.approx(
            float(ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-7
        )


def test_without_higher_moments_there_are_no_narrower_brackets():
    moments = HessianMoments(2, torch.ones(()), torch.ones(()))
    with pytest.raises(ValueError, match=r"get them by hessian_moments\(\.\.\., moments=4\)"):
        moments.bracket(1, moments=4)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("number", [3, 0, "4"])
def test_other_numbers_of_moments(number):
    with pytest.raises(ValueError, match=rf"moments must be 2 or 4.*got {number!r}"):
        of(torch.ones(3)).bracket(1, moments=number)


def test_higher_moments_of_another_shape():
    first = torch.ones(2)
    with pytest.raises(ValueError, match=r"have the shape \(2,\) of trace; got \(2,\) and \(3,\)"):
        HessianMoments(2, first, first, higher=(first, torch.ones(3)))

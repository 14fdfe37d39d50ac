import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowland import HessianMoments


@st.composite
def spectra(draw):
    """Eigenvalues in descending order: random, repeated, or all equal."""
    dim = draw(st.integers(1, 9), label="dim")
    scale = draw(st.sampled_from([1e-6, 1.0, 1e6]))
    values = draw(
        st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0, 7.0]), min_size=dim, max_size=dim)
        | st.lists(st.integers(-1000, 1000).map(lambda i: i / 100), min_size=dim, max_size=dim)
    )
    return scale * torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


def of(eigenvalues):
    return HessianMoments(len(eigenvalues), eigenvalues.sum(), eigenvalues.square().sum())


def slack(eigenvalues):
    """What rounding in a difference of squares may cost a bound."""
    return 1e-7 * eigenvalues.abs().max() + 1e-300


@given(spectra())
def test_mean_and_standard_deviation_are_those_of_the_eigenvalues(eigenvalues):
    moments = of(eigenvalues)
    close = {"rtol": 1e-10, "atol": float(slack(eigenvalues))}
    torch.testing.assert_close(moments.mean, eigenvalues.mean(), **close)
    torch.testing.assert_close(moments.std, eigenvalues.std(correction=0), **close)


@given(spectra())
def test_every_bound_holds(eigenvalues):
    moments, rounding = of(eigenvalues), slack(eigenvalues)
    assert eigenvalues[0] <= moments.upper + rounding
    assert eigenvalues[-1] >= moments.lower - rounding
    low, high = moments.spread
    assert low - rounding <= eigenvalues[0] - eigenvalues[-1] <= high + rounding
    for k, eigenvalue in enumerate(eigenvalues, start=1):
        low, high = moments.bracket(k)
        assert low - rounding <= eigenvalue <= high + rounding


@given(st.integers(1, 9), st.sampled_from([1.0, -1.0]))
def test_bounds_are_attained_by_one_eigenvalue_apart(dim, sign):
    eigenvalues = torch.zeros(dim, dtype=torch.float64)
    eigenvalues[0] = sign
    moments = of(eigenvalues)
    bound = moments.upper if sign > 0 else moments.lower
    torch.testing.assert_close(bound, torch.tensor(sign, dtype=torch.float64))


def test_spread_bounds_are_attained():
    halves = torch.tensor([3.0, 3.0, -1.0, -1.0], dtype=torch.float64)  # half at either end
    torch.testing.assert_close(of(halves).spread[0], torch.tensor(4.0, dtype=torch.float64))
    odd = torch.tensor([3.0, 3.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(of(odd).spread[0], torch.tensor(4.0, dtype=torch.float64))
    ends = torch.tensor([2.0, 0.0, 0.0, -2.0], dtype=torch.float64)  # the rest in the middle
    torch.testing.assert_close(of(ends).spread[1], torch.tensor(4.0, dtype=torch.float64))


def test_the_extreme_brackets_are_the_bounds():
    moments = of(torch.tensor([5.0, 1.0, 0.0, -2.0], dtype=torch.float64))
    assert moments.bracket(1)[1] == moments.upper
    assert moments.bracket(4)[0] == moments.lower
    # The extreme eigenvalues lie beyond the mean, by std / sqrt(P - 1) at least.
    assert moments.bracket(1)[0] == moments.mean + moments.std / math.sqrt(3)
    assert moments.bracket(4)[1] == moments.mean - moments.std / math.sqrt(3)


def test_one_eigenvalue_is_known_exactly():
    moments = of(torch.tensor([-2.5], dtype=torch.float64))
    assert moments.upper == moments.lower == moments.mean == -2.5
    assert moments.std == 0
    assert moments.spread == (0, 0)
    assert moments.bracket(1) == (-2.5, -2.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e-20])
def test_without_spread_gradients_are_finite(value, dtype):
    dim = 7
    trace = torch.tensor(dim * value, dtype=dtype, requires_grad=True)
    trace_sq = torch.tensor(dim * value * value, dtype=dtype, requires_grad=True)
    moments = HessianMoments(dim, trace, trace_sq)
    assert abs(float(moments.std.detach())) <= 3e-3 * abs(value)
    in_trace, in_square = torch.autograd.grad(moments.upper, (trace, trace_sq))
    torch.testing.assert_close(in_trace, torch.tensor(1 / dim, dtype=dtype))
    assert in_square == 0


def test_gradient_of_the_upper_bound_is_that_of_theorem_1():
    dim, first, second = 5, 2.0, 9.0
    trace = torch.tensor(first, dtype=torch.float64, requires_grad=True)
    trace_sq = torch.tensor(second, dtype=torch.float64, requires_grad=True)
    moments = HessianMoments(dim, trace, trace_sq)
    mean, std, root = first / dim, float(moments.std.detach()), math.sqrt(dim - 1)
    in_trace, in_square = torch.autograd.grad(moments.upper, (trace, trace_sq))
    assert in_trace == pytest.approx(1 / dim - root * mean / (std * dim), rel=1e-14)
    assert in_square == pytest.approx(root / (2 * std * dim), rel=1e-14)


def test_ensembles_keep_their_shape_and_their_neighbours_finite():
    trace = torch.tensor([[3.0, 0.0], [1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    trace_sq = torch.tensor([[9.0, 0.0], [1.0, 4.0]], dtype=torch.float64)
    moments = HessianMoments(3, trace, trace_sq)
    for value in (moments.mean, moments.std, moments.upper, moments.lower, *moments.bracket(2)):
        assert value.shape == (2, 2)
    (grad,) = torch.autograd.grad(moments.upper.sum(), trace)
    assert grad.isfinite().all()


@pytest.mark.parametrize("k", [-1, 0, 4])
def test_there_is_no_such_eigenvalue(k):
    with pytest.raises(ValueError, match=rf"k must be between 1 \(the largest.*\) and 3; got {k}"):
        of(torch.ones(3, dtype=torch.float64)).bracket(k)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("k", [1.5, 1.0, "1", None])
def test_eigenvalues_are_counted_by_whole_numbers(k):
    with pytest.raises(TypeError, match=r"k must be a whole number, 1 for the largest.*; got"):
        of(torch.ones(3, dtype=torch.float64)).bracket(k)


@pytest.mark.parametrize("trace_sq", [-2.0, 0.5])
def test_an_estimate_that_no_spectrum_has_leaves_the_mean(trace_sq):
    trace = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    moments = HessianMoments(3, trace, torch.tensor(trace_sq).double().requires_grad_())
    assert moments.std == 0
    assert moments.lower == moments.upper == 1
    assert moments.bracket(2) == (1, 1)
    by_trace, by_square = torch.autograd.grad(moments.upper, (trace, moments.trace_sq))
    assert by_trace == 1 / 3
    assert by_square == 0


def test_moments_that_make_no_sense():
    with pytest.raises(ValueError, match=r"dim must be at least 1.*got 0"):
        HessianMoments(0, torch.ones(()), torch.ones(()))
    with pytest.raises(ValueError, match=r"one shape; got \(2,\) and \(3,\)"):
        HessianMoments(2, torch.ones(2), torch.ones(3))


def test_estimates_carry_their_standard_errors():
    errors = torch.tensor(0.1), torch.tensor(0.2)
    assert HessianMoments(2, torch.ones(()), torch.ones(()), errors).stderr is errors
    assert HessianMoments(2, torch.ones(()), torch.ones(())).stderr is None


@pytest.mark.parametrize(
    ("moments", "shown"),
    [
        (
            HessianMoments(3, torch.tensor(1.23456789), torch.tensor(2.0)),
            "HessianMoments(dim=3, trace=1.23457, trace_sq=2)",
        ),
        (
            HessianMoments(
                3,
                torch.tensor(1.5, requires_grad=True),
                torch.tensor(2.0),
                (torch.tensor(0.25), torch.tensor(math.nan)),
                method="probes",
            ),
            "HessianMoments(dim=3, trace=1.5, trace_sq=2, stderr=(0.25, nan), method='probes')",
        ),
        (
            HessianMoments(3, torch.arange(6000.0).view(2, 3000), torch.ones(2, 3000)),
            "HessianMoments(dim=3, ensemble=(2, 3000), trace=0 to 5999, trace_sq=1 to 1)",
        ),
        (
            HessianMoments(3, torch.ones(0), torch.ones(0)),
            "HessianMoments(dim=3, ensemble=(0,), trace=none, trace_sq=none)",
        ),
    ],
)
def test_print_shows_a_line(moments, shown):
    assert repr(moments) == shown


@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_slopes_of_the_upper_bound_are_its_derivatives(values, scale):
    eigenvalues = scale * torch.tensor(values, dtype=torch.float64)
    traces = [eigenvalues.pow(power).sum().requires_grad_() for power in (1, 2)]
    moments = HessianMoments(len(values), *traces)
    expected = torch.autograd.grad(moments.upper, traces, materialize_grads=True)
    torch.testing.assert_close(moments.slopes_of_upper, expected)

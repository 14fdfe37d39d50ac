import cases
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowland
from lowland import exact

BOTH_TYPES = (torch.float64, torch.float32)


def assert_moments(case, moments):
    tolerance, _ = case.tolerances
    assert moments.dim == case.network.dim
    assert moments.trace.shape == moments.trace_sq.shape == torch.Size(case.ensemble)
    assert moments.trace.dtype == case.x.dtype
    for index, flat, x, y in case.singles():
        trace, trace_sq = oracle.moments(case.network.hessian(flat, x, y))
        # The trace is a sum of terms of both signs: its natural scale is what it cannot exceed,
        # sqrt(P Tr H^2).
        scale = (moments.dim * trace_sq).sqrt()
        assert (moments.trace[index].double() - trace).abs() <= tolerance * scale
        assert (moments.trace_sq[index].double() - trace_sq).abs() <= tolerance * trace_sq


@pytest.mark.slow
@given(cases.cases(dtypes=BOTH_TYPES), st.sampled_from(["auto", *cases.ORDERS]))
def test_moments_are_those_of_the_brute_force_hessian(case, order):
    assert_moments(case, exact.moments(*case.arguments, **case.settings, order=order))


@pytest.mark.slow
@settings(max_examples=25)
@given(cases.cases(dtypes=BOTH_TYPES, most_samples=6), st.sampled_from(cases.ORDERS))
def test_moments_stay_the_same_when_memory_forces_small_pieces(case, order):
    budget = cases.smallest_budget(case, order)
    assert_moments(
        case,
        exact.moments(*case.arguments, **case.settings, order=order, memory_budget=budget),
    )


@given(cases.cases(dtypes=BOTH_TYPES))
def test_trace_alone_is_the_trace(case):
    tolerance, _ = case.tolerances
    trace = exact.trace(*case.arguments, **case.settings)
    assert trace.shape == torch.Size(case.ensemble)
    for index, flat, x, y in case.singles():
        expected, trace_sq = oracle.moments(case.network.hessian(flat, x, y))
        scale = (case.network.dim * trace_sq).sqrt()
        assert (trace[index].double() - expected).abs() <= tolerance * scale


@pytest.mark.slow
@given(cases.cases(dtypes=BOTH_TYPES))
def test_hessian_is_that_of_brute_force_in_the_documented_order(case):
    matrix = exact.hessian(*case.arguments, **case.settings)
    dim = case.network.dim
    assert matrix.shape == (*case.ensemble, dim, dim)
    assert not matrix.requires_grad
    for index, flat, x, y in case.singles():
        expected = case.network.hessian(flat, x, y)
        assert cases.relative_error(matrix[index], expected) <= case.tolerances[0]


@pytest.mark.slow
@given(cases.cases(), st.sampled_from(cases.ORDERS))
def test_bounds_contain_the_true_eigenvalues(case, order):
    moments = exact.moments(*case.arguments, **case.settings, order=order)
    for index, flat, x, y in case.singles():
        true = torch.linalg.eigvalsh(case.network.hessian(flat, x, y)).flip(0)
        slack = 1e-10 * true.abs().max()
        assert true[0] <= moments.upper[index] + slack
        assert true[-1] >= moments.lower[index] - slack
        narrow, wide = (bound[index] for bound in moments.spread)
        assert narrow - slack <= true[0] - true[-1] <= wide + slack
        for k in range(1, moments.dim + 1):
            low, high = (bound[index] for bound in moments.bracket(k))
            assert low - slack <= true[k - 1] <= high + slack


def test_one_network_of_an_ensemble_is_as_if_alone(generator):
    case = cases.make(oracle.Network(3, 4, "gelu", "bce"), 20, ensemble=(2, 3), own_data=True)
    together = exact.moments(*case.arguments, **case.settings)
    alone = exact.moments(
        [part[1, 2] for part in case.weights], case.x[1, 2], case.y[1, 2], **case.settings
    )
    torch.testing.assert_close(together.trace[1, 2], alone.trace, rtol=1e-13, atol=0)
    torch.testing.assert_close(together.trace_sq[1, 2], alone.trace_sq, rtol=1e-13, atol=0)


@pytest.mark.parametrize("order", cases.ORDERS)
def test_leading_dimensions_broadcast(order):
    case = cases.make(oracle.Network(2, 3, "tanh", "mse"), 7, ensemble=(2, 3))
    weight, output = case.weights
    moments = exact.moments(
        [weight[:, :1], output[:1]], case.x, case.y.expand(3, -1), **case.settings, order=order
    )
    assert moments.trace.shape == (2, 3)
    single = exact.moments([weight[1, 0], output[0, 2]], case.x, case.y, **case.settings)
    torch.testing.assert_close(moments.trace_sq[1, 2], single.trace_sq, rtol=1e-12, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("order", cases.ORDERS)
def test_thousands_of_networks_in_one_call_are_those_networks(order):
    case = cases.make(
        oracle.Network(3, 4, "sigmoid", "bce"), 30, ensemble=(2000,), dtype=torch.float32
    )
    moments = exact.moments(*case.arguments, **case.settings, order=order, memory_budget=4 << 20)
    for index in (0, 777, 1999):
        single = exact.moments(
            [part[index] for part in case.weights], case.x, case.y, **case.settings
        )
        torch.testing.assert_close(moments.trace_sq[index], single.trace_sq, rtol=1e-4, atol=0)


@pytest.mark.parametrize("order", cases.ORDERS)
def test_layout_in_memory_does_not_matter(order):
    case = cases.make(oracle.Network(3, 4, "tanh", "bce"), 20)
    strided = [part.mT.contiguous().mT for part in case.weights]
    expected = exact.moments(*case.arguments, **case.settings, order=order)
    x = torch.cat([case.x, case.x], 1)[:, :3].T.contiguous().T
    actual = exact.moments(strided, x, case.y, **case.settings, order=order)
    torch.testing.assert_close(actual.trace_sq, expected.trace_sq, rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", ["auto", *cases.ORDERS])
def test_autocast_does_not_change_the_numbers(order):
    case = cases.make(oracle.Network(5, 6, "gelu", "bce"), 40, dtype=torch.float32)
    weights = [part.requires_grad_() for part in case.weights]

    def run():
        moments = exact.moments(weights, case.x, case.y, **case.settings, order=order)
        return moments.trace, moments.trace_sq, *torch.autograd.grad(moments.upper, weights)

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run()
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_autocast_does_not_change_what_is_attributed():
    case = cases.make(oracle.Network(5, 6, "gelu", "bce"), 40, dtype=torch.float32)

    def run():
        direction = exact.direction(*case.arguments, **case.settings)
        return (
            exact.trace(*case.arguments, **case.settings),
            exact.hessian(*case.arguments, **case.settings),
            exact.pair_contributions(*case.arguments, **case.settings),
            *exact.sample_contributions(*case.arguments, **case.settings),
            *direction.mean,
            *direction.spread,
        )

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run()
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_equal_arguments_give_equal_numbers_bit_for_bit():
    case = cases.make(oracle.Network(5, 6, "gelu", "bce"), 300)
    first = exact.moments(*case.arguments, **case.settings)
    second = exact.moments(*case.arguments, **case.settings)
    assert torch.equal(first.trace_sq, second.trace_sq)


def test_an_activation_of_ones_own_is_taken():
    from lowland.activations import Activation  # noqa: PLC0415

    def square(a):
        return a * a, 2 * a, torch.full_like(a, 2), torch.zeros_like(a)

    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(4, 5, generator=generator, dtype=torch.float64),
        torch.randn(6, 1, generator=generator, dtype=torch.float64),
    ]
    x = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(9, generator=generator, dtype=torch.float64)

    def loss(weight, output):
        z = (weight[0] + x @ weight[1:]).square()
        return ((output[0] + z @ output[1:]).squeeze(-1) - y).square().mean()

    blocks = torch.func.hessian(loss, argnums=(0, 1))(*weights)
    trace_sq = sum(block.square().sum() for row in blocks for block in row)
    moments = lowland.exact.moments(
        weights, x, y, activation=Activation("square", square), loss="mse"
    )
    torch.testing.assert_close(moments.trace_sq, trace_sq, rtol=1e-10, atol=0)

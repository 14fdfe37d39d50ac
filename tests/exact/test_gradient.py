from dataclasses import replace

import cases
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowland import exact
from lowland.moments import HessianMoments

BOTH_TYPES = (torch.float64, torch.float32)

QUANTITIES = {
    "trace": lambda moments: moments.trace,
    "trace_sq": lambda moments: moments.trace_sq,
    "std": lambda moments: moments.std,
    "upper": lambda moments: moments.upper,
    "lower": lambda moments: moments.lower,
    "combination": lambda moments: 0.7 * moments.trace - 1.3 * moments.trace_sq,
}


def trainable(case):
    return [part.clone().requires_grad_() for part in case.weights]


def gradient(case, quantity, **options):
    """The library's gradient of a quantity, summed over the ensemble, in both weights."""
    weights = trainable(case)
    moments = exact.moments(weights, case.x, case.y, **case.settings, **options)
    return torch.autograd.grad(QUANTITIES[quantity](moments).sum(), weights)


def assert_gradients(case, actual, quantity):
    """Compare with autograd through the brute-force Hessian, network by network.

    The gradient is a sum of those of the two traces, which may cancel: they are its natural scale.
    """
    _, tolerance = case.tolerances
    dim = case.network.dim
    for index, flat, x, y in case.singles():
        leaf = flat.clone().requires_grad_()
        traces = oracle.moments(case.network.hessian(leaf, x, y))
        each = [torch.autograd.grad(part, leaf, retain_graph=True)[0] for part in traces]
        leaves = [part.detach().requires_grad_() for part in traces]
        result = QUANTITIES[quantity](HessianMoments(dim, *leaves))
        factors = torch.autograd.grad(result, leaves, materialize_grads=True)
        expected = sum(factor * part for factor, part in zip(factors, each, strict=True))
        scale = sum(
            abs(factor) * part.abs().max() for factor, part in zip(factors, each, strict=True)
        )
        mine = oracle.flatten([part[index] for part in actual])
        assert mine.dtype == case.x.dtype
        # Far out in a tail of GELU brute force has few digits of its own.
        assert (mine.double() - expected).abs().max() <= tolerance * scale + 1e-20


@pytest.mark.slow
@given(
    cases.cases(dtypes=BOTH_TYPES),
    st.sampled_from(["auto", *cases.ORDERS]),
    st.sampled_from(sorted(QUANTITIES)),
)
def test_gradient_is_that_through_the_brute_force_hessian(case, order, quantity):
    actual = gradient(case, quantity, order=order)
    assert_gradients(case, actual, quantity)


@pytest.mark.slow
@settings(max_examples=25)
@given(cases.cases(dtypes=BOTH_TYPES, most_samples=6), st.sampled_from(cases.ORDERS))
def test_gradient_stays_the_same_when_memory_forces_small_pieces(case, order):
    budget = cases.smallest_budget(case, order)
    actual = gradient(case, "upper", order=order, memory_budget=budget)
    assert_gradients(case, actual, "upper")


@given(
    cases.cases(dtypes=BOTH_TYPES),
    st.sampled_from(["auto", *cases.ORDERS]),
    st.sampled_from(sorted(QUANTITIES)),
)
def test_gradient_without_a_graph(case, order, quantity):
    actual = cases.prepare(case).gradient(QUANTITIES[quantity], order)
    assert_gradients(case, actual, quantity)


@given(cases.cases(dtypes=BOTH_TYPES))
def test_gradient_of_the_trace_without_a_graph(case):
    assert_gradients(case, cases.prepare(case).trace_gradient(), "trace")


@given(cases.cases(dtypes=BOTH_TYPES))
def test_gradient_of_the_trace_alone(case):
    weights = trainable(case)
    trace = exact.trace(weights, case.x, case.y, **case.settings)
    actual = torch.autograd.grad(trace.sum(), weights)
    assert_gradients(case, actual, "trace")


@pytest.mark.parametrize("order", cases.ORDERS)
def test_each_network_of_an_ensemble_is_weighted_by_its_own_cotangents(order):
    case = cases.make(oracle.Network(3, 4, "tanh", "bce"), 15, ensemble=(5,))
    weights = trainable(case)
    moments = exact.moments(weights, case.x, case.y, **case.settings, order=order)
    first, second = torch.linspace(-1, 1, 5), torch.linspace(2, -1, 5)
    total = (first * moments.trace + second * moments.trace_sq).sum()
    actual = torch.autograd.grad(total, weights)
    for (index, flat, x, y), a, b in zip(case.singles(), first, second, strict=True):
        expected = oracle.gradient(
            case.network, flat, x, y, lambda h, a=a, b=b: a * h.trace() + b * h.square().sum()
        )
        mine = oracle.flatten([part[index] for part in actual])
        assert cases.relative_error(mine, expected) <= 1e-9


@pytest.mark.parametrize("order", cases.ORDERS)
def test_weights_shared_by_networks_collect_the_gradients_of_all(order):
    case = cases.make(oracle.Network(2, 3, "gelu", "mse"), 7, ensemble=(4,))
    shared = case.weights[0][:1].clone().requires_grad_()
    moments = exact.moments([shared, case.weights[1]], case.x, case.y, **case.settings, order=order)
    (actual,) = torch.autograd.grad(moments.upper.sum(), shared)
    own = shared.detach().expand(4, -1, -1).clone().requires_grad_()
    moments = exact.moments([own, case.weights[1]], case.x, case.y, **case.settings, order=order)
    (each,) = torch.autograd.grad(moments.upper.sum(), own)
    torch.testing.assert_close(actual, each.sum(0, keepdim=True), rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", cases.ORDERS)
@pytest.mark.parametrize("activation", ["gelu", "sigmoid"])
def test_gradient_agrees_with_finite_differences(activation, order):
    case = cases.make(oracle.Network(2, 2, activation, "bce"), 5, ensemble=(2,))

    def function(*weights):
        moments = exact.moments(weights, case.x, case.y, **case.settings, order=order)
        return moments.trace, moments.trace_sq

    assert torch.autograd.gradcheck(function, trainable(case), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("order", cases.ORDERS)
def test_gradients_accumulate_over_backward_calls(order):
    case = cases.make(oracle.Network(3, 4, "silu", "bce"), 20)
    halves = [replace(case, x=case.x[part], y=case.y[part]) for part in (slice(10), slice(10, 20))]
    weights = trainable(case)
    for half in halves:
        moments = exact.moments(weights, half.x, half.y, **case.settings, order=order)
        moments.upper.backward()
    first, second = (gradient(half, "upper", order=order) for half in halves)
    for part, *shares in zip(weights, first, second, strict=True):
        torch.testing.assert_close(part.grad, sum(shares), rtol=1e-14, atol=0)


@pytest.mark.parametrize("order", cases.ORDERS)
def test_a_kept_graph_can_be_walked_twice(order):
    case = cases.make(oracle.Network(3, 4, "tanh", "bce"), 20)
    weights = trainable(case)
    moments = exact.moments(weights, case.x, case.y, **case.settings, order=order)
    first = torch.autograd.grad(moments.upper, weights, retain_graph=True)
    again = torch.autograd.grad(moments.upper, weights)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_functional_gradient_is_the_same():
    case = cases.make(oracle.Network(3, 4, "tanh", "bce"), 20)

    def upper(weights):
        return exact.moments(weights, case.x, case.y, **case.settings).upper

    actual = torch.func.grad(upper)(case.weights)
    for one, other in zip(actual, gradient(case, "upper"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("order", cases.ORDERS)
@pytest.mark.parametrize("trained", [0, 1])
def test_a_layer_that_asks_for_no_gradient_gets_none(trained, order):
    case = cases.make(oracle.Network(3, 4, "tanh", "bce"), 20)
    weights = [part.clone() for part in case.weights]
    weights[trained].requires_grad_()
    exact.moments(weights, case.x, case.y, **case.settings, order=order).upper.backward()
    # The Hessian stays that of all weights: only the gradient is asked of one.
    torch.testing.assert_close(
        weights[trained].grad, gradient(case, "upper")[trained], rtol=1e-10, atol=0
    )
    assert weights[1 - trained].grad is None


@pytest.mark.parametrize("order", cases.ORDERS)
def test_without_a_need_for_gradients_there_is_no_graph(order):
    case = cases.make(oracle.Network(3, 4, "tanh", "bce"), 20)
    assert not exact.moments(*case.arguments, **case.settings, order=order).upper.requires_grad
    with torch.no_grad():
        moments = exact.moments(trainable(case), case.x, case.y, **case.settings, order=order)
        assert not moments.upper.requires_grad
        assert not exact.trace(trainable(case), case.x, case.y, **case.settings).requires_grad


@pytest.mark.parametrize("create", [exact.moments, exact.trace])
def test_a_second_derivative_is_refused_clearly(create):
    case = cases.make(oracle.Network(3, 4, "tanh", "bce"), 20)
    weights = trainable(case)
    result = create(weights, case.x, case.y, **case.settings)
    scalar = result if isinstance(result, torch.Tensor) else result.upper
    first = torch.autograd.grad(scalar, weights, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once, not twice"):
        first[0].sum().backward()


@pytest.mark.parametrize("order", cases.ORDERS)
@pytest.mark.parametrize("changed", ["weights", "x", "y"])
def test_a_change_in_place_before_the_backward_pass_is_noticed(changed, order):
    case = cases.make(oracle.Network(3, 4, "tanh", "bce"), 20)
    weights = trainable(case)
    moments = exact.moments(weights, case.x, case.y, **case.settings, order=order)
    tensor = {"weights": weights[0], "x": case.x, "y": case.y}[changed]
    with torch.no_grad():
        tensor.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        moments.upper.backward()

"""Moments differentiated in the inputs, as below a head that sits on other layers."""

from dataclasses import replace

import cases
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowland import exact
from lowland.exact.plan import make_plan


def in_inputs(case, combine, **options):
    """The gradients of a combination of both moments in ``x`` and all weights."""
    x = case.x.clone().requires_grad_()
    weights = [part.clone().requires_grad_() for part in case.weights]
    moments = exact.moments(weights, x, case.y, **case.settings, **options)
    return torch.autograd.grad(combine(moments.trace, moments.trace_sq).sum(), [x, *weights])


def by_brute_force(case, combine):
    """The gradient in ``x``; of networks that share it the sum."""
    total = torch.zeros_like(case.x)
    scale = 0.0
    for index, flat, own, y in case.singles():
        x = own.clone().requires_grad_()
        traces = oracle.moments(case.network.hessian(flat, x, y))
        one, two = (
            torch.autograd.grad(each, x, retain_graph=True, materialize_grads=True)[0]
            if each.requires_grad
            else torch.zeros_like(x)
            for each in traces
        )
        first, second = (each.detach().requires_grad_() for each in traces)
        factors = torch.autograd.grad(combine(first, second), (first, second))
        place = total[index] if case.x.ndim > 2 else total
        place += factors[0] * one + factors[1] * two
        parts = (factors[0] * one, factors[1] * two)
        scale = max(scale, *(part.abs().max().item() for part in parts))
    return total, scale


def combination(first, second):
    return 0.7 * first - 1.3 * second


@settings(max_examples=40)
@given(case=cases.cases(most_samples=6), order=st.sampled_from(["auto", *cases.ORDERS]))
def test_the_gradient_in_the_inputs_is_that_of_brute_force(case, order):
    mine, *weights = in_inputs(case, combination, order=order)
    expected, scale = by_brute_force(case, combination)
    count = max(1, len(list(case.singles())))
    assert mine.shape == case.x.shape
    assert (mine - expected).abs().max() <= case.tolerances[1] * count * scale + 1e-300
    plain = [part.clone().requires_grad_() for part in case.weights]
    moments = exact.moments(plain, case.x, case.y, **case.settings, order=order)
    value = combination(moments.trace, moments.trace_sq).sum()
    for own, other in zip(weights, torch.autograd.grad(value, plain), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-10 * float(other.abs().max()))


@pytest.mark.parametrize("order", cases.ORDERS)
@pytest.mark.parametrize("keeps", [True, False])
def test_chunks_of_samples_each_fill_their_own_rows(order, keeps, monkeypatch):
    network = oracle.Network(3, (4, 3), ("gelu", "tanh"), "ce", outputs=2)
    case = cases.make(network, 23, ensemble=(2,))
    monkeypatch.setattr("lowland.exact.plan.LONGEST_CHUNK", 5)
    if not keeps:
        monkeypatch.setattr(
            "lowland.exact.setup.make_plan",
            lambda *args, **options: replace(make_plan(*args, **options), keep=False),
        )
    mine, *_ = in_inputs(case, combination, order=order)
    expected, scale = by_brute_force(case, combination)
    assert (mine - expected).abs().max() <= 1e-9 * scale


@pytest.mark.parametrize("order", cases.ORDERS)
def test_unbiased_moments_have_gradients_in_the_inputs(order):
    case = cases.make(oracle.Network(3, 4, "tanh", "bce"), 6)

    def value(x):
        moments = exact.moments(
            case.weights, x, case.y, **case.settings, order=order, unbiased=True
        )
        return moments.trace_sq

    assert torch.autograd.gradcheck(value, case.x.clone().requires_grad_())


@settings(max_examples=20)
@given(case=cases.cases(most_samples=6))
def test_the_trace_alone_has_it_too(case):
    x = case.x.clone().requires_grad_()
    trace = exact.trace(case.weights, x, case.y, **case.settings)
    (mine,) = torch.autograd.grad(trace.sum(), x)
    expected, scale = by_brute_force(case, lambda first, second: first + 0 * second)
    count = max(1, len(list(case.singles())))
    assert (mine - expected).abs().max() <= 1e-9 * count * scale + 1e-300


@pytest.mark.parametrize("matrix", ["ggn", "residual"])
def test_other_matrices_have_it_too(matrix):
    case = cases.make(oracle.Network(2, (3, 3), ("softplus", "gelu"), "ce", outputs=3), 5)

    def value(x):
        return exact.moments(case.weights, x, case.y, **case.settings, matrix=matrix).trace_sq

    assert torch.autograd.gradcheck(value, case.x.clone().requires_grad_())


def test_inputs_below_constant_weights_and_layers_are_differentiated_in():
    case = cases.make(oracle.Network(3, 4, "gelu", "bce"), 7)
    x = case.x.clone().requires_grad_()
    moments = exact.moments(case.weights, x, case.y, **case.settings)
    moments.upper.backward()
    assert x.grad.abs().max() > 0


def test_a_second_derivative_in_the_inputs_is_refused():
    case = cases.make(oracle.Network(3, 4, "gelu", "bce"), 7)
    x = case.x.clone().requires_grad_()
    moments = exact.moments(case.weights, x, case.y, **case.settings)
    (slope,) = torch.autograd.grad(moments.trace_sq, x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once, not twice"):
        slope.sum().backward()


def test_a_change_of_the_inputs_before_the_backward_pass_is_noticed():
    case = cases.make(oracle.Network(3, 4, "gelu", "bce"), 7)
    start = case.x.clone().requires_grad_()
    x = start * 1
    moments = exact.moments(case.weights, x, case.y, **case.settings)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        moments.trace_sq.backward()


@pytest.mark.parametrize("name", ["diagonal", "hessian", "loss_gradient"])
def test_results_without_gradients_refuse_inputs_that_ask_for_them(name):
    case = cases.make(oracle.Network(3, 4, "gelu", "bce"), 7)
    x = case.x.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"expected x without requires_grad.*use x\.detach\(\)"):
        getattr(exact, name)(case.weights, x, case.y, **case.settings)

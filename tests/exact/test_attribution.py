"""What the direction is made of, against brute force (arXiv:2606.28662, sections V-A to V-C)."""

from dataclasses import replace

import cases
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowland import exact

BOTH_TYPES = (torch.float64, torch.float32)


def gradient_of_upper(case, **options):
    weights = [part.clone().requires_grad_() for part in case.weights]
    moments = exact.moments(weights, case.x, case.y, **case.settings, **options)
    return torch.autograd.grad(moments.upper.sum(), weights)


def assert_same(case, actual, expected):
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == case.x.dtype
        assert not mine.requires_grad
        assert cases.relative_error(mine, theirs.double()) <= 10 * case.tolerances[1]


@pytest.mark.slow
@given(cases.cases(dtypes=BOTH_TYPES), st.sampled_from(["auto", *cases.ORDERS]))
def test_shares_of_samples_add_up_to_the_gradient_of_the_bound(case, order):
    shares = exact.sample_contributions(*case.arguments, **case.settings, order=order)
    samples = case.x.shape[-2]
    for share, part in zip(shares, case.weights, strict=True):
        assert share.shape == (*case.ensemble, samples, *part.shape[-2:])
    assert_same(case, [share.sum(-3) for share in shares], gradient_of_upper(case, order=order))


@pytest.mark.slow
@settings(max_examples=15)
@given(cases.cases())
def test_each_share_is_that_of_the_samples_own_hessian(case):
    shares = exact.sample_contributions(*case.arguments, **case.settings)
    dim, mean = case.network.dim, case.network.reduction == "mean"
    for index, flat, x, y in case.singles():
        whole = case.network.hessian(flat, x, y)
        traces = [moment.requires_grad_() for moment in oracle.moments(whole)]
        a, b = torch.autograd.grad(oracle.upper(*traces, dim), traces)
        matrix = a * torch.eye(dim, dtype=x.dtype) + 2 * b * whole
        matrix = matrix / len(x) if mean else matrix

        def product(hessian, matrix=matrix):
            return (matrix * hessian).sum()

        mine = [oracle.flatten([share[(*index, i)] for share in shares]) for i in range(len(x))]
        expected = [
            oracle.gradient(case.network, flat, x[i : i + 1], y[i : i + 1], product)
            for i in range(len(x))
        ]
        assert cases.relative_error(torch.stack(mine), torch.stack(expected)) <= 1e-9


@settings(max_examples=20)
@given(cases.cases())
def test_each_pair_adds_the_product_of_its_hessians(case):
    pairs = exact.pair_contributions(*case.arguments, **case.settings)
    samples = case.x.shape[-2]
    assert pairs.shape == (*case.ensemble, samples, samples)
    moments = exact.moments(*case.arguments, **case.settings)
    torch.testing.assert_close(pairs.sum((-2, -1)), moments.trace_sq, rtol=1e-10, atol=0)
    scale = 1 / samples**2 if case.network.reduction == "mean" else 1
    for index, flat, x, y in case.singles():
        each = case.network.sample_hessians(flat, x, y).flatten(1)
        assert cases.relative_error(pairs[index], scale * each @ each.T) <= 1e-10
        assert cases.relative_error(pairs[index].T, pairs[index]) <= 1e-14


@pytest.mark.slow
@given(cases.cases(dtypes=BOTH_TYPES), st.sampled_from(["auto", *cases.ORDERS]))
def test_mean_part_and_spread_part_are_the_whole_direction(case, order):
    direction = exact.direction(*case.arguments, **case.settings, order=order)
    assert_same(case, direction.total, gradient_of_upper(case, order=order))
    weights = [part.clone().requires_grad_() for part in case.weights]
    trace = exact.trace(weights, case.x, case.y, **case.settings)
    of_mean = torch.autograd.grad(trace.sum() / case.network.dim, weights)
    assert_same(case, direction.mean, of_mean)


@pytest.mark.slow
@pytest.mark.parametrize("order", cases.ORDERS)
def test_pieces_leave_no_seam(order):
    network = oracle.Network(3, (4, 2), "gelu", "ce", outputs=3)
    case = cases.make(network, 5, ensemble=(2,), own_data=True)
    budget = cases.smallest_budget(case, order)
    options = {**case.settings, "memory_budget": budget}
    few = exact.sample_contributions(*case.arguments, **options, order=order)
    assert_same(case, few, exact.sample_contributions(*case.arguments, **case.settings))
    if order == "samples":
        pairs = exact.pair_contributions(*case.arguments, **options)
        assert_same(case, [pairs], [exact.pair_contributions(*case.arguments, **case.settings)])


@pytest.mark.parametrize("order", cases.ORDERS)
def test_a_fitted_sample_leaves_the_gradient(order):
    """Proposition 1: its share goes to zero with its residual, at exponential speed."""
    case = cases.make(oracle.Network(3, 4, "tanh", "bce"), 6)
    sizes = []
    for margin in (0.0, 10.0, 20.0, 30.0):
        weights = [part.clone() for part in case.weights]
        weights[1][0] += margin
        y = torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64)
        shares = exact.sample_contributions(weights, case.x, y, **case.settings, order=order)
        size = torch.cat([share.flatten(1) for share in shares], 1).norm(dim=1)
        sizes.append(size[:3].max() / size[3:].max())
    # e^-10 a step, and the misfitted samples lose curvature too but keep their residual.
    assert sizes[1] < 1e-2 * sizes[0]
    assert sizes[2] < 1e-3 * sizes[1]
    assert sizes[3] < 1e-3 * sizes[2]


@pytest.mark.parametrize("order", cases.ORDERS)
def test_without_spread_the_spread_part_is_zero(order):
    case = cases.make(oracle.Network(3, 4, "tanh", "bce"), 6)
    weights = [torch.zeros_like(case.weights[0]), torch.zeros_like(case.weights[1])]
    weights[1][0] = 1e3
    flat = replace(case, weights=weights, y=torch.ones(6))
    direction = exact.direction(*flat.arguments, **flat.settings, order=order)
    shares = exact.sample_contributions(*flat.arguments, **flat.settings, order=order)
    for part in (*direction.mean, *direction.spread, *shares):
        assert torch.equal(part, torch.zeros_like(part))


def test_weights_that_ask_for_gradients_get_none_here():
    case = cases.make(oracle.Network(3, 4, "tanh", "bce"), 6)
    weights = [part.requires_grad_() for part in case.weights]
    exact.direction(weights, case.x, case.y, **case.settings)
    assert not exact.pair_contributions(weights, case.x, case.y, **case.settings).requires_grad
    assert all(part.grad is None for part in weights)


def test_the_direction_is_found_where_gradients_are_off():
    case = cases.make(oracle.Network(3, 4, "tanh", "bce"), 6)
    expected = exact.direction(*case.arguments, **case.settings).total
    with torch.no_grad():
        actual = exact.direction(*case.arguments, **case.settings).total
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))

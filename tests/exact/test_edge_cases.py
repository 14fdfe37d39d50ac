"""Where numbers are extreme or degenerate: finite, and right."""

from dataclasses import replace

import cases
import oracle
import pytest
import torch

from lowland import exact
from lowland.moments import HessianMoments

BOTH_TYPES = (torch.float64, torch.float32)

# Shapes are checked elsewhere; here are many small networks.
pytestmark = pytest.mark.usefixtures("as_installed")

# Factors of hidden weights, output weights and inputs of the usual size.
REGIMES = {
    "saturated output": (1, 1e3, 1),
    "saturated hidden units": (1e3, 1, 1),
    "saturated everywhere": (1e3, 1e3, 1),
    "large inputs": (1, 1, 1e3),
    "huge inputs": (1, 1, 1e6),
    "tiny inputs": (1, 1, 1e-8),
    "no inputs": (1, 1, 0),
    "tiny weights": (1e-6, 1e-6, 1),
    "zero weights": (0, 0, 1),
    "zero output weights": (1, 0, 1),
}
EXTREME_TOLERANCES = {
    torch.float64: 1e-9,
    # A pre-activation of some hundreds is rounded by as many units in the last place as it is
    # large, and what decays like its exponential is wrong by that much.
    torch.float32: 2e-3,
}


def network(loss, activation="gelu", *, inputs=3, hidden=4):
    outputs = 3 if loss == "ce" else 1
    return oracle.Network(inputs, hidden, activation, loss, outputs=outputs)


def extreme(regime, network, dtype, *, samples=8):
    of_hidden, of_output, of_inputs = REGIMES[regime]
    case = cases.make(network, samples, dtype=dtype)
    *hidden, output = case.weights
    weights = [of_hidden * weight for weight in hidden] + [of_output * output]
    return replace(case, weights=weights, x=of_inputs * case.x).with_gradients()


def solve(case, order):
    moments = exact.moments(*case.arguments, **case.settings, order=order)
    return moments, torch.autograd.grad(moments.upper, case.weights)


def assert_finite(moments, grads):
    values = moments.trace, moments.trace_sq, moments.std, moments.upper, moments.lower
    assert all(bool(value.isfinite().all()) for value in (*values, *grads))


def expected_of(case):
    """Both traces, the bound, and its gradient, by brute force."""
    ((_, flat, x, y),) = case.singles()
    flat.requires_grad_()
    traces = oracle.moments(case.network.hessian(flat, x, y))
    # Its own formula would divide zero by zero where there is no spread.
    upper = HessianMoments(case.network.dim, *traces).upper
    (gradient,) = torch.autograd.grad(upper, flat)
    return *(part.detach() for part in traces), upper.detach(), gradient


def assert_right(case, moments, grads, expected):
    trace, trace_sq, upper, gradient = expected
    tolerance = EXTREME_TOLERANCES[case.x.dtype]
    # What the type cannot hold is zero.
    underflow = 0 if case.x.dtype == torch.float64 else torch.finfo(torch.float32).tiny ** 0.75
    scale = (moments.dim * trace_sq).sqrt()
    assert (moments.trace.double() - trace).abs() <= tolerance * scale + underflow
    assert (moments.trace_sq.double() - trace_sq).abs() <= tolerance * trace_sq + underflow
    # Brute force too is rounded where its terms cancel altogether.
    noise = 4 * torch.finfo(case.x.dtype).eps * upper.abs()
    error = (oracle.flatten(grads).double() - gradient).abs().max()
    assert error <= tolerance * gradient.abs().max() + underflow + noise


def assert_all_right(case):
    expected = expected_of(case)
    for order in cases.ORDERS:
        moments, grads = solve(case, order)
        assert_finite(moments, grads)
        assert_right(case, moments, grads, expected)


@pytest.mark.parametrize("dtype", BOTH_TYPES)
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("regime", REGIMES)
def test_extreme_networks(regime, activation, dtype):
    for loss, hidden in (("bce", 4), ("mse", 4), ("ce", (4, 3))):
        assert_all_right(extreme(regime, network(loss, activation, hidden=hidden), dtype))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("samples", "inputs", "hidden"),
    [(1, 3, 4), (8, 1, 4), (8, 3, 1), (1, 1, 1), (1, 1, ()), (1, 1, (1, 1, 1, 1)), (8, 1, (1, 4))],
)
def test_smallest_networks(samples, inputs, hidden):
    for activation in oracle.ACTIVATIONS:
        for loss in oracle.LOSSES:
            each = network(loss, activation, inputs=inputs, hidden=hidden)
            assert_all_right(cases.make(each, samples).with_gradients())


@pytest.mark.parametrize("order", cases.ORDERS)
@pytest.mark.parametrize("loss", oracle.LOSSES)
@pytest.mark.parametrize("hidden", [4, (3, 2, 3)])
def test_equal_samples_are_one_sample(hidden, loss, order):
    one = cases.make(network(loss, hidden=hidden), 1).with_gradients()
    many = replace(one, x=one.x.expand(50, -1), y=one.y.expand(50))
    expected, expected_grads = solve(one, order)
    moments, grads = solve(many, order)
    torch.testing.assert_close(moments.trace, expected.trace, rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.trace_sq, expected.trace_sq, rtol=1e-12, atol=0)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        assert cases.relative_error(mine, theirs) <= 1e-11


@pytest.mark.parametrize("dtype", BOTH_TYPES)
@pytest.mark.parametrize("order", cases.ORDERS)
def test_a_perfect_fit_at_logits_of_a_thousand_is_flat(order, dtype):
    x = torch.tensor([[1.0], [-1.0]], dtype=dtype)
    weights = [
        torch.tensor([[0.0], [1e3]], dtype=dtype, requires_grad=True),
        torch.tensor([[0.0], [1.0]], dtype=dtype, requires_grad=True),
    ]
    moments = exact.moments(
        weights, x, torch.tensor([1, 0]), activation="identity", loss="bce", order=order
    )
    # exp(-1000) underflows: all derivatives are zero, and so is the spread.
    assert moments.trace == moments.trace_sq == moments.upper == moments.std == 0
    for grad in torch.autograd.grad(moments.upper, weights):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", BOTH_TYPES)
@pytest.mark.parametrize("order", cases.ORDERS)
def test_a_misfit_at_a_logit_of_a_thousand_leaves_the_residual_part(order, dtype):
    # q = 0 and r = 1: of the blocks only [0 | phi'] x~ between W and v is left, for each unit.
    x = torch.tensor([[3.0, -2.0]], dtype=dtype)
    weights = [
        torch.tensor([[0.0] * 5, [1.0] * 5, [1.0] * 5], dtype=dtype, requires_grad=True),
        torch.tensor([[0.0]] + [[200.0]] * 5, dtype=dtype, requires_grad=True),
    ]
    moments = exact.moments(
        weights, x, torch.tensor([0]), activation="identity", loss="bce", order=order
    )
    assert moments.trace == 0
    assert moments.trace_sq == 2 * 5 * (1 + 9 + 4)
    for grad in torch.autograd.grad(moments.upper, weights):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", BOTH_TYPES)
@pytest.mark.parametrize("order", cases.ORDERS)
def test_saturated_hidden_units_leave_the_output_layer(order, dtype):
    # z = 1 and phi' = phi'' = 0: a linear regression on a constant, H = 2 z~ z~^T.
    x = torch.ones(6, 1, dtype=dtype)
    weights = [
        torch.full((2, 3), 500.0, dtype=dtype, requires_grad=True),
        torch.ones(4, 1, dtype=dtype, requires_grad=True),
    ]
    y = torch.zeros(6, dtype=dtype)
    moments = exact.moments(weights, x, y, activation="tanh", loss="mse", order=order)
    torch.testing.assert_close(moments.trace, torch.tensor(8.0, dtype=dtype))
    torch.testing.assert_close(moments.trace_sq, torch.tensor(64.0, dtype=dtype))
    for grad in torch.autograd.grad(moments.upper, weights):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_an_ensemble_with_one_flat_network_keeps_the_gradients_of_the_others():
    case = cases.make(oracle.Network(3, 4, "tanh", "mse"), 8, ensemble=(3,))
    with torch.no_grad():
        for part in case.weights:
            part[1] = 0
    x = torch.zeros_like(case.x)
    weights = [part.requires_grad_() for part in case.weights]
    moments = exact.moments(weights, x, torch.zeros_like(case.y), **case.settings)
    for together in torch.autograd.grad(moments.upper.sum(), weights):
        assert together.isfinite().all()
        assert together[0].abs().max() > 0

"""What a mini-batch says of the data set: right on average over all batches."""

import itertools

import cases
import oracle
import pytest
import torch

from lowland import exact

NETWORKS = {
    "logistic regression": oracle.Network(2, (), (), "bce"),
    "one hidden layer": oracle.Network(2, 3, "tanh", "bce"),
    "a wide layer": oracle.Network(2, 17, "tanh", "mse", outputs=2),
    "three hidden layers": oracle.Network(2, (3, 2, 3), "gelu", "ce", outputs=3),
    "several outputs": oracle.Network(2, (3, 2), "silu", "mse", outputs=2),
}


def solve(case, batch, order):
    """The estimate and its gradient from some of the samples."""
    case = case.with_gradients()
    moments = exact.moments(
        case.weights, case.x[batch], case.y[batch], **case.settings, order=order, unbiased=True
    )
    grads = torch.autograd.grad(moments.trace_sq, case.weights)
    return torch.stack([moments.trace, moments.trace_sq]).detach(), oracle.flatten(grads)


@pytest.mark.slow
@pytest.mark.parametrize("order", cases.ORDERS)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_mean_over_all_batches_is_the_data_sets(network, size, order):
    case = cases.make(NETWORKS[network], 3)
    # Every batch that can be drawn with replacement, each as likely as the others.
    found = [solve(case, list(batch), order) for batch in itertools.product(range(3), repeat=size)]
    values, grads = (torch.stack(parts).mean(0) for parts in zip(*found, strict=True))
    ((_, flat, x, y),) = case.singles()
    expected = torch.stack(oracle.moments(case.network.hessian(flat, x, y)))
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)

    def squared(matrix):
        return matrix.square().sum()

    brute = oracle.gradient(case.network, flat, x, y, squared)
    assert cases.relative_error(grads, brute) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("order", cases.ORDERS)
def test_pieces_leave_no_seam(order):
    case = cases.make(NETWORKS["three hidden layers"], 12, ensemble=(2,)).with_gradients()

    def call(memory_budget):
        return exact.moments(
            *case.arguments,
            **case.settings,
            order=order,
            unbiased=True,
            memory_budget=memory_budget,
        )

    whole, pieces = call(1 << 28), call(cases.smallest_budget(case, order))
    torch.testing.assert_close(pieces.trace_sq, whole.trace_sq, rtol=1e-11, atol=0)
    grads = [
        torch.autograd.grad(moments.trace_sq.sum(), case.weights) for moments in (whole, pieces)
    ]
    for mine, theirs in zip(*grads, strict=True):
        assert cases.relative_error(mine, theirs) <= 1e-10


def test_what_cannot_be_estimated():
    case = cases.make(NETWORKS["one hidden layer"], 1)
    with pytest.raises(ValueError, match="at least 2 samples; got 1"):
        exact.moments(*case.arguments, **case.settings, unbiased=True)
    case = cases.make(NETWORKS["one hidden layer"], 4)
    settings = {**case.settings, "reduction": "sum"}
    with pytest.raises(ValueError, match="estimates the moments of a mean"):
        exact.moments(*case.arguments, **settings, unbiased=True)
    with pytest.raises(ValueError, match="use moments=2"):
        exact.moments(*case.arguments, **case.settings, unbiased=True, moments=4)

"""A loss as a function of parameters."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import lowland
from lowland.objective import objective

CE = nn.CrossEntropyLoss()


class Spare(nn.Module):
    """With a layer that its forward pass leaves out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.used(x).tanh()


@pytest.fixture
def data(generator):
    return torch.randn(9, 3, generator=generator), torch.arange(9) % 2


def test_where_the_loss_does_not_depend_on_a_parameter_its_gradient_is_zero(data):
    model = Spare()
    _, gradient = objective(model, CE, *data).gradient()
    assert [bool(part.any()) for part in gradient] == [True, True, False, False]


@pytest.mark.parametrize("products", ["autograd", "differences"])
def test_a_penalized_loss_does_not_move_what_it_does_not_depend_on(products, data):
    model = Spare()
    penalty = lowland.HSR(CE, 0.1, method="probes", products=products)
    penalty.loss(model, *data).backward()
    assert model.used.weight.grad.any()
    grads = [p.grad for p in model.spare.parameters()]
    assert all(grad is None or not grad.any() for grad in grads)


def test_the_loss_on_batches_is_the_mean_over_all_samples(data):
    model, (x, y) = Spare(), data
    whole = objective(model, CE, x, y)
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    found = replace(whole, batches=batches, shares=[2 / 9, 7 / 9])
    torch.testing.assert_close(found.loss(), whole.loss())
    assert [share for share, _ in found.parts()] == [2 / 9, 7 / 9]
    with pytest.raises(ValueError, match="shorter"):  # as many batches in each pass
        replace(whole, batches=batches[:1], shares=[2 / 9, 7 / 9]).loss()

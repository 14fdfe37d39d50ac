"""Operations that other rows, batches or switches bring in are looked at as soon as they appear."""

import pytest
import torch
from helpers.any_models import CROSS_ENTROPY, differences_of_loss
from torch import nn

import lowland
from lowland._watch import steps_of
from lowland.objective import graph


class Wrong(torch.autograd.Function):
    """A cube, whose second derivative PyTorch is told to be zero."""

    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a**3

    @staticmethod
    def backward(ctx, slope):
        (a,) = ctx.saved_tensors
        return slope * 3 * a.detach() ** 2


def straight_through(a):
    return a + (a.round() - a).detach()


class Experts(nn.Module):
    """Rows whose first number is large go to another expert than all others."""

    def __init__(self, other):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.other = other

    def forward(self, x):
        chosen = x[:, 0] > 2
        hidden = torch.tanh(self.one(x))
        if chosen.any():
            hidden = torch.where(chosen[:, None], self.other(self.two(x)), hidden)
        return self.last(hidden)


def data(routed=()):
    x = torch.randn(150, 4, generator=torch.Generator().manual_seed(1)).clamp(max=1)
    for row in routed:
        x[row, 0] = 3
    return x, torch.arange(150) % 3


def experts(other):
    torch.manual_seed(0)
    return Experts(other)


MEASURES = {
    "probes": lambda m, x, y: lowland.hessian_moments(
        m, CROSS_ENTROPY, x, y, method="probes", products="autograd"
    ),
    "spectrum": lambda m, x, y: lowland.spectrum(m, CROSS_ENTROPY, [(x, y)], k=1),
    "diagonal": lambda m, x, y: lowland.hessian_diagonal(m, CROSS_ENTROPY, x, y, method="probes"),
    "ggn": lambda m, x, y: lowland.hessian_moments(
        m, CROSS_ENTROPY, x, y, method="probes", products="autograd", matrix="ggn"
    ),
    "penalty": lambda m, x, y: lowland.HSR(CROSS_ENTROPY, 0.1, products="autograd").loss(m, x, y),
}


@pytest.mark.parametrize("measure", ["probes", "penalty"])
def test_rows_that_take_another_way_are_looked_at_in_the_first_call_and_in_later_ones(measure):
    with pytest.raises(RuntimeError, match="derivatives of this loss are wrong"):
        MEASURES[measure](experts(Wrong.apply), *data(routed=[137]))
    model = experts(Wrong.apply)
    MEASURES[measure](model, *data())
    for _ in range(2):  # and are not forgotten
        with pytest.raises(RuntimeError, match="derivatives of this loss are wrong"):
            MEASURES[measure](model, *data(routed=[137]))


@pytest.mark.parametrize("measure", ["spectrum", "diagonal"])
def test_what_falls_through_to_differences_does_so_by_rows_that_six_do_not_show(measure):
    model, (x, y) = experts(Wrong.apply).double(), data(routed=[137])
    found = MEASURES[measure](model, x.double(), y)
    expected = differences_of_loss(model, lambda: CROSS_ENTROPY(model(x.double()), y))
    if measure == "spectrum":
        right = torch.linalg.eigvalsh((expected + expected.T) / 2)[-1]
        assert abs(float(found.eigenvalues[0]) - float(right)) < 1e-3 * float(right)
    else:
        assert torch.isfinite(found.trace)


@pytest.mark.parametrize("measure", sorted(MEASURES))
def test_a_gradient_that_is_none_is_seen_in_a_later_batch(measure):
    model = experts(straight_through)
    MEASURES[measure](model, *data())
    with pytest.raises(RuntimeError, match="a batch takes operations that others did not"):
        MEASURES[measure](model, *data(routed=[20]))


def test_right_ones_cost_nothing_but_a_look():
    model = experts(torch.sin)
    lowland.hessian_moments(model, CROSS_ENTROPY, *data(), method="probes")
    x, y = data(routed=[3, 77])
    model, x = model.double(), x.double()
    found = lowland.hessian_moments(model, CROSS_ENTROPY, x, y, method="dense")
    expected = differences_of_loss(model, lambda: CROSS_ENTROPY(model(x), y))
    torch.testing.assert_close(found.trace.detach(), expected.trace(), rtol=1e-6, atol=1e-8)


def test_unchecked_is_not_looked_at():
    model = experts(Wrong.apply)
    MEASURES["probes"](model, *data())
    with lowland.unchecked():
        MEASURES["probes"](model, *data(routed=[20]))


def test_a_switch_that_is_a_number_or_a_buffer_is_seen():
    class Quantized(nn.Sequential):
        def forward(self, x):
            hidden = self[0](x)
            return self[1](straight_through(hidden) if self.bits < 8 else hidden.sin())

    torch.manual_seed(0)
    for buffer in (False, True):
        model = Quantized(nn.Linear(4, 5), nn.Linear(5, 3))
        if buffer:
            model.register_buffer("bits", torch.tensor(8))
        else:
            model.bits = 8
        MEASURES["probes"](model, *data())
        model.bits = torch.tensor(4) if buffer else 4
        with pytest.raises(RuntimeError, match="is not its derivative"):
            MEASURES["probes"](model, *data())


def test_conversions_of_types_are_no_steps():
    a = torch.ones(3, requires_grad=True)
    plain, cast = a.sin().sum(), a.double().sin().float().sum()
    assert steps_of(graph(plain)) == steps_of(graph(cast))
    assert steps_of(graph(plain)) != steps_of(graph(a.cos().sum()))
    joined, cut = a.sin() + a.sin(), a.sin() + a.sin().detach()
    assert steps_of(graph(joined)) != steps_of(graph(cut))


def test_a_penalty_in_an_ordinary_loop_looks_once_and_on_few_rows(monkeypatch):
    looks = []
    original = lowland.verification._compared

    def compared(target, order):
        looks.append(len(target.batch[1]))
        return original(target, order)

    monkeypatch.setattr(lowland.verification, "_compared", compared)
    model, (x, y) = experts(torch.sin), data(routed=[5])
    penalty = lowland.HessianTrace(CROSS_ENTROPY, 0.01, method="probes")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for start in range(0, 150, 30):
        optimizer.zero_grad()
        penalty.loss(model, x[start : start + 30], y[start : start + 30]).backward()
        optimizer.step()
    assert looks == [6, 30, 1]  # of the batch six, and all; the one that goes another way

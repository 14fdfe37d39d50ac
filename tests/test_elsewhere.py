"""The Hessian in a batch's inputs, or in what a layer gives."""

import pytest
import torch
from helpers.any_models import CROSS_ENTROPY
from torch import nn
from torch.autograd.functional import hessian

import lowland
from lowland.errors import UnsupportedModelError

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    return model, torch.randn(5, 3).double(), torch.arange(5) % 2


def matrices(model, x, y):
    """By automatic differentiation in the numbers themselves."""
    inside = model[:2](x).detach()
    return {
        "inputs": hessian(lambda x: CROSS_ENTROPY(model(x), y), x).reshape(15, 15),
        "1": hessian(lambda z: CROSS_ENTROPY(model[2:](z), y), inside).reshape(20, 20),
    }


@pytest.mark.parametrize("wrt", ["inputs", "1"])
def test_moments_and_spectrum(wrt):
    model, x, y = case()
    expected = matrices(model, x, y)[wrt]
    dense = lowland.hessian_moments(model, CROSS_ENTROPY, x, y, wrt=wrt)
    assert (dense.method, dense.dim) == ("dense", len(expected))
    torch.testing.assert_close(dense.trace, expected.trace(), **CLOSE)
    torch.testing.assert_close(dense.trace_sq, expected.square().sum(), **CLOSE)
    probes = lowland.hessian_moments(model, CROSS_ENTROPY, (x, y), method="probes", wrt=wrt)
    assert abs(probes.trace - expected.trace()) < 5 * probes.stderr[0]
    spectrum = lowland.spectrum(model, CROSS_ENTROPY, (x, y), k=None, wrt=wrt)
    torch.testing.assert_close(spectrum.eigenvalues, torch.linalg.eigvalsh(expected).flip(0))
    (vector,) = spectrum.eigenvectors[0].values()
    assert vector.shape == (x if wrt == "inputs" else model[:2](x)).shape
    loss = CROSS_ENTROPY(model(x), y)
    assert float(spectrum.along(0, [0.0])) == pytest.approx(loss.item())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["dense", "probes"])
def test_moments_lead_to_the_models_parameters(method):
    model, x, y = case()

    def trace():
        generator = torch.Generator().manual_seed(0)
        return lowland.hessian_moments(
            model, CROSS_ENTROPY, x, y, method, wrt="inputs", generator=generator
        ).trace

    (gradient,) = torch.autograd.grad(trace(), model[0].weight)
    with torch.no_grad():
        entries = model[0].weight.view(-1)
        for index in (0, 5):
            sides = []
            for step in (1e-5, -1e-5):
                entries[index] += step
                sides.append(trace())
                entries[index] -= step
            slope = (sides[0] - sides[1]) / 2e-5
            torch.testing.assert_close(gradient.view(-1)[index], slope, rtol=1e-5, atol=1e-7)


def test_layers_may_write_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Hardswish(inplace=True), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3).double(), torch.arange(5) % 2
    inside = model[:1](x).detach()
    tail = nn.Sequential(nn.Hardswish(), model[2])
    expected = hessian(lambda z: CROSS_ENTROPY(tail(z), y), inside).reshape(20, 20)
    found = lowland.hessian_moments(model, CROSS_ENTROPY, x, y, wrt="0")
    torch.testing.assert_close(found.trace_sq, expected.square().sum(), **CLOSE)


class Tanh(torch.autograd.Function):
    """With a third derivative that is wrong."""

    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a.tanh()

    @staticmethod
    def backward(ctx, slope):
        (a,) = ctx.saved_tensors
        value, here = a.detach().tanh(), a.detach()
        return slope * (1 - value**2 - 2 * value * (1 - value**2) * (a - here))


def test_gradients_in_the_models_parameters_are_looked_at():
    model, x, y = case()

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = model[0]

        def forward(self, x):
            return Tanh.apply(self.inside(x))

    moments = lowland.hessian_moments(
        nn.Sequential(Own(), model[3]), CROSS_ENTROPY, x, y, wrt="inputs"
    )
    with pytest.raises(RuntimeError, match="third derivatives of this loss are wrong"):
        moments.trace.backward()


class Keyed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head, self.twice = nn.Embedding(5, 3), nn.Linear(5, 2), nn.Tanh()

    def forward(self, ids, values):
        inside = self.twice(self.twice(self.embed(ids)))
        return self.head(torch.cat([inside, values], -1))


def test_inputs_of_any_form():
    torch.manual_seed(0)
    model, y = Keyed().double(), torch.arange(6) % 2
    x = {"ids": torch.arange(6) % 5, "values": torch.randn(6, 2).double()}
    expected = hessian(
        lambda values: CROSS_ENTROPY(model(x["ids"], values), y), x["values"]
    ).reshape(12, 12)
    found = lowland.hessian_moments(model, CROSS_ENTROPY, x, y, wrt="inputs")
    torch.testing.assert_close(found.trace_sq, expected.square().sum(), **CLOSE)
    assert not x["values"].requires_grad


def test_what_has_no_such_hessian():
    model, x, y = case()

    def refused(error, match, **settings):
        with pytest.raises(error, match=match):
            lowland.hessian_moments(model, CROSS_ENTROPY, x, y, **settings)

    refused(ValueError, "'inputs' or the name of a layer of the model; got 'out'", wrt="out")
    refused(UnsupportedModelError, "takes the place of parameters=", wrt="1", unbiased=True)
    refused(UnsupportedModelError, "the closed form reads", wrt="1", method="exact")
    with pytest.raises(UnsupportedModelError, match="wrt= looks at one batch"):
        lowland.hessian_moments(model, CROSS_ENTROPY, [(x, y)], wrt="inputs")
    with pytest.raises(UnsupportedModelError, match="wrt= looks at one batch"):
        lowland.spectrum(model, CROSS_ENTROPY, [(x, y)], wrt="inputs")
    keyed = Keyed().double()
    batch = {"ids": torch.arange(6) % 5, "values": torch.randn(6, 2).double()}
    with pytest.raises(ValueError, match="the model runs 2 times"):
        lowland.hessian_moments(keyed, CROSS_ENTROPY, batch, torch.arange(6) % 2, wrt="twice")
    ids = nn.Sequential(nn.Embedding(5, 2), nn.Flatten())
    with pytest.raises(TypeError, match="has no floating-point numbers"):
        lowland.hessian_moments(ids, CROSS_ENTROPY, torch.zeros(3, 1).long(), y[:3], wrt="inputs")


@pytest.mark.parametrize("l2", [0.3, 2.0])
def test_weight_decay_is_part_of_the_loss(l2):
    model, x, y = case()
    parameters = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    plain = lowland.spectrum(model, CROSS_ENTROPY, (x, y), k=None).eigenvalues + l2
    for method, settings in (("dense", {"moments": 4}), ("probes", {"probes": 300})):
        moments = lowland.hessian_moments(model, CROSS_ENTROPY, x, y, method, l2=l2, **settings)
        values = [moments.trace, moments.trace_sq, *(moments.higher or ())]
        for power, value in enumerate(values, 1):
            room = 1e-9 * plain.sum() if method == "dense" else 4 * moments.stderr[power - 1]
            assert abs(value - plain.pow(power).sum()) < room
    over_loader = lowland.hessian_moments(model, CROSS_ENTROPY, [(x, y)], l2=l2, probes=100)
    assert abs(over_loader.trace - plain.sum()) < 4 * over_loader.stderr[0]
    spectrum = lowland.spectrum(model, CROSS_ENTROPY, (x, y), k=None, l2=l2)
    torch.testing.assert_close(spectrum.eigenvalues, plain)
    loss = CROSS_ENTROPY(model(x), y).item() + l2 / 2 * float(parameters.square().sum())
    assert float(spectrum.along(0, [0.0])) == pytest.approx(loss)
    top = lowland.spectrum(model, CROSS_ENTROPY, (x, y), k=1, l2=l2, method="lanczos")
    torch.testing.assert_close(top.eigenvalues, plain[:1], rtol=1e-6, atol=0)
    curve = spectrum.along(0, [-1e-3, 0.0, 1e-3])
    bend = (curve[0] - 2 * curve[1] + curve[2]) / 1e-6
    assert float(bend) == pytest.approx(float(plain[0]), rel=1e-3)


def test_no_weight_decay():
    model, x, y = case()
    for wrong in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="l2 must be a finite number of at least 0"):
            lowland.hessian_moments(model, CROSS_ENTROPY, x, y, l2=wrong)
        with pytest.raises(ValueError, match="l2 must be a finite number of at least 0"):
            lowland.spectrum(model, CROSS_ENTROPY, (x, y), l2=wrong)

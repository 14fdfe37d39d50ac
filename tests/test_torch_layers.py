"""Each layer and each loss of PyTorch, in every engine, against differences of first gradients."""

import pytest
import torch
from helpers.any_models import differences, flat
from helpers.torch_layers import LAYERS, LEFT_OUT, LOSSES, build
from torch import nn

import lowland
from lowland.objective import objective
from lowland.passes import remember, unsteady
from lowland.probes import rademacher
from lowland.products import quadratic_forms


def test_none_is_missing():
    known = {name.split(",")[0].removesuffix(" of all") for name in (*LAYERS, *LOSSES)}
    named = {n for n in dir(nn) if isinstance(getattr(nn, n), type)}
    missing = {n for n in named - known if not n.startswith(tuple(LEFT_OUT))}
    assert not missing


def first(model, criterion, x, y):
    """The gradient as PyTorch has it, from the same random numbers each time."""
    for module in model.modules():  # whose sparse gradients cannot be put together
        if isinstance(module, nn.Embedding):
            module.sparse = False
    again, parameters = remember(model, device=x.device), list(model.parameters())

    def gradient():
        with again():
            loss = criterion(model(x), y)
            return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)

    return gradient


def third(model, gradient, v, w, step=1e-4):
    """The derivative of ``v' H v`` along ``w``, by differences of first gradients."""
    total, parameters = 0.0, list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    for one in (1, -1):
        for other in (1, -1):
            with torch.no_grad():
                for p, start, along_v, along_w in zip(parameters, before, v, w, strict=True):
                    p.copy_(start + step * (one * along_v + other * along_w))
            total += one * other * float(flat(v) @ flat(gradient()))
    with torch.no_grad():
        for p, start in zip(parameters, before, strict=True):
            p.copy_(start)
    return total / (4 * step**2)


# One of each kind; the others take a minute together.
FAST = (
    *("SiLU", "Hardsigmoid", "MultiheadAttention", "BatchNorm2d", "LayerNorm", "GroupNorm"),
    *("weight_norm", "MaxPool2d", "LSTM", "GRU, packed", "Embedding, sparse", "cdist"),
    *("EmbeddingBag, mean", "slogdet", "CrossEntropyLoss", "CTCLoss", "MultiMarginLoss"),
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in (*LAYERS, *LOSSES)
    ],
)
def test_every_engine_is_right(name):
    model, criterion, x, y = build(name)
    gradient = first(model, criterion, x, y)
    expected = differences(model, gradient)
    generator = torch.Generator().manual_seed(0)
    v, w = (rademacher(model.parameters(), generator) for _ in range(2))
    image, slope = expected @ flat(v), third(model, gradient, v, w)

    model, criterion, x, y = build(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    randomness = torch.get_rng_state()

    # Whose own gradient is not that precise.
    rough = 1e-4 if name == "CrossMapLRN2d" else 1e-5

    def close(found, right, tolerance=rough):
        scale = float(expected.norm())
        torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance * scale)

    trace, square = flat(v) @ image, image @ image
    dense = lowland.hessian_moments(model, criterion, x, y, "dense")
    close(dense.trace, expected.trace())
    close(dense.trace_sq.sqrt(), expected.norm())
    if not any(map(unsteady, model.modules())) and name != "RReLU":
        spectrum = lowland.spectrum(model, criterion, (x, y), k=None)
        close(spectrum.eigenvalues, torch.linalg.eigvalsh(expected).flip(0))

    target = objective(model, criterion, x, y)
    again = remember(model, device=x.device)
    penalty = lowland.HessianTrace(criterion, 1.0, method="probes", generator=generator)
    penalty(model, x, y).backward()
    assert ("differences" in penalty.used) == (name in WITHOUT_PRODUCTS)
    for products in ("differences",) if "differences" in penalty.used else PRODUCTS:
        with again():
            _, (one,), (other,) = quadratic_forms([target], [v], products)
            close(one, trace, 1e-3)
            close(other.sqrt(), square.sqrt(), 1e-3)
            found = torch.autograd.grad(one, list(model.parameters()))
        if products == "autograd":
            size = abs(slope) + float(flat(found).norm())
            assert abs(float(flat(found) @ flat(w)) - slope) < 1e-4 * size
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), randomness)


# What has no second derivative, and is not written out.
WITHOUT_PRODUCTS = ("CrossMapLRN2d", "CTCLoss")

PRODUCTS = ("autograd", "differences")

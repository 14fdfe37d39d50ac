"""The two parts of the Hessian in the closed form, beside those of brute force."""

from dataclasses import replace

import cases
import oracle
import pytest
import torch
from any_models import build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import lowland
from lowland import exact
from lowland.errors import UnsupportedModelError

PARTS = st.sampled_from(["ggn", "residual"])


def check(case, name, order, *, moments=2, **options):
    """Moments, matrix and gradient of each network of a case."""
    case = case.with_gradients()
    found = exact.moments(
        *case.arguments, **case.settings, matrix=name, order=order, moments=moments, **options
    )
    alone = exact.trace(*case.arguments, **case.settings, matrix=name)
    assert found.matrix == name
    whole = exact.hessian(*case.arguments, **case.settings, matrix=name)
    slopes = [
        torch.autograd.grad(part.sum(), case.weights, retain_graph=True, materialize_grads=True)
        for part in (found.trace, found.trace_sq, alone)
        if part.requires_grad
    ]
    for index, flat, x, y in case.singles():
        leaf = flat.clone().requires_grad_()
        matrix = case.network.matrix(name, leaf, x, y)
        hessian = case.network.hessian(flat, x, y)
        size = float(hessian.norm() + case.network.gauss_newton(flat, x, y).norm())
        assert (whole[index] - matrix).abs().max() <= 1e-10 * size
        traces = oracle.moments(matrix)
        for mine, expected, scale in (
            (found.trace, traces[0], size * found.dim**0.5),
            (alone, traces[0], size * found.dim**0.5),
            (found.trace_sq, traces[1], size**2),
        ):
            assert (mine[index] - expected).abs() <= 1e-10 * scale
        if moments == 4:
            square = matrix @ matrix
            for mine, power in zip(found.higher, (square @ matrix, square @ square), strict=True):
                torch.testing.assert_close(
                    mine[index], power.trace().detach(), rtol=1e-9, atol=1e-12 * size**3
                )
        for values, of in zip(slopes, (*traces, traces[0]), strict=False):
            (expected,) = torch.autograd.grad(of, leaf, retain_graph=True, materialize_grads=True)
            mine = oracle.flatten([part[index] for part in values])
            natural = torch.autograd.grad(
                oracle.moments(case.network.hessian(leaf, x, y))[of is traces[1]],
                leaf,
                materialize_grads=True,
            )[0]
            scale = float(expected.abs().max() + natural.abs().max())
            assert (mine - expected).abs().max() <= 1e-9 * scale + 1e-13 * size


@pytest.mark.parametrize("name", ["ggn", "residual"])
@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_networks_that_the_compiled_code_covers(name, loss):
    network = oracle.Network(inputs=3, hidden=4, activation="tanh", loss=loss)
    case = cases.make(network, samples=7, seed=1)
    for order in ("auto", "parameters"):
        check(case, name, order, moments=4)


@settings(max_examples=12)
@given(cases.cases(most_samples=5), PARTS, st.sampled_from(cases.ORDERS))
def test_the_parts_of_the_hessian(case, name, order):
    check(case, name, order)


@pytest.mark.slow
@settings(max_examples=80)
@given(cases.cases(), PARTS, st.sampled_from(cases.ORDERS), st.sampled_from([2, 4]))
def test_the_parts_of_the_hessian_at_length(case, name, order, moments):
    check(case, name, order, moments=moments)


@pytest.mark.slow
@settings(max_examples=30)
@given(
    cases.cases(
        # The library's mean is one over outputs, too, of which the oracle has none here.
        networks=cases.general(losses=tuple(oracle.OF_ONES_OWN)).map(
            lambda network: replace(network, reduction="sum")
        )
    ),
    PARTS,
    st.sampled_from(cases.ORDERS),
)
def test_the_parts_of_the_hessian_of_a_loss_of_ones_own(case, name, order):
    check(case, name, order)


@pytest.mark.slow
@settings(max_examples=10)
@given(cases.cases(most_samples=6), st.sampled_from(cases.ORDERS))
def test_parts_in_small_pieces_and_without_own_pairs(case, order):
    budget = cases.smallest_budget(case, order)
    options = {"order": order, "memory_budget": budget}
    small = exact.moments(*case.arguments, **case.settings, matrix="ggn", **options)
    large = exact.moments(*case.arguments, **case.settings, matrix="ggn")
    torch.testing.assert_close(small.trace, large.trace)
    torch.testing.assert_close(small.trace_sq, large.trace_sq)
    if case.samples < 2 or case.network.reduction == "sum":
        return
    unbiased = exact.moments(*case.arguments, **case.settings, matrix="ggn", unbiased=True)
    for index, flat, x, y in case.singles():
        parts = [case.network.gauss_newton(flat, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
        pairs = sum((a * b).sum() for a in parts for b in parts if a is not b)
        torch.testing.assert_close(unbiased.trace_sq[index], pairs / (len(x) * (len(x) - 1)))


CRITERIA = {
    "cross-entropy": (nn.CrossEntropyLoss(), "classes"),
    "weighed, smoothed": (
        nn.CrossEntropyLoss(weight=torch.tensor([0.3, 2.0]).double(), label_smoothing=0.1),
        "classes",
    ),
    "ignored": (nn.CrossEntropyLoss(ignore_index=0, reduction="sum"), "classes"),
    "soft": (nn.CrossEntropyLoss(), "soft"),
    "binary": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0, 0.5]).double()), "soft"),
    "squares": (nn.MSELoss(), "soft"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("matrix", ["ggn", "residual"])
def test_engines_agree(name, matrix):
    criterion, kind = CRITERIA[name]
    model, x, y = build("mlp")
    model[0].bias.requires_grad_(requires_grad=False)
    y = y if kind == "classes" else torch.rand(8, 2).double()
    settings = {"matrix": matrix, "moments": 4}
    found, expected = (
        lowland.hessian_moments(model, criterion, x, y, method=method, **settings)
        for method in ("exact", "dense")
    )
    assert (found.method, expected.method) == ("exact", "dense")
    for each in (found, expected):
        assert each.matrix == matrix
    for mine, theirs in (
        (found.trace, expected.trace),
        (found.trace_sq, expected.trace_sq),
        *zip(found.higher, expected.higher, strict=True),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    parameters = [p for p in model.parameters() if p.requires_grad]
    slopes = [
        torch.autograd.grad(each.trace + each.trace_sq, parameters) for each in (found, expected)
    ]
    torch.testing.assert_close(*slopes, rtol=1e-8, atol=1e-11)


def test_the_fisher_matrix_in_the_closed_form():
    model, x, y = build("mlp")
    for criterion, targets in (
        (nn.CrossEntropyLoss(label_smoothing=0.2), y),
        (nn.CrossEntropyLoss(), functional.one_hot(y, 2).double()),
        (nn.BCEWithLogitsLoss(), torch.rand(8, 2).double()),
        (nn.MSELoss(), torch.rand(8, 2).double()),
    ):
        found, expected = (
            lowland.hessian_moments(model, criterion, x, targets, matrix="fisher", method=method)
            for method in ("auto", "dense")
        )
        assert (found.method, found.matrix) == ("exact", "fisher")
        torch.testing.assert_close(found.trace_sq, expected.trace_sq)
    weighed = nn.CrossEntropyLoss(weight=torch.ones(2).double())
    for method in ("auto", "exact"):
        with pytest.raises(UnsupportedModelError, match="weights"):
            lowland.hessian_moments(model, weighed, x, y, matrix="fisher", method=method)


@pytest.mark.usefixtures("as_installed")
def test_matrices_that_the_closed_form_has_not():
    weights, x, y = [torch.zeros(2, 1)], torch.ones(4, 1), torch.ones(4)
    with pytest.raises(ValueError, match="the Fisher matrix is 'ggn'"):
        exact.moments(weights, x, y, activation="tanh", loss="mse", matrix="fisher")

"""The ends of spectra where they are hard to find, and what is said of their errors."""

import math
import statistics

import pytest
import torch
from torch import nn

import lowland

MSE = nn.MSELoss()


def with_eigenvalues(values):
    """A model, a criterion and data of which the Hessian is diagonal and has these eigenvalues."""
    dim = len(values)
    values = torch.as_tensor(values, dtype=torch.float64)
    model = nn.Linear(dim, 1, bias=False).double()
    positive = torch.diag((values.abs() * dim / 2).sqrt())
    sign = values.sign().unsqueeze(1)

    def criterion(outputs, y):
        return (sign * outputs.square() + 0 * y).sum() / dim

    return model, criterion, (positive, torch.zeros(dim, 1, dtype=torch.float64))


def ends(values, **settings):
    method = "lanczos" if len(values) > 10 else "dense"
    return lowland.spectrum(*with_eigenvalues(values), method=method, **settings)


@pytest.mark.parametrize("sign", [1, -1])
def test_eigenvalues_close_to_zero_are_found_to_the_tolerance(sign):
    # One end crowds at zero: a residual that is small beside the largest eigenvalue is enough, one
    # that is small beside such an eigenvalue would take for ever.
    values = sign * torch.logspace(-6, 0, 100, dtype=torch.float64)
    which = "SA" if sign > 0 else "LA"
    found = ends(values, k=2, which=which, tolerance=1e-4, restarts=60)
    assert (found.residuals <= found.tolerance).all()
    assert found.tolerance == pytest.approx(1e-4, rel=0.1)
    assert found.eigenvalues.abs().max() < 1e-3


@pytest.mark.parametrize("tolerance", [1e-3, 1e-8])
def test_residuals_keep_the_tolerance_that_was_asked_for(tolerance):
    values = torch.linspace(-1, 2, 80, dtype=torch.float64)
    found = ends(values, k=3, which="both", tolerance=tolerance)  # without a warning
    assert (found.residuals <= found.tolerance).all()
    assert found.tolerance <= 2 * tolerance * (1 + 1e-12)
    expected = values.flip(0)[found.ranks - 1]
    assert (found.eigenvalues - expected).abs().max() <= found.tolerance


def test_both_ends_of_few_eigenvalues_do_not_overlap():
    found = ends([3.0, 2.0, 1.0, -1.0, -2.0], k=3, which="both")
    assert found.ranks.tolist() == [1, 2, 3, 4, 5]


def test_standard_errors_of_the_trace_are_as_large_as_its_errors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = torch.randn(30, 4).double(), torch.randn(30, 2).double()
    exact = lowland.hessian_moments(model, MSE, x, y).trace.item()
    off = []
    for seed in range(4):
        found = lowland.spectrum(
            model, MSE, (x, y), k=1, method="lanczos", trace_probes=16, seed=seed
        )
        off.append((found.trace - exact) / found.trace_stderr)
    assert 0.5 < math.sqrt(statistics.mean(each**2 for each in off)) < 2

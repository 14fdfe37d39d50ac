"""The ends of spectra where they are hard to find, and what is said of their errors."""

import math
import statistics

import pytest
import torch
from torch import nn

import lowland
from lowland.spectra.lanczos import lanczos_pairs

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


class Counted:
    """A symmetric matrix with these eigenvalues, which counts its products."""

    def __init__(self, values, dtype=torch.float64, skew=0.0):
        torch.manual_seed(0)
        values = torch.as_tensor(values, dtype=torch.float64)
        dim = len(values)
        rotation = torch.linalg.qr(torch.randn(dim, dim).double())[0]
        other = torch.randn(dim, dim).double()
        matrix = (rotation * values) @ rotation.T + skew * (other - other.T)
        self.values, self.matrix = values.sort(descending=True).values, matrix.to(dtype)
        self.shape, self.taken = (dim, dim), 0
        self.device, self.dtype = self.matrix.device, dtype

    def __matmul__(self, vector):
        self.taken += 1
        return self.matrix @ vector


SPECTRA = {
    "copies": [3.0] * 3 + [2.0] * 2 + [1.0] + torch.linspace(-0.5, 0.5, 200).tolist(),
    "negative": (-torch.logspace(-1, 1, 150)).tolist(),
    "mostly negative": [-10.0, -7.0, 2.0, 1.0, *torch.linspace(-0.2, 0.2, 300).tolist()],
    "of low rank": torch.linspace(0.1, 1, 20).tolist() + [0.0] * 500,
    "of few": torch.linspace(-1, 1, 9).tolist(),
}


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("which", ["LA", "SA", "both"])
@pytest.mark.parametrize("k", [1, 3])
def test_the_ends_are_all_there_with_their_copies(values, which, k):
    matrix = Counted(values)
    found, space = lanczos_pairs(matrix, k, which, tolerance=1e-6, restarts=300, seed=0)
    expected = matrix.values[found.ranks - 1]
    assert (found.values - expected).abs().max() <= found.tolerance
    off = matrix.matrix @ found.vectors - found.vectors * found.values
    torch.testing.assert_close(
        found.residuals, torch.linalg.vector_norm(off, dim=0), rtol=0, atol=1e-12
    )
    assert (found.residuals <= found.tolerance).all()
    eye = torch.eye(len(space.basis)).double()
    torch.testing.assert_close(space.basis @ space.basis.T, eye, rtol=0, atol=1e-10)
    inside = (space.basis @ matrix.matrix @ space.basis.T).trace()
    assert space.trace == pytest.approx(float(inside), abs=1e-9)


def test_outliers_take_few_products():
    matrix = Counted([10.0, 7, 5, 4, 3, 2, *torch.linspace(-0.3, 0.3, 600).tolist()])
    lanczos_pairs(matrix, 1, "LA", tolerance=1e-5, restarts=300, seed=0)
    assert matrix.taken <= 14


def test_single_precision_reaches_its_own_in_many_dimensions():
    # Inner products of this length in single precision would leave residuals of 1e-4.
    values = torch.full((2**20,), 0.01)
    values[:4] = torch.tensor([1.0, 0.7, 0.5, -0.8])

    class Diagonal:
        shape, device, dtype = (len(values),) * 2, values.device, values.dtype

        def __matmul__(self, vector):
            return values * vector

    found, _ = lanczos_pairs(Diagonal(), 1, "LA", tolerance=1e-5, restarts=9, seed=0)
    assert float(found.values[0]) == pytest.approx(1, abs=1e-6)
    assert float(found.residuals[0]) < 1e-5


def test_a_matrix_that_is_not_symmetric_is_found_on_the_way():
    matrix = Counted(torch.linspace(-1, 2, 100), skew=0.05)
    with pytest.raises(RuntimeError, match=r"not symmetric: u'Hv = .* and v'Hu"):
        lanczos_pairs(matrix, 1, "LA", tolerance=1e-5, restarts=300, seed=0)


class Rounded:
    """A matrix whose products have the digits of half precision alone."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.dtype = matrix, matrix.shape, matrix.dtype
        self.device = matrix.device

    def __matmul__(self, vector):
        return (self.matrix @ vector).bfloat16().to(self.dtype)


@pytest.mark.parametrize("k", [1, 3])
def test_residuals_are_those_of_the_products_as_they_are(k):
    # What rounding adds to a product is in the space that is made of it, and seen by another alone.
    matrix = torch.diag(torch.linspace(0, 1, 400) ** 8)
    turned, _ = torch.linalg.qr(torch.randn(400, 400, generator=torch.Generator().manual_seed(0)))
    operator = Rounded(turned @ matrix @ turned.T)
    with pytest.warns(RuntimeWarning, match="are no more exact"):
        pairs, _ = lanczos_pairs(operator, k, "LA", tolerance=1e-4, restarts=200, seed=0)
    for value, vector, residual in zip(pairs.values, pairs.vectors.T, pairs.residuals, strict=True):
        true = (operator @ vector - value * vector).norm()
        assert 0.9 * true <= residual <= 1.1 * true

"""Lanczos quadrature, of matrices whose eigenvalues are known."""

import pytest
import torch

from lowland.spectra import solve


def with_eigenvalues(values, generator):
    """A symmetric matrix, and its eigenvectors in columns."""
    square = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(square)[0]
    matrix = vectors @ torch.diag(values) @ vectors.T
    return (matrix + matrix.T) / 2, vectors


@pytest.mark.parametrize(
    "values",
    [
        torch.linspace(-1, 2, 60).double(),
        # Two converge long before the crowd at zero, and rounding would bring copies of them.
        torch.cat([1e-3 * torch.linspace(0.5, 1, 58), torch.tensor([5e2, 1e3])]).double(),
    ],
)
def test_of_as_many_steps_as_parameters_the_nodes_are_the_eigenvalues(values, generator):
    matrix, vectors = with_eigenvalues(values, generator)
    start = torch.randn(60, generator=generator, dtype=torch.float64)
    nodes, weights = solve._quadrature(matrix, start, 60)
    torch.testing.assert_close(nodes, values, rtol=0, atol=1e-11 * float(values.max()))
    expected = (vectors.T @ start / start.norm()).square()
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-9)


def test_of_few_distinct_eigenvalues_there_is_one_node_each(generator):
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0]).double().repeat(20))
    start = torch.randn(60, generator=generator, dtype=torch.float64)
    nodes, _ = solve._quadrature(matrix, start, 60)
    torch.testing.assert_close(nodes, torch.tensor([1.0, 2.0, 3.0]).double())


def test_standard_errors_of_a_density_are_as_large_as_its_errors(generator):
    values = torch.linspace(-1, 2, 60).double()
    matrix, _ = with_eigenvalues(values, generator)
    exact = solve.smooth([(values, torch.full((60,), 1 / 60).double())])
    found = solve.density_of(matrix, probes=30, steps=60, seed=0)
    off = ((found.mean - exact.mean) / found.stderr)[exact.mean > 0.1 * exact.mean.max()]
    assert 0.5 < float(off.square().mean().sqrt()) < 2

import pytest
import torch

from lowland import spectrum
from lowland.networks import initial_weights


def brute_force(weights, x, y, index, activation):
    def loss(flat):
        first, second = weights[0][index], weights[1][index]
        inner = flat[: first.numel()].view_as(first)
        outer = flat[first.numel() :].view_as(second)
        hidden = activation(inner[0] + x[index] @ inner[1:])
        logit = (outer[0] + hidden @ outer[1:]).squeeze(1)
        return torch.nn.functional.binary_cross_entropy_with_logits(logit, y[index])

    flat = torch.cat([part[index].flatten() for part in weights])
    return torch.linalg.eigvalsh(torch.func.hessian(loss)(flat))


@pytest.fixture
def problem(generator):
    weights = initial_weights(range(5), inputs=3, hidden=4)
    x = torch.randn(5, 12, 3, generator=generator, dtype=torch.float64)
    y = (torch.rand(5, 12, generator=generator) < 0.5).double()
    return weights, x, y


@pytest.mark.parametrize("path", ["dense", "lanczos"])
def test_both_ends_are_those_of_brute_force(problem, path, monkeypatch):
    if path == "lanczos":
        monkeypatch.setattr(spectrum, "DENSE_LIMIT", 5)
    smallest, largest = spectrum.extreme_eigenvalues(*problem, activation="sigmoid", loss="bce")
    for i in range(5):
        values = brute_force(*problem, i, torch.sigmoid)
        scale = float(values.abs().max())
        assert abs(float(smallest[i] - values[0])) < 1e-8 * scale
        assert abs(float(largest[i] - values[-1])) < 1e-8 * scale
        assert smallest[i] < 0 < largest[i]


def test_many_parameters_go_without_the_whole_matrix(generator, monkeypatch):
    def forbidden(*args, **settings):
        raise AssertionError("the whole Hessian was built")

    monkeypatch.setattr(spectrum, "hessian", forbidden)
    monkeypatch.setattr(spectrum, "DENSE_LIMIT", 20)
    weights = initial_weights(range(1), inputs=3, hidden=4)
    x = torch.randn(1, 12, 3, generator=generator, dtype=torch.float64)
    smallest, largest = spectrum.extreme_eigenvalues(
        weights, x, torch.ones(1, 12).double(), activation="tanh", loss="bce"
    )
    values = brute_force(weights, x, torch.ones(1, 12).double(), 0, torch.tanh)
    torch.testing.assert_close(torch.cat([smallest, largest]), values[[0, -1]])


def test_the_number_of_threads_is_given_back(problem):
    before = torch.get_num_threads()
    spectrum.extreme_eigenvalues(*problem, activation="sigmoid", loss="bce")
    assert torch.get_num_threads() == before

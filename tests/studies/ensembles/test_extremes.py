import plain
import pytest
import torch
from torch import nn

from lowland.studies.ensembles import extremes

PROBLEMS = [
    ((3, 4, 1), "bce"),
    ((3, 4, 2, 1), "bce"),
    ((3, 2, 3), "bce"),
    ((3, 4, 3), "ce"),
    ((3, 3, 2, 3), "ce"),
    ((3, 3), "ce"),
]


def brute_force(weights, x, y, index, loss):
    model = plain.module(weights, index, nn.Sigmoid)
    parameters = dict(model.named_parameters())

    def value(flat):
        parts = flat.split([part.numel() for part in parameters.values()])
        named = {
            name: new.view_as(old)
            for (name, old), new in zip(parameters.items(), parts, strict=True)
        }
        return plain.loss_of(torch.func.functional_call(model, named, x[index]), y[index], loss)

    flat = torch.cat([part.detach().flatten() for part in parameters.values()])
    return torch.linalg.eigvalsh(torch.func.hessian(value)(flat))


@pytest.mark.parametrize(("sizes", "loss"), PROBLEMS)
@pytest.mark.parametrize("path", ["dense", "lanczos"])
def test_both_ends_are_those_of_brute_force(sizes, loss, path, monkeypatch):
    if path == "lanczos":
        monkeypatch.setattr(extremes, "DENSE_LIMIT", 5)
        monkeypatch.setattr(extremes, "hessian", None)  # goes without the whole matrix
    problem = plain.problem(sizes, loss)
    smallest, largest = extremes.extreme_eigenvalues(*problem, activation="sigmoid", loss=loss)
    for i in range(3):
        values = brute_force(*problem, i, loss)
        scale = float(values.abs().max())
        assert abs(float(smallest[i] - values[0])) < 1e-8 * scale
        assert abs(float(largest[i] - values[-1])) < 1e-8 * scale
        assert smallest[i] < largest[i]


def test_the_number_of_threads_is_given_back():
    before = torch.get_num_threads()
    problem = plain.problem((3, 4, 1), "bce")
    extremes.extreme_eigenvalues(*problem, activation="sigmoid", loss="bce")
    assert torch.get_num_threads() == before

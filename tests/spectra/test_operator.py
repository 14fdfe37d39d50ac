"""Products with the Hessian of many batches, against oracles that share no code with them."""

import warnings

import pytest
import torch
from any_models import MODELS, build, differences_of_loss, error
from torch import nn

import lowland
from lowland.spectra.surface import survey

CE = nn.CrossEntropyLoss()


def by_curvlinops(model, batches):
    with warnings.catch_warnings():  # of a package that it imports, about PyTorch
        warnings.simplefilter("ignore")
        import curvlinops  # noqa: PLC0415

        parameters = [p for p in model.parameters() if p.requires_grad]
        operator = curvlinops.HessianLinearOperator(model, CE, parameters, batches)
        return operator @ torch.eye(operator.shape[0], dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"cnn", "tied", "Attention", "Recurrent"}))
def test_the_operator_is_that_of_curvlinops(name):
    model, x, y = build(name, samples=9)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    operator = survey(model, CE, batches).operator()
    eye = torch.eye(operator.shape[0], dtype=torch.float64)
    assert error(operator @ eye, by_curvlinops(model, batches)) < 1e-9
    assert error(operator @ eye[:, 1], (operator @ eye)[:, 1]) < 1e-12


class Flow(nn.Module):
    """An invertible map, as in Glow, whose density has a determinant and a solved system."""

    def __init__(self):
        super().__init__()
        self.mix, self.scale = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.rand(3))

    def forward(self, x):
        z = torch.linalg.solve(self.mix, (x * self.scale.exp()).T).T
        return z, torch.linalg.slogdet(self.mix)[1] - self.scale.sum()


def unlikelihood(output, _):
    z, volume = output
    return 0.5 * z.square().sum(1).mean() + volume


@pytest.mark.parametrize("grad_mode", [True, False])
def test_determinants_and_solves_have_their_own_second_derivatives(grad_mode):
    """PyTorch's derivative of them is another one where gradients are off, and symmetric too."""
    torch.manual_seed(2)
    model, x, y = Flow().double(), torch.randn(20, 3).double(), torch.zeros(20)
    matrix = differences_of_loss(model, lambda: unlikelihood(model(x), y))
    with torch.set_grad_enabled(grad_mode):
        exact = lowland.spectrum(model, unlikelihood, (x, y), k=None)
        found = lowland.spectrum(model, unlikelihood, (x, y), k=2, method="lanczos")
        moments = lowland.hessian_moments(model, unlikelihood, x, y, "dense")
    expected = torch.linalg.eigvalsh(matrix).flip(0)
    assert error(exact.eigenvalues, expected) < 1e-7
    assert error(found.eigenvalues, expected[:2]) < 1e-4
    assert error(moments.trace_sq, expected.square().sum()) < 1e-7
    assert exact.trace == pytest.approx(float(matrix.trace()), rel=1e-7)


@pytest.mark.parametrize(
    "layer",
    [nn.SiLU(), nn.Mish(), nn.GroupNorm(1, 4), nn.Softsign(), nn.RMSNorm(4)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_without_forward_mode_have_a_spectrum(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 3)).double()
    x, y = torch.randn(12, 3).double(), torch.arange(12) % 3
    matrix = differences_of_loss(model, lambda: CE(model(x), y))
    values = lowland.spectrum(model, CE, (x, y), k=None).eigenvalues
    assert error(values, torch.linalg.eigvalsh(matrix).flip(0)) < 1e-6
    blocks = lowland.layer_spectra(model, CE, (x, y), k=None)
    assert sum(block.trace for block in blocks.values()) == pytest.approx(float(values.sum()))


def test_a_density_of_few_distinct_eigenvalues_is_exact():
    """Where the Lanczos iteration has seen all there is, it ends."""
    x, y = torch.randn(7, 2).double(), torch.randn(7, 300).double()
    model = nn.Linear(2, 300).double()  # three distinct eigenvalues, 300 times each
    found = lowland.spectrum(
        model, nn.MSELoss(), (x, y), k=1, method="lanczos", density=True, density_steps=64
    )
    assert float(torch.trapezoid(found.density.mean, found.density.grid)) == pytest.approx(
        1, abs=1e-3
    )

"""The spectrum of trained models, against brute force in float64."""

import builtins
import math

import pytest
import torch
from any_models import Attention, Recurrent
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lowland
from lowland.dense import dense_hessian
from lowland.spectra import solve

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
METHODS = ["dense", "lanczos"]


def mlp():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))


def cnn():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(12, 3),
    )  # fmt: skip
    model(torch.randn(50, 1, 6, 6))  # statistics of their own
    return model


MODELS = {
    "mlp": (mlp, (3,)),
    "cnn": (cnn, (1, 6, 6)),
    "transformer": (lambda: nn.Sequential(Attention(), nn.Linear(2, 3)), (4,)),
    "lstm": (lambda: nn.Sequential(Recurrent(), nn.Linear(2, 3)), (4,)),
}


def case(name="mlp", samples=24):
    torch.manual_seed(1)
    build, shape = MODELS[name]
    model = build().double().eval()
    x = torch.randn(samples, *shape, dtype=torch.float64)
    return model, x, torch.randint(3, (samples,))


def brute_force(model, criterion, x, y):
    """``H`` by two plain backward passes, row by row."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def flat(parts):
        pairs = zip(parts, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = criterion(model(x), y)
    gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True))
    rows = [
        flat(torch.autograd.grad(g, parameters, retain_graph=True, allow_unused=True))
        for g in gradient
    ]
    return torch.stack(rows)


def descending(matrix):
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0)


def flat(vector):
    return torch.cat([part.reshape(-1) for part in vector.values()])


# Against brute force


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_both_ends_are_those_of_brute_force(name, method):
    model, x, y = case(name)
    matrix = brute_force(model, CE, x, y)
    expected = descending(matrix)
    found = lowland.spectrum(
        model, CE, (x, y), k=4, which="both", method=method, tolerance=1e-8, seed=3
    )
    scale = float(expected.abs().max())
    assert found.method == method
    assert found.dim == len(matrix)
    assert found.ranks.tolist() == [1, 2, 3, 4, *range(found.dim - 3, found.dim + 1)]
    torch.testing.assert_close(
        found.eigenvalues, expected[found.ranks - 1], rtol=0, atol=1e-8 * scale
    )
    assert (found.residuals <= found.tolerance).all()
    assert found.tolerance <= 1.01e-8 * scale
    for value, vector, residual in zip(
        found.eigenvalues, found.eigenvectors, found.residuals, strict=True
    ):
        v = flat(vector)
        own = float(torch.linalg.vector_norm(matrix @ v - value * v))
        assert own == pytest.approx(float(residual), abs=1e-13 * scale * len(v))


@pytest.mark.parametrize("method", METHODS)
def test_eigenvectors_are_orthonormal_and_of_the_parameters_shapes(method):
    model, x, y = case("cnn")
    found = lowland.spectrum(model, CE, (x, y), k=5, method=method)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for vector in found.eigenvectors:
        assert {name: part.shape for name, part in vector.items()} == shapes
        assert all(part.dtype == torch.float64 for part in vector.values())
    stacked = torch.stack([flat(vector) for vector in found.eigenvectors])
    torch.testing.assert_close(stacked @ stacked.T, torch.eye(5).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_one_end_alone_is_descending(which):
    model, x, y = case()
    expected = descending(brute_force(model, CE, x, y))
    expected = expected[:3] if which == "LA" else expected[-3:]
    for method in METHODS:
        found = lowland.spectrum(model, CE, (x, y), k=3, which=which, method=method)
        torch.testing.assert_close(found.eigenvalues, expected, rtol=0, atol=1e-7)


def test_all_eigenvalues_of_a_small_model_and_what_they_add_up_to():
    model, x, y = case()
    expected = descending(brute_force(model, CE, x, y))
    for k, which in ((None, "LA"), (len(expected), "SA"), (len(expected) - 3, "both")):
        found = lowland.spectrum(model, CE, (x, y), k=k, which=which, density=True)
        torch.testing.assert_close(found.eigenvalues, expected, rtol=0, atol=1e-12)
    assert found.method == "dense"
    assert found.trace == pytest.approx(float(expected.sum()))
    assert found.trace_stderr == 0
    assert found.trace == pytest.approx(
        float(lowland.hessian_moments(model, CE, x, y).trace.detach())
    )
    density = found.density
    assert float(torch.trapezoid(density.mean, density.grid)) == pytest.approx(1, abs=1e-4)
    mean = float(torch.trapezoid(density.mean * density.grid, density.grid))
    assert mean == pytest.approx(found.trace / found.dim, abs=1e-5)
    assert not density.stderr.any()


def test_single_precision_keeps_the_stated_tolerance():
    model, x, y = case("mlp", 200)
    expected = descending(brute_force(model, CE, x, y))
    model, x = model.float(), x.float()
    for method in METHODS:
        found = lowland.spectrum(model, CE, (x, y), k=3, method=method)
        assert (found.residuals <= found.tolerance).all()
        assert float((found.eigenvalues - expected[:3]).abs().max()) < 1e-5
        assert found.eigenvectors[0]["0.weight"].dtype == torch.float32


def test_a_tolerance_that_rounding_does_not_allow_is_pointed_to():
    model, x, y = case("mlp")
    with pytest.warns(RuntimeWarning, match="beyond the tolerance .* use model.double()"):
        lowland.spectrum(model.float(), CE, (x.float(), y), k=2, method="lanczos", tolerance=1e-12)


@pytest.mark.slow
def test_a_model_of_more_parameters_goes_through_lanczos():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 2)).double()
    x, y = torch.randn(30, 40).double(), torch.randint(2, (30,))
    found = lowland.spectrum(model, CE, (x, y), k=3)
    assert found.method == "lanczos"
    expected = descending(dense_hessian(model, CE, x, y).detach())
    torch.testing.assert_close(found.eigenvalues, expected[:3], rtol=0, atol=found.tolerance)
    assert abs(found.trace - float(expected.sum())) < 4 * found.trace_stderr


# Data


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "criterion",
    [
        CE,
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]).double(), ignore_index=1),
    ],
    ids=["mean", "sum", "weights"],
)
def test_a_loader_gives_what_its_data_give_at_once(method, criterion):
    model, x, y = case(samples=25)
    loader = DataLoader(TensorDataset(x, y), batch_size=14)  # the last one is smaller
    found = lowland.spectrum(
        model, criterion, loader, k=2, which="both", method=method, trace_probes=2
    )
    expected = descending(brute_force(model, criterion, x, y))[[0, 1, -2, -1]]
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.eigenvalues, expected, rtol=0, atol=1e-6 * scale)
    at_zero = float(criterion(model(x), y).detach())
    assert float(found.along(0, [0.0])) == pytest.approx(at_zero)


def test_batches_may_stand_in_a_list_and_inputs_in_a_mapping():
    model, x, y = case()

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, batch):
            return self.inner(batch["x"])

    data = [({"x": part}, label) for part, label in zip(x.split(9), y.split(9), strict=True)]
    expected = descending(brute_force(model, CE, x, y))[:2]
    for method in METHODS:
        found = lowland.spectrum(Named(), CE, data, k=2, method=method)
        torch.testing.assert_close(found.eigenvalues, expected, rtol=0, atol=1e-7)


def test_flat_targets_are_one_a_sample(generator):
    x = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (9,), generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    criterion = nn.BCEWithLogitsLoss()
    found = lowland.spectrum(model, criterion, (x, y), k=2)
    expected = descending(brute_force(model, criterion, x, y[:, None].double()))
    torch.testing.assert_close(found.eigenvalues, expected[:2], rtol=0, atol=1e-12)


def test_a_criterion_may_be_a_function():
    model, x, y = case()
    found = lowland.spectrum(model, nn.functional.cross_entropy, (x, y), k=2)
    torch.testing.assert_close(
        found.eigenvalues, lowland.spectrum(model, CE, (x, y), k=2).eigenvalues
    )


@pytest.mark.parametrize("method", METHODS)
def test_frozen_parameters_are_constants(method):
    model, x, y = case()
    model[0].weight.requires_grad_(requires_grad=False)
    expected = descending(brute_force(model, CE, x, y))
    found = lowland.spectrum(model, CE, (x, y), k=2, method=method)
    assert found.dim == len(expected)
    assert list(found.eigenvectors[0]) == [n for n, _ in model.named_parameters()][1:]
    torch.testing.assert_close(found.eigenvalues, expected[:2], rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_occur_twice_or_not_at_all(method):
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(3, 3)).double()
    model.unused = nn.Parameter(torch.zeros(2).double())
    before = list(model.parameters())
    _, x, y = case()
    forward = nn.Sequential.forward
    model.forward = lambda x: forward(nn.Sequential(*list(model)[:5]), x)
    expected = descending(brute_force(model, CE, x, y))
    found = lowland.spectrum(model, CE, (x, y), k=3, method=method)
    torch.testing.assert_close(found.eigenvalues, expected[:3], rtol=0, atol=1e-7)
    found.along(0, [0.5])
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    assert float(found.eigenvectors[0]["unused"].abs().max()) < 1e-12


# Estimates


def test_standard_errors_cover_the_truth():
    """The mean over 30 probes is within 2.05 of them in 95 % of all cases."""
    matrix = brute_force(*case("cnn")[:1], CE, *case("cnn")[1:])
    everything = solve.dense_pairs(matrix)
    trace = float(matrix.trace())
    for k in (1, 5):
        ends = solve.ends_of(everything, k, "both")
        known = solve.Space(ends.vectors.T, float(ends.values.sum()))
        found = [solve.trace_of(matrix, known, probes=30, seed=seed) for seed in range(100)]
        assert 90 <= sum(abs(value - trace) < 2.05 * stderr for value, stderr in found) < 100
    exact = solve.smooth([(everything.values, torch.ones(len(matrix)).double() / len(matrix))])
    found = solve.density_of(matrix, probes=30, steps=30, seed=0)
    assert float(torch.trapezoid(found.mean, found.grid)) == pytest.approx(1, abs=1e-3)
    assert found.width == pytest.approx(exact.width, rel=1e-6)
    seen = exact.mean > 0.01 * exact.mean.max()
    off = (found.mean - exact.mean).abs()[seen] / found.stderr[seen]
    assert float((off < 2.05).double().mean()) > 0.85


def test_estimates_of_a_model_are_those_of_its_matrix():
    model, x, y = case()
    exact = lowland.spectrum(model, CE, (x, y), k=3, density=True)
    settings = {"density": True, "density_probes": 4, "density_steps": 20}
    found = lowland.spectrum(model, CE, (x, y), k=3, method="lanczos", **settings)
    assert 0 < abs(found.trace - exact.trace) < 3 * found.trace_stderr
    assert found.density.stderr.any()
    both = torch.stack([exact.density.mean, found.density.mean])
    assert float(torch.corrcoef(both)[0, 1]) > 0.95


def test_the_same_seed_gives_the_same_and_no_global_state_is_touched():
    model, x, y = case()
    loader = DataLoader(TensorDataset(x, y), batch_size=14)
    settings = {"k": 2, "method": "lanczos", "density": True, "tolerance": 1e-2}
    settings |= {"density_steps": 4, "density_probes": 2, "trace_probes": 2}
    before = torch.get_rng_state()
    first = lowland.spectrum(model, CE, loader, **settings)
    first.along(0, [0.0, 0.1])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    second = lowland.spectrum(model, CE, loader, **settings)
    other = lowland.spectrum(model, CE, loader, seed=1, **settings)
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert torch.equal(first.density.mean, second.density.mean)
    assert first.trace == second.trace != other.trace


@pytest.mark.parametrize("method", METHODS)
def test_a_hessian_that_is_zero_has_a_spectrum(method):
    model = nn.Linear(3, 3).double()
    _, x, y = case()
    found = lowland.spectrum(
        model, nn.L1Loss(), (x, torch.zeros(len(y), 3)), k=2, method=method, density=True
    )
    assert not found.eigenvalues.any()
    assert found.trace == found.trace_stderr == 0
    assert torch.isfinite(found.density.mean).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_hessian_of_few_distinct_eigenvalues(method):
    """Of a linear model, whose Hessian has the rank of its inputs."""
    torch.manual_seed(0)
    model = nn.Linear(20, 1, bias=False).double()
    x = torch.randn(2, 20).double()
    y = torch.zeros(2, 1).double()
    found = lowland.spectrum(model, MSE, (x, y), k=4, method=method, density=True, density_steps=10)
    expected = torch.linalg.eigvalsh(x @ x.T).flip(0)
    torch.testing.assert_close(found.eigenvalues[:2], expected)
    assert float(found.eigenvalues[2:].abs().max()) < 1e-8
    assert torch.isfinite(found.density.mean).all()


# Blocks


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_layers_are_those_of_the_matrix(method):
    model, x, y = case("transformer")
    matrix = brute_force(model, CE, x, y)
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    starts = dict(zip(names, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))
    found = lowland.layer_spectra(model, CE, (x, y), k=2, which="both", method="auto")
    if method == "lanczos":
        layers = {n: s for n, s in found.items() if s.dim > 8}
        with_lanczos = {}
        for name, layer in layers.items():
            for p in model.parameters():
                p.requires_grad_(requires_grad=False)
            for own in layer.surface.names:
                model.get_parameter(own).requires_grad_()
            with_lanczos |= lowland.layer_spectra(
                model, CE, (x, y), k=2, which="both", method="lanczos"
            )
            assert set(with_lanczos) >= {name}
        found = with_lanczos
    else:
        assert list(found) == list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        assert sum(s.trace for s in found.values()) == pytest.approx(float(matrix.trace()))
    for layer in found.values():
        index = torch.cat(
            [
                starts[name] + torch.arange(model.get_parameter(name).numel())
                for name in layer.surface.names
            ]
        )
        expected = descending(matrix[index][:, index])
        assert layer.dim == len(expected)
        torch.testing.assert_close(layer.eigenvalues, expected[layer.ranks - 1], rtol=0, atol=1e-6)
        assert set(layer.eigenvectors[0]) == set(layer.surface.names)


def test_a_block_of_fewer_parameters_gives_all_of_its_eigenvalues():
    model, x, y = case()
    found = lowland.layer_spectra(model, CE, (x, y), k=17)
    assert {name: len(layer.eigenvalues) for name, layer in found.items()} == {
        "0": 17, "2": 17, "4": 15,
    }  # fmt: skip
    everything = lowland.layer_spectra(model, CE, (x, y), k=None)
    assert [len(layer.eigenvalues) for layer in everything.values()] == [20, 24, 15]


# Relative to the parameters


def relative(model):
    """``|theta|``, flat."""
    return torch.cat([p.detach().abs().reshape(-1) for p in model.parameters()])


def homogeneous():
    """A convolutional network that can be rescaled, without a unit that is never active."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.LeakyReLU(),
        nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3),
    ).double()  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_the_adaptive_spectrum_is_that_of_the_scaled_matrix(name, method):
    model, x, y = case(name)
    scale = relative(model)
    matrix = brute_force(model, CE, x, y) * scale * scale[:, None]
    expected = descending(matrix)
    found = lowland.spectrum(
        model, CE, (x, y), k=3, which="both", method=method, tolerance=1e-8, adaptive=True
    )
    size = float(expected.abs().max())
    assert found.adaptive
    torch.testing.assert_close(
        found.eigenvalues, expected[found.ranks - 1], rtol=0, atol=1e-8 * size
    )
    room = 4 * found.trace_stderr + 1e-10 * size
    assert abs(found.trace - float(matrix.trace())) <= room


@pytest.mark.parametrize("method", METHODS)
def test_adaptive_sharpness_stays_under_rescaling(method):
    model = homogeneous()
    x, y = torch.randn(30, 1, 6, 6, dtype=torch.float64), torch.arange(30) % 3
    by_unit = 3 ** torch.linspace(-2, 2, 5, dtype=torch.float64)
    changed = lowland.rescale(lowland.rescale(model, 0, 7.0), 2, by_unit)

    def measure(model, *, adaptive):
        found = lowland.spectrum(
            model, CE, (x, y), k=3, method=method, tolerance=1e-9, adaptive=adaptive
        )
        return torch.tensor([*found.eigenvalues, found.trace])

    torch.testing.assert_close(
        measure(changed, adaptive=True), measure(model, adaptive=True), rtol=1e-9, atol=0
    )
    plain = measure(changed, adaptive=False) / measure(model, adaptive=False)
    assert ((plain > 2) | (plain < 0.5)).all()


def test_an_adaptive_eigenvector_is_the_step_that_raises_the_loss_most():
    model, x, y = case("transformer")
    found = lowland.spectrum(model, CE, (x, y), k=2, which="both", adaptive=True)
    for index, value in enumerate(found.eigenvalues):
        left, middle, right = found.along(index, [-1e-3, 0.0, 1e-3])
        assert float(left - 2 * middle + right) / 1e-6 == pytest.approx(float(value), abs=2e-5)
        step = flat(found.eigenvectors[index]) / relative(model)
        assert float(torch.linalg.vector_norm(step[relative(model) > 0])) == pytest.approx(1)


def test_adaptive_spectra_of_layers_are_those_of_the_blocks():
    model, x, y = case()
    scale = relative(model)
    matrix = brute_force(model, CE, x, y) * scale * scale[:, None]
    found = lowland.layer_spectra(model, CE, (x, y), adaptive=True)
    first = descending(matrix[:20, :20])[:1]
    torch.testing.assert_close(found["0"].eigenvalues, first, rtol=1e-9, atol=0)
    traces = sum(layer.trace for layer in found.values())
    assert traces == pytest.approx(float(matrix.trace()))


# Along a line


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_along_an_eigenvector_bends_by_its_eigenvalue(method):
    model, x, y = case("transformer")
    found = lowland.spectrum(model, CE, (x, y), k=2, which="both", method=method, tolerance=1e-8)
    step = 1e-3
    before = {name: p.clone() for name, p in model.state_dict().items()}
    for index in (0, 1, 2, -1):
        left, middle, right = found.along(index, [-step, 0.0, step])
        bend = (left - 2 * middle + right) / step**2
        assert float(bend) == pytest.approx(float(found.eigenvalues[index]), abs=2e-5)
    assert float(middle) == pytest.approx(float(CE(model(x), y).detach()))
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_line_starts_where_the_spectrum_was_measured():
    model, x, y = case("cnn")
    found = lowland.spectrum(model, CE, (x, y), k=1)
    before = found.along(0, torch.linspace(-1, 1, 3))
    with torch.no_grad():
        for part in [*model.parameters(), *model.buffers()]:
            part.add_(1)
    assert torch.equal(found.along(0, torch.linspace(-1, 1, 3)), before)


def test_any_direction_of_some_parameters():
    model, x, y = case()
    found = lowland.spectrum(model, CE, (x, y), k=1)
    direction = {"4.bias": torch.tensor([1.0, -2.0, 0.0]).double()}
    (moved,) = found.along(direction, [0.25])
    with torch.no_grad():
        model[4].bias += 0.25 * direction["4.bias"]
    assert float(moved) == pytest.approx(float(CE(model(x), y).detach()))


def test_directions_that_do_not_exist():
    model, x, y = case()
    found = lowland.spectrum(model, CE, (x, y), k=2)
    with pytest.raises(IndexError, match=r"one of 2 eigenvectors, .* got 2"):
        found.along(2, [0.0])
    with pytest.raises(ValueError, match=r"got one for 'head', and the model has 0\.weight"):
        found.along({"head": torch.zeros(2)}, [0.0])
    with pytest.raises(ValueError, match=r"'4\.bias' must have the parameter's shape \(3,\)"):
        found.along({"4.bias": torch.zeros(1)}, [0.0])
    model.train()
    model.append(nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        found.along(0, [0.0])


# Errors


def fails(error, match, model=None, criterion=CE, data=None, **settings):
    own, x, y = case()
    with pytest.raises(error, match=match):
        lowland.spectrum(model or own, criterion, (x, y) if data is None else data, **settings)


class Broken(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.inner = nn.Linear(3, 3).double()
        self.function = function

    def forward(self, x):
        return self.function(self.inner(x))


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def test_a_loss_without_a_graph():
    fails(ValueError, "the loss has no graph", Broken(torch.Tensor.detach))
    fails(
        ValueError,
        "the loss has no graph .* counts, as accuracy does",
        criterion=lambda output, y: (output.argmax(1) == y).double().mean(),
    )
    fails(TypeError, "must return a scalar tensor; got float", criterion=lambda output, y: 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_differentiated_twice_is_found_by_differences(method):
    model, x, y = case()

    def once(output, y):
        return OnceOnly.apply(output).square().mean()

    def twice(output, y):
        return output.square().square().mean()

    found, expected = (
        lowland.spectrum(model, criterion, (x, y), k=1, method=method)
        for criterion in (once, twice)
    )
    assert found.method == f"{method}, differences"
    assert expected.method == method
    torch.testing.assert_close(found.eigenvalues, expected.eigenvalues, rtol=1e-4, atol=1e-6)
    message = r"marked as once_differentiable[\s\S]*Differences.*no way here.*kinks"
    fails(RuntimeError, message, nn.Sequential(Broken(OnceOnly.apply), nn.ReLU()), method=method)


class Skewed(torch.autograd.Function):
    """With a backward pass that is no gradient of anything."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a):
        return a.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (a,) = ctx.saved_tensors
        return grad * (1 + a.roll(1, -1))

    @staticmethod
    def jvp(ctx, tangent):
        return tangent


@pytest.mark.parametrize("method", METHODS)
def test_derivatives_that_are_wrong_are_found(method):
    fails(
        RuntimeError,
        "the gradient of this loss is not its derivative",
        Broken(Skewed.apply),
        k=1,
        method=method,
    )


def test_losses_and_products_that_are_not_finite():
    fails(ValueError, "the loss is not finite", Broken(lambda a: a * math.nan))
    fails(
        ValueError,
        "the Hessian's product with a direction, in .*, is not finite",
        criterion=lambda output, y: (output - output.detach()).square().sum().sqrt(),
    )
    _, x, y = case()
    x[3, 1] = math.nan
    fails(ValueError, "x of batch 0 has 1 NaN", data=(x, y))
    fails(ValueError, "x of batch 1 has 1 NaN", data=[(x[4:], y[4:]), (x[:4], y[:4])])


def test_data_that_is_empty():
    fails(ValueError, "data is empty: got no batch", data=[])
    loader = DataLoader(TensorDataset(torch.zeros(3, 3), torch.zeros(3)), 7, drop_last=True)
    fails(ValueError, "data is empty: got no batch", data=loader)
    fails(ValueError, "x of batch 0 is empty", data=(torch.zeros(0, 3), torch.zeros(0).long()))


def test_data_that_is_other_in_each_pass():
    _, x, y = case()
    loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True)
    fails(ValueError, "other batches in each pass, from batch 0 on.*use shuffle=False", data=loader)

    class Shrinking:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([(x, y)] * (3 - self.passes))

    fails(ValueError, "other batches in each pass, from batch 1 on", data=Shrinking())
    fails(TypeError, "data must give its batches again and again", data=iter([(x, y)]))


def test_data_of_another_form():
    x = torch.zeros(4, 3)
    fails(TypeError, "must be a pair .* got torch.Tensor", data=x)
    fails(TypeError, "must be a pair .* got builtins.int", data=3)
    fails(TypeError, r"batch 0 is builtins.tuple of length 1", data=[(x,)])
    fails(TypeError, r"y of batch 0 must be a torch.Tensor; got builtins.str", data=[(x, "cat")])


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (nn.Dropout(0.3), "draws random numbers"),
        (nn.BatchNorm1d(3), "updates its running statistics"),
    ],
)
def test_layers_in_training_mode(layer, what):
    model = nn.Sequential(nn.Linear(3, 3), layer, nn.Linear(3, 3)).double()
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    fails(ValueError, rf"layer '1' .* {what} .*call model\.eval\(\) first", model)
    assert all(torch.equal(statistics[name], b) for name, b in model.named_buffers())
    _, x, y = case()
    assert lowland.spectrum(model.eval(), CE, (x, y), k=1).method == "dense"


def test_randomness_that_no_layer_announces():
    fails(
        ValueError,
        r"the loss is .* and then .* on the same data.*call model\.eval\(\) first",
        Broken(lambda a: a + torch.randn_like(a)),
    )


def test_models_without_a_hessian():
    model, *_ = case()
    fails(ValueError, "no trainable parameter", model.requires_grad_(requires_grad=False))
    model, *_ = case()
    model[0].float()
    fails(ValueError, "one type on one device; got float32 on cpu and float64", model)
    model, *_ = case()
    fails(TypeError, "must be float32 or float64; .* is bfloat16", model.bfloat16())


@pytest.mark.usefixtures("as_installed")
def test_arguments_out_of_range():
    fails(ValueError, "unknown which 'LM': expected one of 'LA', 'SA', 'both'", which="LM")
    fails(ValueError, "unknown method 'exact': expected one of 'auto'", method="exact")
    fails(ValueError, "k must be at least 1, or None", k=0)
    fails(TypeError, r"k must be a whole number, or None for all eigenvalues; got 2\.5", k=2.5)
    fails(ValueError, "k must be at most 59, the number of trainable parameters; got 60", k=60)
    fails(ValueError, "Lanczos gives fewer .* got k=59", k=59, method="lanczos")
    fails(ValueError, "Lanczos gives fewer .* got k=30", k=30, which="both", method="lanczos")
    fails(ValueError, "Lanczos gives fewer .* got k=None", k=None, method="lanczos")
    fails(ValueError, "tolerance must be between 0 and 1.*got 0", tolerance=0.0)
    fails(ValueError, "trace_probes must be at least 2; got 1", trace_probes=1)
    fails(ValueError, r"reduction must be .* got 'none'", criterion=nn.MSELoss(reduction="none"))
    fails(ValueError, r"got shape \(24,\)", criterion=lambda output, y: output.sum(1))


def test_a_matrix_beyond_the_limit_is_not_begun():
    model = nn.Linear(3, 8000)
    fails(
        ValueError,
        r"the matrix of 32000 parameters takes 7\.63 GiB",
        model,
        data=(torch.zeros(2, 3), torch.zeros(2).long()),
        method="dense",
    )


def test_what_does_not_converge_says_so():
    fails(
        RuntimeError,
        r"0 of 3 eigenvalues \('SA'\) converged .* within 1 restarts",
        nn.Linear(300, 1, bias=False).double(),
        MSE,
        data=(torch.logspace(-3, 0, 300).double().diag(), torch.zeros(300, 1).double()),
        k=3,
        which="SA",
        method="lanczos",
        tolerance=1e-10,
        restarts=1,
    )


@pytest.mark.parametrize("missing", ["pandas", "matplotlib"])
def test_a_missing_extra_is_named(missing, monkeypatch):
    model, x, y = case()
    found = lowland.spectrum(model, CE, (x, y), k=1)
    plain = builtins.__import__

    def without(name, *arguments, **named):
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return plain(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    call = {"pandas": found.to_frame, "matplotlib": found.plot}[missing]
    with pytest.raises(ImportError, match=r"pip install 'lowland\[cli\]'"):
        call()


# Tables and figures


def test_a_table_of_eigenvalues():
    model, x, y = case()
    found = lowland.spectrum(model, CE, (x, y), k=2, which="both")
    table = found.to_frame()
    assert list(table.columns) == ["rank", "eigenvalue", "residual"]
    assert table["rank"].tolist() == [1, 2, 58, 59]
    assert table["eigenvalue"].tolist() == found.eigenvalues.tolist()


@pytest.mark.parametrize("density", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_figure_of_the_spectrum(density, method):
    plt = pytest.importorskip("matplotlib.pyplot")
    model, x, y = case()
    found = lowland.spectrum(
        model,
        CE,
        (x, y),
        k=4,
        which="both",
        density=density,
        method=method,
        density_steps=9,
        density_probes=3,
    )
    ax = found.plot()
    ax.figure.canvas.draw()
    title = ax.get_title(loc="left")
    assert "59 parameters" in title
    assert "theta" not in title
    assert ("±" in title) == (method == "lanczos")
    assert ax.get_yscale() == ("log" if density else "linear")
    assert found.plot(ax) is ax
    plt.close(ax.figure)


def test_a_figure_says_that_a_spectrum_is_adaptive():
    plt = pytest.importorskip("matplotlib.pyplot")
    model, x, y = case()
    ax = lowland.spectrum(model, CE, (x, y), k=1, adaptive=True).plot()
    ax.figure.canvas.draw()
    assert "theta" in ax.get_title(loc="left")
    plt.close(ax.figure)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_an_accelerator_gives_what_the_cpu_gives(method):
    model, x, y = case("cnn")
    expected = lowland.spectrum(model, CE, (x, y), k=3)
    before = torch.cuda.get_rng_state()
    found = lowland.spectrum(model.cuda(), CE, (x, y), k=3, method=method)  # data goes along
    torch.testing.assert_close(found.eigenvalues, expected.eigenvalues, rtol=0, atol=1e-6)
    assert found.eigenvectors[0]["0.weight"].is_cuda
    assert torch.equal(torch.cuda.get_rng_state(), before)
    torch.testing.assert_close(found.along(0, [0.1]), found.along(0, [0.1]))

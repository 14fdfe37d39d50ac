"""Functions of eigenvalues and their gradients, beside brute force and autograd."""

import cases
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowland import exact
from lowland.spectral_functions import spectral_function

FUNCTIONS = {
    "lambda_max": ({}, lambda values: values[-1]),
    "lambda_min": ({}, lambda values: values[0]),
    "spectral_norm": ({}, lambda values: values.abs().max()),
    "nuclear": ({}, lambda values: values.abs().sum()),
    "schatten": ({"p": 2.5}, lambda values: values.abs().pow(2.5).sum() ** 0.4),
    "soft_max": ({"beta": 3.0}, lambda values: (3 * values).logsumexp(0) / 3),
    "log_det": ({"alpha": 0.3}, lambda values: (values.clamp(min=0) + 0.3).log().sum() / 2),
    "effective_dim": ({"alpha": 0.3}, lambda values: (1 - 0.3 / (values.clamp(min=0) + 0.3)).sum()),
    (torch.sin, torch.cos): ({}, lambda values: values.sin().sum()),
}
ENDS = ("lambda_max", "lambda_min", "spectral_norm")


def check(case, f, parameters, formula, **options):
    """Values at 1e-9; gradients at 1e-8, where no gap is so small that kinks are near."""
    case = case.with_gradients()
    found = exact.spectral(*case.arguments, **case.settings, f=f, **parameters, **options)
    assert found.shape == case.ensemble
    gradients = torch.autograd.grad(found.sum(), case.weights)
    for index, flat, x, y in case.singles():
        leaf = flat.clone().requires_grad_()
        matrix = case.network.hessian(leaf, x, y)
        values, vectors = torch.linalg.eigh(matrix.detach())
        scale = float(values.abs().max())
        eigenvalues = values.requires_grad_()
        expected = formula(eigenvalues)
        size = max(float(expected.detach().abs()), scale)
        assert (found[index] - expected).abs() <= 1e-9 * size
        mine = oracle.flatten([part[index] for part in gradients])
        assert mine.isfinite().all()
        (slopes,) = torch.autograd.grad(expected, eigenvalues)
        if not is_smooth(f, values.detach(), scale):
            continue
        weighed = ((vectors * slopes) @ vectors.T * matrix).sum()
        (wanted,) = torch.autograd.grad(weighed, leaf, materialize_grads=True)
        natural = wanted.abs().max() + gradient_of_entries(case, flat, x, y) * slopes.abs().sum()
        assert (mine - wanted).abs().max() <= 1e-8 * natural


def gradient_of_entries(case, flat, x, y):
    """How large a derivative of an entry of the Hessian is: what rounding is relative to."""
    leaf = flat.clone().requires_grad_()
    matrix = case.network.hessian(leaf, x, y)
    weights = torch.linspace(0.5, 1.5, matrix.numel(), dtype=matrix.dtype).view_as(matrix)
    (found,) = torch.autograd.grad((weights * matrix).sum(), leaf, materialize_grads=True)
    return found.abs().max() / len(matrix)


def is_smooth(f, values, scale):
    """Whether no kink is so near that the choice of a subgradient counts."""
    room = 1e-4 * scale
    if f == "spectral_norm":
        values = values.abs().sort().values
    if f in ("lambda_max", "spectral_norm"):
        return len(values) == 1 or values[-1] - values[-2] > room
    if f == "lambda_min":
        return len(values) == 1 or values[1] - values[0] > room
    if f in ("nuclear", "log_det", "effective_dim", "schatten"):
        return values.abs().min() > 1e-8 * scale
    return True


@pytest.mark.parametrize("f", FUNCTIONS)
@pytest.mark.parametrize(
    ("network", "samples"),
    [
        (oracle.Network(3, 4, "tanh", "bce"), 20),
        (oracle.Network(2, (3, 2, 2), "gelu", "ce", outputs=3), 9),
        (oracle.Network(3, (), (), "mse", "sum", outputs=2), 7),
    ],
)
def test_functions_of_eigenvalues_and_their_gradients(f, network, samples):
    check(cases.make(network, samples, seed=3, ensemble=(2,)), f, *FUNCTIONS[f])


@pytest.mark.slow
@settings(max_examples=60)
@given(cases.cases(), st.sampled_from(list(FUNCTIONS)))
def test_functions_of_eigenvalues_at_length(case, f):
    check(case, f, *FUNCTIONS[f])


@settings(max_examples=15)
@given(cases.cases(most_samples=8), st.sampled_from(ENDS))
def test_products_lead_to_the_same_ends_of_the_spectrum(case, f):
    check(case, f, *FUNCTIONS[f], method="lanczos", tolerance=1e-10)


@pytest.mark.parametrize("f", ["lambda_max", "log_det"])
def test_memory_that_forces_small_pieces_changes_nothing(f):
    case = cases.make(oracle.Network(3, (4, 3), "gelu", "ce", outputs=3), 40, ensemble=(5,))
    for budget in (400_000, 800_000):
        check(case, f, *FUNCTIONS[f], method="dense", memory_budget=budget)
    check(case, "lambda_max", *FUNCTIONS["lambda_max"], method="lanczos", memory_budget=120_000)


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_frozen_rows_are_no_rows_of_the_matrix(method):
    case = cases.make(oracle.Network(3, (4, 3), "gelu", "bce"), 9)
    rows = [slice(1, 4), slice(0, 1), slice(0, 4)]
    case = case.with_gradients()
    setup = cases.prepare(case, rows=rows)
    value = exact.eigenvalues.evaluate(setup, spectral_function("lambda_max"), method, 1 << 26)
    trained = torch.cat(
        [
            torch.isin(torch.arange(r), torch.arange(r)[kept]).repeat_interleave(c)
            for (r, c), kept in zip(case.network.shapes, rows, strict=True)
        ]
    )
    ((_, flat, x, y),) = case.singles()
    leaf = flat.clone().requires_grad_()
    matrix = case.network.hessian(leaf, x, y)[trained][:, trained]
    expected = torch.linalg.eigvalsh(matrix)[-1]
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    mine = oracle.flatten(torch.autograd.grad(value, case.weights))
    (wanted,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(mine, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["ggn", "residual"])
@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_the_parts_of_the_hessian(name, method):
    case = cases.make(oracle.Network(3, (4, 3), "gelu", "ce", outputs=3), 9).with_gradients()
    value = exact.spectral(
        *case.arguments, **case.settings, f="lambda_max", matrix=name, method=method
    )
    ((_, flat, x, y),) = case.singles()
    leaf = flat.clone().requires_grad_()
    expected = torch.linalg.eigvalsh(case.network.matrix(name, leaf, x, y))[-1]
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    mine = oracle.flatten(torch.autograd.grad(value, case.weights))
    (wanted,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(mine, wanted, rtol=1e-7, atol=1e-9)


def test_gradients_are_those_of_central_differences():
    case = cases.make(oracle.Network(2, (3, 3), "tanh", "bce"), 12, seed=5).with_gradients()

    def value(weights, f, parameters):
        arguments = (weights, case.x, case.y)
        return exact.spectral(*arguments, **case.settings, f=f, **parameters)

    for f, (parameters, _) in FUNCTIONS.items():
        gradient = torch.autograd.grad(value(case.weights, f, parameters), case.weights)
        ways = [torch.randn_like(part) for part in case.weights]
        h = 1e-5
        ends = [
            value(
                [w.detach() + s * way for w, way in zip(case.weights, ways, strict=True)],
                f,
                parameters,
            )
            for s in (h, -h)
        ]
        slope = (ends[0] - ends[1]) / (2 * h)
        mine = sum((g * way).sum() for g, way in zip(gradient, ways, strict=True))
        assert float(mine) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)


def test_of_equal_eigenvalues_the_gradient_is_the_mean():
    # Of outputs that are zero, as they should be, H is the Gram matrix of units, once for each.
    network = oracle.Network(2, 3, "tanh", "mse", outputs=2)
    y = torch.zeros(9, 2).double()
    case = cases.make(network, 9, y=y).with_gradients()
    with torch.no_grad():
        case.weights[1].zero_()
    value = exact.spectral(*case.arguments, **case.settings, f="lambda_max")
    ((_, flat, x, y),) = case.singles()
    leaf = flat.clone().requires_grad_()
    matrix = network.hessian(leaf, x, y)
    values, vectors = torch.linalg.eigh(matrix.detach())
    equal = values[-1] - values < 1e-12
    assert int(equal.sum()) == 2
    top = vectors[:, equal]
    (expected,) = torch.autograd.grad((top @ top.T / 2 * matrix).sum(), leaf)
    assert expected.abs().max() > 0.01
    gradient = oracle.flatten(torch.autograd.grad(value, case.weights))
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-11)
    # One vector of the eigenspace gives a subgradient as well, here with the same mean eigenvalue.
    alone = exact.spectral(*case.arguments, **case.settings, f="lambda_max", method="lanczos")
    torch.testing.assert_close(alone, value)
    single = oracle.flatten(torch.autograd.grad(alone, case.weights))
    torch.testing.assert_close(single[:9], expected[:9], rtol=1e-6, atol=1e-9)


def test_the_tolerance_says_what_is_equal():
    function = spectral_function("lambda_max", tolerance=0.1)
    values = torch.tensor([-3.0, 1.0, 9.2, 10.0]).double()
    assert function.at(values)[1].tolist() == [0, 0, 0.5, 0.5]
    assert spectral_function("lambda_max").at(values)[1].tolist() == [0, 0, 0, 1]
    both = spectral_function("spectral_norm", tolerance=0.1).at(torch.tensor([-9.5, 0.0, 10.0]))
    assert both[1].tolist() == [-0.5, 0, 0.5]


@pytest.mark.parametrize(
    ("f", "method"), [*((f, "dense") for f in FUNCTIONS), *((f, "lanczos") for f in ENDS)]
)
def test_networks_of_zeros_have_finite_gradients(f, method):
    weights = [torch.zeros(3, 4).double().requires_grad_(), torch.zeros(5, 2).double()]
    x = torch.zeros(6, 2).double()
    for activation, loss, y in (
        ("relu", "mse", torch.zeros(6, 2).double()),
        ("tanh", "ce", torch.zeros(6).long()),
    ):
        value = exact.spectral(
            weights,
            *(x, y),
            activation=activation,
            loss=loss,
            f=f,
            method=method,
            **FUNCTIONS[f][0],
        )
        (gradient,) = torch.autograd.grad(value, weights[0])
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_a_network_that_overflows_leaves_the_others_alone():
    case = cases.make(oracle.Network(2, 3, "tanh", "mse"), 5, ensemble=(2,)).with_gradients()
    with torch.no_grad():
        case.weights[1][1] = 1e200
    for f, (parameters, _) in FUNCTIONS.items():
        value = exact.spectral(*case.arguments, **case.settings, f=f, **parameters)
        gradients = torch.autograd.grad(value[0], case.weights)
        assert value.isnan().tolist() == [False, True]
        assert all(part[0].isfinite().all() for part in gradients)


def test_once_not_twice():
    case = cases.make(oracle.Network(2, 3, "tanh", "mse"), 5).with_gradients()
    value = exact.spectral(*case.arguments, **case.settings, f="lambda_max")
    (gradient, _) = torch.autograd.grad(value, case.weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        gradient.sum().backward()


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"f": "lambda"}, ValueError, "unknown spectral function 'lambda'.*'lambda_max'"),
        ({"f": "log_det"}, ValueError, "'log_det' needs alpha="),
        ({"f": "log_det", "alpha": 0.0}, ValueError, "alpha of 'log_det'.*above 0; got 0"),
        ({"f": "effective_dim", "alpha": -1}, ValueError, "alpha of 'effective_dim'.*above 0"),
        ({"f": "effective_dim", "alpha": float("nan")}, ValueError, "finite number above 0"),
        ({"f": "log_det", "alpha": "1"}, TypeError, "alpha must be a number"),
        ({"f": "schatten", "p": 0.5}, ValueError, "p of 'schatten'.*at least 1; got 0.5"),
        ({"f": "schatten", "p": float("inf")}, ValueError, "'spectral_norm'"),
        ({"f": "soft_max", "beta": 0}, ValueError, "beta of 'soft_max'.*above 0"),
        ({"f": "lambda_max", "alpha": 1.0}, ValueError, "alpha= is no parameter of 'lambda_max'"),
        ({"f": "lambda_max", "tolerance": 2.0}, ValueError, "tolerance must be at least 0 and"),
        ({"f": "nuclear", "method": "lanczos"}, ValueError, "use method='dense'"),
        ({"f": "nuclear", "method": "exact"}, ValueError, "unknown method 'exact'"),
        ({"f": torch.sin}, TypeError, r"a pair \(f, f'\)"),
        ({"f": (torch.sin,)}, TypeError, r"a pair \(f, f'\)"),
        ({"f": (torch.sin, 2)}, TypeError, r"a pair \(f, f'\)"),
        ({"f": (torch.sum, torch.ones_like)}, ValueError, "f must give a number for each"),
        ({"f": (torch.sin, torch.sum)}, ValueError, "f' must give a number for each"),
        ({"f": (torch.sin, torch.sin)}, ValueError, "f' is not the derivative of f"),
        ({"f": "log_det", "alpha": 1.0, "memory_budget": 9_000}, ValueError, "raise memory_budget"),
        ({"f": "lambda_max", "memory_budget": 9_000}, ValueError, "or use method='lanczos'"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, error, words):
    case = cases.make(oracle.Network(2, 3, "tanh", "mse"), 5)
    with pytest.raises(error, match=words):
        exact.spectral(*case.arguments, **case.settings, **settings)


def test_functions_with_kinks_are_their_own_derivatives():
    case = cases.make(oracle.Network(2, 3, "relu", "mse"), 5)
    pair = (torch.relu, lambda values: (values > 0).to(values.dtype))
    exact.spectral(*case.arguments, **case.settings, f=pair)
    # What autograd knows nothing of is taken as it is.
    alien = (lambda values: values.detach() ** 2, lambda values: 2 * values)
    exact.spectral(*case.arguments, **case.settings, f=alien)

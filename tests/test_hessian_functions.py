"""Functions of eigenvalues of any model's Hessian, as a call and as a penalty."""

import itertools
import pickle

import pytest
import torch
from any_models import build
from torch import nn
from torch.autograd import grad

import lowland
from lowland import UnsupportedModelError
from lowland.dense import dense_hessian

CROSS_ENTROPY = nn.CrossEntropyLoss()
SQUARE = (torch.square, lambda values: 2 * values)
FUNCTIONS = {
    "lambda_max": ({}, lambda values: values[-1]),
    "spectral_norm": ({}, lambda values: values.abs().max()),
    "soft_max": ({"beta": 5.0}, lambda values: (5 * values).logsumexp(0) / 5),
    "effective_dim": ({"alpha": 0.1}, lambda values: (1 - 0.1 / (values.clamp(min=0) + 0.1)).sum()),
    SQUARE: ({}, lambda values: values.square().sum()),
}


def network(*widths):
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


@pytest.fixture
def data():
    torch.manual_seed(1)
    return torch.randn(12, 3).double(), torch.randint(2, (12,))


def expected(model, criterion, x, y, formula):
    """Value and gradient by autograd through a dense eigenvalue decomposition."""
    values = torch.linalg.eigvalsh(dense_hessian(model, criterion, x, y))
    value = formula(values)
    return value, grad(value, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("f", FUNCTIONS)
@pytest.mark.parametrize("method", ["exact", "dense"])
def test_both_methods_give_values_and_gradients(data, f, method):
    model = network(3, 3, 2)
    model[0].bias.requires_grad_(requires_grad=False)
    parameters, formula = FUNCTIONS[f]
    value, gradient = expected(model, CROSS_ENTROPY, *data, formula)
    found = lowland.hessian_function(model, CROSS_ENTROPY, *data, method, f=f, **parameters)
    torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)
    mine = grad(found, [p for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(mine, gradient, rtol=1e-7, atol=1e-10)


def test_auto_takes_brute_force_where_the_closed_form_does_not_reach(data):
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)).double()
    value, gradient = expected(model, CROSS_ENTROPY, *data, lambda values: values[-1])
    found = lowland.hessian_function(model, CROSS_ENTROPY, data, f="lambda_max")
    torch.testing.assert_close(found, value)
    mine = grad(found, list(model.parameters()))
    torch.testing.assert_close(mine, gradient, rtol=1e-7, atol=1e-9)
    with pytest.raises(UnsupportedModelError, match="use method='dense', which takes any module"):
        lowland.hessian_function(model, CROSS_ENTROPY, *data, "exact", f="lambda_max")


def test_what_is_too_large_for_brute_force_is_said_by_name(data):
    model = nn.Sequential(nn.Linear(3, 500), nn.LayerNorm(500), nn.Linear(500, 2)).double()
    with pytest.raises(UnsupportedModelError, match=r"LayerNorm.*method='dense'.*2048 parameters"):
        lowland.hessian_function(model, CROSS_ENTROPY, *data, f="lambda_max")


def test_large_networks_go_by_products(data):
    model = network(3, 40, 12, 2)
    assert sum(p.numel() for p in model.parameters()) > 512
    found = lowland.hessian_function(model, CROSS_ENTROPY, *data, f="lambda_max")
    (known,) = lowland.spectrum(model, CROSS_ENTROPY, data, k=1).eigenvalues
    torch.testing.assert_close(found.detach(), known, rtol=1e-9, atol=1e-12)
    way = [torch.randn_like(p) for p in model.parameters()]
    slope = sum(
        (g * d).sum() for g, d in zip(grad(found, list(model.parameters())), way, strict=True)
    )
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, d in zip(model.parameters(), way, strict=True):
                p.add_(d, alpha=step)
            ends.append(lowland.hessian_function(model, CROSS_ENTROPY, *data, f="lambda_max"))
    assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("matrix", ["ggn", "residual", "fisher"])
def test_other_matrices(data, matrix):
    model = network(3, 3, 2)
    found = [
        lowland.hessian_function(model, CROSS_ENTROPY, *data, method, f=SQUARE, matrix=matrix)
        for method in ("exact", "dense")
    ]
    square = lowland.hessian_moments(model, CROSS_ENTROPY, *data, matrix=matrix).trace_sq
    for each in found:
        torch.testing.assert_close(each, square)


def test_some_parameters_alone(data):
    model = network(3, 3, 2)
    head = list(model[2].parameters())
    found = lowland.hessian_function(model, CROSS_ENTROPY, *data, f="lambda_max", parameters=head)
    block = dense_hessian(model, CROSS_ENTROPY, *data)[-8:, -8:]
    torch.testing.assert_close(found, torch.linalg.eigvalsh(block)[-1])


def test_brute_force_is_differentiable_in_the_inputs(data):
    model, (x, y) = network(3, 3, 2), data
    x = x.clone().requires_grad_()
    found = lowland.hessian_function(model, CROSS_ENTROPY, x, y, "dense", f="lambda_max")
    value = torch.linalg.eigvalsh(dense_hessian(model, CROSS_ENTROPY, x, y))[-1]
    torch.testing.assert_close(grad(found, x), grad(value, x), rtol=1e-8, atol=1e-11)


def test_brute_force_once_not_twice(data):
    model = network(3, 3, 2)
    found = lowland.hessian_function(model, CROSS_ENTROPY, *data, "dense", f="lambda_max")
    with pytest.raises(RuntimeError, match="once, not twice"):
        grad(found, list(model.parameters()), create_graph=True)


@pytest.mark.usefixtures("as_installed")
def test_what_makes_no_sense_is_refused(data):
    model = network(3, 3, 2)
    for settings, words in (
        ({"f": "sharpness"}, "unknown spectral function 'sharpness'"),
        ({"f": "log_det"}, "needs alpha="),
        ({"f": "lambda_max", "method": "probes"}, "unknown method 'probes'"),
        ({"f": "lambda_max", "matrix": "covariance"}, "covariance"),
    ):
        with pytest.raises(ValueError, match=words):
            lowland.hessian_function(model, CROSS_ENTROPY, *data, **settings)
    with pytest.raises(UnsupportedModelError, match="one batch: pass all samples"):
        lowland.hessian_function(model, CROSS_ENTROPY, [data, data], f="lambda_max")
    for settings, words in (
        ({"f": "sharpness"}, "unknown spectral function"),
        ({"f": "schatten", "p": 0.0}, "at least 1"),
        ({"f": "nuclear", "method": "probes"}, "unknown method"),
        ({"f": "nuclear", "every": 0}, "every"),
    ):
        with pytest.raises(ValueError, match=words):
            lowland.Spectral(CROSS_ENTROPY, 0.1, **settings)


def test_the_penalty_is_the_weighted_function(data):
    model = network(3, 3, 2)
    penalty = lowland.Spectral(CROSS_ENTROPY, 0.3, f="lambda_max", limit=1e9)
    value, gradient = expected(model, CROSS_ENTROPY, *data, lambda values: values[-1])
    found = penalty(model, *data)
    assert penalty.used == "exact"
    torch.testing.assert_close(found, 0.3 * value)
    mine = grad(found, list(model.parameters()))
    torch.testing.assert_close(mine, tuple(0.3 * g for g in gradient), rtol=1e-7, atol=1e-10)
    loss = CROSS_ENTROPY(model(data[0]), data[1])
    torch.testing.assert_close(penalty.loss(model, *data), loss + 0.3 * value)
    torch.testing.assert_close(penalty.measure(model, *data), value)


def test_the_penalty_keeps_to_its_calls_and_its_state(data):
    model = network(3, 3, 2)
    penalty = lowland.Spectral(
        CROSS_ENTROPY, 0.1, f="soft_max", beta=2.0, every=2, active=(1, 4), method="exact"
    )
    assert "f='soft_max', beta=2.0, method='exact', every=2" in repr(penalty)
    one = penalty.eval()(model, *data).item()
    penalty.train()
    values = [penalty(model, *data).item() for _ in range(6)]
    assert values == pytest.approx([0, 2 * one, 0, 2 * one, 0, 0])
    other = lowland.Spectral(CROSS_ENTROPY, 0.1, f="nuclear")
    other.load_state_dict(penalty.state_dict())
    assert other.calls == 6
    again = pickle.loads(pickle.dumps(penalty.eval()))  # noqa: S301 - our own
    assert again(model, *data).item() == pytest.approx(one)


def test_descending_the_largest_eigenvalue_lowers_it(data):
    model = network(3, 4, 2)
    penalty = lowland.Spectral(CROSS_ENTROPY, 1.0, f="lambda_max", limit=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = penalty.measure(model, *data).item()
    for _ in range(30):
        optimizer.zero_grad()
        penalty(model, *data).backward()
        optimizer.step()
    assert penalty.measure(model, *data).item() < 0.7 * before


@pytest.mark.parametrize("name", ["batch norm", "dropout"])
def test_models_that_change_by_themselves(name, data):
    layer = nn.BatchNorm1d(3) if name == "batch norm" else nn.Dropout(0.5)
    model = nn.Sequential(nn.Linear(3, 3), layer, nn.Linear(3, 2)).double()
    with pytest.raises(UnsupportedModelError, match="not taken unasked"):
        lowland.Spectral(CROSS_ENTROPY, 0.1, f="lambda_max")(model, *data)
    model.eval()
    assert lowland.Spectral(CROSS_ENTROPY, 0.1, f="lambda_max")(model, *data) > 0


class TestFourMoments:
    """HSR by the bound from four moments."""

    @pytest.mark.parametrize("method", ["exact", "dense"])
    def test_the_gradient_is_that_of_central_differences(self, data, method):
        model = network(3, 4, 2)
        penalty = lowland.HSR(CROSS_ENTROPY, 1.0, bound="four-moment", method=method, limit=1e9)

        def bound():
            with torch.no_grad():
                moments = lowland.hessian_moments(model, CROSS_ENTROPY, *data, moments=4)
            return float(moments.bracket(1, moments=4)[1])

        found = penalty(model, *data)
        assert penalty.used == method
        assert found.item() == pytest.approx(bound(), rel=1e-10)
        gradient = grad(found, list(model.parameters()))
        for _ in range(3):
            way = [torch.randn_like(p) for p in model.parameters()]
            slope = sum((g * d).sum() for g, d in zip(gradient, way, strict=True))
            ends = []
            for step in (1e-5, -2e-5, 1e-5):
                with torch.no_grad():
                    for p, d in zip(model.parameters(), way, strict=True):
                        p.add_(d, alpha=step)
                ends.append(bound())
            assert float(slope) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-8)

    def test_it_is_sharper_and_chosen_by_itself(self, data):
        model = network(3, 4, 2)
        penalty = lowland.HSR(CROSS_ENTROPY, 1.0, bound="four-moment")
        top = lowland.hessian_function(model, CROSS_ENTROPY, *data, f="lambda_max")
        two = lowland.HSR(CROSS_ENTROPY, 1.0)(model, *data)
        assert top < penalty(model, *data) < two
        assert penalty.used == "exact"
        assert penalty.loss(model, *data) > penalty(model, *data)
        normed = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)).double()
        penalty(normed, *data).backward()
        assert penalty.used == "dense"

    def test_zero_spread_has_the_gradient_of_the_mean(self):
        model = nn.Linear(2, 1, bias=False).double()
        x, y = torch.eye(2).double(), torch.zeros(2, 1).double()
        penalty = lowland.HSR(nn.MSELoss(), 1.0, bound="four-moment")
        found = penalty(model, x, y)
        assert found.item() == pytest.approx(1.0)
        found.backward()
        assert model.weight.grad.tolist() == [[0.0, 0.0]]

    @pytest.mark.usefixtures("as_installed")
    def test_what_cannot_be(self):
        with pytest.raises(ValueError, match="unknown bound 'six'"):
            lowland.HSR(CROSS_ENTROPY, 1.0, bound="six")
        for settings in ({"method": "probes"}, {"unbiased": True}):
            with pytest.raises(UnsupportedModelError, match="four moments"):
                lowland.HSR(CROSS_ENTROPY, 1.0, bound="four-moment", **settings)


def test_a_covered_mlp_of_the_helpers_is_read_once():
    model, x, y = build("mlp")
    found = lowland.hessian_function(model, CROSS_ENTROPY, x, y, f="nuclear")
    values = torch.linalg.eigvalsh(dense_hessian(model, CROSS_ENTROPY, x, y))
    torch.testing.assert_close(found, values.abs().sum())

import copy
import math
import pickle

import oracle
import pytest
import torch
from torch import nn

import lowland

FREE = 1e9  # a limit that never acts
PENALTIES = [lowland.HSR, lowland.HessianTrace, lowland.FlatnessAware]
BCE = nn.BCEWithLogitsLoss()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


@pytest.fixture
def data(generator):
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    return x, (x[:, :1] * x[:, 1:2] > 0).double()


def by_hand(penalty, trace, trace_sq, dim, samples):
    return {
        lowland.HSR: lambda: oracle.upper(trace, trace_sq, dim),
        lowland.HessianTrace: lambda: trace,
        lowland.FlatnessAware: lambda: trace_sq / samples,
    }[penalty]()


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("method", ["exact", "dense"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_value_and_gradient_are_those_of_the_weighted_formula(kind, method, model, data):
    penalty = kind(BCE, weight=0.25, limit=FREE, method=method)(model, *data)
    matrix = lowland.dense.dense_hessian(model, BCE, *data)
    expected = 0.25 * by_hand(kind, *oracle.moments(matrix), 21, 20)
    assert penalty.shape == ()
    torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=0)
    parameters = list(model.parameters())
    actual = torch.autograd.grad(penalty, parameters)
    brute = torch.autograd.grad(expected, parameters)
    for mine, theirs in zip(actual, brute, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", PENALTIES)
def test_one_backward_pass_adds_to_the_gradient_of_a_plain_loss(kind, model, data):
    x, y = data
    penalty = kind(BCE, weight=0.1)
    BCE(model(x), y).backward()
    penalty(model, x, y).backward()  # gradients accumulate over two backward passes
    separate = gradients(model)
    model.zero_grad()
    (BCE(model(x), y) + penalty(model, x, y)).backward()
    for one, other in zip(gradients(model), separate, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", PENALTIES)
def test_frozen_parameters_stay_without_a_gradient(kind, model, data):
    model[0].weight.requires_grad_(requires_grad=False)
    kind(BCE, weight=1.0)(model, *data).backward()
    assert model[0].weight.grad is None
    actual = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    kind(BCE, weight=1.0, method="dense")(model, *data).backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.5),
        lambda parameters: torch.optim.Adam(parameters, lr=0.05),
        lambda parameters: torch.optim.LBFGS(parameters, max_iter=4, line_search_fn="strong_wolfe"),
    ],
)
def test_any_optimizer_descends_loss_and_penalty(optimizer, kind, model, data):
    x, y = data
    penalty = kind(BCE, weight=0.1)
    optimizer = optimizer(model.parameters())

    def closure():
        optimizer.zero_grad()
        total = BCE(model(x), y) + penalty(model, x, y)
        total.backward()
        return total

    before = float(closure().detach())
    for _ in range(5):
        optimizer.step(closure)
    assert float(closure().detach()) < before


def test_hsr_narrows_the_spectrum_from_both_sides(model, data):
    penalty = lowland.HSR(BCE, weight=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = torch.linalg.eigvalsh(lowland.dense.dense_hessian(model, BCE, *data).detach())
    for _ in range(30):
        optimizer.zero_grad()
        penalty(model, *data).backward()
        optimizer.step()
    after = torch.linalg.eigvalsh(lowland.dense.dense_hessian(model, BCE, *data).detach())
    assert after[-1] < before[-1]
    assert after[0] > before[0]


def test_models_beyond_the_closed_form_are_penalized_by_estimates(data):
    torch.manual_seed(0)
    layers = nn.Linear(3, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 1)
    model = nn.Sequential(*layers).double()
    penalty = lowland.HSR(BCE, weight=1.0)
    penalty(model, *data).backward()
    assert penalty.used == "probes"
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(lowland.UnsupportedModelError, match="layer 2 of the model, LayerNorm"):
        lowland.HSR(BCE, weight=1.0, method="exact")(model, *data)


@pytest.mark.parametrize("kind", [lowland.HSR, lowland.FlatnessAware])
def test_unbiased_penalties_estimate_the_data_set(kind, model, data):
    biased, unbiased = (kind(BCE, weight=1.0, unbiased=value) for value in (False, True))
    expected = lowland.hessian_moments(model, BCE, *data, unbiased=True)
    value = {lowland.HSR: expected.upper, lowland.FlatnessAware: expected.trace_sq / len(data[0])}
    torch.testing.assert_close(unbiased(model, *data), value[kind])
    assert unbiased(model, *data) < biased(model, *data)
    assert "unbiased=True" in repr(unbiased)
    assert "unbiased" not in repr(biased)
    with pytest.raises(lowland.UnsupportedModelError, match="unbiased=True needs the closed form"):
        kind(BCE, weight=1.0, unbiased=True, method="dense")(model, *data)


def test_wide_layers_take_a_larger_budget():
    model = nn.Sequential(nn.Linear(3, 700), nn.Tanh(), nn.Linear(700, 2))
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    criterion = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match="raise memory_budget"):
        lowland.HSR(criterion, 1.0, method="exact", memory_budget=1 << 18)(model, x, y)
    lowland.HSR(criterion, 1.0, method="exact", memory_budget=1 << 30)(model, x, y).backward()


def test_without_gradients_there_is_a_value_and_no_graph(model, data):
    with torch.no_grad():
        assert not lowland.HSR(BCE, weight=1.0)(model, *data).requires_grad


@pytest.mark.parametrize("kind", PENALTIES)
def test_zero_weight_changes_nothing(kind, model, data):
    penalty = kind(BCE, weight=0)(model, *data)
    penalty.backward()
    assert penalty == 0
    assert all((grad == 0).all() for grad in gradients(model))


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", PENALTIES)
def test_weights_that_make_no_sense(kind, weight):
    with pytest.raises(ValueError, match=f"finite number of at least 0; got {weight}"):
        kind(BCE, weight=weight)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("kind", PENALTIES)
def test_settings_that_make_no_sense_are_refused_at_once(kind):
    with pytest.raises(TypeError, match="weight must be a finite number of at least 0; got 'a'"):
        kind(BCE, "a")
    with pytest.raises(TypeError, match=r"expected a criterion, such as .*got <class"):
        kind(nn.MSELoss, 0.1)
    with pytest.raises(TypeError, match=r"expected a criterion, such as .*got 0.1"):
        kind(0.1, BCE)
    with pytest.raises(
        ValueError, match="unknown method 'x': expected 'auto', 'exact', 'probes' or"
    ):
        kind(BCE, 0.1, method="x")
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator; got 3"):
        kind(BCE, 0.1, generator=3)
    with pytest.raises(ValueError, match=r"parameters= must name at least one parameter"):
        kind(BCE, 0.1, parameters=[])
    with pytest.raises(TypeError, match=r"memory_budget must be a number of bytes.*got '1GB'"):
        kind(BCE, 0.1, memory_budget="1GB")


def test_the_trace_keeps_to_the_budget(model, data):
    with pytest.raises(ValueError, match="raise memory_budget"):
        lowland.HessianTrace(BCE, 0.1, memory_budget=64)(model, *data)


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])  # noqa: S301
def test_copies_are_the_same_penalty(duplicate, kind, model, data):
    penalty = kind(nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)), weight=0.3)
    twin = duplicate(penalty)
    assert torch.equal(twin(model, *data), penalty(model, *data))
    assert twin.state_dict().keys() == penalty.state_dict().keys()


def test_print_shows_the_settings():
    shown = repr(lowland.HSR(nn.MSELoss(), weight=0.01))
    assert "HSR(" in shown
    assert "weight=0.01, method='auto'" in shown
    assert "(criterion): MSELoss()" in shown


def test_the_base_class_is_abstract():
    from lowland.penalties import CurvaturePenalty  # noqa: PLC0415

    with pytest.raises(TypeError, match="abstract"):
        CurvaturePenalty(BCE, weight=1.0)


class FourthPower(lowland.penalties.CurvaturePenalty):
    count = 4

    def value(self, moments, samples):
        return moments.higher[1] + moments.higher[0]


def test_a_penalty_of_four_moments_has_the_gradient_of_brute_force(data):
    x, y = data
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[1], 2), nn.Tanh(), nn.Linear(2, 1)).to(x.dtype)
    matrix = lowland.dense.dense_hessian(model, BCE, x, y)
    powers = [torch.linalg.matrix_power(matrix, power).trace() for power in (3, 4)]
    expected = 0.5 * sum(powers)
    parameters = list(model.parameters())
    theirs = torch.autograd.grad(expected, parameters)
    for method, used in (("auto", "exact"), ("dense", "dense")):
        penalty = FourthPower(BCE, 0.5, method=method)
        value = penalty(model, x, y)
        assert penalty.used == used
        torch.testing.assert_close(value, expected)
        found = torch.autograd.grad(value, parameters)
        torch.testing.assert_close(found, theirs, rtol=1e-8, atol=1e-12)
    with pytest.raises(lowland.UnsupportedModelError, match="use method='exact' or method='dense'"):
        FourthPower(BCE, 0.5, method="probes")


def test_the_gradient_of_brute_force_can_be_differentiated_again(data):
    x, y = data
    model = nn.Sequential(nn.Linear(x.shape[1], 2), nn.Tanh(), nn.Linear(2, 1)).to(x.dtype)
    parameters = list(model.parameters())
    twice = []
    for square in (
        lowland.hessian_moments(model, BCE, x, y, "dense").trace_sq,
        lowland.dense.dense_hessian(model, BCE, x, y).square().sum(),
    ):
        first = torch.autograd.grad(square, parameters, create_graph=True)
        total = sum(part.square().sum() for part in first)
        twice.append(torch.autograd.grad(total, parameters))
    torch.testing.assert_close(*twice)


@pytest.mark.parametrize("products", ["autograd", "differences"])
@pytest.mark.parametrize("penalty", [lowland.HSR, lowland.HessianTrace, lowland.LambdaMax])
def test_within_inference_mode_a_penalty_has_its_value(penalty, products):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    made = penalty(nn.CrossEntropyLoss(), 0.1, products=products).eval()
    with torch.inference_mode():
        x, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
        torch.manual_seed(1)
        found, loss = made(model, x, y), made.loss(model, x, y)
    assert not found.requires_grad
    assert not loss.requires_grad
    torch.manual_seed(1)
    expected = made(model, x.clone(), y.clone())
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-8)


def test_lambda_max_of_a_head_moves_what_is_below_it_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    head = model[3].parameters()
    penalty = lowland.LambdaMax(nn.CrossEntropyLoss(), 1.0, parameters=head)
    for _ in range(60):
        penalty.measure(model, x, y)
    ours = torch.autograd.grad(penalty.measure(model, x, y), model[0].weight)
    top = lowland.hessian_function(
        model, nn.CrossEntropyLoss(), x, y, f="lambda_max", parameters=model[3].parameters()
    )
    torch.testing.assert_close(ours, torch.autograd.grad(top, model[0].weight), rtol=1e-5, atol=0)

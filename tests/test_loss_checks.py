"""Losses of one's own whose derivatives are wrong: refused, with what is wrong."""

from dataclasses import replace

import cases
import pytest
import torch
from torch import nn

from lowland import _loss_checks as loss_checks
from lowland import criteria, exact, hessian_moments
from lowland.losses import LOSSES, Loss, Separable

pytestmark = pytest.mark.usefixtures("as_installed")

POISSON, DISTANCE = cases.OF_ONES_OWN["poisson"], cases.OF_ONES_OWN["distance"]


@pytest.fixture(autouse=True)
def _nothing_seen(monkeypatch):
    monkeypatch.setattr(loss_checks, "_matched", type(loss_checks._matched)(maxlen=64))


def moments(loss, *, outputs=2, dtype=torch.float64, networks=(), y=None):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weights = [random(*networks, 4, 3), random(*networks, 4, outputs)]
    y = random(6, outputs) if y is None else y
    y = y if outputs > 1 else y.squeeze(-1)
    return exact.moments(weights, random(6, 3), y, activation="tanh", loss=loss)


def changed(loss, **parts):
    """The same loss with other derivatives, functions of those that are right."""

    def derivatives(s, y):
        found = loss.derivatives(s, y)
        return found._replace(**{name: parts[name](getattr(found, name)) for name in parts})

    return replace(loss, derivatives=derivatives)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [POISSON, DISTANCE, changed(LOSSES["ce"]), changed(LOSSES["bce"])])
def test_right_ones_are_taken_and_looked_at_once(loss, dtype, monkeypatch):
    y = torch.tensor([[1.0, 0.0]], dtype=dtype).expand(6, 2)
    before = torch.get_rng_state()
    expected = moments(loss, dtype=dtype, y=y).trace_sq
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(loss_checks, "_told", None)
    again = replace(loss)  # equal, as a criterion's reader may make it
    assert torch.equal(moments(again, dtype=dtype, y=y).trace_sq, expected)


@pytest.mark.parametrize("loss", [POISSON, DISTANCE])
@pytest.mark.parametrize("name", ["residual", "curvature"])
def test_derivatives_that_are_not_those_of_the_value(name, loss):
    message = rf"'{name}' of the loss '{loss.name}' is not the derivative of its value"
    with pytest.raises(ValueError, match=message):
        moments(changed(loss, **{name: lambda part: 1.01 * part}))


def test_third_derivatives_that_are_not_those_of_the_value():
    with pytest.raises(ValueError, match="'third' of the loss 'poisson'"):
        moments(changed(POISSON, third=lambda part: -part))
    with pytest.raises(ValueError, match="'third' of the loss 'distance'"):
        moments(changed(DISTANCE, third=lambda part: lambda A: -part(A)))


def test_a_third_derivative_of_zero():
    moments(changed(LOSSES["mse"], third=lambda part: -part))
    with pytest.raises(ValueError, match="'third' of the loss 'mse' is not the derivative"):
        moments(changed(LOSSES["mse"], third=torch.ones_like))


SHAPES = {
    "a part too small": (
        changed(POISSON, curvature=lambda part: part[..., :1]),
        r"curvature of the loss 'poisson' must be a float64 tensor of shape \(3, 2\).*\(3, 1\)",
    ),
    "a number": (changed(POISSON, third=lambda _: 0.0), r"third of the loss .*; got float"),
    "another type": (changed(POISSON, third=lambda part: part.float()), "got a float32 tensor"),
    "a diagonal for a matrix": (
        changed(DISTANCE, curvature=lambda part: part.diagonal(dim1=-2, dim2=-1)),
        r"curvature of .*'distance' must be a float64 tensor of shape \(3, 2, 2\)",
    ),
    "a matrix from the third": (
        changed(DISTANCE, third=lambda _: lambda A: A),
        r"third\(A\) of the loss 'distance' must be a float64 tensor of shape \(3, 2\)",
    ),
    "a mean": (
        replace(POISSON, value=lambda s, y: (s.exp() - y * s).mean()),
        r"value of the loss 'poisson' must be one number for each logit, of shape \(3, 2\).*\(\)",
    ),
}


@pytest.mark.parametrize("what", SHAPES)
def test_shapes_that_are_wrong(what):
    loss, message = SHAPES[what]
    with pytest.raises(ValueError, match=message):
        moments(loss)


def test_shapes_are_looked_at_in_each_call():
    small = {"now": False}

    def derivatives(s, y):
        found = POISSON.derivatives(s, y)
        return found._replace(third=found.third[:1]) if small["now"] else found

    loss = replace(POISSON, derivatives=derivatives)
    moments(loss)
    small["now"] = True
    with pytest.raises(ValueError, match="third of the loss 'poisson' must be"):
        moments(loss, networks=(4,))


@pytest.mark.parametrize(
    ("found", "got"), [((1, 2), "a tuple of 2"), (None, "NoneType"), (torch.ones(2), "a float32")]
)
def test_derivatives_of_another_kind(found, got):
    loss = Loss("mine", POISSON.value, lambda s, y: found)
    message = rf"derivatives of the loss 'mine' must be a .*Separable or Coupled; got {got}"
    with pytest.raises(TypeError, match=message):
        moments(loss)


def test_a_value_that_pytorch_cannot_differentiate_is_no_obstacle():
    def value(s, y):
        raise NotImplementedError

    torch.testing.assert_close(
        moments(replace(POISSON, value=value)).trace_sq, moments(POISSON).trace_sq
    )


def test_whole_numbers_are_targets_too():
    y = torch.tensor([[0, 3]]).expand(6, 2)
    expected = moments(POISSON, y=y.double()).trace_sq
    assert torch.equal(moments(POISSON, y=y).trace_sq, expected)


def test_parts_that_a_loss_needs():
    with pytest.raises(TypeError, match="name of a loss must be a string; got 3"):
        Loss(3, POISSON.value, POISSON.derivatives)
    with pytest.raises(TypeError, match="value of the loss 'mine' must be a function of logits"):
        Loss("mine", None, POISSON.derivatives)
    with pytest.raises(TypeError, match="derivatives of the loss 'mine' must be a function"):
        Loss("mine", POISSON.value, Separable(*torch.ones(3)))
    with pytest.raises(ValueError, match=r"one of 'binary', 'probabilities'.*got 'counts'"):
        Loss("mine", POISSON.value, POISSON.derivatives, "counts")


def test_criteria_that_cannot_be_registered(monkeypatch):
    monkeypatch.setattr(criteria, "_CLOSED_FORMS", dict(criteria._CLOSED_FORMS))
    for kind in (nn.PoissonNLLLoss(), nn.functional.poisson_nll_loss, int):
        with pytest.raises(TypeError, match=r"expected a criterion's class.*give the class"):
            exact.register_criterion(kind, lambda _: POISSON)
    with pytest.raises(TypeError, match=r"expected a function of a PoissonNLLLoss.*use lambda"):
        exact.register_criterion(nn.PoissonNLLLoss, POISSON)
    model, x = nn.Sequential(nn.Linear(3, 1)), torch.ones(4, 3)
    exact.register_criterion(nn.PoissonNLLLoss, lambda _: POISSON.derivatives)
    with pytest.raises(TypeError, match=r"for PoissonNLLLoss must return a .*Loss; got function"):
        hessian_moments(model, nn.PoissonNLLLoss(), x, torch.ones(4))

    class Plain(nn.Module):
        pass

    exact.register_criterion(Plain, lambda _: POISSON)
    with pytest.raises(ValueError, match=r"reduction must be 'mean' or 'sum'.*got None"):
        hessian_moments(model, Plain(), x, torch.ones(4))


def test_a_coupled_loss_of_ones_own_is_compared_along_its_outputs():
    skew = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="'curvature' of the loss 'distance'"):
        moments(changed(DISTANCE, curvature=lambda part: part + skew))


class Scaled(nn.PoissonNLLLoss):
    """A Poisson loss that is larger by a factor."""

    def __init__(self, factor, reduction="mean"):
        super().__init__(reduction=reduction)
        self.factor = factor

    def forward(self, logits, y):
        return self.factor * super().forward(logits, y)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_criterion_is_the_mean_or_the_sum_over_all_outputs(reduction, outputs):
    y = torch.ones(6, outputs).double()
    loss_checks.check_criterion(Scaled(1.0, reduction), POISSON, y, outputs, like=y)
    for factor in (1.01, torch.nan):
        with pytest.raises(ValueError, match=f"is not the {reduction} of the loss 'poisson'"):
            loss_checks.check_criterion(Scaled(factor, reduction), POISSON, y, outputs, like=y)

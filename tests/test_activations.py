"""Values and derivatives against arithmetic with sixty digits, far into the saturated range."""

import mpmath
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp
from torch import nn
from torch.nn import functional

import lowland
from lowland import activations
from lowland.activations import ACTIVATIONS, compose, get_activation, leaky_relu

BOTH_TYPES = (torch.float64, torch.float32)


# Each derivative as its terms: its value is their sum, and what it may be wrong by is relative to
# the sum of their sizes, since a sum that crosses zero has no scale of its own.
def _sigmoid(a):
    high, low = 1 / (1 + mp.exp(-a)), 1 / (1 + mp.exp(a))
    slope = high * low
    return [high], [slope], [slope * low, -slope * high], [slope, -6 * slope * slope]


def _tanh(a):
    value, slope = mp.tanh(a), mp.sech(a) ** 2
    return [value], [slope], [-2 * value * slope], [4 * slope, -6 * slope * slope]


def _softplus(a):
    return [mp.log1p(mp.exp(a))], *_sigmoid(a)[:3]


def _gelu(a):
    cdf, pdf = mp.erfc(-a / mp.sqrt(2)) / 2, mp.npdf(a)
    return [a * cdf], [cdf, a * pdf], [2 * pdf, -a * a * pdf], [a**3 * pdf, -4 * a * pdf]


def _silu(a):
    value, slope, bend, twist = _sigmoid(a)

    def times(terms, factor):
        return [factor * term for term in terms]

    return (
        times(value, a),
        [*value, *times(slope, a)],
        [*times(slope, 2), *times(bend, a)],
        [*times(bend, 3), *times(twist, a)],
    )


SMOOTH = {
    "identity": lambda a: ([a], [1], [0], [0]),
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "softplus": _softplus,
    "gelu": _gelu,
    "silu": _silu,
}


def assert_accurate(name, a):
    eps, tiny = torch.finfo(a.dtype).eps, torch.finfo(a.dtype).tiny
    # exp(a) is off by a units in the last place if a was rounded once, exp(-a^2 / 2) by a^2.
    rounded = 1 + float(a) ** 2 if name == "gelu" else 1 + abs(float(a))
    with mpmath.workdps(60):
        expected = SMOOTH[name](mp.mpf(float(a)))
        for order, (actual, terms) in enumerate(zip(ACTIVATIONS[name](a), expected, strict=True)):
            assert actual.dtype == a.dtype
            assert actual.isfinite(), (name, order, a)
            size = mp.fsum(map(abs, terms))
            error = abs(mp.mpf(float(actual)) - mp.fsum(terms))
            assert error <= 8 * eps * rounded * size + 8 * tiny * rounded, (name, order, a)


@pytest.mark.parametrize("dtype", BOTH_TYPES)
@pytest.mark.parametrize("name", SMOOTH)
def test_tails_and_turning_points(name, dtype):
    for size in (0, 1e-30, 1e-8, 1e-3, 0.5, 1, 1.3, 2, 5, 12, 17, 37, 88, 104, 300, 709, 746, 1000):
        for sign in (1, -1):
            assert_accurate(name, torch.tensor(float(sign * size), dtype=dtype))


@given(
    st.sampled_from(sorted(SMOOTH)),
    st.sampled_from(BOTH_TYPES),
    st.floats(-1000, 1000) | st.floats(-6, 6),
)
def test_three_derivatives_are_accurate_anywhere(name, dtype, value):
    assert_accurate(name, torch.tensor(value, dtype=dtype))


@pytest.mark.parametrize("dtype", BOTH_TYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nothing_overflows_even_beyond(name, dtype):
    a = torch.tensor([-1e6, -1e3, 0.0, 1e3, 1e6], dtype=dtype)
    for derivative in ACTIVATIONS[name](a):
        assert derivative.shape == a.shape
        assert derivative.isfinite().all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_slopes_are_pytorchs_on_either_side_and_on_the_kink(name):
    function = {
        "identity": lambda a: a,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "softplus": functional.softplus,
        "gelu": functional.gelu,
        "silu": functional.silu,
        "relu": functional.relu,
        "leaky_relu": functional.leaky_relu,
    }[name]
    a = torch.tensor([-2.0, -0.1, 0.0, 0.1, 2.0], dtype=torch.float64, requires_grad=True)
    value = function(a)
    (slope,) = torch.autograd.grad(value.sum(), a)
    mine, my_slope, *_ = ACTIVATIONS[name](a.detach())
    torch.testing.assert_close(mine, value.detach())
    torch.testing.assert_close(my_slope, slope)


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.3, -1.0, 1.0])
def test_piecewise_linear_activations_do_not_bend(slope):
    a = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64)
    activation = leaky_relu(slope)
    value, first, second, third = activation(a)
    torch.testing.assert_close(value, functional.leaky_relu(a, slope))
    assert first.tolist() == [slope, slope, 1]
    assert not second.any()
    assert not third.any()
    assert activation.negative_slope == slope
    assert activation.name == ("relu" if slope == 0 else "leaky_relu")


@given(
    st.lists(st.sampled_from(sorted(ACTIVATIONS)), min_size=2, max_size=3),
    st.floats(-4, 4).filter(lambda a: abs(a) > 1e-3),  # off the kinks
)
def test_compositions_have_the_derivatives_of_nested_functions(names, value):
    activation = None
    for name in names:  # the innermost first
        activation = compose(ACTIVATIONS[name], activation)
    *others, last = names
    assert activation.name.startswith(f"{last}(")
    assert all(name in activation.name for name in others)

    def nested(a):
        for name in names:
            a = oracle.ACTIVATIONS[name](a)
        return a

    functions = [nested]
    for _ in range(3):
        functions.append(torch.func.grad(functions[-1]))
    a = torch.tensor(value, dtype=torch.float64)
    for mine, function in zip(activation(a), functions, strict=True):
        torch.testing.assert_close(mine, function(a), rtol=1e-9, atol=1e-9)


def test_nothing_to_compose_with_is_the_activation_itself():
    assert compose(ACTIVATIONS["gelu"], None) is ACTIVATIONS["gelu"]


def test_names_and_activations_are_looked_up():
    assert list(ACTIVATIONS) == [activation.name for activation in ACTIVATIONS.values()]
    assert get_activation("gelu") is ACTIVATIONS["gelu"]
    own = leaky_relu(0.7)
    assert get_activation(own) is own
    with pytest.raises(ValueError, match="unknown activation 'swish': expected one of identity"):
        get_activation("swish")


# Activations of one's own


@pytest.fixture
def registered(monkeypatch):
    """What is registered here is forgotten afterwards."""
    for table in ("ACTIVATIONS", "_LAYERS"):
        monkeypatch.setattr(activations, table, dict(getattr(activations, table)))


class Sine(nn.Module):
    def __init__(self, rate=1.0):
        super().__init__()
        self.rate = rate

    def forward(self, a):
        return (self.rate * a).sin()


SINE = activations.Activation("sine", lambda a: (a.sin(), a.cos(), -a.sin(), -a.cos()))


@pytest.mark.usefixtures("registered")
def test_a_registered_activation_is_known_to_the_closed_form_by_layer_and_by_name():
    lowland.exact.register_activation(Sine, SINE)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Sine(), nn.Linear(4, 2)).double()
    x, y = torch.randn(9, 3).double(), torch.arange(9) % 2
    found = lowland.hessian_moments(model, nn.CrossEntropyLoss(), x, y, "exact")
    expected = lowland.hessian_moments(model, nn.CrossEntropyLoss(), x, y, "dense")
    torch.testing.assert_close(found.trace_sq, expected.trace_sq, rtol=1e-10, atol=0)
    weights = [torch.cat([layer.bias[None], layer.weight.T]) for layer in (model[0], model[2])]
    by_name = lowland.exact.moments(weights, x, y, activation="sine", loss="ce")
    torch.testing.assert_close(by_name.trace_sq, expected.trace_sq, rtol=1e-10, atol=0)


@pytest.mark.usefixtures("registered")
def test_settings_of_a_layer_decide_which_activation_it_is():
    lowland.exact.register_activation(Sine, lambda layer: SINE if layer.rate == 1 else None)
    assert activations.read_activation(Sine()) is SINE
    assert activations.read_activation(Sine(2.0)) is None
    lowland.exact.register_activation(Sine, lambda layer: SINE)
    with pytest.raises(ValueError, match=r"Sine\(\) is not the activation 'sine'"):
        activations.read_activation(Sine(2.0))


@pytest.mark.usefixtures("registered", "as_installed")
def test_a_slip_in_a_registered_activation_is_found():
    def slip(order):
        def function(a):
            parts = [a.sin(), a.cos(), -a.sin(), -a.cos()]
            parts[order] = parts[order] + 0.01
            return tuple(parts)

        return activations.Activation("slip", function)

    for order in (1, 2, 3):
        with pytest.raises(ValueError, match=f"derivative {order} of the activation 'slip' is not"):
            lowland.exact.register_activation(Sine, slip(order))
    short = activations.Activation("short", lambda a: (a.sin(), a.cos(), -a.sin()))
    with pytest.raises(ValueError, match="must return its value and three derivatives"):
        lowland.exact.register_activation(Sine, short)
    for kind, activation in ((Sine(), SINE), (torch.sin, SINE), (Sine, "sine")):
        with pytest.raises(TypeError, match="expected a"):
            lowland.exact.register_activation(kind, activation)
    assert activations.read_activation(Sine()) is None
    # What a function gives is not known before there is a layer.
    lowland.exact.register_activation(Sine, lambda layer: slip(3))
    with pytest.raises(ValueError, match="derivative 3 of the activation 'slip' is not"):
        activations.read_activation(Sine())


class Bent(nn.Module):
    def forward(self, a):
        return torch.where(a > 0, a, -0.5 * a)


@pytest.mark.usefixtures("registered")
def test_a_registered_activation_that_is_straight_on_both_sides_can_be_rescaled():
    model = nn.Sequential(nn.Linear(3, 4), Bent(), nn.Linear(4, 2)).double()
    x, y = torch.randn(9, 3).double(), torch.arange(9) % 2
    with pytest.raises(lowland.UnsupportedModelError, match="positively homogeneous"):
        lowland.rescale(model, 0, 4.0)
    with pytest.raises(lowland.UnsupportedModelError, match="treats each unit by itself"):
        lowland.permute(model, 0, torch.tensor([1, 0, 3, 2]))
    lowland.exact.register_activation(Bent, activations.leaky_relu(-0.5))
    for changed in (
        lowland.rescale(model, 0, 4.0),
        lowland.permute(model, 0, torch.tensor([1, 0, 3, 2])),
    ):
        torch.testing.assert_close(changed(x), model(x))
    penalty = lowland.HSR(nn.CrossEntropyLoss(), 1.0, method="probes", products="differences")
    with pytest.warns(UserWarning, match="layer '1', Bent: the gradient jumps at its kinks"):
        penalty(model, x, y)


def test_what_pytorchs_layers_keep():
    assert all(map(activations.is_homogeneous, (nn.ReLU(), nn.PReLU(), nn.LeakyReLU(0.3))))
    assert not any(map(activations.is_homogeneous, (nn.Tanh(), nn.ReLU6(), nn.RReLU(), nn.GELU())))
    kinked = (nn.ReLU(), nn.Hardswish(), nn.PReLU(), nn.Softshrink())
    assert all(map(activations.has_kinks, kinked))
    assert not any(map(activations.has_kinks, (nn.Identity(), nn.GELU("tanh"), nn.SiLU())))
    assert not any(map(activations.is_elementwise, (nn.Softmax(1), nn.Linear(2, 2), nn.GLU())))

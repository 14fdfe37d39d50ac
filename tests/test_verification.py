"""What PyTorch has wrong, or a model says wrongly of itself, is told before there is a number."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from helpers.any_models import CROSS_ENTROPY, build, differences, differences_of_loss, flat
from torch import nn

import lowland
from lowland.objective import objective
from lowland.verification import step_of, verdict


def cube(wrong=None):
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return a**3 / 10

        @staticmethod
        def backward(ctx, slope):
            (a,) = ctx.saved_tensors
            if wrong == "gradient":
                return slope
            if wrong == "product":
                return slope * 3 * a.detach() ** 2 / 10
            if wrong == "third":
                return slope * (3 * a.detach() ** 2 + 6 * a.detach() * (a - a.detach())) / 10
            return slope * 3 * a**2 / 10

    return Cube.apply


class Between(nn.Module):
    """A function between two linear layers, in a module of its own."""

    class Layer(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    def __init__(self, function, activation=nn.Tanh):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)
        self.activation, self.odd = activation(), self.Layer(function)

    def forward(self, x):
        return self.last(self.activation(self.odd(self.first(x))))


def case(function, activation=nn.Tanh, dtype=torch.float64):
    torch.manual_seed(0)
    model = Between(function, activation).to(dtype)
    return model, torch.randn(8, 4, dtype=dtype), torch.arange(8) % 2


def by_differences(model, x, y):
    parameters = list(model.parameters())
    return differences(model, lambda: torch.autograd.grad(CROSS_ENTROPY(model(x), y), parameters))


DTYPES = (torch.float32, torch.float64)
WRONG = ("gradient", "product", "third")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("wrong", [None, *WRONG])
def test_each_derivative_is_compared_and_its_layer_named(wrong, activation, dtype):
    model, x, y = case(cube(wrong), activation, dtype)
    found = verdict(objective(model, CROSS_ENTROPY, x, y), 3)
    assert found.what == wrong
    assert found.clear
    assert wrong is None or "layer 'odd', Layer" in found.reason
    order_two = verdict(objective(model, CROSS_ENTROPY, x, y), 2).what
    assert order_two == (None if wrong == "third" else wrong)


def test_a_layer_is_named_at_any_depth_and_the_criterion_too():
    model, x, y = case(cube("product"))
    outer = nn.Sequential(nn.Linear(4, 4), nn.Sequential(model))
    found = verdict(objective(outer.double(), CROSS_ENTROPY, x, y))
    assert "layer '1.0.odd', Layer" in found.reason
    model, x, y = build("mlp")
    odd = cube("product")

    def criterion(output, y):
        return CROSS_ENTROPY(odd(output), y)

    assert "the criterion, criterion" in verdict(objective(model, criterion, x, y)).reason


@pytest.mark.parametrize("method", ["auto", "dense", "probes"])
def test_no_engine_trusts_what_is_wrong(method):
    model, x, y = case(cube("gradient"))
    message = r"gradient of this loss is not its derivative.*'odd'.*lowland.unchecked\(\)"
    with pytest.raises(RuntimeError, match=message):
        lowland.hessian_moments(model, CROSS_ENTROPY, x, y, method)
    with pytest.raises(RuntimeError, match=message):
        lowland.spectrum(model, CROSS_ENTROPY, (x, y), k=1)
    with pytest.raises(RuntimeError, match=message):
        lowland.hessian_moments(model, CROSS_ENTROPY, [(x, y)])
    with pytest.raises(RuntimeError, match=message):
        lowland.HSR(CROSS_ENTROPY, 0.1).loss(model, x, y)
    model, x, y = case(cube("product"))
    message = r"PyTorch's second derivatives of this loss are wrong.*layer 'odd'"
    with pytest.raises(RuntimeError, match=message):
        lowland.hessian_moments(model, CROSS_ENTROPY, x, y, method, products="autograd")


def test_auto_goes_on_with_differences_and_says_so():
    model, x, y = case(cube("product"))
    expected = by_differences(model, x, y)
    moments = lowland.hessian_moments(model, CROSS_ENTROPY, x, y)
    assert moments.method == "dense, differences"
    torch.testing.assert_close(moments.trace, expected.trace(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.trace_sq, expected.square().sum(), rtol=1e-6, atol=1e-6)
    spectrum = lowland.spectrum(model, CROSS_ENTROPY, (x, y), k=None)
    eigenvalues = torch.linalg.eigvalsh(expected).flip(0)
    torch.testing.assert_close(spectrum.eigenvalues, eigenvalues, rtol=1e-6, atol=1e-6)
    estimate = lowland.hessian_moments(model, CROSS_ENTROPY, x, y, "probes", probes=400)
    assert estimate.method == "probes, differences"
    assert abs(estimate.trace - expected.trace()) < 4 * estimate.stderr[0]
    penalty = lowland.HSR(CROSS_ENTROPY, 0.1)
    penalty.loss(model, x, y).backward()
    assert penalty.used == "probes, differences"


@pytest.mark.parametrize("power", range(4))
def test_the_gradient_of_moments_by_differences(power):
    right, x, y = case(cube())
    wrong, _, _ = case(cube("third"))
    slopes = torch.zeros(4).double()
    slopes[power] = 1.0

    def gradient(model, products):
        moments = lowland.hessian_moments(
            model, CROSS_ENTROPY, x, y, "dense", moments=4, products=products
        )
        values = torch.stack([moments.trace, moments.trace_sq, *moments.higher])
        return flat(torch.autograd.grad(slopes @ values, list(model.parameters())))

    expected = gradient(right, "autograd")
    found = gradient(wrong, "differences")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_wrong_third_derivative_stops_a_gradient_and_not_a_value():
    model, x, y = case(cube("third"))
    expected = by_differences(model, x, y)
    for settings in ({"method": "dense"}, {"method": "probes"}):
        moments = lowland.hessian_moments(model, CROSS_ENTROPY, x, y, **settings)
        with pytest.raises(RuntimeError, match="PyTorch's third derivatives of this loss are wron"):
            moments.trace_sq.backward()
        if settings["method"] == "dense":
            torch.testing.assert_close(moments.trace, expected.trace(), rtol=1e-6, atol=1e-6)


def test_kinks_leave_no_way_but_an_error():
    model, x, y = case(cube("product"), nn.ReLU)
    message = r"second derivatives.*wrong[\s\S]*Differences.*no way here.*kinks.*'activation', ReLU"
    with pytest.raises(RuntimeError, match=message):
        lowland.hessian_moments(model, CROSS_ENTROPY, x, y)


def straight_through(a):
    return a + ((4 * a).round() / 4 - a).detach()


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        return a.view_as(a)

    @staticmethod
    def backward(ctx, slope):
        return -slope


def hooked(a):
    a.register_hook(lambda slope: 2 * slope)
    return a


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [straight_through, Reversal.apply, hooked])
def test_gradients_that_are_meant_to_be_others_can_be_taken_as_they_are(function, dtype):
    model, x, y = case(function, dtype=dtype)
    with pytest.raises(RuntimeError, match="the gradient of this loss is not its derivative"):
        lowland.hessian_moments(model, CROSS_ENTROPY, x, y)
    with lowland.unchecked():
        lowland.hessian_moments(model, CROSS_ENTROPY, x, y, "probes")


def test_hooks_on_parameters_are_no_part_of_the_loss():
    model, x, y = case(torch.sin)
    expected = by_differences(model, x, y)
    for parameter in model.parameters():
        parameter.register_hook(lambda slope: 2 * slope)
    moments = lowland.hessian_moments(model, CROSS_ENTROPY, x, y)
    assert moments.method == "dense"
    torch.testing.assert_close(moments.trace_sq, expected.square().sum())
    lowland.HessianTrace(CROSS_ENTROPY, 1.0, method="probes").loss(model, x, y).backward()
    assert all(len(p._backward_hooks) == 1 for p in model.parameters())


class Mixed(nn.Module):
    """Single precision within double."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        inside = self.first(x)
        return self.last(nn.functional.rms_norm(inside.float(), (3,)).to(inside.dtype).tanh())


def test_single_precision_within_double_is_no_fault_and_differences_see_it():
    torch.manual_seed(0)
    model = Mixed().double()
    x, y = torch.randn(8, 4).double(), torch.arange(8) % 2
    expected = lowland.hessian_moments(model, CROSS_ENTROPY, x, y, "dense")
    assert expected.method == "dense"
    found = lowland.hessian_moments(
        model, CROSS_ENTROPY, x, y, "probes", products="differences", probes=300
    )
    assert abs(found.trace - expected.trace) < 4 * found.stderr[0]
    assert abs(found.trace_sq - expected.trace_sq) < 4 * found.stderr[1]
    assert step_of(objective(model, CROSS_ENTROPY, x, y)) > 1


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_stage_of_half_precision_is_no_fault(kind):
    model, x, y = case(lambda a: a.to(kind).to(a.dtype), dtype=torch.float32)
    assert verdict(objective(model, CROSS_ENTROPY, x, y), 3).what is None


class Single(nn.Module):
    """Single precision alone, whatever its parameters are."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        weights = [w.float() for w in self.parameters()]
        inside = torch.tanh(nn.functional.linear(x.float(), *weights[:2]))
        return nn.functional.linear(inside, *weights[2:]).double()


def test_what_rounding_hides_is_no_fault():
    torch.manual_seed(0)
    model = Single().double()
    x, y = torch.randn(8, 4).double(), torch.arange(8) % 2
    found = verdict(objective(model, CROSS_ENTROPY, x, y), 3)
    assert found.what is None
    assert found.clear


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-6, 0.0])
def test_steps_of_differences_suit_a_head_of_any_size(size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 2))
    with torch.no_grad():
        model[2].weight.mul_(size)
        model[2].bias.mul_(size)
    x, y = torch.randn(40, 4), torch.arange(40) % 2
    model.get_submodule("0").requires_grad_(requires_grad=False)
    head = {"generator": torch.Generator().manual_seed(0), "probes": 3}
    expected, found = (
        lowland.hessian_moments(
            model,
            CROSS_ENTROPY,
            x,
            y,
            "probes",
            products=products,
            **head | {"generator": torch.Generator().manual_seed(0)},
        )
        for products in ("autograd", "differences")
    )
    torch.testing.assert_close(found.trace, expected.trace, rtol=0.01, atol=0)
    torch.testing.assert_close(found.trace_sq, expected.trace_sq, rtol=0.01, atol=0)


class Chosen(nn.Module):
    """Sets its parameter by the first data that it sees."""

    def __init__(self):
        super().__init__()
        self.shift, self.last = nn.Parameter(torch.zeros(4)), nn.Linear(4, 2)
        self.register_buffer("ready", torch.tensor(0))

    def forward(self, x):
        if not self.ready:
            self.shift.data.copy_(-x.mean(0))
            self.ready.fill_(1)
        return self.last((x + self.shift).tanh())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_forward_pass_that_writes_to_parameters_is_refused_until_it_has(dtype):
    model, x, y = Chosen().to(dtype), torch.randn(8, 4, dtype=dtype) + 1, torch.arange(8) % 2
    with pytest.raises(ValueError, match=r"writes to its parameter 'shift'.*call model\(x\) once"):
        lowland.hessian_moments(model, CROSS_ENTROPY, x, y)
    assert not model.shift.any()
    assert not model.ready
    model(x)
    assert lowland.hessian_moments(model, CROSS_ENTROPY, x, y).method == "dense"


def test_one_look_for_a_model_a_criterion_and_a_mode():
    passes = []
    model, x, y = case(torch.sin)
    model.register_forward_hook(lambda *_: passes.append(1))

    def measured(criterion=CROSS_ENTROPY):
        passes.clear()
        lowland.hessian_moments(model, criterion, x, y, "probes", probes=1)
        return len(passes)

    first, again = measured(), measured()
    assert first > again == 1
    fresh = [(lambda s, t: CROSS_ENTROPY(s, t) / 2) for _ in range(2)]
    assert measured(fresh[0]) > measured(fresh[1]) == 1
    model.eval()
    assert measured() > measured() == 1
    with lowland.unchecked():
        model.train()
        model.odd.eval()
        assert measured() == 1


def test_scripted_models_are_looked_at_too():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2))
    model, x, y = torch.jit.script(plain), torch.randn(8, 4), torch.arange(8) % 2
    expected = lowland.hessian_moments(plain, CROSS_ENTROPY, x, y, "dense")
    found = lowland.hessian_moments(model, CROSS_ENTROPY, x, y)
    torch.testing.assert_close(found.trace_sq, expected.trace_sq)
    message = r"third derivatives of this loss are wrong[\s\S]*measure the module that was scripted"
    with pytest.raises(RuntimeError, match=message):
        lowland.HSR(CROSS_ENTROPY, 0.1).loss(model, x, y)
    generator = torch.Generator().manual_seed(0)
    for method, room in (("dense", 1e-3), ("probes", 0.3)):
        found = lowland.hessian_moments(
            model,
            CROSS_ENTROPY,
            x,
            y,
            method,
            products="differences",
            probes=400,
            generator=generator,
        )
        torch.testing.assert_close(found.trace_sq, expected.trace_sq, rtol=room, atol=0)


def test_exported_programs_are_right():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Hardsigmoid(), nn.Linear(3, 2))
    x, y = torch.randn(8, 4), torch.arange(8) % 2
    model = torch.export.export(plain, (x,)).module()

    def gradient(model):
        penalty = lowland.FlatnessAware(CROSS_ENTROPY, 1.0, method="dense")
        return flat(torch.autograd.grad(penalty(model, x, y), list(model.parameters())))

    torch.testing.assert_close(gradient(model), gradient(plain))


def test_within_inference_mode():
    model, x, y = case(torch.sin)
    expected = lowland.hessian_moments(model, CROSS_ENTROPY, x, y)
    with torch.inference_mode():
        inside, labels = x * 1, y * 1
        found = lowland.hessian_moments(model, CROSS_ENTROPY, inside, labels)
        spectrum = lowland.spectrum(model, CROSS_ENTROPY, (inside, labels), k=None)
        never = nn.Linear(4, 2)
    torch.testing.assert_close(found.trace_sq, expected.trace_sq)
    assert spectrum.trace == pytest.approx(expected.trace.item())
    with pytest.raises(ValueError, match=r"made within torch.inference_mode\(\)"):
        lowland.hessian_moments(never, CROSS_ENTROPY, x.float(), y, "dense")


# Where losses hold things, and what they write to


class Held(nn.Module):
    """Its parameters in a tuple, beside where modules have theirs."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 2))
        self.steps = ((self.one, torch.tanh), (self.two, nn.Identity()))

    def forward(self, x):
        for weight, function in self.steps:
            x = function(x @ weight)
        return x


def decayed(model):
    parameters = list(model.parameters())

    def criterion(output, y):
        return CROSS_ENTROPY(output, y) + 0.05 * sum(p.square().sum() for p in parameters)

    return criterion


@pytest.mark.parametrize("products", ["auto", "differences"])
@pytest.mark.parametrize("held", ["by the model", "by the criterion"])
def test_parameters_may_be_held_anywhere(held, products):
    torch.manual_seed(0)
    x, y = torch.randn(8, 4).double(), torch.arange(8) % 2
    model = Held().double() if held == "by the model" else case(torch.sin)[0]
    criterion = CROSS_ENTROPY if held == "by the model" else decayed(model)
    parameters = list(model.parameters())

    def gradient():
        return torch.autograd.grad(criterion(model(x), y), parameters)

    expected = differences(model, gradient)
    moments = lowland.hessian_moments(model, criterion, x, y, "dense", products=products)
    assert moments.method == "dense"
    torch.testing.assert_close(moments.trace_sq, expected.square().sum(), rtol=1e-6, atol=0)
    penalty = lowland.HessianTrace(criterion, 1e-9, method="probes", products=products)
    penalty.loss(model, x, y).backward()
    for p, plain in zip(parameters, gradient(), strict=True):
        torch.testing.assert_close(p.grad, plain, rtol=1e-5, atol=1e-7)


class Curriculum(nn.Module):
    """A criterion that is another at each call."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("mean", torch.ones(()).double())

    def forward(self, output, y):
        self.calls += 1
        loss = CROSS_ENTROPY(output * (1 + 0.1 * self.calls), y) / self.mean
        self.mean = 0.5 * self.mean + 0.5 * loss.detach()
        return loss


@pytest.mark.parametrize("products", ["autograd", "differences"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_criterion_has_state_too(products, wrapped):
    model, x, y = case(torch.sin)
    inside = Curriculum()
    criterion = (lambda output, y: inside(output, y)) if wrapped else inside  # noqa: PLW0108
    first = lambda output, y: CROSS_ENTROPY(output * 1.1, y)  # noqa: E731
    expected = lowland.hessian_moments(model, first, x, y, "dense")
    found = lowland.hessian_moments(model, criterion, x, y, "dense", products=products)
    torch.testing.assert_close(found.trace_sq, expected.trace_sq, rtol=1e-6, atol=0)
    assert (inside.calls, float(inside.mean)) == (0, 1.0)
    lowland.HSR(criterion, 0.1, method="probes", products=products).loss(model, x, y).backward()
    assert inside.calls == 1


def of(function):
    return lambda output, y: CROSS_ENTROPY(function(output), y)


def test_what_has_changed_is_looked_at_again():
    wrong = cube("product")

    def method_of(model, criterion=CROSS_ENTROPY):
        return lowland.hessian_moments(model, criterion, x, y).method

    model, x, y = case(cube())
    assert method_of(model) == "dense"
    model.odd.function = wrong
    assert method_of(model) == "dense, differences"
    model, x, y = case(torch.sin)
    assert method_of(model, of(cube())) == "dense"
    assert method_of(model, of(wrong)) == "dense, differences"
    assert method_of(model, partial(of, wrong)()) == "dense, differences"
    hook = model.first.register_forward_hook(lambda _, __, output: wrong(output))
    assert method_of(model) == "dense, differences"
    hook.remove()
    assert method_of(model) == "dense"


class Skipping(nn.Module):
    """Draws from NumPy's and its own random numbers; from Python's own the type checks draw too."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)
        self.own = torch.Generator().manual_seed(0)

    def forward(self, x):
        scale = np.random.rand() + torch.rand((), generator=self.own).item()  # noqa: NPY002
        return self.last((scale * self.first(x)).tanh())


def test_random_numbers_of_others_come_again_too():
    torch.manual_seed(0)
    model, x, y = Skipping().double(), torch.randn(8, 4).double(), torch.arange(8) % 2
    states = np.random.get_state()[2], model.own.get_state()  # noqa: NPY002
    generator = torch.Generator()
    one, other = (
        lowland.hessian_moments(
            model,
            CROSS_ENTROPY,
            x,
            y,
            "probes",
            products=products,
            probes=2,
            generator=generator.manual_seed(0),
        )
        for products in ("autograd", "differences")
    )
    torch.testing.assert_close(one.trace_sq, other.trace_sq, rtol=1e-3, atol=0)
    assert np.random.get_state()[2] == states[0]  # noqa: NPY002
    assert torch.equal(model.own.get_state(), states[1])


def test_third_derivatives_that_are_no_numbers_are_wrong():
    model, x, y = case(torch.sin)

    def criterion(output, y):
        return CROSS_ENTROPY(output.logcumsumexp(1), y)

    penalty = lowland.HSR(criterion, 0.1)
    penalty.loss(model, x, y).backward()
    assert penalty.used == "probes, differences"
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_spectra_leave_parameters_that_a_forward_pass_writes_to():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 2)).double()
    before, x = model[0].weight.detach().clone(), torch.arange(14).view(7, 2) % 7
    with pytest.raises(ValueError, match=r"writes to its parameter '0.weight'.*max_norm"):
        lowland.spectrum(model, CROSS_ENTROPY, (x, torch.arange(7) % 2), k=1)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("seed", range(3))
def test_kinks_right_at_the_parameters_are_no_fault(seed):
    """Where images have black borders, units stand at zero, and at the kink of ReLU."""
    torch.manual_seed(seed)
    x = torch.zeros(16, 1, 12, 12)
    x[:, :, 3:9, 3:9] = torch.rand(16, 1, 6, 6)
    layers = [nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)]
    target = objective(nn.Sequential(*layers).eval(), CROSS_ENTROPY, x, torch.arange(16) % 10)
    assert verdict(target, 3).what is None


@pytest.mark.parametrize("products", ["auto", "differences"])
def test_an_embeddings_row_for_padding_is_a_constant(products):
    torch.manual_seed(0)

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.embed(x).mean(1).tanh())

    model, x, y = Pooled().double(), torch.randint(5, (12, 4)), torch.arange(12) % 2
    with torch.no_grad():
        model.embed.weight[0] = 0.5
    parameters = list(model.parameters())
    matrix = differences(model, lambda: torch.autograd.grad(CROSS_ENTROPY(model(x), y), parameters))
    matrix[:3], matrix[:, :3] = 0, 0
    found = lowland.hessian_moments(model, CROSS_ENTROPY, x, y, "dense", products=products)
    assert found.method == "dense"
    torch.testing.assert_close(found.trace_sq, matrix.square().sum(), rtol=1e-6, atol=0)
    top = lowland.spectrum(model, CROSS_ENTROPY, (x, y), k=1).eigenvalues
    torch.testing.assert_close(top[0], torch.linalg.eigvalsh(matrix)[-1], rtol=1e-6, atol=0)


class Island(nn.Module):
    """Single precision within, and a layer whose second derivative is wrong."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.odd = nn.Linear(4, 3), nn.Linear(3, 2), cube("product")

    def forward(self, x):
        inside = nn.functional.rms_norm(self.first(x).float(), (3,)).to(x.dtype)
        return self.last(self.odd(inside).tanh())


def test_steps_suit_single_precision_within_brute_force_too():
    torch.manual_seed(0)
    model, x, y = Island().double(), torch.randn(8, 4).double(), torch.arange(8) % 2
    found = lowland.hessian_moments(model, CROSS_ENTROPY, x, y)
    assert found.method == "dense, differences"
    model.odd = cube()
    expected = lowland.hessian_moments(model, CROSS_ENTROPY, x, y)
    assert expected.method == "dense"
    torch.testing.assert_close(found.trace_sq, expected.trace_sq, rtol=5e-3, atol=0)


def test_what_inference_mode_made_is_data_elsewhere():
    model, x, y = case(torch.sin)
    with torch.inference_mode():
        inside = x * 1
    for method in ("dense", "probes"):
        found, expected = (
            lowland.hessian_moments(
                model, CROSS_ENTROPY, data, y, method, generator=torch.Generator().manual_seed(0)
            )
            for data in (inside, x)
        )
        torch.testing.assert_close(found.trace_sq, expected.trace_sq)


class WritesTo(nn.Sequential):
    """A model that centers its batch in place."""

    def forward(self, x):
        x -= x.mean(0, keepdim=True) / 2
        return super().forward(x)


def criterion_that_writes(output, y):
    y *= 0.5
    return nn.functional.mse_loss(output, y)


@pytest.mark.parametrize("method", ["probes", "dense", "auto"])
def test_a_pass_that_writes_to_its_batch_is_refused_and_leaves_it(method):
    torch.manual_seed(0)
    x, y = torch.randn(30, 3), torch.randn(30, 2)
    plain = nn.Sequential(nn.Linear(3, 2))
    cases = [
        (WritesTo(nn.Linear(3, 2)), nn.MSELoss()),
        (plain, criterion_that_writes),
        (nn.Sequential(nn.SiLU(inplace=True), nn.Linear(3, 2)), nn.MSELoss()),
    ]
    for model, criterion in cases[: 2 if method == "auto" else 3]:  # the closed form runs no layer
        before = x.clone(), y.clone()
        with pytest.raises(ValueError, match="writes to the batch"):
            lowland.hessian_moments(model, criterion, x, y, method=method)
        assert torch.equal(x, before[0])
        assert torch.equal(y, before[1])
    inside = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
    lowland.hessian_moments(inside, nn.MSELoss(), x, y, method=method)


class Counting(nn.Module):
    """A model whose output depends on how often it has run, which it keeps out of sight."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.layer, self.step = nn.Linear(3, 2), itertools.count(1)

    def forward(self, x):
        Counting.calls += 1
        return self.layer(x) * next(self.step)


def in_a_class(output, y):
    Counting.calls += 1
    return nn.functional.cross_entropy(output, y) * Counting.calls


@pytest.mark.parametrize("method", ["probes", "dense", "auto"])
def test_a_loss_that_is_another_one_each_time_is_refused(method):
    x, y = torch.randn(30, 3), torch.arange(30) % 2
    for model, criterion in ((Counting(), nn.CrossEntropyLoss()), (nn.Linear(3, 2), in_a_class)):
        with pytest.raises(ValueError, match="on the same data"):
            lowland.hessian_moments(model, criterion, x, y, method=method)
        with pytest.raises(ValueError, match="on the same data"):
            lowland.HSR(criterion, 0.1).loss(model, x, y)


class Gated(nn.Module):
    """All rows run the same operations, of which one counts for few of them."""

    def __init__(self, odd):
        super().__init__()
        self.first, self.last, self.odd = nn.Linear(4, 3), nn.Linear(3, 2), odd

    def forward(self, x):
        hidden = self.first(x)
        return self.last(torch.where(x[:, :1] > 5, self.odd(hidden), hidden.sin()))


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_wrong_for_few_rows_is_seen(rows):
    torch.manual_seed(rows)
    x, y = torch.randn(60, 4).clamp(max=2).double(), torch.arange(60) % 2
    x[7 : 7 + rows, 0] = 9
    model = Gated(cube("product")).double()
    with pytest.raises(RuntimeError, match="second derivatives of this loss are wrong"):
        lowland.hessian_moments(model, CROSS_ENTROPY, x, y, method="probes", products="autograd")
    found = lowland.hessian_moments(model, CROSS_ENTROPY, x, y)
    expected = differences_of_loss(model, lambda: CROSS_ENTROPY(model(x), y))
    assert found.method == "dense, differences"
    torch.testing.assert_close(found.trace, expected.trace(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("options", "raised", "message"),
    [
        ({"scale_grad_by_freq": True}, RuntimeError, "scale_grad_by_freq"),
        ({"max_norm": 0.7}, ValueError, "writes to its parameter '0.weight'"),
    ],
)
@pytest.mark.parametrize("used", [False, True])
def test_embeddings_whose_gradients_are_not_the_losses_are_refused_by_name(
    options, raised, message, used
):
    model = nn.Sequential(nn.Embedding(90, 2, **options), nn.Linear(2, 2))
    ids = torch.arange(40)
    if used:
        model(ids)
    with pytest.raises(raised, match=message):
        lowland.hessian_moments(model, CROSS_ENTROPY, ids, ids % 2)
    model[0].weight.requires_grad_(False)
    lowland.hessian_moments(model, CROSS_ENTROPY, ids, ids % 2)


class Sinc(nn.Module):
    """A smooth function whose second derivative PyTorch has as NaN at zero."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2, bias=False)

    def forward(self, x):
        return torch.sinc(self.layer(x))


@pytest.mark.parametrize("method", ["auto", "dense"])
def test_second_derivatives_that_are_no_numbers_are_wrong_ones(method):
    torch.manual_seed(0)
    model, x, y = Sinc().double(), torch.randn(20, 4).double(), torch.arange(20) % 2
    x[3] = 0
    found = lowland.hessian_moments(model, CROSS_ENTROPY, x, y, method=method)
    expected = differences_of_loss(model, lambda: CROSS_ENTROPY(model(x), y))
    torch.testing.assert_close(found.trace, expected.trace(), rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="NaN or infinite where it has finite ones"):
        lowland.hessian_moments(model, CROSS_ENTROPY, x, y, products="autograd")


class Rebinding(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        self.layer.weight = nn.Parameter(self.layer.weight.detach().clone())
        return self.layer(x)


def test_a_parameter_that_is_replaced_in_a_pass_is_refused_and_put_back():
    model, x, y = Rebinding(), torch.randn(20, 4), torch.arange(20) % 2
    weight = model.layer.weight
    with pytest.raises(ValueError, match="puts another tensor in the place of 'weight'"):
        lowland.hessian_moments(model, CROSS_ENTROPY, x, y)
    assert model.layer.weight is weight


class ByPrecision(nn.Module):
    """A kernel of single precision, with a substitute in double."""

    def __init__(self, odd):
        super().__init__()
        self.first, self.last, self.odd = nn.Linear(4, 5), nn.Linear(5, 2), odd

    def forward(self, x):
        hidden = self.first(x)
        wide = hidden.dtype == torch.float64
        return self.last(hidden**3 / 10 if wide else self.odd(hidden))


@pytest.mark.parametrize("wrong", [None, "gradient", "product"])
def test_what_double_precision_does_not_run_is_looked_at_too(wrong):
    torch.manual_seed(0)
    model, x, y = ByPrecision(cube(wrong)), torch.randn(20, 4), torch.arange(20) % 2
    found = verdict(objective(model, CROSS_ENTROPY, x, y))
    assert (found.what is None) == (wrong is None)  # which of them it is, is hard to tell there
    assert wrong is None or "in its own precision" in found.reason

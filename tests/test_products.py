"""Products with the Hessian and third derivatives, beside brute force."""

import copy
import functools
import math
from itertools import combinations, pairwise

import any_models
import pytest
import torch
from any_models import CROSS_ENTROPY, build, error, flat, trainable
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from torch import nn
from torch.autograd import grad
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import lowland
from lowland.dense import dense_hessian
from lowland.objective import objective
from lowland.passes import frozen_statistics
from lowland.probes import rademacher
from lowland.products import hessian_products, quadratic_forms


def directions_for(model, count, generator):
    return [rademacher(trainable(model), generator) for _ in range(count)]


def brute_force(model, x, y, directions, criterion=CROSS_ENTROPY):
    with frozen_statistics(model):
        matrix = dense_hessian(model, criterion, x, y)
    vectors = torch.stack([flat(direction) for direction in directions])
    products = vectors @ matrix
    return (vectors * products).sum(1), products.square().sum(1)


def measured(model, x, y, directions, products="autograd", criterion=CROSS_ENTROPY):
    target = objective(model, criterion, x, y)
    with frozen_statistics(target.model):
        return quadratic_forms([target], directions, products)[1:]


def gradients(forms, model, slopes=(0.7, -0.3)):
    """Of a function of both forms whose slopes differ for each direction."""
    weighed = sum(
        a * (form * torch.arange(1, len(form) + 1)).sum()
        for a, form in zip(slopes, forms, strict=True)
    )
    parameters = trainable(model)
    return grad(weighed, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("name", any_models.MODELS)
def test_exact_products_are_those_of_brute_force(name, generator):
    model, x, y = build(name)
    directions = directions_for(model, 2, generator)
    actual, expected = (f(model, x, y, directions) for f in (measured, brute_force))
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert error(gradients(actual, model), gradients(expected, model)) < 1e-9
    (found, _) = hessian_products(objective(model, CROSS_ENTROPY, x, y), directions, "autograd")
    torch.testing.assert_close(flat(found).norm() ** 2, expected[1][0], rtol=1e-10, atol=0)


@settings(max_examples=15)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=4),
    st.sampled_from([nn.GELU, nn.Tanh, nn.Softplus, nn.ReLU]),
    st.integers(1, 7),
    st.integers(0, 99),
)
def test_of_any_shape(widths, activation, samples, seed):
    torch.manual_seed(seed)
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), activation())]
    model = nn.Sequential(*layers[:-1]).double()
    x, y = torch.randn(samples, widths[0]).double(), torch.randn(samples, widths[-1]).double()
    criterion = nn.MSELoss(reduction="sum")
    directions = directions_for(model, 3, None)
    actual = measured(model, x, y, directions, criterion=criterion)
    expected = brute_force(model, x, y, directions, criterion)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)
    for mine, theirs in zip(gradients(actual, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


NORMS = {
    "layer": nn.LayerNorm(4),
    "batch": nn.BatchNorm1d(4),
    "batch in evaluation": nn.BatchNorm1d(4).eval(),
    "instance": nn.Sequential(nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2), nn.Flatten()),
    "group": nn.GroupNorm(2, 4),
    "root mean square": nn.RMSNorm(4),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_third_derivatives_of_normalizations_are_those_of_differences(name, generator):
    """PyTorch's own take batch and layer statistics for constants, without a sign of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), NORMS[name], nn.Linear(4, 2)).double()
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 2
    directions = directions_for(model, 1, generator)
    found = flat(gradients(measured(model, x, y, directions), model))
    step, along = 1e-5, [torch.randn_like(p) for p in model.parameters()]

    def value(shift):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            torch._foreach_add_(list(moved.parameters()), along, alpha=shift)
            trace, square = measured(moved, x, y, directions)
        return 0.7 * trace.sum() - 0.3 * square.sum()

    expected = (value(step) - value(-step)) / (2 * step)
    torch.testing.assert_close(found @ flat(along), expected, rtol=1e-5, atol=0)


def tiny():
    """Six parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 1, bias=False))
    return model.double(), torch.randn(4, 2).double(), torch.rand(4, 1).double()


def signs_that_cover(model):
    """Columns of a Hadamard matrix: the mean of ``v v^T`` is the identity."""
    sizes = [p.numel() for p in model.parameters()]
    for column in torch.tensor(hadamard(8)[: sum(sizes)].T, dtype=torch.float64):
        parts = column.split(sizes)
        yield [part.view_as(p) for part, p in zip(parts, model.parameters(), strict=True)]


def test_the_mean_over_signs_is_the_moment_and_so_is_its_gradient():
    model, x, y = tiny()
    forms = measured(model, x, y, list(signs_that_cover(model)), criterion=nn.MSELoss())
    matrix = dense_hessian(model, nn.MSELoss(), x, y)
    for form, moment in zip(forms, (matrix.trace(), matrix.square().sum()), strict=True):
        torch.testing.assert_close(form.mean(), moment, rtol=1e-10, atol=0)
        mine, theirs = (
            grad(each, list(model.parameters()), retain_graph=True)
            for each in (form.mean(), moment)
        )
        assert error(mine, theirs) < 1e-9


def test_halves_on_average_leave_out_each_samples_pair_with_itself():
    model, x, y = tiny()
    signs, criterion = list(signs_that_cover(model)), nn.MSELoss()
    squares, traces = [], []
    for first in combinations(range(4), 2):
        order = [*first, *(set(range(4)) - set(first))]
        target = objective(model, criterion, x[order], y[order])
        loss, trace, square = quadratic_forms(target.halves(), signs, "autograd")
        torch.testing.assert_close(loss, criterion(model(x), y))
        squares.append(square.mean())
        traces.append(trace.mean())
    own = [dense_hessian(model, criterion, x[i : i + 1], y[i : i + 1]) for i in range(4)]
    expected = sum((own[i] * own[j]).sum() for i in range(4) for j in range(4) if i != j) / 12
    found = torch.stack(squares).mean()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    parameters = list(model.parameters())
    mine, theirs = (grad(each, parameters, retain_graph=True) for each in (found, expected))
    assert error(mine, theirs) < 1e-9
    trace = dense_hessian(model, criterion, x, y).trace()
    torch.testing.assert_close(torch.stack(traces).mean(), trace)
    exact = lowland.hessian_moments(model, criterion, x, y, "exact", unbiased=True)
    torch.testing.assert_close(exact.trace_sq, expected, rtol=1e-10, atol=0)


# Differences. What stands here is what docs/recipes.md says of them.


def close(model, double, x, y, within, directions):
    """Whether differences of a model are close to the exact values of its double."""
    expected = measured(double, x.double(), y, directions)
    own = [[part.to(x.dtype) for part in direction] for direction in directions]
    actual = measured(model, x, y, own, "differences")
    # v'Hv may cancel; |v| |Hv| is what it cannot exceed.
    scale = (expected[1] * sum(p.numel() for p in trainable(model))).sqrt()
    values = max(
        error(actual[1], expected[1]), ((actual[0] - expected[0]).abs() / scale).max().item()
    )
    slopes = [(1.0, 0.0), (0.0, 1.0), (0.7, -0.3)]
    errors = [
        error(*(gradients(forms, m, ab) for forms, m in ((actual, model), (expected, double))))
        for ab in slopes
    ]
    return values < within[0] and max(errors) < within[1], (values, errors)


@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float64, (1e-4, 1e-3)), (torch.float32, (0.03, 0.15))], ids=str
)
@pytest.mark.parametrize("name", sorted(set(any_models.MODELS) - {"Attention"}))
def test_differences_are_close_for_smooth_networks(name, dtype, within, generator):
    # Not attention: its layer normalization over two features is all but a step.
    model, x, y = build(name, samples=32, dtype=dtype)
    double, *_ = build(name, samples=32)
    double.load_state_dict(model.state_dict())
    good, errors = close(model, double, x, y, within, directions_for(double, 3, generator))
    assert good, errors


def test_kinks_are_no_place_for_differences(generator):
    """As documented: values are those without the kinks at best, and gradients are noise."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
    )
    x, y = torch.randn(200, 4), torch.arange(200) % 2
    directions = directions_for(model, 3, generator)
    exact, finite = (measured(model, x, y, directions, how) for how in ("autograd", "differences"))
    assert error(gradients(finite, model), gradients(exact, model)) > 1


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.middle = nn.Sequential(nn.GELU(), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.last = nn.Linear(5, 2)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = self.first(x)
        if self.use_reentrant is None:
            return self.last(self.middle(x))
        return self.last(checkpoint(self.middle, x, use_reentrant=self.use_reentrant))


def test_differences_go_through_activation_checkpointing(generator):
    torch.manual_seed(0)
    plain, model = Checkpointed(None).double(), Checkpointed(use_reentrant=False).double()
    model.load_state_dict(plain.state_dict())
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 2
    directions = directions_for(model, 2, generator)
    found = []
    for each in (plain, model):
        before = each.middle[2].running_mean.clone()
        forms = measured(each, x, y, directions, "differences")
        found.append((*forms, *gradients(forms, each)))
        assert torch.equal(each.middle[2].running_mean, before)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    with pytest.raises(RuntimeError, match="set use_reentrant=False"):
        measured(Checkpointed(use_reentrant=True).double(), x, y, directions, "differences")


@pytest.mark.parametrize("products", ["autograd", "differences"])
def test_compiled_models_are_run_as_they_were_written(products, generator):
    plain, x, y = build("mlp")
    directions = directions_for(plain, 2, generator)
    expected = measured(plain, x, y, directions, products)
    expected = [*expected, *gradients(expected, plain)]

    def in_place(model):
        model.compile(backend="aot_eager")
        return model

    def a_part(model):
        return nn.Sequential(torch.compile(model[:3], backend="aot_eager"), *model[3:])

    for wrap in (lambda m: torch.compile(m, backend="aot_eager"), in_place, a_part):
        model = wrap(build("mlp")[0])
        model(x).sum().backward()  # compiled by now
        forms = measured(model, x, y, directions, products)
        found = [*forms, *gradients(forms, model)]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        assert torch.equal(model(x), plain(x))


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.head = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x):
        q, k, v = self.inside(x.view(1, 1, -1, 4)).chunk(3, -1)
        return self.head(functional.scaled_dot_product_attention(q, k, v)[0, 0])


def test_fused_attention(generator):
    torch.manual_seed(0)
    model, x, y = Fused().double(), torch.randn(9, 4).double(), torch.arange(9) % 2
    directions = directions_for(model, 2, generator)
    good, errors = close(model, model, x, y, (1e-4, 1e-3), directions)
    assert good, errors
    expected = brute_force(model, x, y, directions)[1]
    torch.testing.assert_close(measured(model, x, y, directions)[1], expected)


def test_differences_see_one_dropout_mask_and_the_stream_goes_on(generator):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 2)).double()
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 2
    directions = directions_for(model, 2, generator)

    def run(products):
        torch.manual_seed(1)
        forms = measured(model, x, y, directions, products)
        torch.rand(3)  # what else happens before the backward pass
        return [*forms, *gradients(forms, model)], torch.rand(1)

    (exact, after), (finite, again) = run("autograd"), run("differences")
    assert error(finite, exact) < 1e-3
    assert torch.equal(after, again)
    first, second = (measured(model, x, y, directions, "differences")[1] for _ in range(2))
    assert not torch.equal(first, second)


def test_forms_of_a_quadratic_loss_have_a_gradient_of_zero():
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 1).double()
    directions = directions_for(model, 2, None)
    _, square = measured(model, x, y, directions, criterion=nn.MSELoss())
    assert (square > 0).all()
    assert all((part == 0).all() for part in grad(square.sum(), list(model.parameters())))


# What cannot be differentiated.


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return 3 * slope * ctx.saved_tensors[0] ** 2


def logged(function):
    """A decorator of one's own, under which what is beneath cannot be seen."""

    @functools.wraps(function)
    def called(*arguments):
        return function(*arguments)

    del called.__wrapped__
    return called


class LoggedCube(Cube):
    backward = staticmethod(logged(Cube.backward))


class Cubic(nn.Module):
    def __init__(self, cube):
        super().__init__()
        self.cube, self.first, self.last = cube, nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.cube(self.first(x)))


@pytest.mark.parametrize("cube", [Cube, LoggedCube])
def test_functions_that_can_be_differentiated_once_are_for_differences(cube, generator):
    """PyTorch would leave them out of the product, and say nothing."""
    torch.manual_seed(0)
    model, double = Cubic(cube.apply).double(), Cubic(lambda x: x**3).double()
    double.load_state_dict(model.state_dict())
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 2
    directions = directions_for(model, 2, generator)
    with pytest.raises(RuntimeError, match="once_differentiable\nUse products='differences'"):
        measured(model, x, y, directions)
    good, errors = close(model, double, x, y, (1e-4, 1e-3), directions)
    assert good, errors


@pytest.mark.parametrize("criterion", [nn.L1Loss(), nn.HingeEmbeddingLoss()])
def test_losses_without_curvature(criterion):
    model = nn.Linear(3, 1)
    y = torch.tensor([[1.0], [-1.0]])
    with pytest.raises(ValueError, match="its Hessian is zero"):
        measured(model, torch.randn(2, 3), y, directions_for(model, 1, None), criterion=criterion)


@pytest.mark.parametrize("products", ["autograd", "differences"])
def test_losses_without_a_graph_or_with_nan(products):
    model, x, y = build("mlp")
    directions = directions_for(model, 1, None)

    class Detached(nn.Module):
        def forward(self, output, y):
            return functional.cross_entropy(output, y).detach()

    with pytest.raises(ValueError, match="the loss has no graph to the model's parameters"):
        measured(model, x, y, directions, products, Detached())
    with pytest.raises(ValueError, match=r"must return a scalar.*got shape \(8,\)"):
        measured(model, x, y, directions, products, nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match="the loss is not finite"):
        measured(model, x * math.nan, y, directions, products)


@pytest.mark.parametrize("products", ["autograd", "differences"])
def test_parameters_that_a_batch_does_not_use_have_no_curvature(products):
    model, x, y = build("mlp")
    directions = directions_for(model, 1, None)
    forms = measured(model, x, y, directions, products)
    expected = [*gradients(forms, model), torch.zeros(1, 1).double(), torch.zeros(1).double()]
    model.register_module("spare", nn.Linear(1, 1).double())
    model.forward = functools.partial(nn.Sequential.forward, model[:5])
    longer = [[*directions[0], torch.ones(1, 1).double(), torch.ones(1).double()]]
    found = measured(model, x, y, longer, products)
    torch.testing.assert_close(found, forms, rtol=1e-4, atol=1e-9)
    assert error(gradients(found, model), expected) < 1e-3
    dense = lowland.hessian_moments(model, CROSS_ENTROPY, x, y, "dense")
    assert dense.dim == sum(p.numel() for p in model.parameters())
    dense.upper.backward()
    assert not model.spare.weight.grad.any()


def test_products_that_are_not_finite():
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.0)  # where the root has no curvature

    class Root(nn.Module):
        def forward(self, output, y):
            return (output.abs() ** 1.5).sum()

    x = y = torch.ones(1, 1).double()
    with pytest.raises(ValueError, match="product with a direction, in weight, is not finite"):
        measured(model, x, y, directions_for(model, 1, None), criterion=Root())


def test_finite_products_whose_length_is_not():
    model = nn.Linear(1, 1, bias=False)

    class Steep(nn.Module):
        def forward(self, output, y):
            return 5e24 * (output - y).square().sum()

    x = torch.ones(1, 1)
    directions = directions_for(model, 1, None)
    trace, square = measured(model, x, x, directions, criterion=Steep())
    torch.testing.assert_close(trace, torch.tensor([1e25]))
    assert not square.isfinite().any()


def wrapped_once():
    class Wrapped(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu")
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return a**3

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        @torch.autograd.function.once_differentiable
        def backward(ctx, slope):
            return 3 * slope * ctx.saved_tensors[0] ** 2

    return Wrapped.apply


@pytest.mark.parametrize("function", [Cube.apply, wrapped_once()], ids=["plain", "decorated"])
@pytest.mark.parametrize("method", ["dense", "probes"])
def test_functions_that_can_be_differentiated_once_are_seen_at_the_end_of_a_loss(function, method):
    """There PyTorch hands them a constant, and leaves no sign in the gradient's graph."""
    model, x, y = build("mlp")
    with pytest.raises(RuntimeError, match="marked as once_differentiable"):
        lowland.hessian_moments(
            model,
            lambda s, t: function(CROSS_ENTROPY(s, t)),
            x,
            y,
            method,
            products="autograd",
        )


@pytest.mark.parametrize("method", ["auto", "dense", "probes"])
@pytest.mark.parametrize("products", ["autograd", "differences"])
def test_parameters_that_reentrant_checkpoints_hide_are_not_taken_for_unused(method, products):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            x = x.clone().requires_grad_()
            return self.last(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=True))

    model, x, y = Hidden().double(), torch.randn(8, 4).double(), torch.arange(8) % 2
    with pytest.raises(RuntimeError, match=r"inner.weight.*use_reentrant=False"):
        lowland.hessian_moments(model, CROSS_ENTROPY, x, y, method, products=products)
    with pytest.raises(RuntimeError, match=r"inner.weight.*use_reentrant=False"):
        lowland.HSR(CROSS_ENTROPY, 0.1, products=products).loss(model, x, y)


@pytest.mark.parametrize(
    "settings", [{"method": "dense"}, {"method": "probes", "products": "differences"}]
)
def test_a_batch_that_is_overwritten_before_the_way_back_is_noticed(settings):
    model, x, y = build("mlp")
    value = lowland.FlatnessAware(CROSS_ENTROPY, 1.0, limit=None, **settings)(model, x, y)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


class Rolled(torch.autograd.Function):
    """With a gradient that is none of anything."""

    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a.square().sum()

    @staticmethod
    def backward(ctx, slope):
        (a,) = ctx.saved_tensors
        return slope * a.roll(1)


def test_brute_force_refuses_a_matrix_that_is_not_symmetric():
    model, x, y = build("mlp")
    with lowland.unchecked(), pytest.raises(RuntimeError, match="the Hessian is not symmetric"):
        lowland.hessian_moments(model, lambda s, _: Rolled.apply(s), x, y, "dense")

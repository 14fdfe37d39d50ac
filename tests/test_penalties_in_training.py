"""Penalties in training as people do it."""

import copy

import any_models
import parallel_penalties
import pytest
import torch
import two_processes
from any_models import CROSS_ENTROPY, build, error, trainable
from resuming import resumed
from test_products import signs_that_cover
from torch import nn
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

import lowland
from lowland.dense import dense_hessian, dense_moments
from lowland.moments import HessianMoments
from lowland.objective import objective
from lowland.passes import frozen_statistics
from lowland.products import quadratic_forms

PENALTIES = [lowland.HSR, lowland.HessianTrace, lowland.FlatnessAware]
PRODUCTS = ["autograd", "differences"]


def signs(seed=0):
    return torch.Generator().manual_seed(seed)


def close(one, other, rtol=1e-10, atol=1e-13):
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


# What the penalties of estimates are.


def test_the_slopes_of_hsr_at_the_averages_give_the_gradient_of_the_bound():
    """On average over the signs; around any other point they would not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 1, bias=False))
    model, x, y = model.double(), torch.randn(4, 2).double(), torch.rand(4, 1).double()
    target = objective(model, nn.MSELoss(), x, y)
    _, traces, squares = quadratic_forms([target], list(signs_that_cover(model)), "autograd")
    exact = dense_moments(model, nn.MSELoss(), x, y)
    penalty = lowland.HSR(nn.MSELoss(), 1.0).eval()
    penalty.average.copy_(torch.stack([exact.trace, exact.trace_sq, torch.ones(())]).detach() / 4)
    nan = torch.tensor(torch.nan)
    moments = [
        HessianMoments(6, a, b, stderr=(nan, nan)) for a, b in zip(traces, squares, strict=True)
    ]
    values = torch.stack([penalty.value(each, 4) for each in moments])
    parameters = list(model.parameters())
    close(
        grad(values.mean(), parameters, retain_graph=True), grad(exact.upper, parameters), rtol=1e-9
    )
    torch.testing.assert_close(values, exact.upper.expand(8))


@pytest.mark.slow
def test_over_many_steps_the_gradient_of_hsr_is_that_of_the_bound():
    model, x, y = build("cnn_in_evaluation")
    settings = {"method": "probes", "generator": signs(), "memory": 0.98, "limit": 1e9}
    penalty = lowland.HSR(CROSS_ENTROPY, 1.0, **settings)
    steps = 600
    for _ in range(steps):
        penalty(model, x, y).backward()
    expected = grad(dense_moments(model, CROSS_ENTROPY, x, y).upper, trainable(model))
    assert error([p.grad / steps for p in trainable(model)], expected) < 0.2


def test_one_step_that_overflows_is_not_remembered():
    model, x, y = build("cnn")
    penalty = lowland.HSR(CROSS_ENTROPY, 1.0, method="probes", generator=signs())
    penalty(model, x, y)
    before = penalty.average.clone()
    for bad in (torch.nan, torch.inf):
        nan, one, value = torch.tensor([torch.nan, 1.0, bad]).double()
        moments = HessianMoments(9, one, value, stderr=(nan, nan))
        assert not penalty.value(moments, 4).isfinite()
        assert torch.equal(penalty.average, before)
    assert penalty(model, x, y).isfinite()


@pytest.mark.parametrize("kind", PENALTIES)
def test_a_checkpoint_continues_bit_for_bit(kind):
    def made(generator):
        return kind(
            CROSS_ENTROPY, 0.1, method="probes", generator=generator, every=2, active=(1, 7)
        )

    first, second = resumed(made, steps=4)
    assert first[1].calls == second[1].calls == 8
    for one, other in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["exact", "probes"])
def test_every_so_many_calls_it_counts_as_many_times(method):
    model, x, y = any_models.mlp().double(), torch.randn(8, 4).double(), torch.arange(8) % 2
    plain = lowland.FlatnessAware(CROSS_ENTROPY, 0.5, method=method, generator=signs())
    rare = lowland.FlatnessAware(
        CROSS_ENTROPY, 0.5, method=method, generator=signs(), every=3, active=(2, 9)
    )
    values = [plain(model, x, y).detach() for _ in range(3)]
    found = [rare(model, x, y) for _ in range(12)]
    assert [call for call, value in enumerate(found) if value != 0] == [2, 5, 8]
    close([found[call].detach() for call in (2, 5, 8)], [3 * value for value in values])
    found[0].backward()  # nothing, but it may stand alone
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("loss", [False, True])
def test_a_penalty_in_evaluation_mode_gives_its_value_and_does_not_count(loss):
    model, x, y = build("cnn")
    penalty = lowland.HSR(CROSS_ENTROPY, 0.5, method="probes", every=4, active=(3, 5))
    plain = CROSS_ENTROPY(model(x), y)
    call = penalty.loss if loss else penalty
    nothing = plain if loss else torch.zeros(()).double()
    torch.testing.assert_close(call(model, x, y), nothing)
    penalty.eval()
    state = copy.deepcopy(penalty.state_dict())
    assert all(call(model, x, y) > nothing for _ in range(5))
    assert penalty.state_dict().keys() == state.keys()
    assert torch.equal(penalty.average, state["average"])
    assert penalty.calls == 1


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("products", PRODUCTS)
def test_a_subset_of_the_parameters_is_as_if_the_others_were_frozen(products, kind):
    model, x, y = build("mlp")
    whole = [p for layer in model[2:] for p in layer.parameters()]
    settings = {"method": "probes", "products": products, "probes": 2, "limit": 1e9}
    penalty = kind(CROSS_ENTROPY, 0.5, parameters=iter(whole), generator=signs(), **settings)
    total = penalty.loss(model, x, y)
    total.backward()
    assert all(p.requires_grad for p in model.parameters())
    other = copy.deepcopy(model).requires_grad_(requires_grad=False)
    other[2:].requires_grad_()
    frozen = kind(CROSS_ENTROPY, 0.5, generator=signs(), **settings)(other, x, y)
    close([total], [CROSS_ENTROPY(model(x), y) + frozen])
    loss = grad(CROSS_ENTROPY(model(x), y), whole)
    parts = grad(frozen, trainable(other))
    close([p.grad for p in whole], [a + b for a, b in zip(loss, parts, strict=True)], rtol=1e-8)
    assert model[0].weight.grad is not None  # of the loss


def test_a_subset_by_the_closed_form_is_that_of_brute_force():
    model, x, y = any_models.mlp().double(), torch.randn(8, 4).double(), torch.arange(8) % 2
    penalty = lowland.FlatnessAware(
        CROSS_ENTROPY, 1.0, method="exact", parameters=[model[0].weight, model[4].bias]
    )
    matrix = dense_hessian(model, CROSS_ENTROPY, x, y)
    chosen = [*range(20), len(matrix) - 2, len(matrix) - 1]
    expected = matrix[chosen][:, chosen].square().sum() / 8
    torch.testing.assert_close(penalty(model, x, y), expected)


# The loss and the penalty from one pass.


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("name", ["cnn", "Attention", "tied"])
def test_loss_is_both_and_counts_as_one_pass(name, products, kind):
    model, x, y = build(name)
    two, once = copy.deepcopy(model), copy.deepcopy(model)
    settings = {"method": "probes", "products": products, "probes": 2}
    total = kind(CROSS_ENTROPY, 0.3, generator=signs(), **settings).loss(model, x, y)
    total.backward()
    with frozen_statistics(two):
        loss = CROSS_ENTROPY(two(x), y)
    buffers = copy.deepcopy(list(two.buffers()))
    apart = loss + kind(CROSS_ENTROPY, 0.3, generator=signs(), **settings)(two, x, y)
    apart.backward()
    close(list(two.buffers()), buffers, rtol=0, atol=0)  # a penalty alone updates none
    once(x)
    close(list(model.buffers()), list(once.buffers()))
    close([total], [apart], rtol=1e-9)
    grads = [[p.grad for p in each.parameters()] for each in (model, two)]
    close(*grads, rtol=1e-8, atol=1e-10)


def test_unbiased_estimates_leave_the_statistics_of_the_whole_batch():
    model, x, y = build("cnn")
    once = copy.deepcopy(model)
    loss = CROSS_ENTROPY(once(x), y)
    total, penalty = (
        lowland.FlatnessAware(CROSS_ENTROPY, 0.5, method="probes", unbiased=True, generator=signs())
        for _ in range(2)
    )
    total = total.loss(model, x, y)
    close([total], [loss + penalty(once, x, y)])
    close(list(model.buffers()), list(once.buffers()))


@pytest.mark.parametrize("products", PRODUCTS)
def test_dropout_draws_one_mask_for_both_and_another_in_the_next_step(products):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(), nn.Linear(8, 2)).double()
    x, y = torch.randn(8, 4).double(), torch.arange(8) % 2
    penalty = lowland.FlatnessAware(
        CROSS_ENTROPY, 0.5, method="probes", products=products, generator=signs()
    )
    torch.manual_seed(1)
    total = penalty.loss(model, x, y)
    total.backward()
    (after, second) = torch.rand(1), penalty.loss(model, x, y)
    torch.manual_seed(1)
    mask = (model[2](torch.ones(8, 8).double()) > 0).double() * 2
    assert torch.equal(after, torch.rand(1))
    fixed = nn.Sequential(model[0], model[1], Times(mask), model[3])
    same = lowland.FlatnessAware(CROSS_ENTROPY, 0.5, method="probes", generator=signs())
    expected = same.loss(fixed, x, y)
    assert error(total, expected) < 1e-5
    assert (
        error([p.grad for p in model.parameters()], grad(expected, list(model.parameters()))) < 1e-3
    )
    assert error(second, expected) > 1e-3


class Times(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


# Precision, accumulation, clipping.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("name", ["cnn", "Attention", "mlp"])
def test_under_autocast_the_gradient_is_about_that_of_single_precision(name, products, dtype):
    model, x, y = build(name, samples=32, dtype=torch.float32)
    grads = []
    for enabled in (True, False):
        model.zero_grad()
        penalty = lowland.FlatnessAware(
            CROSS_ENTROPY, 1.0, method="probes", products=products, generator=signs(), probes=4
        )
        with torch.autocast("cpu", dtype, enabled=enabled):
            value = penalty(model, x, y)
        assert value.dtype == torch.float32
        value.backward()
        grads.append([p.grad for p in model.parameters()])
    assert error(*grads) < (0.1 if products == "autograd" else 1e-6)


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.BCEWithLogitsLoss()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_targets_keep_their_digits(dtype, criterion):
    model, x, _ = build("mlp", dtype=torch.float32)
    y = torch.rand(len(x), 2)
    penalty = lowland.FlatnessAware(criterion, 0.0, method="probes")
    with torch.autocast("cpu", dtype):
        assert torch.equal(penalty.loss(model, x, y), criterion(model(x), y))


def test_small_gradients_do_not_vanish_in_half_precision():
    model, x, y = build("mlp", samples=512, dtype=torch.float32)

    class Small(nn.Module):
        def forward(self, output, y):
            return 1e-4 * CROSS_ENTROPY(output, y)  # by the sample below what 16 bits can say

    found = []
    for enabled in (True, False):
        penalty = lowland.HessianTrace(Small(), 1.0, method="probes", generator=signs())
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            value = penalty(model, x, y)
        found.append([value, *grad(1e3 * value, list(model.parameters()))])
    assert error(*found) < 0.05


@pytest.mark.parametrize("products", PRODUCTS)
def test_training_with_a_scaler_survives_overflows(products):
    model, x, y = build("cnn", samples=64, dtype=torch.float32)
    y = (x[:, 0] > 0).long()
    penalty = lowland.HSR(
        CROSS_ENTROPY, 0.01, method="probes", products=products, generator=signs()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = CROSS_ENTROPY(model(x), y)
    for step in range(25):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            total = penalty.loss(model, x, y)
        if step == 3:
            total = total * torch.inf
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**10
    assert penalty.average.isfinite().all()
    assert CROSS_ENTROPY(model(x), y) < 0.8 * before


def test_an_overflow_of_the_products_leaves_out_the_penalty():
    model, x, y = build("mlp", dtype=torch.float32)
    penalty = lowland.HSR(CROSS_ENTROPY, 1.0, method="probes", generator=signs())
    with torch.autocast("cpu", torch.float16):
        good = penalty(model, x, y).detach()
        assert penalty(model, 1e5 * x, y) == 0  # beyond the largest of 16 bits
        again = penalty(model, x, y).detach()
    assert good.isfinite()
    assert again.isfinite()


def test_accumulated_gradients_are_those_of_the_mean_of_the_penalties():
    model, x, y = build("mlp")
    whole, parts = (
        lowland.FlatnessAware(CROSS_ENTROPY, 0.5, method="probes", generator=signs())
        for _ in range(2)
    )
    for some_x, some_y in zip(x.chunk(4), y.chunk(4), strict=True):
        (parts.loss(model, some_x, some_y) / 4).backward()
    mean = sum(whole(model, a, b) for a, b in zip(x.chunk(4), y.chunk(4), strict=True)) / 4
    expected = grad(CROSS_ENTROPY(model(x), y) + mean, list(model.parameters()))
    close([p.grad for p in model.parameters()], expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("name", ["cnn", "Attention"])
def test_training_lowers_the_curvature_that_it_penalizes(name, products, kind):
    after = []
    for weight in (
        0.0,
        {lowland.HSR: 0.1, lowland.HessianTrace: 0.1, lowland.FlatnessAware: 1.0}[kind],
    ):
        model, x, y = build(name, samples=32, dtype=torch.float32)
        penalty = kind(CROSS_ENTROPY, weight, method="probes", products=products, generator=signs())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        for _ in range(30):
            optimizer.zero_grad()
            penalty.loss(model, x, y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
        with frozen_statistics(model):
            found = dense_moments(model, CROSS_ENTROPY, x, y)
        after.append(penalty.value(found, 32).detach())
    assert after[1] < after[0]


@pytest.mark.parametrize("products", PRODUCTS)
def test_frozen_parameters_stay_without_a_gradient(products):
    model, x, y = build("frozen")
    lowland.HSR(CROSS_ENTROPY, 0.1, method="probes", products=products).loss(model, x, y).backward()
    for p in model.parameters():
        assert (p.grad is not None) == p.requires_grad


# Wrappers.


class Checkpointed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.middle = nn.Sequential(nn.GELU(), nn.Linear(5, 5), norm, nn.Tanh())
        self.last = nn.Linear(5, 2)

    def forward(self, x, run=checkpoint):
        return self.last(run(self.middle, self.first(x), use_reentrant=False))


class NotCheckpointed(Checkpointed):
    def forward(self, x):
        return super().forward(x, lambda part, x, **_: part(x))


@pytest.mark.parametrize("products", PRODUCTS)
def test_activation_checkpointing_changes_nothing(products):
    found = []
    for make in (Checkpointed, NotCheckpointed):
        torch.manual_seed(0)
        model = make(nn.Identity() if products == "autograd" else nn.BatchNorm1d(5)).double()
        x, y = torch.randn(8, 4).double(), torch.arange(8) % 2
        penalty = lowland.HSR(
            CROSS_ENTROPY, 0.1, method="probes", products=products, generator=signs()
        )
        (CROSS_ENTROPY(model(x), y) + penalty(model, x, y)).backward()
        found.append([p.grad for p in model.parameters()])
    close(*found, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_compiled_models_are_penalized_as_they_were_written(name, in_place):
    found, took = [], set()
    for compiled in (True, False):
        model, x, y = build(name)
        wrapped = model
        if compiled and in_place:
            model.compile(backend="aot_eager")
        elif compiled:
            wrapped = torch.compile(model, backend="aot_eager")
        penalty = lowland.HSR(CROSS_ENTROPY, 0.1, generator=signs())
        (CROSS_ENTROPY(wrapped(x), y) + penalty(wrapped, x, y)).backward()
        took.add(penalty.used)
        found.append([p.grad for p in model.parameters()])
    close(*found, rtol=1e-9)
    assert took == {"exact" if name == "mlp" else "probes"}


@pytest.mark.slow
def test_several_processes_penalize_the_curvature_of_all_samples(tmp_path):
    expected = parallel_penalties.alone()
    for results, errors in two_processes.run(parallel_penalties.in_parallel, tmp_path):
        for one, other in zip(results, expected, strict=True):
            assert error(one, other) < 1e-4  # differences amplify rounding
        for case, one, other in zip(parallel_penalties.CASES, results, expected, strict=False):
            if case["products"] == "autograd":
                close(one, other, rtol=1e-10, atol=1e-12)
        assert len(errors) == 2
        assert all("DistributedDataParallel model needs method='probes'" in each for each in errors)


# Bad input.


def test_without_gradients_there_is_a_value():
    model, x, y = build("cnn")
    for products in PRODUCTS:
        penalty = lowland.HSR(CROSS_ENTROPY, 1.0, method="probes", products=products)
        with torch.no_grad():
            assert not penalty(model, x, y).requires_grad
            assert not penalty.loss(model, x, y).requires_grad


@pytest.mark.parametrize("method", ["exact", "probes", "dense"])
def test_parameters_of_another_model(method):
    model, x, y = build("mlp")
    for others in ([nn.Linear(2, 2).weight], [model[0].weight, nn.Linear(2, 2).weight]):
        penalty = lowland.HSR(CROSS_ENTROPY, 1.0, method=method, parameters=others)
        with pytest.raises(ValueError, match="parameters= must be trainable parameters of the mod"):
            penalty(model, x, y)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probes": 0}, "probes must be a whole number of at least 1; got 0"),
        ({"products": "x"}, "unknown products 'x': expected 'auto', 'autograd' or 'differences'"),
        ({"every": 0}, "every must be a whole number of at least 1; got 0"),
        ({"every": 1.5}, "every must be a whole number of at least 1; got 1.5"),
        ({"active": (3, 3)}, r"active must be \(start, stop\).*got \(3, 3\)"),
        ({"active": 3}, r"active must be \(start, stop\).*got 3"),
        ({"memory": 1.0}, "memory must be at least 0 and below 1; got 1.0"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        lowland.HSR(CROSS_ENTROPY, 0.1, **settings)


def test_print_shows_what_is_not_usual():
    penalty = lowland.HSR(
        CROSS_ENTROPY, 0.1, probes=3, products="differences", every=2, active=(1, 5)
    )
    assert "probes=3, products='differences', every=2, active=(1, 5)" in repr(penalty)
    assert "products" not in repr(lowland.HSR(CROSS_ENTROPY, 0.1))

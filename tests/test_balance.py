"""What penalties do with their gradients in training: limits, strengths, parts of batches."""

import copy
import math
import warnings

import any_models
import pytest
import torch
from any_models import CROSS_ENTROPY
from hypothesis import given, settings
from hypothesis import strategies as st
from resuming import resumed
from torch import nn
from torch.autograd import grad

import lowland

KINDS = [lowland.HSR, lowland.HessianTrace, lowland.FlatnessAware, lowland.LambdaMax]
MEMORY = 0.95


def signs(seed=0):
    return torch.Generator().manual_seed(seed)


def data(samples=12, seed=0, dtype=torch.float64):
    generator = signs(seed)
    x = torch.randn(samples, 4, generator=generator, dtype=dtype)
    return x, torch.randint(2, (samples,), generator=generator)


def length(parts):
    return float(torch.cat([part.reshape(-1) for part in parts]).norm())


def close(one, other, rtol=1e-9, atol=1e-13):
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


def trace(settings_=None, **more):
    return lowland.HessianTrace(CROSS_ENTROPY, **{"method": "exact", **(settings_ or {}), **more})


# The rule, by hand.


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    "given_",
    [
        {"weight": 0.003},
        {"weight": 3.0},
        {"weight": 0.2, "every": 2},
        {"strength": 0.2},
        {"strength": 2.0},
        {"strength": 0.7, "limit": 0.3},
        {"strength": 0.7, "limit": None},
    ],
)
def test_the_gradient_is_the_losss_and_a_limited_part_of_the_penaltys(given_, alone):
    model = any_models.mlp().double()
    parameters, optimizer = list(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.3)
    penalty, pure = trace(given_), trace(weight=1.0, limit=None)
    every, limit = given_.get("every", 1), given_.get("limit", 0.5)
    loss_mean = mean = seen = 0.0
    for step in range(8):
        x, y = data(seed=step)
        g = grad(CROSS_ENTROPY(model(x), y), parameters)
        h = grad(pure(model, x, y), parameters)
        c = 0.0
        if step % every == 0:
            loss_mean = MEMORY * loss_mean + (1 - MEMORY) * length(g)
            mean = MEMORY * mean + (1 - MEMORY) * length(h)
            seen = MEMORY * seen + 1 - MEMORY
            weight = given_.get("weight") or given_["strength"] * loss_mean / mean
            c = every * weight
            if limit is not None:
                c = min(c, limit * loss_mean / seen / length(h))
        optimizer.zero_grad()
        if alone:
            total = CROSS_ENTROPY(model(x), y) + penalty(model, x, y)
        else:
            total = penalty.loss(model, x, y)
        total.backward()
        close([p.grad for p in parameters], [a + c * b for a, b in zip(g, h, strict=True)])
        expected = CROSS_ENTROPY(model(x), y)
        if step % every == 0:
            expected = expected + every * weight * pure.measure(model, x, y)
        torch.testing.assert_close(total, expected)
        optimizer.step()


@given(
    scale=st.floats(1e-3, 1e3),
    kind=st.sampled_from(KINDS[:3]),
    seed=st.integers(0, 50),
)
@settings(max_examples=8, deadline=None)
def test_a_strength_does_the_same_for_any_multiple_of_the_loss(scale, kind, seed):
    ends = []
    for factor in (1.0, scale):

        def criterion(output, y, factor=factor):
            return factor * CROSS_ENTROPY(output, y)

        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2 / factor, momentum=0.5)
        penalty = kind(criterion, strength=0.3, method="probes", generator=signs(seed))
        for step in range(4):
            optimizer.zero_grad()
            penalty.loss(model, *data(seed=step)).backward()
            optimizer.step()
        ends.append(list(model.parameters()))
    close(*ends, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [1e3, 1e8])
def test_no_weight_breaks_a_training(kind, weight):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    x, y = data(64, dtype=torch.float32)
    y = (x[:, 0] > 0).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    penalty = kind(CROSS_ENTROPY, weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            optimizer.zero_grad()
            penalty.loss(model, x, y).backward()
            optimizer.step()
    assert float(CROSS_ENTROPY(model(x), y).detach()) < 0.9 * math.log(2)


def test_a_loss_without_a_gradient_lets_no_penalty_pass():
    model = nn.Linear(2, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    x, y = torch.tensor([[1.0, 0], [1, 0]]).double(), torch.tensor([0, 1])
    total = trace(weight=1.0).loss(model, x, y)
    total.backward()
    assert torch.equal(model.weight.grad, torch.zeros(2, 2).double())


# What is returned.


def test_everything_that_the_loss_depends_on_has_its_gradient():
    """Inputs that come from elsewhere, and a criterion with parameters of its own."""

    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.3).double())

        def forward(self, output, y):
            return CROSS_ENTROPY(self.scale * output, y)

    model, below, criterion = any_models.mlp().double(), nn.Linear(4, 4).double(), Tempered()
    x, y = data()
    everything = [*model.parameters(), *below.parameters(), criterion.scale]
    found = []
    for limit in (1e9, None):
        for use in ("loss", "alone"):
            penalty = lowland.HSR(
                criterion, 0.3, method="probes", products="autograd", generator=signs(), limit=limit
            )
            features = below(x).tanh()
            if use == "loss":
                total = penalty.loss(model, features, y)
            else:
                total = criterion(model(features), y) + penalty(model, features, y)
            found.append(grad(total, everything))
    for other in found[1:]:
        close(found[0], other)


@pytest.mark.parametrize(
    "settings_",
    [
        {"method": "probes", "products": "autograd"},
        {"method": "probes", "products": "differences"},
        {"method": "dense"},
    ],
)
@pytest.mark.parametrize("kind", [lowland.HSR, lowland.HessianTrace])
def test_what_the_loss_does_not_use_stays_without_a_gradient(kind, settings_):
    model = any_models.Routed().double()
    penalty = kind(CROSS_ENTROPY, 0.1, **settings_)
    for total in (penalty.loss(model, *data()), penalty(model, *data())):
        model.zero_grad()
        total.backward()
        assert model.one.weight.grad is not None
        assert model.other.weight.grad is None


@pytest.mark.parametrize("limit", [1e9, None])
def test_the_trace_of_upper_layers_has_a_gradient_in_those_below(limit):
    layers = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.GELU(), nn.Linear(3, 3)
    model, (x, y) = nn.Sequential(*layers).double(), data()
    parameters = list(model.parameters())
    for chosen in (layers[2:], layers[4:]):
        found = []
        for method in ("exact", "dense"):
            wanted = [p for layer in chosen for p in layer.parameters()]
            penalty = lowland.HessianTrace(
                CROSS_ENTROPY, 0.3, method=method, parameters=wanted, limit=limit
            )
            found.append(grad(penalty.loss(model, x, y), parameters))
        close(*found)
        assert found[0][0].norm() > 1e-3


def test_hooks_on_parameters_see_the_whole_gradient_once():
    model, seen = any_models.mlp().double(), []
    model[0].weight.register_hook(lambda g: seen.append(g.clone()))
    penalty = lowland.HSR(CROSS_ENTROPY, 0.1, method="probes", generator=signs())
    penalty.loss(model, *data()).backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], model[0].weight.grad)


def test_one_backward_pass_or_as_many_as_are_asked_for():
    model = any_models.mlp().double()
    total = trace(weight=0.1).loss(model, *data())
    total.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    (2 * total).backward()
    close([p.grad for p in model.parameters()], [3 * g for g in once])
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        total.backward()


def test_a_second_derivative_needs_the_graph():
    model, (x, y) = any_models.mlp().double(), data()
    total = lowland.HSR(CROSS_ENTROPY, 0.1, method="dense").loss(model, x, y)
    (first, *_) = grad(total, list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="use weight= with limit=None"):
        first.sum().backward()
    total = lowland.HSR(CROSS_ENTROPY, 0.1, method="dense", limit=None).loss(model, x, y)
    (first, *_) = grad(total, list(model.parameters()), create_graph=True)
    first.sum().backward()


def test_weights_that_modules_share_between_passes_stay_differentiable():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))).double()
    x, y = data()
    penalty = lowland.HSR(CROSS_ENTROPY, 0.1, method="probes", products="autograd")
    with nn.utils.parametrize.cached(), lowland.unchecked():  # a look would move the weights
        (CROSS_ENTROPY(model(x), y) + penalty(model, x, y)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_memory_of_graphs_is_given_back_before_the_backward_pass():
    import gc  # noqa: PLC0415
    import weakref  # noqa: PLC0415

    kept = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            kept.append(weakref.ref(ctx))
            return a * 1

        @staticmethod
        def backward(ctx, g):
            return g * 1

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 2).double()

        def forward(self, x):
            return Watched.apply(self.inner(x)).tanh()

    model, (x, y) = Model(), data()
    penalty = lowland.HSR(CROSS_ENTROPY, 0.1, method="probes", products="autograd")
    total = penalty.loss(model, x, y)
    gc.collect()
    assert not any(each() for each in kept)
    total.backward()


# A part of the batch.


@pytest.mark.parametrize(
    ("known", "how"),
    [
        (True, {}),
        (False, {}),
        (True, {"reduction": "sum"}),
        (False, {"reduction": "sum"}),
        (True, {"weight": torch.tensor([0.3, 2.0]).double()}),
        (True, {"ignore_index": 1}),
    ],
)
@pytest.mark.parametrize("kind", [lowland.HessianTrace, lowland.LambdaMax])
def test_over_a_round_the_parts_have_the_gradient_of_the_whole(kind, known, how):
    model, (x, y) = any_models.mlp().double(), data(12)
    inside = nn.CrossEntropyLoss(**how)

    def unknown(output, y):
        return inside(output, y)

    criterion = inside if known else unknown
    parameters = list(model.parameters())
    more = {} if kind is lowland.LambdaMax else {"method": "dense"}

    def penalty(**settings_):
        made = kind(criterion, 0.2, limit=1e9, generator=signs(), **more, **settings_)
        if kind is lowland.LambdaMax:  # of which one vector is looked at
            made.refresh = 10**9
        return made

    whole, parts = penalty(), penalty(samples=0.25)
    if kind is lowland.LambdaMax:
        whole(model, x, y)
        whole.calls = 0
        vector = whole._tracked
        expected = whole(model, x, y)
        gradient = grad(expected, parameters)
        values, gradients = [], []
        for _ in range(4):
            parts._tracked, parts._names, parts._model = vector, whole._names, whole._model
            value = parts(model, x, y)
            values.append(value.detach())
            gradients.append(grad(value, parameters))
    else:
        expected = whole(model, x, y)
        gradient = grad(expected, parameters)
        found = [parts(model, x, y) for _ in range(4)]
        values, gradients = [v.detach() for v in found], [grad(v, parameters) for v in found]
    torch.testing.assert_close(torch.stack(values).mean(), expected.detach())
    assert len({float(value) for value in values}) == 4
    close([torch.stack(each).mean(0) for each in zip(*gradients, strict=True)], gradient)


def test_a_part_without_a_label_adds_nothing():
    model, (x, y) = any_models.mlp().double(), data(12)
    y[:4] = -100
    penalty = trace(weight=0.3, samples=4, limit=1e9)
    found = [penalty(model, x, y) for _ in range(3)]
    assert found[0] == 0
    whole = trace(weight=0.3, limit=1e9)(model, x, y)
    torch.testing.assert_close(torch.stack(found).mean(), whole)


@pytest.mark.parametrize("gradients", [True, False])
def test_without_a_comparison_parts_are_looked_at_too(gradients):
    model, (x, y) = any_models.mlp().double(), data(12)
    penalty = trace(weight=0.5, samples=4, limit=None)
    for use in ("alone", "loss"):
        start = penalty._window.start
        with torch.set_grad_enabled(gradients):
            part = trace(weight=0.5, limit=None)(model, x[start : start + 4], y[start : start + 4])
            if use == "alone":
                torch.testing.assert_close(penalty(model, x, y), part)
            else:
                expected = CROSS_ENTROPY(model(x), y) + part
                torch.testing.assert_close(penalty.loss(model, x, y), expected)
    # In evaluation mode the value is that of all.
    torch.testing.assert_close(penalty.eval()(model, x, y), 0.5 * penalty.measure(model, x, y))


def test_parts_that_are_too_small_are_made_larger_or_named():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = data(5)
    penalty = lowland.HSR(CROSS_ENTROPY, 0.1, samples=0.25, method="probes")
    penalty.loss(model, x, y).backward()
    with pytest.raises(ValueError, match="samples=1 looked at 1 of 5 samples, and of these alone"):
        lowland.HSR(CROSS_ENTROPY, 0.1, samples=1, method="probes").loss(model, x, y)
    model, (x, y) = any_models.mlp().double(), data(10)
    unbiased = {"unbiased": True, "method": "probes"}
    lowland.HSR(CROSS_ENTROPY, 0.1, samples=0.25, **unbiased).loss(model, x, y).backward()
    with pytest.raises(ValueError, match="empty"):
        lowland.HSR(CROSS_ENTROPY, 0.1, samples=0.25).loss(model, x[:0], y[:0])


def test_of_a_sum_what_is_known_is_what_is_penalized():
    model, (x, y) = any_models.mlp().double(), data(12)
    criterion = nn.CrossEntropyLoss(reduction="sum")
    penalty = lowland.LambdaMax(criterion, 0.5, samples=4, limit=1e9, generator=signs())
    value = penalty(model, x, y)
    torch.testing.assert_close(value.detach(), 0.5 * penalty.known.eigenvalue)


@given(count=st.integers(1, 9), samples=st.one_of(st.integers(1, 12), st.floats(0.05, 0.95)))
@settings(max_examples=12, deadline=None)
def test_all_samples_take_part_alike(count, samples):
    seen = torch.zeros(count)

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(1, 1)

        def forward(self, x):
            if len(x) < count or samples_a_call == count:
                seen[x[:, 0].long()] += 1
            return self.inner(x)

    samples_a_call = min(count, max(2, round(samples * count)) if samples < 1 else samples)
    model, x = Counting(), torch.arange(float(count))[:, None]
    penalty = lowland.HessianTrace(nn.MSELoss(), 0.1, samples=samples, method="dense")
    with lowland.unchecked():
        penalty(model, x, x)
        each = int(seen.sum()) // samples_a_call
        for _ in range(count - 1):
            penalty(model, x, x)
    assert seen.tolist() == [each * samples_a_call] * count


def test_the_whole_batchs_size_divides_tr_h_squared_of_a_part():
    model, (x, y) = any_models.mlp().double(), data(12)
    penalty = lowland.FlatnessAware(CROSS_ENTROPY, 0.5, samples=4, method="dense", limit=1e9)
    matrix = lowland.dense.dense_hessian(model, CROSS_ENTROPY, x[:4], y[:4])
    torch.testing.assert_close(penalty(model, x, y), 0.5 * matrix.square().sum() / 12)
    torch.testing.assert_close(
        penalty.measure(model, x, y),
        lowland.dense.dense_hessian(model, CROSS_ENTROPY, x, y).square().sum() / 12,
    )


def test_the_loss_is_that_of_the_whole_batch_as_a_plain_step_has_it():
    """With the running statistics and the masks of a step without a penalty."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(0.5), nn.Linear(6, 2)
    model = nn.Sequential(*layers).double()
    plain, (x, y) = copy.deepcopy(model), data(12)
    penalty = lowland.HSR(CROSS_ENTROPY, 0.0, samples=0.5, method="probes", generator=signs())
    for seed in range(2):
        torch.manual_seed(seed)
        total = penalty.loss(model, x, y)
        torch.manual_seed(seed)
        expected = CROSS_ENTROPY(plain(x), y)
        torch.testing.assert_close(total, expected)
        close(list(model.buffers()), list(plain.buffers()), rtol=0, atol=0)
        total.backward()
        expected.backward()
        close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_parts_of_batches_of_any_form():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 2)

        def forward(self, features, mask):
            return (self.inner(features) * mask).tanh()

    model, (x, y) = Model().double(), data(12)
    batch = {"features": x, "mask": torch.ones(12, 1).double(), "labels": y}

    def criterion(output, batch):
        return CROSS_ENTROPY(output, batch["labels"])

    penalty = lowland.HessianTrace(criterion, 0.5, samples=3, method="dense", limit=1e9)
    model.forward = lambda features, mask, labels=None: Model.forward(model, features, mask)
    part = {name: value[:3] for name, value in batch.items()}
    expected = lowland.hessian_moments(model, criterion, part, method="dense").trace
    torch.testing.assert_close(penalty(model, batch), 0.5 * expected)


def test_samples_of_a_loss_that_is_neither_a_mean_nor_a_sum_are_refused():
    model, (x, y) = any_models.mlp().double(), data(12)

    def rooted(output, y):
        return CROSS_ENTROPY(output, y).sqrt()

    penalty = lowland.HessianTrace(rooted, 0.5, samples=3)
    with pytest.raises(
        ValueError, match=r"samples= takes a part of each batch.*leave samples= out"
    ):
        penalty(model, x, y)
    with pytest.raises(TypeError, match=r"samples= takes a part.*leave samples= out"):
        lowland.HessianTrace(CROSS_ENTROPY, 0.5, samples=3)(model, x, torch.randn(7).double())


def test_a_spectral_penalty_of_a_part_of_a_sum_is_refused():
    model, (x, y) = any_models.mlp().double(), data(12)
    criterion = nn.CrossEntropyLoss(reduction="sum")
    penalty = lowland.Spectral(criterion, 0.1, f="lambda_max", samples=0.5)
    with pytest.raises(lowland.UnsupportedModelError, match="a criterion that is a plain mean"):
        penalty(model, x, y)
    mean = lowland.Spectral(CROSS_ENTROPY, 0.1, f="lambda_max", samples=0.5)
    assert float(mean.loss(model, x, y).detach()) > 0


# When, what it says, and what it remembers.


@pytest.mark.parametrize(
    ("active", "total", "calls"),
    [
        ((0.0, 0.5), 10, [0, 1, 2, 3, 4]),
        ((0.7, 1.0), 10, [7, 8, 9, 10, 11]),
        ((0.25, 0.75), 8, [2, 3, 4, 5]),
        ((0, math.inf), 3, list(range(12))),
    ],
)
def test_shares_of_a_training(active, total, calls):
    model, (x, y) = any_models.mlp().double(), data()
    penalty = trace(weight=0.1, active=active, total_steps=total)
    found = [bool(penalty(model, x, y).detach() != 0) for _ in range(12)]
    assert [call for call, applied in enumerate(found) if applied] == calls


def test_a_report_says_what_was_done():
    model, (x, y) = any_models.mlp().double(), data()
    penalty = trace(weight=0.02, every=2)
    assert math.isnan(penalty.report().ratio)
    assert penalty.report().applied == 0
    assert "no call in training mode" in str(penalty.report())
    for _ in range(5):
        penalty.loss(model, x, y)
    found = penalty.report()
    loss = float(CROSS_ENTROPY(model(x), y).detach())
    quantity = float(penalty.measure(model, x, y).detach())
    pure = trace(weight=1.0, limit=None)
    parameters = list(model.parameters())
    g = length(grad(CROSS_ENTROPY(model(x), y), parameters))
    h = length(grad(pure(model, x, y), parameters))
    assert found.loss == pytest.approx(loss)
    assert found.quantity == pytest.approx(quantity)
    assert found.penalty == pytest.approx(0.02 * quantity)
    assert found.applied == 3
    assert found.loss_gradient == pytest.approx(g)
    assert found.quantity_gradient == pytest.approx(h)
    assert found.ratio == found.largest_ratio == pytest.approx(2 * 0.02 * h / g)
    assert found.limited == float(2 * 0.02 * h > 0.5 * g)
    assert "of 3 calls" in str(found)


def test_one_warning_says_that_the_limit_acts_most_of_the_time():
    model, (x, y) = any_models.mlp().double(), data()
    penalty = trace(weight=100.0, every=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(120):
            penalty.loss(model, x, y)
    (warning,) = caught
    assert "has acted in more than half of 50 calls" in str(warning.message)
    calm = trace(strength=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(120):
            calm.loss(model, x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_continues_bit_for_bit(kind):
    def made(generator):
        return kind(CROSS_ENTROPY, strength=0.3, samples=3, generator=generator)

    first, second = resumed(made, steps=5)
    close(list(first[0].parameters()), list(second[0].parameters()), rtol=0, atol=0)
    assert first[1].report() == second[1].report()


def test_states_of_before_there_were_limits_still_load():
    penalty = trace(weight=0.1)
    penalty.load_state_dict({"_extra_state": {"calls": 4}})
    assert penalty.calls == 4


def test_in_evaluation_mode_a_strength_is_the_weight_that_was_found():
    model, (x, y) = any_models.mlp().double(), data()
    penalty = trace(strength=0.2)
    with pytest.raises(RuntimeError, match="no call in it yet"):
        penalty.eval()(model, x, y)
    penalty.train().loss(model, x, y)
    expected = penalty.report().weight * penalty.measure(model, x, y)
    torch.testing.assert_close(penalty.eval()(model, x, y), expected)
    with torch.no_grad():
        torch.testing.assert_close(penalty.train()(model, x, y), expected.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_in_half_precision_gradients_that_overflow_do_not_stop_a_training(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(64, 4)
    y, criterion = 5 * x[:, :1], nn.MSELoss(reduction="sum")
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=2e-4), torch.amp.GradScaler("cpu")
    more = {} if kind is lowland.LambdaMax else {"method": "probes"}
    penalty = kind(criterion, strength=0.1, **more)
    before = criterion(model(x), y).item()
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            total = penalty.loss(model, x, y)
        assert total.isfinite()
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
    assert criterion(model(x), y).item() < 0.8 * before
    assert penalty.report().weight > 0
    assert penalty._balance.scale < 1024


def test_settings_may_change_and_are_looked_at():
    model, (x, y) = any_models.mlp().double(), data()
    penalty = trace(weight=0.1, limit=1e9)
    penalty.weight = 0.2
    assert penalty(model, x, y).item() == pytest.approx(0.2 * penalty.measure(model, x, y).item())
    penalty.active = (5, 9)
    assert penalty(model, x, y) == 0
    with pytest.raises(ValueError, match="weight must be a finite number of at least 0; got -1"):
        penalty.weight = -1
    with pytest.raises(ValueError, match="every must be a whole number"):
        penalty.every = 0
    with pytest.raises(TypeError, match=r"takes a weight=.*or a strength="):
        penalty.strength = 0.1
    assert penalty.weight == 0.2


def test_nothing_can_be_added_to_any_loss():
    class Empty(nn.Module):
        def forward(self, x):
            return x

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.number = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
            self.inner = nn.Linear(4, 2)

    for model in (Empty(), Counted(), nn.LazyLinear(2)):
        penalty = trace(weight=0.1, active=(3, 9))
        assert penalty(model, *data()) == 0


@pytest.mark.parametrize(
    ("given_", "error", "words"),
    [
        ({}, TypeError, "takes a weight=.*or a strength="),
        ({"weight": 1.0, "strength": 1.0}, TypeError, "takes a weight=.*or a strength="),
        ({"strength": 0}, ValueError, "strength must be a finite number above 0; got 0"),
        ({"strength": "a"}, TypeError, "strength must be a finite number above 0; got 'a'"),
        ({"weight": 1, "limit": 0}, ValueError, "limit must be a finite number above 0; got 0"),
        ({"weight": 1, "limit": math.inf}, ValueError, "limit must be a finite number above 0"),
        ({"weight": torch.tensor([0.1])}, TypeError, "weight must be a finite number"),
        ({"weight": True}, TypeError, "weight must be a finite number"),
        ({"weight": 1, "samples": True}, TypeError, "samples must be a number of samples"),
        ({"weight": 1, "samples": 0}, ValueError, "samples must be a whole number of samples"),
        ({"weight": 1, "samples": 1.5}, ValueError, "samples must be a whole number of samples"),
        ({"weight": 1, "samples": "a"}, TypeError, "samples must be a number of samples"),
        ({"weight": 1, "total_steps": 0}, ValueError, "total_steps must be a whole number"),
        ({"weight": 1, "active": (0.5, 2), "total_steps": 9}, ValueError, "a pair of shares"),
        ({"weight": 1, "active": (2, 1)}, ValueError, "active must be"),
        ({"weight": 1, "active": ("a", 1)}, ValueError, "active must be"),
    ],
)
@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_make_no_sense(kind, given_, error, words):
    with pytest.raises(error, match=words):
        kind(CROSS_ENTROPY, **given_)


def test_settings_are_shown():
    shown = repr(lowland.HSR(CROSS_ENTROPY, strength=0.1, limit=None, samples=0.25))
    assert "strength=0.1" in shown
    assert "limit=None" in shown
    assert "samples=0.25" in shown
    assert "weight" not in shown

"""SAM at less than two gradients a step: by momentum, every so many-th, in some steps only."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowland

BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9}),
    "Nesterov": (torch.optim.SGD, {"lr": 0.2, "momentum": 0.8, "nesterov": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
}


def problem(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x, y = torch.randn(30, 4).double(), torch.rand(30, 1).double().round()
    return model, lambda model=model: nn.BCEWithLogitsLoss()(model(x), y)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def counted(model, loss_of, optimizer):
    """A closure, and where the weights were in each of its calls."""
    calls = []

    def closure():
        optimizer.zero_grad()
        calls.append(flat(model))
        loss = loss_of(model)
        loss.backward()
        return loss

    return closure, calls


def sizes(w, eta):
    return torch.ones_like(w) if eta is None else w.abs() + eta


class Reference:
    """Both papers' updates on the flat vector of parameters, with optimizers written out."""

    def __init__(self, model, loss_of, base):
        self.parameters, self.loss_of = list(model.parameters()), lambda: loss_of(model)
        self.w, self.base, self.steps = flat(model), base, 0
        self.v, self.second = torch.zeros_like(self.w), torch.zeros_like(self.w)

    def gradient(self, w):
        nn.utils.vector_to_parameters(w.clone(), self.parameters)
        grads = torch.autograd.grad(self.loss_of(), self.parameters)
        nn.utils.vector_to_parameters(self.w.clone(), self.parameters)
        return torch.cat([part.flatten() for part in grads])

    def descend(self, g):
        kind, settings = BASES[self.base]
        self.steps += 1
        if kind is torch.optim.SGD:
            self.v = settings["momentum"] * self.v + g
            nesterov = settings.get("nesterov", False)
            self.w = self.w - settings["lr"] * (
                g + settings["momentum"] * self.v if nesterov else self.v
            )
        else:
            self.w = self.w * (1 - settings["lr"] * settings["weight_decay"])
            self.v = 0.9 * self.v + 0.1 * g
            self.second = 0.999 * self.second + 0.001 * g**2
            root = (self.second / (1 - 0.999**self.steps)).sqrt() + 1e-8
            self.w = self.w - settings["lr"] * self.v / (1 - 0.9**self.steps) / root
        nn.utils.vector_to_parameters(self.w.clone(), self.parameters)

    def momentum_step(self, rho, eta=None):
        t = sizes(self.w, eta)
        length = (t * self.v).norm()
        self.descend(self.gradient(self.w - (rho * t**2 * self.v / length if length else 0)))

    def look_step(self, rho, every, reuse, eta=None):
        g = self.gradient(self.w)
        if self.steps % every == 0:
            t = sizes(self.w, eta)
            s = self.gradient(self.w + rho * t**2 * g / (t * g).norm())
            cosine = (s @ g) / (s.norm() * g.norm())
            self.g_v = s - s.norm() * cosine * g / g.norm()
            self.descend(s)
        else:
            self.descend(g + reuse * g.norm() / self.g_v.norm() * self.g_v)


def paper_kept_perturbed(model, loss_of, steps, rho, lr, mu):
    """Algorithm 1 of the momentum paper as it stands, whose weights stay perturbed in between."""
    parameters = list(model.parameters())
    perturbed, v, unit = flat(model), torch.zeros_like(flat(model)), 0
    for _ in range(steps):
        nn.utils.vector_to_parameters(perturbed.clone(), parameters)
        g = torch.cat([part.flatten() for part in torch.autograd.grad(loss_of(model), parameters)])
        w = perturbed + rho * unit
        v = mu * v + g
        w = w - lr * v
        unit = v / v.norm()
        perturbed = w - rho * unit
    return w


def drive(way, optimizer, closure, backward, parts=2):
    """One step in each of the ways in which one can be made."""
    if way == "closure":
        optimizer.step(closure)
    elif way == "two calls":
        if optimizer.gradients == 2:
            backward()
        optimizer.first_step(zero_grad=True)
        backward()
        optimizer.second_step(zero_grad=True)
    elif way == "two passes always":
        backward()
        optimizer.first_step(zero_grad=True)
        backward()
        optimizer.second_step(zero_grad=True)
    elif way == "accumulate":
        optimizer.accumulate(backward)
        optimizer.step()
        optimizer.zero_grad()
    elif way == "trainer":  # as Lightning does by the recipe
        optimizer.step(lambda: optimizer.accumulate(closure))
    elif way == "micro-batches":  # equal ones, so that the mean is the whole
        optimizer.step(lambda _: backward(), micro_batches=parts)
    else:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        drive_scaled(way, optimizer, lambda: backward(scaler), scaler)
        scaler.update()


def drive_scaled(way, optimizer, backward, scaler):
    if way == "scaler":
        optimizer.step(lambda: (optimizer.zero_grad(), backward()), scaler=scaler)
    elif way == "scaler in two calls":
        if optimizer.gradients == 2:
            backward()
        optimizer.first_step(zero_grad=True, scaler=scaler)
        backward()
        scaler.unscale_(optimizer)
        optimizer.second_step(zero_grad=True, scaler=scaler)
    else:  # a trainer's
        optimizer.accumulate(backward)
        scaler.step(optimizer)
        optimizer.zero_grad()


WAYS = [
    *("closure", "two calls", "two passes always", "accumulate", "trainer", "micro-batches"),
    *("scaler", "scaler in two calls", "trainer's scaler"),
]


def sam_of(model, base, /, **settings):
    kind, of_base = BASES[base]
    return lowland.SAM(model.parameters(), kind, **settings, **of_base)


def both_of(model, loss_of, optimizer):
    def backward(scaler=None):
        loss = loss_of(model)
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    return counted(model, loss_of, optimizer)[0], backward


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_a_step_by_momentum_is_the_published_update(base, adaptive, way):
    model, loss_of = problem()
    reference = Reference(copy.deepcopy(model), loss_of, base)
    sam = sam_of(model, base, rho=0.3, adaptive=adaptive, perturb="momentum")
    closure, backward = both_of(model, loss_of, sam)
    for _ in range(5):
        drive(way, sam, closure, backward)
        reference.momentum_step(0.3, 0.01 if adaptive else None)
        torch.testing.assert_close(flat(model), reference.w, rtol=1e-9, atol=1e-11)


def test_weights_between_steps_are_those_of_the_algorithm_that_keeps_them_perturbed():
    model, loss_of = problem()
    other = copy.deepcopy(model)
    sam = sam_of(model, "SGD", rho=0.5, perturb="momentum")
    closure, calls = counted(model, loss_of, sam)
    for _ in range(7):
        before = flat(model)
        sam.step(closure)
        if len(calls) > 1:
            torch.testing.assert_close((calls[-1] - before).norm().item(), 0.5)
    assert len(calls) == 7
    expected = paper_kept_perturbed(other, loss_of, 7, rho=0.5, lr=0.3, mu=0.9)
    torch.testing.assert_close(flat(model), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_a_step_that_looks_every_third_time_is_the_published_update(base, adaptive, way):
    model, loss_of = problem()
    reference = Reference(copy.deepcopy(model), loss_of, base)
    sam = sam_of(model, base, rho=0.3, adaptive=adaptive, every=3, reuse=0.6)
    closure, backward = both_of(model, loss_of, sam)
    for step in range(8):
        assert sam.gradients == (1 if step % 3 else 2)
        drive(way, sam, closure, backward)
        reference.look_step(0.3, 3, 0.6, 0.01 if adaptive else None)
        torch.testing.assert_close(flat(model), reference.w, rtol=1e-8, atol=1e-10)


@given(st.integers(1, 5), st.floats(0, 2), st.floats(1e-3, 0.5), st.floats(-12, 12))
def test_what_is_reused_does_not_depend_on_the_loss_s_scale(every, reuse, rho, exponent):
    model, loss_of = problem()
    other = copy.deepcopy(model)
    scale = 10.0**exponent
    for each, factor in ((model, 1.0), (other, scale)):
        sam = lowland.SAM(
            each.parameters(), torch.optim.SGD, rho, every=every, reuse=reuse, lr=0.1 / factor
        )
        for _ in range(4):
            sam.step(counted(each, lambda model, factor=factor: factor * loss_of(model), sam)[0])
    torch.testing.assert_close(flat(other), flat(model), rtol=1e-7, atol=1e-9)


def test_where_both_gradients_are_parallel_nothing_is_reused():
    # One number has no direction beside its own, and that of roundings is none.
    p, q = (nn.Parameter(torch.full((1,), 1.7)) for _ in range(2))
    sam = lowland.SAM([p], torch.optim.SGD, 0.3, every=4, lr=0.1)
    plain = torch.optim.SGD([q], lr=0.1)
    for step in range(4):
        if step == 0:
            q.data.add_(0.3 * q.grad.sign() if q.grad is not None else 0)
        sam.step(lambda: (sam.zero_grad(), p.exp().sum().backward()))
        if step == 0:
            q.data.copy_(p.data)
        else:
            plain.zero_grad()
            q.exp().sum().backward()
            plain.step()
    assert torch.equal(p, q)


# In some steps only


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 1, 1, 1, 2, 2, 2, 1, 1, 1]),
        ({"every": 2}, [1, 1, 1, 1, 2, 1, 2, 1, 1, 1]),
        ({"perturb": "momentum"}, [1] * 10),
    ],
)
@pytest.mark.parametrize("shares", [False, True])
def test_outside_of_some_steps_it_is_the_base_optimizer(settings, expected, shares):
    when = {"active": (0.4, 0.7), "total_steps": 10} if shares else {"active": (4, 7)}
    model, loss_of = problem()
    plain = copy.deepcopy(model)
    sam = sam_of(model, "AdamW", rho=0.3, **when, **settings)
    optimizer = torch.optim.AdamW(plain.parameters(), **BASES["AdamW"][1])
    closure, calls = counted(model, loss_of, sam)
    counts = []
    for step in range(10):
        before = len(calls)
        sam.step(closure)
        counts.append(len(calls) - before)
        optimizer.step(counted(plain, loss_of, optimizer)[0])
        assert torch.equal(flat(model), flat(plain)) == (step < 4)
    assert counts == expected
    # From there on, too: a fresh base optimizer with this state makes the same steps.
    plain.load_state_dict(model.state_dict())
    optimizer.load_state_dict(copy.deepcopy(sam.state_dict()))
    for _ in range(2):
        sam.step(closure)
        optimizer.step(counted(plain, loss_of, optimizer)[0])
    assert torch.equal(flat(model), flat(plain))


def test_a_share_of_one_has_no_end():
    model, loss_of = problem()
    sam = sam_of(model, "SGD", active=(0.5, 1.0), total_steps=4)
    counts = []
    for _ in range(6):
        counts.append(sam.gradients)
        sam.step(counted(model, loss_of, sam)[0])
    assert counts == [1, 1, 2, 2, 2, 2]


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perturb": "velocity"}, "'gradient' or 'momentum'"),
        ({"every": 0}, "every must be a whole number"),
        ({"every": 2.0}, "every must be a whole number"),
        ({"reuse": -1.0}, "reuse must be a finite number"),
        ({"reuse": math.inf}, "reuse must be a finite number"),
        ({"perturb": "momentum", "every": 2}, "leave one of the two out"),
        ({"perturb": "momentum", "measure": True}, "leave one of the two out"),
        ({"perturb": "momentum", "momentum": 0.0}, "has none: use torch.optim.SGD with"),
        ({"active": (3, 3)}, "0 <= start < stop"),
        ({"active": 3}, "0 <= start < stop"),
        ({"active": (-1, 3)}, "0 <= start < stop"),
        ({"active": (0.5, 1.0)}, "give total_steps= too"),
        ({"active": (0.0, 1.0)}, "give total_steps= too"),
        ({"active": (5, 9), "total_steps": 10}, "shares of it"),
        ({"active": (0.5, 0.501), "total_steps": 10}, "no step of 10"),
        ({"total_steps": 0}, "total_steps must be"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        lowland.SAM(
            [nn.Parameter(torch.ones(1))],
            torch.optim.SGD,
            **{"lr": 0.1, "momentum": 0.9} | settings,
        )


def test_a_base_optimizer_with_a_setting_of_the_same_name_is_refused():
    with pytest.raises(TypeError, match="Adadelta and SAM both have a setting 'rho'"):
        lowland.SAM([nn.Parameter(torch.ones(1))], torch.optim.Adadelta)


@pytest.mark.parametrize("kind", ["Adagrad", "Adafactor", "Rprop", "RMSprop", "ASGD"])
def test_base_optimizers_without_momentum_are_refused(kind):
    with pytest.raises(ValueError, match=f"{kind} as set has none"):
        lowland.SAM(
            [nn.Parameter(torch.ones(1, 1))], getattr(torch.optim, kind), perturb="momentum"
        )


@pytest.mark.parametrize("kind", ["Adam", "NAdam", "RAdam", "Adamax", "RMSprop"])
def test_momentum_of_any_optimizer_is_found(kind):
    model, loss_of = problem()
    more = {"momentum": 0.9} if kind == "RMSprop" else {}
    sam = lowland.SAM(
        model.parameters(), getattr(torch.optim, kind), 0.4, perturb="momentum", lr=0.01, **more
    )
    closure, calls = counted(model, loss_of, sam)
    sam.step(closure)
    before = flat(model)
    sam.step(closure)
    torch.testing.assert_close((calls[-1] - before).norm().item(), 0.4)


def test_momentum_under_another_name_is_said_to_be_missing():
    class Other(torch.optim.Optimizer):
        def __init__(self, params, lr=0.1, momentum=0.9):
            super().__init__(params, {"lr": lr, "momentum": momentum})

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p]["m"] = p.grad

    model, loss_of = problem()
    sam = lowland.SAM(model.parameters(), Other, perturb="momentum")
    closure, _ = counted(model, loss_of, sam)
    sam.step(closure)
    before = flat(model)
    with pytest.raises(RuntimeError, match="needs the momentum that Other keeps"):
        sam.step(closure)
    assert torch.equal(flat(model), before)


# What goes on from where it was


SETTINGS = {
    "momentum": {"perturb": "momentum"},
    "look": {"every": 3},
    "late": {"active": (4, 6)},
    "all": {"every": 2, "active": (0.3, 0.9), "total_steps": 10, "adaptive": True},
}


@pytest.mark.parametrize("how", ["state", "copy", "pickle"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("after", [1, 5])
def test_training_goes_on_bit_for_bit(base, settings, how, after, tmp_path):
    model, loss_of = problem()
    sam = sam_of(model, base, rho=0.3, **SETTINGS[settings])
    for _ in range(after):
        sam.step(counted(model, loss_of, sam)[0])
    if how == "state":
        torch.save((model.state_dict(), sam.state_dict()), tmp_path / "state.pt")
        weights, state = torch.load(tmp_path / "state.pt")
        other = problem(1)[0]
        other.load_state_dict(weights)
        restored = sam_of(other, base, rho=9.0, **SETTINGS[settings])
        restored.load_state_dict(state)
    elif how == "copy":
        other, restored = copy.deepcopy((model, sam))
    else:
        other, restored = pickle.loads(pickle.dumps((model, sam)))  # noqa: S301
    for _ in range(5):
        sam.step(counted(model, loss_of, sam)[0])
        restored.step(counted(other, loss_of, restored)[0])
        assert torch.equal(flat(model), flat(other))
    assert restored.gradients == sam.gradients


def test_a_loaded_state_is_no_longer_the_one_that_was_loaded():
    model, loss_of = problem()
    sam = sam_of(model, "AdamW", every=2)
    sam.step(counted(model, loss_of, sam)[0])
    state = sam.state_dict()
    kept = copy.deepcopy(state)
    sam.load_state_dict(state)
    for _ in range(3):
        sam.step(counted(model, loss_of, sam)[0])
    assert kept["state"][0]["orthogonal"].norm() > 0
    torch.testing.assert_close(state["state"][0]["orthogonal"], kept["state"][0]["orthogonal"])


def test_with_the_base_optimizer_s_state_it_looks_at_once():
    model, loss_of = problem()
    plain = torch.optim.AdamW(model.parameters(), lr=0.05)
    plain.step(counted(model, loss_of, plain)[0])
    sam = sam_of(model, "AdamW", every=3)
    sam.step(counted(model, loss_of, sam)[0])
    assert sam.gradients == 1
    sam.load_state_dict(plain.state_dict())
    assert sam.gradients == 2


# What is refused, and what is left as it was


def test_accumulating_without_it_is_refused_by_momentum_too():
    model, loss_of = problem()
    sam = sam_of(model, "SGD", perturb="momentum")
    sam.step(counted(model, loss_of, sam)[0])
    sam.zero_grad()
    before = flat(model)
    loss_of(model).backward()  # as of a first micro-batch, at the weights
    with pytest.raises(RuntimeError, match=r"go backward in accumulate\(closure\)"):
        sam.step(lambda: loss_of(model).backward())
    with pytest.raises(RuntimeError, match="one at another place than the weights"):
        sam.step()
    with pytest.raises(RuntimeError, match="one at another place than the weights"):
        sam.step(lambda: None)
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        sam.step(lambda: (sam.zero_grad(), loss_of(model).backward(), sam.zero_grad()))
    assert torch.equal(flat(model), before)


def test_gradients_that_a_replayed_graph_writes_are_taken_by_momentum_too():
    model, loss_of = problem()
    reference = Reference(copy.deepcopy(model), loss_of, "SGD")
    sam = sam_of(model, "SGD", rho=0.3, perturb="momentum")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def closure():
        parameters = list(model.parameters())
        for p, part in zip(
            parameters, torch.autograd.grad(loss_of(model), parameters), strict=True
        ):
            p.grad.data.copy_(part)

    for _ in range(3):
        sam.step(closure)
        reference.momentum_step(0.3)
    torch.testing.assert_close(flat(model), reference.w, rtol=1e-9, atol=1e-11)


def test_an_error_in_the_closure_leaves_the_weights():
    model, loss_of = problem()
    sam = sam_of(model, "SGD", rho=0.5, perturb="momentum")
    closure, calls = counted(model, loss_of, sam)
    sam.step(closure)
    before = flat(model)
    with pytest.raises(ZeroDivisionError):
        sam.step(lambda: (closure(), 1 / 0))
    assert not torch.equal(calls[-1], before)
    assert torch.equal(flat(model), before)
    sam.first_step()
    with pytest.raises(RuntimeError, match="where first_step"):
        sam.step(closure)
    assert not torch.equal(flat(model), before)


@pytest.mark.parametrize("settings", [{"perturb": "momentum"}, {"every": 2}])
@pytest.mark.parametrize("way", ["scaler", "scaler in two calls", "trainer's scaler"])
def test_an_overflow_leaves_everything_where_it_was(settings, way):
    model, loss_of = problem()
    sam = sam_of(model, "SGD", rho=0.3, **settings)
    for _ in range(2 if "every" in settings else 1):
        sam.step(counted(model, loss_of, sam)[0])
    before, state = flat(model), copy.deepcopy(sam.state_dict())

    def backward(scaler):
        scaler.scale(math.inf * loss_of(model)).backward()

    sam.zero_grad()
    drive(way, sam, None, backward)
    assert torch.equal(flat(model), before)
    torch.testing.assert_close(sam.state_dict(), state, rtol=0, atol=0)


def test_sparse_gradients_are_refused_where_a_vector_is_kept_and_are_fine_by_momentum():
    layer = nn.Embedding(5, 2, sparse=True)
    with pytest.raises(lowland.UnsupportedModelError, match="use every=1, or layers with sparse"):
        lowland.SAM(layer.parameters(), torch.optim.SGD, every=2, lr=0.1).step(
            lambda: layer(torch.tensor([1, 3])).square().sum().backward()
        )
    results = []
    for sparse in (False, True):
        torch.manual_seed(0)
        layer = nn.Embedding(5, 2, sparse=sparse)
        sam = lowland.SAM(
            layer.parameters(), torch.optim.SGD, 0.3, perturb="momentum", lr=0.1, momentum=0.9
        )
        for _ in range(3):
            sam.zero_grad()
            sam.step(lambda layer=layer: layer(torch.tensor([1, 3])).square().sum().backward())
        results.append(flat(layer))
    torch.testing.assert_close(*results)


def test_groups_have_radii_of_their_own_by_momentum_too():
    model, loss_of = problem()
    groups = [{"params": model[0].parameters(), "rho": 0.0}, {"params": model[2].parameters()}]
    sam = lowland.SAM(groups, torch.optim.SGD, 0.5, perturb="momentum", lr=0.1, momentum=0.9)
    closure, calls = counted(model, loss_of, sam)
    sam.step(closure)
    before = flat(model)
    sam.step(closure)
    moved = calls[-1] - before
    assert moved[:30].norm() == 0
    assert 0 < moved[30:].norm() < 0.5


def test_a_frozen_layer_stays_though_it_has_momentum():
    model, loss_of = problem()
    sam = sam_of(model, "SGD", rho=0.5, perturb="momentum")
    closure, calls = counted(model, loss_of, sam)
    sam.step(closure)
    model[0].requires_grad_(requires_grad=False)
    sam.step(closure)
    assert torch.equal(calls[-1][:30], flat(model)[:30])


def test_running_statistics_see_each_batch_once_in_every_kind_of_step():
    for settings in ({"perturb": "momentum"}, {"every": 2}, {"active": (1, 2)}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).double()
        x = torch.randn(30, 4).double()
        sam = sam_of(model, "SGD", model=model, **settings)
        for _ in range(4):
            sam.step(counted(model, lambda model, x=x: model(x).square().mean(), sam)[0])
        assert model[1].num_batches_tracked == 4


def test_no_kind_of_step_waits_for_the_device():
    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            assert operation is not torch.ops.aten._local_scalar_dense.default
            return operation(*args, **(kwargs or {}))

    for settings in ({"perturb": "momentum"}, {"every": 2, "measure": True}, {"active": (1, 2)}):
        model, loss_of = problem()
        sam = sam_of(model, "SGD", **settings)
        with NoWaiting():
            for _ in range(3):
                sam.step(counted(model, loss_of, sam)[0])


# The curvature along the way


def quotient(model, loss_of, way):
    """By brute force: of the Hessian's mean along the way."""
    parameters = dict(model.named_parameters())

    def loss(w):
        parts = w.split([p.numel() for p in parameters.values()])
        there = {n: part.view_as(p) for part, (n, p) in zip(parts, parameters.items(), strict=True)}
        return loss_of(lambda x: torch.func.functional_call(model, there, x))

    nodes, weights = (
        torch.tensor([-1.0, 0.0, 1.0]).double() * math.sqrt(0.6),
        [5 / 18, 8 / 18, 5 / 18],
    )
    hessian = sum(
        weight * torch.func.hessian(loss)(flat(model) + (1 + node) / 2 * way)
        for node, weight in zip(nodes, weights, strict=True)
    )
    return way @ hessian @ way / way.square().sum()


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("way", ["closure", "accumulate", "trainer", "micro-batches", "scaler"])
@pytest.mark.parametrize("every", [1, 2])
def test_the_curvature_is_the_hessian_s_along_the_way(adaptive, way, every):
    model, loss_of = problem()
    sam = sam_of(model, "SGD", rho=0.05, adaptive=adaptive, measure=True, every=every)
    closure, backward = both_of(model, loss_of, sam)
    assert sam.curvature is None
    for step in range(3):
        before, where = copy.deepcopy(model), []
        handle = model.register_forward_pre_hook(lambda *_, where=where: where.append(flat(model)))
        drive(way, sam, closure, backward)
        handle.remove()
        if step % every:
            assert sam.curvature is None
        else:
            expected = quotient(before, loss_of, where[1] - where[0])
            factor = 1
            torch.testing.assert_close(sam.curvature, factor * expected, rtol=1e-5, atol=1e-9)


def test_the_curvature_of_scaled_micro_batches_is_that_of_the_loss():
    model, loss_of = problem()
    results = []
    for scale in (None, 1.0, 4096.0):
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        other = copy.deepcopy(model)
        sam = sam_of(other, "SGD", measure=True, scaler=scaler)

        def backward(other=other, scaler=scaler):
            loss = loss_of(other) / 2
            (loss if scaler is None else scaler.scale(loss)).backward()

        for _ in range(2):
            sam.accumulate(backward)
        sam.step() if scaler is None else scaler.step(sam)
        results.append(sam.curvature)
        sam.zero_grad()
        sam.step(lambda _, backward=backward: backward(), micro_batches=2)
        results.append(2 * sam.curvature)
    for first, second in (results[:2], results[2:4], results[4:]):
        torch.testing.assert_close(first, results[0], rtol=1e-9, atol=0)
        torch.testing.assert_close(second, results[1], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "way", ["two calls", "clipped", "clipped at last", "trainer's scaler", "overflow"]
)
def test_a_curvature_that_cannot_be_known_is_not_given(way):
    model, loss_of = problem()
    sam = sam_of(model, "SGD", measure=True)
    closure, backward = both_of(model, loss_of, sam)
    sam.step(closure)
    assert sam.curvature is not None
    sam.zero_grad()
    if way == "clipped":
        sam.step(lambda: (closure(), nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
    elif way == "clipped at last":
        lengths = iter([math.inf, 0.1])

        def clipping():
            closure()
            if (length := next(lengths)) < math.inf:
                nn.utils.clip_grad_norm_(model.parameters(), length)

        sam.step(clipping)
    elif way == "overflow":
        drive(
            "scaler", sam, None, lambda scaler: scaler.scale(math.inf * loss_of(model)).backward()
        )
    else:
        drive(way, sam, closure, backward)
    assert sam.curvature.isnan() if way == "trainer's scaler" else sam.curvature is None
    sam.zero_grad()
    sam.step(closure)
    assert sam.curvature is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_curvature_of_a_quadratic_is_known_in_lower_precision(dtype):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(300).to(dtype))
    eigenvalues = torch.linspace(1, 3, 300).to(dtype)
    sam = lowland.SAM([p], torch.optim.SGD, 1.0, measure=True, lr=0.1)
    sam.step(lambda: (sam.zero_grad(), (eigenvalues * p.square() / 2).sum().backward()))
    assert sam.curvature.dtype == torch.float32
    assert 1 < sam.curvature < 3

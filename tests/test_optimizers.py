import copy
import pickle
from contextlib import nullcontext
from functools import partial

import parallel_training
import pytest
import torch
import two_processes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lowland
from lowland.passes import frozen_statistics, remember_randomness


def problem(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x, y = torch.randn(30, 4).double(), torch.rand(30, 1).double().round()
    return model, lambda model=model: nn.BCEWithLogitsLoss()(model(x), y)


def closure_of(model, loss_of, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return closure


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def published_step(model, loss_of, *, rho, adaptive, eta, lr):
    """The update as its formula stands, on the flat parameter vector, with plain SGD."""
    parameters = list(model.parameters())

    def gradient():
        grads = torch.autograd.grad(loss_of(), parameters)
        return torch.cat([part.flatten() for part in grads])

    def assign(vector):
        nn.utils.vector_to_parameters(vector, parameters)

    w, g = flat(model), gradient()
    t = w.abs() + eta if adaptive else torch.ones_like(w)
    assign(w + rho * t.square() * g / (t * g).norm())
    assign(w - lr * gradient())


@given(
    st.floats(0.001, 0.5), st.booleans(), st.floats(0, 0.1), st.floats(0.01, 1), st.integers(0, 99)
)
def test_a_step_is_the_published_update(rho, adaptive, eta, lr, seed):
    model, loss_of = problem(seed)
    plain = copy.deepcopy(model)
    optimizer = lowland.SAM(
        model.parameters(), torch.optim.SGD, rho, adaptive=adaptive, eta=eta, lr=lr
    )
    for _ in range(3):
        optimizer.step(closure_of(model, loss_of, optimizer))
        published_step(plain, lambda: loss_of(plain), rho=rho, adaptive=adaptive, eta=eta, lr=lr)
    torch.testing.assert_close(flat(model), flat(plain), rtol=1e-10, atol=1e-12)


def test_step_returns_the_loss_at_the_weights():
    model, loss_of = problem()
    optimizer = lowland.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    expected = loss_of().item()
    assert optimizer.step(closure_of(model, loss_of, optimizer)).item() == expected


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_radius_zero_is_the_base_optimizer(base):
    model, loss_of = problem()
    plain = copy.deepcopy(model)
    sam = lowland.SAM(model.parameters(), base, rho=0.0, lr=0.05)
    optimizer = base(plain.parameters(), lr=0.05)
    for _ in range(5):
        sam.step(closure_of(model, loss_of, sam))
        optimizer.step(closure_of(plain, lambda: loss_of(plain), optimizer))
    torch.testing.assert_close(flat(model), flat(plain), rtol=0, atol=0)


def test_two_calls_are_the_closure():
    model, loss_of = problem()
    other = copy.deepcopy(model)
    sam = lowland.SAM(model.parameters(), torch.optim.Adam, lr=0.05)
    split = lowland.SAM(other.parameters(), torch.optim.Adam, lr=0.05)
    for _ in range(4):
        sam.step(closure_of(model, loss_of, sam))
        loss_of(other).backward()
        split.first_step(zero_grad=True)
        loss_of(other).backward()
        split.second_step(zero_grad=True)
    assert torch.equal(flat(model), flat(other))
    assert all(p.grad is None for p in other.parameters())


def test_state_goes_through_a_checkpoint_and_training_continues_bit_for_bit():
    model, loss_of = problem()
    sam = lowland.SAM(model.parameters(), torch.optim.Adam, rho=0.1, adaptive=True, lr=0.05)
    for _ in range(3):
        sam.step(closure_of(model, loss_of, sam))
    other = copy.deepcopy(model)
    restored = lowland.SAM(other.parameters(), torch.optim.Adam, rho=0.7, lr=9.0)
    restored.load_state_dict(copy.deepcopy(sam.state_dict()))
    for _ in range(3):
        sam.step(closure_of(model, loss_of, sam))
        restored.step(closure_of(other, lambda: loss_of(other), restored))
    assert torch.equal(flat(model), flat(other))


def test_a_copy_goes_on_by_itself():
    model, loss_of = problem()
    sam = lowland.SAM(model.parameters(), torch.optim.Adam, lr=0.05)
    sam.step(closure_of(model, loss_of, sam))
    other, copied = copy.deepcopy((model, sam))
    sam.step(closure_of(model, loss_of, sam))
    copied.step(closure_of(other, lambda: loss_of(other), copied))
    assert torch.equal(flat(model), flat(other))


def test_groups_have_settings_of_their_own():
    model, loss_of = problem()
    first, last = model[0], model[2]
    sam = lowland.SAM(
        [{"params": first.parameters(), "rho": 0.0, "lr": 0.0}, {"params": last.parameters()}],
        torch.optim.SGD,
        rho=0.5,
        lr=0.1,
    )
    before, frozen = flat(last), flat(first)
    loss_of().backward()
    sam.first_step(zero_grad=True)
    assert torch.equal(flat(first), frozen)
    assert (flat(last) - before).norm() > 0.01
    loss_of().backward()
    sam.second_step()
    assert torch.equal(flat(first), frozen)


def test_a_group_added_later_gets_the_defaults_of_both():
    model, loss_of = problem()
    sam = lowland.SAM(model[0].parameters(), torch.optim.SGD, rho=0.2, lr=0.1, momentum=0.9)
    sam.add_param_group({"params": list(model[2].parameters())})
    assert sam.param_groups[1]["rho"] == 0.2
    assert sam.param_groups[1]["momentum"] == 0.9
    before = flat(model[2])
    sam.step(closure_of(model, loss_of, sam))
    assert not torch.equal(flat(model[2]), before)


def test_schedulers_reach_the_base_optimizer():
    model, loss_of = problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(sam, step_size=1, gamma=0.0)
    sam.step(closure_of(model, loss_of, sam))
    scheduler.step()
    before = flat(model)
    sam.step(closure_of(model, loss_of, sam))
    assert torch.equal(flat(model), before)


def test_parameters_without_gradient_stay():
    model, loss_of = problem()
    model[0].requires_grad_(requires_grad=False)
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before = flat(model[0])
    sam.step(closure_of(model, loss_of, sam))
    assert torch.equal(flat(model[0]), before)


def test_a_zero_gradient_moves_nothing():
    p = nn.Parameter(torch.ones(3))
    sam = lowland.SAM([p], torch.optim.SGD, lr=0.1)

    def closure():
        sam.zero_grad()
        loss = (0 * p).sum()
        loss.backward()
        return loss

    sam.step(closure)
    assert torch.equal(p.detach(), torch.ones(3))


@pytest.mark.parametrize("settings", [{"rho": -0.1}, {"rho": float("nan")}, {"eta": -1.0}])
def test_negative_settings_are_refused(settings):
    with pytest.raises(ValueError, match="must be a finite number of at least 0; got"):
        lowland.SAM([nn.Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1, **settings)


@pytest.mark.usefixtures("as_installed")
def test_an_optimizer_in_place_of_its_class_is_refused():
    p = nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match="must be a class such as"):
        lowland.SAM([p], torch.optim.SGD([p], lr=0.1), lr=0.1)


def test_an_optimizer_that_takes_gradients_of_its_own_is_refused():
    p = nn.Parameter(torch.ones(1))
    torch.optim.LBFGS([p])  # PyTorch wraps the step of a class that is in use
    with pytest.raises(
        TypeError, match=r"LBFGS calls a closure.*SGD or AdamW, or LBFGS with a pen"
    ):
        lowland.SAM([p], torch.optim.LBFGS, lr=0.1)


def test_steps_out_of_order_are_refused():
    p = nn.Parameter(torch.ones(1))
    sam = lowland.SAM([p], torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match="needs a first_step"):
        sam.second_step()
    with pytest.raises(RuntimeError, match=r"call backward\(\) before"):
        sam.first_step()
    with pytest.raises(RuntimeError, match="pass a closure"):
        sam.step()
    p.square().sum().backward()
    sam.first_step()
    for another in (sam.first_step, lambda: sam.step(p.sum), lambda: sam.accumulate(p.sum)):
        with pytest.raises(RuntimeError, match="where first_step"):
            another()


def test_a_scheduler_counts_steps_in_two_calls():
    model, loss_of = problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(sam, step_size=1, gamma=0.5)
    loss_of().backward()
    sam.first_step(zero_grad=True)
    loss_of().backward()
    sam.second_step()
    scheduler.step()  # warns where no step came before it, and warnings are errors
    assert sam.param_groups[0]["lr"] == 0.5


def test_the_first_step_leaves_the_gradients():
    model, loss_of = problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, adaptive=True, lr=0.1)
    loss_of().backward()
    before = [p.grad.clone() for p in model.parameters()]
    sam.first_step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_an_error_in_the_second_pass_leaves_the_weights():
    model, loss_of = problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    before, closure = flat(model), closure_of(model, loss_of, sam)
    calls = []

    def failing():
        calls.append(flat(model))
        return closure() if len(calls) == 1 else calls[2]

    with pytest.raises(IndexError):
        sam.step(failing)
    assert not torch.equal(calls[1], before)
    assert torch.equal(flat(model), before)
    sam.step(closure)
    assert not torch.equal(flat(model), before)


def test_a_model_may_change_its_type_between_steps():
    model, loss_of = problem()
    exact = flat(model) / 3  # beyond single precision
    model.float()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, lr=0.0)
    sam.step(closure_of(model, lambda: sum(p.square().sum() for p in model.parameters()), sam))
    nn.utils.vector_to_parameters(exact.clone(), model.double().parameters())
    sam.step(closure_of(model, loss_of, sam))
    assert torch.equal(flat(model), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_have_a_norm(dtype):
    p = nn.Parameter(torch.zeros(8000, dtype=dtype))
    sam = lowland.SAM([p], torch.optim.SGD, rho=100.0, lr=0.1)
    (1000 * p).sum().backward()  # their norm is 89,000, beyond float16
    sam.first_step()
    torch.testing.assert_close(p.detach().float().norm().item(), 100.0, rtol=1e-2, atol=0)


def test_a_step_never_waits_for_the_device():
    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            assert operation is not torch.ops.aten._local_scalar_dense.default
            return operation(*args, **(kwargs or {}))

    for adaptive in (False, True):
        model, loss_of = problem()
        sam = lowland.SAM(
            model.parameters(), torch.optim.SGD, adaptive=adaptive, lr=0.1, momentum=0.9
        )
        with NoWaiting():
            sam.step(closure_of(model, loss_of, sam), model=model)


@pytest.mark.gpu
def test_a_step_never_waits_for_the_accelerator():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Tanh(), nn.Linear(6, 1)).cuda()
    x = torch.randn(30, 4, device="cuda")
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    closure = closure_of(model, lambda: model(x).square().mean(), sam)
    sam.step(closure)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sam.step(closure, model=model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Mixed precision


def amp_problem(dtype=torch.float16, *, surrounded=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    x, y = torch.randn(30, 4), torch.rand(30, 1).round()

    def loss_of(model=model):
        with nullcontext() if surrounded else torch.autocast("cpu", dtype):
            return nn.BCEWithLogitsLoss()(model(x), y)

    return model, loss_of


def scaled(model, loss_of, optimizer, scaler, factors=(1.0, 1.0)):
    """A closure whose calls multiply the loss by one factor after the other."""
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of() * factors[len(calls) % len(factors)]
        calls.append(flat(model))
        scaler.scale(loss).backward()
        return loss

    return closure, calls


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_step_under_autocast_is_the_published_update(adaptive):
    model, loss_of = amp_problem(torch.bfloat16)
    plain = copy.deepcopy(model)
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.3, adaptive=adaptive, lr=0.5)
    for _ in range(3):
        sam.step(closure_of(model, loss_of, sam))
        published_step(plain, lambda: loss_of(plain), rho=0.3, adaptive=adaptive, eta=0.01, lr=0.5)
    torch.testing.assert_close(flat(model), flat(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_an_autocast_around_both_passes_sees_the_moved_weights(split):
    # It keeps half-precision copies of the weights, which moving them must drop.
    results = []
    for surrounded in (False, True):
        model, loss_of = amp_problem(torch.bfloat16, surrounded=surrounded)
        sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.5, lr=0.5)
        with torch.autocast("cpu", torch.bfloat16) if surrounded else nullcontext():
            for _ in range(2):
                if split:
                    loss_of().backward()
                    sam.first_step(zero_grad=True)
                    loss_of().backward()
                    sam.second_step(zero_grad=True)
                else:
                    sam.step(closure_of(model, loss_of, sam))
                with torch.no_grad():
                    loss_of()
        results.append(flat(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_scaler_changes_nothing_where_nothing_overflows(base, enabled):
    model, loss_of = problem()
    models = [model, copy.deepcopy(model), copy.deepcopy(model)]
    plain, closed, split = (lowland.SAM(m.parameters(), base, 0.2, lr=0.1) for m in models)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=enabled) for _ in range(2)]
    closure, _ = scaled(models[1], lambda: loss_of(models[1]), closed, scalers[0])
    for _ in range(3):
        plain.step(closure_of(model, loss_of, plain))
        closed.step(closure, scaler=scalers[0])
        scalers[1].scale(loss_of(models[2])).backward()
        split.first_step(scaler=scalers[1], zero_grad=True)
        scalers[1].scale(loss_of(models[2])).backward()
        split.second_step(scaler=scalers[1], zero_grad=True)
        for scaler in scalers:
            scaler.update()
    # Factors of two are exact.
    assert torch.equal(flat(models[0]), flat(models[1]))
    assert torch.equal(flat(models[0]), flat(models[2]))


def test_a_fused_base_optimizer_takes_the_scaler_too():
    model, loss_of = problem()
    other = copy.deepcopy(model)
    plain = lowland.SAM(model.parameters(), torch.optim.Adam, lr=0.1)
    fused = lowland.SAM(other.parameters(), torch.optim.Adam, lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    closure, _ = scaled(other, lambda: loss_of(other), fused, scaler)
    for _ in range(3):
        plain.step(closure_of(model, loss_of, plain))
        fused.step(closure, scaler=scaler)
        scaler.update()
    torch.testing.assert_close(flat(model), flat(other), rtol=1e-10, atol=1e-12)


def test_training_in_half_precision_follows_training_in_full():
    model, loss_of = amp_problem()
    plain, plain_loss = amp_problem(surrounded=True)
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.1, lr=0.5)
    full = lowland.SAM(plain.parameters(), torch.optim.SGD, 0.1, lr=0.5)
    scaler = torch.amp.GradScaler("cpu")
    closure, _ = scaled(model, loss_of, sam, scaler)
    for _ in range(20):
        sam.step(closure, scaler=scaler)
        scaler.update()
        full.step(closure_of(plain, plain_loss, full))
    torch.testing.assert_close(flat(model), flat(plain), rtol=0.05, atol=0.01)


INFINITE, UNDEFINED = float("inf"), float("nan")


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "factors", [(INFINITE, 1.0), (UNDEFINED, 1.0), (1.0, INFINITE), (INFINITE, INFINITE)]
)
def test_a_gradient_that_is_not_finite_leaves_everything_where_it_was(split, factors):
    model, loss_of = amp_problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.5, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    good, _ = scaled(model, loss_of, sam, scaler)
    sam.step(good, scaler=scaler)
    scaler.update()
    before = flat(model)
    state = copy.deepcopy(sam.state_dict()["state"])
    closure, calls = scaled(model, loss_of, sam, scaler, factors)
    if split:
        closure()
        sam.first_step(scaler=scaler)
        closure()
        scaler.unscale_(sam)
        sam.second_step(scaler=scaler)
    else:
        sam.step(closure, scaler=scaler)
        assert len(calls) == (2 if factors[0] == 1.0 else 1)  # no second pass for nothing
    scaler.update()
    assert torch.equal(flat(model), before)
    assert torch.equal(calls[-1], before) == (factors[0] != 1.0)
    torch.testing.assert_close(sam.state_dict()["state"], state, rtol=0, atol=0)
    assert scaler.get_scale() == 512.0  # halved once, however many passes overflowed
    sam.step(good, scaler=scaler)
    assert not torch.equal(flat(model), before)


def test_two_backward_passes_count_as_one_step_of_the_scaler():
    model, loss_of = amp_problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    closure, _ = scaled(model, loss_of, sam, scaler)
    scales = []
    for _ in range(4):
        sam.step(closure, scaler=scaler)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [1024.0, 2048.0, 2048.0, 4096.0]


# Clipping and accumulation


@pytest.mark.parametrize("adaptive", [False, True])
def test_clipping_in_the_closure_clips_what_the_base_optimizer_gets(adaptive):
    # The first gradient's length cancels in the perturbation.
    model, loss_of = problem()
    other = copy.deepcopy(model)
    closed, split = (
        lowland.SAM(m.parameters(), torch.optim.SGD, 0.3, adaptive=adaptive, lr=1.0)
        for m in (model, other)
    )

    def closure():
        closed.zero_grad()
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        return loss

    for _ in range(3):
        before = flat(model)
        closed.step(closure)
        torch.testing.assert_close((flat(model) - before).norm().item(), 1e-3, rtol=1e-3, atol=0)
        loss_of(other).backward()
        split.first_step(zero_grad=True)
        loss_of(other).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1e-3)
        split.second_step(zero_grad=True)
    torch.testing.assert_close(flat(model), flat(other), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("split", [False, True])
def test_clipping_with_a_scaler_sees_unscaled_gradients(split):
    model, loss_of = amp_problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.3, lr=1.0)
    scaler = torch.amp.GradScaler("cpu")
    closure, _ = scaled(model, loss_of, sam, scaler)

    def clip(*_):
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)

    if not split:
        sam.base_optimizer.register_step_pre_hook(clip)
    for _ in range(3):
        before = flat(model)
        if split:
            closure()
            sam.first_step(scaler=scaler)
            closure()
            scaler.unscale_(sam)
            clip()
            sam.second_step(scaler=scaler)
        else:
            sam.step(closure, scaler=scaler)
        scaler.update()
        torch.testing.assert_close((flat(model) - before).norm().item(), 1e-2, rtol=1e-2, atol=0)


def test_accumulated_micro_batches_are_the_whole_batch():
    model, x, y = parallel_training.problem()
    other = copy.deepcopy(model)
    whole = parallel_training.train(model, [(x, y)])
    parts = parallel_training.train(other, list(zip(x.chunk(4), y.chunk(4), strict=True)))
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)


# Gradients that were there before


def zeroing_none(optimizer, model):
    optimizer.zero_grad()


def zeroing_in_place(optimizer, model):
    optimizer.zero_grad(set_to_none=False)


def zeroing_the_model(optimizer, model):
    model.zero_grad(set_to_none=False)


def zeroing_by_hand(optimizer, model):
    for p in model.parameters():
        if p.grad is not None:
            p.grad.data.zero_()  # as it was once written, which no version counts


ZEROING = [zeroing_none, zeroing_in_place, zeroing_the_model, zeroing_by_hand]


@pytest.mark.parametrize("zero", ZEROING)
@pytest.mark.parametrize("where", ["in the closure", "after the forward pass", "before", "after"])
@pytest.mark.parametrize("dirty", [False, True])
def test_the_second_gradient_is_alone_wherever_the_first_is_zeroed(zero, where, dirty):
    model, loss_of = problem()
    plain = copy.deepcopy(model)
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.3, adaptive=True, lr=0.5)
    if dirty and where != "after":
        (7 * loss_of()).backward()  # as of another loss before the first step

    def closure():
        if where == "in the closure":
            zero(sam, model)
        loss = loss_of()
        if where == "after the forward pass":
            zero(sam, model)
        loss.backward()
        return loss

    for _ in range(3):
        if where == "before":
            zero(sam, model)
        sam.step(closure)
        if where == "after":
            zero(sam, model)
        published_step(plain, lambda: loss_of(plain), rho=0.3, adaptive=True, eta=0.01, lr=0.5)
    torch.testing.assert_close(flat(model), flat(plain), rtol=1e-10, atol=1e-12)


def test_a_closure_that_never_zeroes_is_refused_and_moves_nothing():
    model, loss_of = problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.3, lr=0.5)

    def closure():
        loss = loss_of()
        loss.backward()
        return loss

    sam.step(closure)  # the first gradients there are
    before = flat(model)
    with pytest.raises(RuntimeError, match=r"call zero_grad\(\) in it or before it"):
        sam.step(closure)
    assert torch.equal(flat(model), before)
    sam.zero_grad()
    sam.step(closure)
    assert not torch.equal(flat(model), before)


def test_a_closure_that_zeroes_only_some_gradients_is_refused():
    model, loss_of = problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.3, lr=0.5)

    def closure():
        model[0].zero_grad()
        loss_of().backward()

    sam.step(closure)
    with pytest.raises(RuntimeError, match="added to gradients that were there before"):
        sam.step(closure)


def test_clipping_does_not_hide_that_gradients_were_there():
    model, loss_of = problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.3, lr=0.5)
    loss_of().backward()

    def closure():
        loss_of().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    with pytest.raises(RuntimeError, match=r"go backward in accumulate\(closure\)"):
        sam.step(closure)


@pytest.mark.parametrize("zero", ZEROING[:3])
@pytest.mark.parametrize("twice", [False, True])
def test_a_closure_that_zeroes_at_its_end_is_refused(zero, twice):
    model, loss_of = problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.3, lr=0.5)
    if twice:
        sam.step(closure_of(model, loss_of, sam))
        zero(sam, model)

    def closure():
        loss_of().backward()
        zero(sam, model)

    with pytest.raises(RuntimeError, match="do not zero the gradients after it"):
        sam.step(closure)


def test_a_stale_gradient_of_a_frozen_parameter_is_no_hindrance():
    model, loss_of = problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.3, lr=0.5)
    closure = closure_of(model, loss_of, sam)
    sam.step(closure)
    model[0].requires_grad_(requires_grad=False)
    sam.step(closure)


@pytest.mark.parametrize("zero", [None, *ZEROING])
def test_two_calls_without_zeroing_in_between_are_refused(zero):
    model, loss_of = problem()
    other = copy.deepcopy(model)
    sam, reference = (
        lowland.SAM(m.parameters(), torch.optim.SGD, 0.3, lr=0.5) for m in (model, other)
    )
    before = flat(model)
    loss_of().backward()
    sam.first_step()
    if zero is not None:
        zero(sam, model)
    loss_of().backward()
    if zero is None:
        with pytest.raises(RuntimeError, match="were added to those of the first"):
            sam.second_step()
        assert torch.equal(flat(model), before)
    else:
        sam.second_step()
        reference.step(closure_of(other, lambda: loss_of(other), reference))
        assert torch.equal(flat(model), flat(other))


def test_gradients_that_are_written_as_a_replayed_graph_writes_them_are_taken():
    model, loss_of = problem()
    other = copy.deepcopy(model)
    sam, reference = (
        lowland.SAM(m.parameters(), torch.optim.SGD, 0.3, lr=0.5) for m in (model, other)
    )
    fixed = [torch.zeros_like(p) for p in model.parameters()]
    for p, gradient in zip(model.parameters(), fixed, strict=True):
        p.grad = gradient

    def closure():
        parameters = list(model.parameters())
        for gradient, part in zip(fixed, torch.autograd.grad(loss_of(), parameters), strict=True):
            gradient.data.copy_(part)

    for _ in range(3):
        sam.step(closure)
        reference.step(closure_of(other, lambda: loss_of(other), reference))
    assert torch.equal(flat(model), flat(other))


# Micro-batches


def m_sharpness_step(model, losses, *, rho, adaptive, eta, lr):
    """A step by the mean of gradients, each at a worst point of its own, with plain SGD."""
    parameters = list(model.parameters())
    w = flat(model)
    found = []
    for loss_of in losses:

        def gradient(loss_of=loss_of):
            grads = torch.autograd.grad(loss_of(), parameters)
            return torch.cat([part.flatten() for part in grads])

        g = gradient()
        t = w.abs() + eta if adaptive else torch.ones_like(w)
        nn.utils.vector_to_parameters(w + rho * t.square() * g / (t * g).norm(), parameters)
        found.append(gradient())
        nn.utils.vector_to_parameters(w.clone(), parameters)
    nn.utils.vector_to_parameters(w - lr * torch.stack(found).mean(0), parameters)


def parts_problem(parts):
    model, _ = problem()
    x, y = torch.randn(30, 4).double(), torch.rand(30, 1).double().round()
    pairs = list(zip(x.chunk(parts), y.chunk(parts), strict=True))

    def loss_of(model, part):
        return nn.BCEWithLogitsLoss()(model(part[0]), part[1])

    return model, pairs, loss_of


@pytest.mark.parametrize("way", ["parts", "count", "zeroing", "accumulate", "scaler", "trainer"])
@given(st.integers(1, 4), st.floats(0.01, 0.5), st.booleans())
def test_micro_batches_have_worst_points_of_their_own(way, parts, rho, adaptive):
    model, pairs, loss_of = parts_problem(parts)
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", enabled=way in ("scaler", "trainer"))
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, rho, adaptive=adaptive, lr=0.3)

    def closure(part):
        if way == "zeroing":
            sam.zero_grad()
        part = pairs[part] if way == "count" else part
        loss = loss_of(model, part)
        scaler.scale(loss / parts if way in ("accumulate", "trainer") else loss).backward()
        return loss.detach()

    for _ in range(2):
        expected = sum(loss_of(model, part).detach() for part in pairs) / parts
        if way in ("accumulate", "trainer"):
            sam.zero_grad()
            losses = [sam.accumulate(lambda part=part: closure(part)) for part in pairs]
            loss = sum(losses) / parts
            if way == "trainer":
                scaler.unscale_(sam)
                scaler.step(sam)
            else:
                sam.step()
        else:
            loss = sam.step(
                closure,
                micro_batches=parts if way == "count" else iter(pairs),
                scaler=scaler if way == "scaler" else None,
            )
        if scaler.is_enabled():
            scaler.update()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        m_sharpness_step(
            plain,
            [lambda part=part: loss_of(plain, part) for part in pairs],
            rho=rho,
            adaptive=adaptive,
            eta=0.01,
            lr=0.3,
        )
        torch.testing.assert_close(flat(model), flat(plain), rtol=1e-10, atol=1e-12)


def test_no_micro_batch_is_refused():
    model, loss_of = problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    for none in (0, []):
        with pytest.raises(ValueError, match="micro_batches must be at least one"):
            sam.step(lambda _: loss_of().backward(), micro_batches=none)


def test_a_micro_batch_that_leaves_parameters_out_leaves_their_gradients():
    model = nn.ModuleList([nn.Linear(2, 1, bias=False).double() for _ in range(2)])
    x = torch.randn(5, 2).double()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    for layer in model:
        sam.accumulate(lambda layer=layer: layer(x).square().mean().backward())
    alone = copy.deepcopy(model)
    for layer in alone:
        other = lowland.SAM(layer.parameters(), torch.optim.SGD, lr=0.1)
        other.accumulate(lambda layer=layer: layer(x).square().mean().backward())
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_step_without_a_closure_takes_what_was_accumulated_once():
    model, loss_of = problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    sam.accumulate(lambda: loss_of().backward())
    sam.step()
    with pytest.raises(RuntimeError, match=r"go backward in accumulate\(closure\)"):
        sam.step()
    sam.zero_grad()
    sam.accumulate(lambda: loss_of().backward())
    sam.zero_grad()
    loss_of().backward()
    with pytest.raises(RuntimeError, match="two gradients a step"):
        sam.step()


def test_a_closure_that_does_nothing_is_none():
    # As Lightning passes one where a module goes backward itself.
    model, loss_of = problem()
    other = copy.deepcopy(model)
    sam, reference = (
        lowland.SAM(m.parameters(), torch.optim.SGD, 0.3, lr=0.5) for m in (model, other)
    )
    for _ in range(2):
        sam.zero_grad()
        sam.accumulate(lambda: loss_of().backward())
        sam.step(lambda: None)
        reference.step(closure_of(other, lambda: loss_of(other), reference))
    assert torch.equal(flat(model), flat(other))
    sam.zero_grad()
    loss_of().backward()
    before = flat(model)
    with pytest.raises(RuntimeError, match="two gradients a step"):
        sam.step(lambda: None)
    assert torch.equal(flat(model), before)


# Trainers that call the step themselves, as they do it


def batch_normalized(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()


def batches(count):
    torch.manual_seed(1)
    return list(torch.randn(count, 10, 4).double())


class Trainer:
    """What Lightning does around an optimizer, and what Hugging Face's Trainer does."""

    def __init__(self, model, optimizer, *, accumulate=1, scaler=None, clip=None):
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.accumulate, self.clip = accumulate, clip

    def backward(self, x):
        loss = self.model(x).square().mean() / self.accumulate
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()

    def clipped(self):
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)

    def automatic(self, batches):
        """A closure zeroes with the first micro-batch alone; only the last one makes a step."""
        for index, x in enumerate(batches):

            def closure(index=index, x=x):
                loss = self.model(x).square().mean() / self.accumulate
                if index % self.accumulate == 0:
                    self.optimizer.zero_grad()
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                return loss.detach()

            if (index + 1) % self.accumulate:
                closure()
            elif self.scaler is None:

                def and_clip(closure=closure):
                    loss = closure()
                    self.clipped()
                    return loss

                self.optimizer.step(closure=and_clip)
            else:
                self.optimizer.accumulate(closure)  # what a module's optimizer_step makes of it
                self.scaler.unscale_(self.optimizer)
                self.clipped()
                self.scaler.step(self.optimizer)
                self.scaler.update()

    def manual(self, batches):
        """A backward pass for each micro-batch, and steps without a closure."""
        for index, x in enumerate(batches):
            self.optimizer.accumulate(lambda x=x: self.backward(x))
            if (index + 1) % self.accumulate == 0:
                if self.scaler is not None:
                    self.scaler.unscale_(self.optimizer)
                self.clipped()
                if self.scaler is None:
                    self.optimizer.step(None)
                else:
                    self.scaler.step(self.optimizer)
                    self.scaler.update()
                self.model.zero_grad()


def by_hand(model, batches, *, accumulate=1, clip=None):
    """The same with the two calls, each micro-batch by itself."""
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.3, lr=0.5, momentum=0.9)
    plain = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for start in range(0, len(batches), accumulate):
        total = [torch.zeros_like(p) for p in model.parameters()]
        for x in batches[start : start + accumulate]:
            before = flat(model)
            sam.zero_grad()
            (model(x).square().mean() / accumulate).backward()
            sam.first_step(zero_grad=True)
            with frozen_statistics(model):
                (model(x).square().mean() / accumulate).backward()
            total = [part + p.grad for part, p in zip(total, model.parameters(), strict=True)]
            sam._return()
            assert torch.equal(flat(model), before)
        for part, p in zip(total, model.parameters(), strict=True):
            p.grad = part
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        plain.step()
    return model


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("way", "accumulate"), [("automatic", 1), ("manual", 1), ("manual", 2)])
def test_trainers_drive_it(way, accumulate, scaled, clip):
    data = batches(6)
    expected = by_hand(batch_normalized(), data, accumulate=accumulate, clip=clip)
    model = batch_normalized()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.3, model=model, lr=0.5, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    trainer = Trainer(model, sam, accumulate=accumulate, scaler=scaler, clip=clip)
    getattr(trainer, way)(data)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-6, atol=1e-9)
    assert model[1].num_batches_tracked == len(data)


def test_a_closure_that_accumulates_itself_is_called_once():
    model, loss_of = problem()
    other = copy.deepcopy(model)
    sam, reference = (
        lowland.SAM(m.parameters(), torch.optim.SGD, 0.3, lr=0.5) for m in (model, other)
    )
    calls = []

    def closure():
        calls.append(flat(model))
        return sam.accumulate(closure_of(model, loss_of, sam))

    for _ in range(3):
        sam.step(closure)
        reference.step(closure_of(other, lambda: loss_of(other), reference))
    assert len(calls) == 3
    assert torch.equal(flat(model), flat(other))


def test_gradients_of_others_are_not_taken_for_accumulated_ones():
    model, loss_of = problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.3, lr=0.5)
    loss_of().backward()  # of a micro-batch whose gradient is that at the weights
    with pytest.raises(RuntimeError, match=r"gradients that accumulate\(\) did not add"):
        sam.accumulate(lambda: loss_of().backward())
    sam.zero_grad()
    sam.accumulate(lambda: loss_of().backward())
    sam.step()
    with pytest.raises(RuntimeError, match="such as those of an earlier step"):
        sam.accumulate(lambda: loss_of().backward())


def test_a_trainer_that_accumulates_without_it_is_refused():
    model = batch_normalized()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.3, model=model, lr=0.5)
    with pytest.raises(RuntimeError, match="accumulate_grad_batches"):
        Trainer(model, sam, accumulate=2).automatic(batches(2))
    sam.zero_grad()
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match=r"accumulate\(closure\) for every one"):
        Trainer(model, sam, accumulate=2, scaler=scaler).automatic(batches(2))


@pytest.mark.parametrize("factors", [(INFINITE, 1.0), (UNDEFINED, 1.0), (1.0, INFINITE)])
def test_a_trainer_s_scaler_leaves_out_a_step_with_a_gradient_that_is_not_finite(factors):
    model, loss_of = amp_problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.5, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = flat(model)
    closure, calls = scaled(model, loss_of, sam, scaler, factors)
    sam.accumulate(closure)
    scaler.step(sam)
    scaler.update()
    assert len(calls) == 2
    assert torch.equal(flat(model), before)
    assert scaler.get_scale() == 512.0
    good, _ = scaled(model, loss_of, sam, scaler)
    sam.accumulate(good)
    scaler.step(sam)
    assert not torch.equal(flat(model), before)


def test_no_finite_gradient_comes_of_one_that_is_not():
    p = nn.Parameter(torch.ones(3))
    sam = lowland.SAM([p], torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    factors = iter([INFINITE, 1.0])

    def closure():  # where the weights are no number, ReLU's slope is zero
        scaler.scale(next(factors) * p.relu().sum()).backward()

    sam.accumulate(closure)
    scaler.step(sam)
    scaler.update()
    assert torch.equal(p.detach(), torch.ones(3))
    assert scaler.get_scale() == 1.0


def test_settings_of_the_constructor_are_those_of_every_step():
    results = []
    for at_once in (False, True):
        model = batch_normalized()
        scaler = torch.amp.GradScaler("cpu")
        both = {"model": model, "scaler": scaler}
        sam = lowland.SAM(
            model.parameters(), torch.optim.SGD, 0.3, lr=0.5, **(both if at_once else {})
        )
        closure, _ = scaled(
            model, lambda model=model: model(batches(1)[0]).square().mean(), sam, scaler
        )
        for _ in range(3):
            sam.step(closure, **({} if at_once else both))
            scaler.update()
        assert model[1].num_batches_tracked == 3
        results.append(flat(model))
    assert torch.equal(*results)


# States


def shape_of(state):
    return {name for group in state["param_groups"] for name in group}


@pytest.mark.parametrize(
    "base", [partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW], ids=["SGD", "AdamW"]
)
def test_states_go_from_the_base_optimizer_and_back(base):
    kind = base.func if isinstance(base, partial) else base
    settings = base.keywords if isinstance(base, partial) else {}
    model, loss_of = problem()
    plain = kind(model.parameters(), lr=0.05, **settings)
    for _ in range(3):
        plain.step(closure_of(model, loss_of, plain))
    other = copy.deepcopy(model)
    sam = lowland.SAM(other.parameters(), kind, rho=0.0, adaptive=True, lr=9.0, **settings)
    sam.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert sam.param_groups[0]["lr"] == 0.05
    assert sam.param_groups[0]["adaptive"] is True
    for _ in range(3):  # of radius zero, so it is the base optimizer
        sam.step(closure_of(other, lambda: loss_of(other), sam))
        plain.step(closure_of(model, loss_of, plain))
    assert torch.equal(flat(model), flat(other))

    third = copy.deepcopy(model)
    fresh = kind(third.parameters(), lr=9.0, **settings)
    fresh.load_state_dict(copy.deepcopy(sam.state_dict()))
    for _ in range(3):
        fresh.step(closure_of(third, lambda: loss_of(third), fresh))
        plain.step(closure_of(model, loss_of, plain))
    assert torch.equal(flat(model), flat(third))


def test_a_state_of_an_older_version_gets_the_settings_that_are_new():
    model, loss_of = problem()
    plain = torch.optim.Adam(model.parameters(), lr=0.05)
    plain.step(closure_of(model, loss_of, plain))
    state = plain.state_dict()
    for new in ("fused", "decoupled_weight_decay", "capturable"):
        state["param_groups"][0].pop(new, None)
    sam = lowland.SAM(model.parameters(), torch.optim.Adam, lr=0.05)
    sam.load_state_dict(state)
    sam.step(closure_of(model, loss_of, sam))


def test_a_state_of_other_groups_is_refused_as_by_any_optimizer():
    model, _ = problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        sam.load_state_dict(
            torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=1.0).state_dict()
        )


@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_a_model_and_a_scaler_go_with_copies_and_not_with_states(way):
    model = batch_normalized()
    scaler = torch.amp.GradScaler("cpu")
    sam = lowland.SAM(model.parameters(), torch.optim.Adam, 0.3, model=model, scaler=scaler, lr=0.1)
    x = batches(1)[0]

    def train(model, sam, scaler):
        closure, _ = scaled(model, lambda: model(x).square().mean(), sam, scaler)
        sam.step(closure)
        scaler.update()

    train(model, sam, scaler)
    state = sam.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert not {"model", "scaler"} & shape_of(state)
    everything = (model, sam, scaler)
    pickled = pickle.dumps(everything)
    copied = copy.deepcopy(everything) if way == "copy" else pickle.loads(pickled)  # noqa: S301
    assert copied[1].model is copied[0]
    train(*everything)
    train(*copied)
    torch.testing.assert_close(model.state_dict(), copied[0].state_dict(), rtol=0, atol=0)
    assert copied[0][1].num_batches_tracked == 2


# Sparse gradients


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("micro_batches", [None, 2])
def test_sparse_gradients_make_the_step_of_dense_ones(adaptive, micro_batches):
    results = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 3, sparse=sparse), nn.Linear(3, 1)).double()
        x = torch.tensor([1, 4, 4, 7])
        sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.3, adaptive=adaptive, lr=0.5)

        def closure(part=None, model=model, sam=sam, x=x):
            if part is None:
                sam.zero_grad()
            loss = model(x if part is None else x.chunk(2)[part]).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            sam.step(closure, micro_batches=micro_batches)
        results.append(flat(model))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


# Models that remember or draw


def test_running_statistics_see_each_batch_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
    x = torch.randn(30, 4)
    once, unfrozen, split = (copy.deepcopy(model) for _ in range(3))
    once(x)
    sams = [
        lowland.SAM(m.parameters(), torch.optim.SGD, 0.5, lr=0.1) for m in (model, unfrozen, split)
    ]
    for sam, trained, frozen in ((sams[0], model, model), (sams[1], unfrozen, None)):
        sam.step(
            closure_of(trained, lambda trained=trained: trained(x).square().mean(), sam),
            model=frozen,
        )
    split(x).square().mean().backward()
    sams[2].first_step(zero_grad=True)
    with frozen_statistics(split):
        split(x).square().mean().backward()
    sams[2].second_step()
    for one in (model, split):
        torch.testing.assert_close(
            dict(one.named_buffers()), dict(once.named_buffers()), rtol=0, atol=0
        )
        assert torch.equal(flat(one), flat(unfrozen))  # the gradients do not depend on them
    assert unfrozen[1].num_batches_tracked == 2


def test_both_passes_draw_the_same_numbers_and_the_next_step_others():
    model, loss_of = problem()
    sam = lowland.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    closure, drawn = closure_of(model, loss_of, sam), []

    def drawing():
        drawn.append(torch.rand(1).item())
        return closure()

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sam.step(drawing)
    sam.step(drawing)
    assert drawn == [expected[0], expected[0], expected[1], expected[1]]
    assert torch.rand(1) == expected[2]


class Block(nn.Module):
    """Two layers with dropout between them, computed again in the backward pass on request."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.rest = nn.Sequential(nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.reentrant = reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self.rest(self.first(x))
        return checkpoint(self.rest, self.first(x), use_reentrant=self.reentrant)


def trained_block(block, *, called=None, split=False):
    """Three steps on a block, through what was made of it, with random numbers of their own."""
    called = block if called is None else called
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    sam = lowland.SAM(block.parameters(), torch.optim.SGD, 0.5, lr=0.5)
    torch.manual_seed(2)

    def loss_of():
        return called(x).square().mean()

    for _ in range(3):
        if split:
            again = remember_randomness()
            loss_of().backward()
            sam.first_step(zero_grad=True)
            with again():
                loss_of().backward()
            sam.second_step(zero_grad=True)
        else:
            sam.step(closure_of(block, loss_of, sam), model=block)
    return flat(block)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant):
    assert torch.equal(trained_block(Block(reentrant)), trained_block(Block()))


def test_two_calls_with_the_same_randomness_are_the_closure():
    assert torch.equal(trained_block(Block(), split=True), trained_block(Block()))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's compiler's own
@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_a_compiled_model_trains_like_the_model(backend):
    block = Block()
    block.rest[1].p = 0.0  # compiled code may draw other numbers
    plain = copy.deepcopy(block)
    result = trained_block(block, called=torch.compile(block, backend=backend))
    torch.testing.assert_close(result, trained_block(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_processes_are_one_with_the_joined_batch(tmp_path):
    kinds = [{}, {"perturb": "momentum"}, {"every": 2, "measure": True}, {"active": (1, 2)}]
    cases = [(count, settings) for settings in kinds for count in (1, 3)]
    results = two_processes.run(parallel_training.several, tmp_path, cases)
    for index, (_, settings) in enumerate(cases):
        model, x, y = parallel_training.problem()
        expected = parallel_training.train(model, [(x, y)], **settings)
        assert ("curvature" in expected) == ("measure" in settings)
        for rank in range(2):
            torch.testing.assert_close(results[rank][index], expected, rtol=1e-9, atol=1e-11)

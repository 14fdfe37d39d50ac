import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lowland


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
    with pytest.raises(RuntimeError, match="twice in a row"):
        sam.first_step()

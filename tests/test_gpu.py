"""The same numbers on an accelerator, without making the host wait for it."""

import any_models
import cases
import oracle
import pytest
import torch
from torch import nn

import lowland
from lowland import exact

pytestmark = pytest.mark.gpu

BOTH_TYPES = (torch.float64, torch.float32)


@pytest.fixture
def no_waiting():
    """A function that makes every wait from then on an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def on_device(case):
    return [part.cuda() for part in case.weights], case.x.cuda(), case.y.cuda()


def solve(weights, x, y, settings, **options):
    weights = [part.requires_grad_() for part in weights]
    moments = exact.moments(weights, x, y, **settings, **options)
    trace = exact.trace(weights, x, y, **settings)
    grads = torch.autograd.grad(moments.upper.sum(), weights)
    return moments.trace, moments.trace_sq, trace, *grads


@pytest.mark.parametrize("dtype", BOTH_TYPES)
@pytest.mark.parametrize("order", ["auto", *cases.ORDERS])
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("ensemble", [(), (3,)])
def test_moments_and_gradients_are_those_of_the_cpu(ensemble, activation, order, dtype):
    for loss in oracle.LOSSES:
        network = oracle.Network(4, 5, activation, loss)
        case = cases.make(network, 50, ensemble=ensemble, dtype=dtype)
        expected = solve(*case.arguments, case.settings)
        actual = solve(*on_device(case), case.settings, order=order)
        for mine, theirs in zip(actual, expected, strict=True):
            assert mine.device.type == "cuda"
            # The trace may cancel; sqrt(P Tr H^2) is what it cannot exceed.
            scale = (case.network.dim * expected[1].detach()).sqrt().max()
            error = (mine.detach().cpu() - theirs.detach()).abs().max().double()
            assert error <= case.tolerances[1] * max(theirs.detach().abs().max(), scale)


@pytest.mark.parametrize("order", ["auto", *cases.ORDERS])
def test_the_host_never_waits(order, no_waiting):
    case = cases.make(oracle.Network(4, 5, "gelu", "bce"), 200, ensemble=(2,))
    weights, x, y = on_device(case)
    no_waiting()
    solve(weights, x, y, case.settings, order=order)
    solve(weights, x, y, case.settings, order=order, memory_budget=1 << 20)
    exact.direction(weights, x, y, **case.settings, order=order)
    exact.sample_contributions(weights, x, y, **case.settings, order=order)
    exact.pair_contributions(weights, x, y, **case.settings)


@pytest.mark.parametrize(
    "criterion", [nn.MSELoss(), nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0))]
)
def test_penalties_train_a_model_there(criterion, no_waiting):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y = torch.randn(20, 3), torch.ones(20, 1)
    expected = lowland.HSR(criterion, weight=0.1)(model, x, y).detach()
    model, criterion = model.cuda(), criterion.cuda()
    x, y = x.cuda(), y.cuda()
    no_waiting()
    penalty = lowland.HSR(criterion, weight=0.1)(model, x, y)
    (criterion(model(x), y) + penalty).backward()
    torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(penalty.detach().cpu(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("home", ["cpu", "cuda"])
@pytest.mark.parametrize("products", ["autograd", "differences"])
@pytest.mark.parametrize("kind", [lowland.HSR, lowland.HessianTrace, lowland.FlatnessAware])
def test_a_step_with_an_estimated_penalty_never_waits(kind, products, home, no_waiting):
    model, x, y = any_models.build("cnn", samples=32, dtype=torch.float32)
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    settings = {"method": "probes", "products": products, "probes": 2, "every": 2}
    penalty = kind(
        any_models.CROSS_ENTROPY, 0.1, generator=torch.Generator(home).manual_seed(0), **settings
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(call):
        optimizer.zero_grad()
        call(model, x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    step(penalty.loss)  # libraries may wait at their first call
    no_waiting()
    for _ in range(3):
        step(penalty.loss)
        step(penalty)


@pytest.mark.parametrize("products", ["autograd", "differences"])
@pytest.mark.parametrize("name", any_models.MODELS)
def test_estimates_are_those_of_the_cpu(name, products):
    model, x, y = any_models.build(name, samples=32)
    found = []
    for device in ("cpu", "cuda"):
        model, x, y = model.to(device), x.to(device), y.to(device)
        moments = lowland.hessian_moments(
            model,
            any_models.CROSS_ENTROPY,
            x,
            y,
            "probes",
            products=products,
            generator=torch.Generator().manual_seed(0),  # the same signs on both
        )
        parts = torch.autograd.grad(moments.trace_sq, any_models.trainable(model))
        found.append([part.cpu() for part in (moments.trace, moments.trace_sq, *parts)])
    assert any_models.error(*found) < (1e-8 if products == "autograd" else 1e-2)


def test_dropout_draws_one_mask_for_all_gradients_there():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Dropout(), nn.Linear(64, 2))
    model, x = model.double().cuda(), torch.randn(32, 4).double().cuda()
    y, found = torch.arange(32).cuda() % 2, []
    for products in ("autograd", "differences"):
        torch.manual_seed(1)
        penalty = lowland.FlatnessAware(
            any_models.CROSS_ENTROPY,
            1.0,
            method="probes",
            products=products,
            generator=torch.Generator().manual_seed(0),
        )
        total = penalty.loss(model, x, y)
        torch.rand(7, device="cuda")
        found.append(torch.autograd.grad(total, list(model.parameters())))
    assert any_models.error(*found) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_penalties_under_autocast_there(dtype):
    model, x, y = any_models.build("cnn", samples=32, dtype=torch.float32)
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    found = []
    for enabled in (True, False):
        penalty = lowland.FlatnessAware(
            any_models.CROSS_ENTROPY,
            1.0,
            method="probes",
            probes=4,
            generator=torch.Generator().manual_seed(0),
        )
        with torch.autocast("cuda", dtype, enabled=enabled):
            value = penalty(model, x, y)
        found.append(torch.autograd.grad(value, list(model.parameters())))
    assert any_models.error(*found) < 0.05


def test_autocast_does_not_change_the_numbers():
    case = cases.make(oracle.Network(4, 5, "gelu", "bce"), 50, dtype=torch.float32)
    arguments = on_device(case)
    expected = solve(*arguments, case.settings)
    with torch.autocast("cuda", dtype=torch.float16):
        actual = solve(*arguments, case.settings)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.usefixtures("as_installed")
def test_tensors_on_two_devices_are_refused():
    weights, x, y = cases.make(oracle.Network(4, 5, "gelu", "bce"), 50).arguments
    for arguments in (([w.cuda() for w in weights], x, y), (weights, x.cuda(), y.cuda())):
        with pytest.raises(TypeError, match="use one type and one device for both"):
            exact.moments(*arguments, activation="gelu", loss="bce")
    with pytest.raises(TypeError, match="y is float64 on cuda"):
        exact.moments(weights, x, y.cuda(), activation="gelu", loss="bce")

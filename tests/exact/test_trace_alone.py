"""``Tr H`` beside the loss: one forward pass for both, and nothing left from another call."""

import gc
import weakref
from itertools import pairwise

import pytest
import torch
from cases import OF_ONES_OWN, TOLERANCES, cases, prepare, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, hessian

import lowland
from lowland.exact import with_loss
from lowland.exact.modules import read
from lowland.exact.trace_alone import TracePass, bends_in_full
from lowland.losses import Loss, Separable

CE, BCE, MSE = nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.MSELoss()
UNITS = (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.GELU, nn.Identity)


def network(widths, kinds, seed=0, dtype=torch.float64, *, bias=True):
    torch.manual_seed(seed)
    layers = [nn.Linear(widths[0], widths[1], bias=bias)]
    for kind, (one, other) in zip(kinds, pairwise(widths[1:]), strict=True):
        layers += [kind(), nn.Linear(one, other, bias=bias)]
    return nn.Sequential(*layers).to(dtype)


def batch(criterion, inputs, outputs, samples=6, dtype=torch.float64):
    x = torch.randn(samples, inputs, dtype=dtype)
    if isinstance(criterion, nn.CrossEntropyLoss):
        return x, torch.arange(samples) % outputs
    y = torch.randn(samples, outputs, dtype=dtype)
    return x, (y > 0).to(dtype) if isinstance(criterion, nn.BCEWithLogitsLoss) else y


def by_hand(model, criterion, x, y, weight):
    """Loss and penalty by brute force, and the gradient of their sum."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(values):
        return criterion(functional_call(model, values, (x,)), y)

    total = loss(trained)
    blocks = hessian(loss)(trained)
    for name, p in trained.items():
        block = blocks[name][name].reshape(p.numel(), p.numel())
        total = total + weight * block.trace()
    return total, torch.autograd.grad(total, list(trained.values()), allow_unused=True)


def ours(penalty, model, x, y):
    total = penalty.loss(model, x, y)
    trained = [p for p in model.parameters() if p.requires_grad]
    return total, torch.autograd.grad(total, trained, allow_unused=True)


def require_same(found, expected, tolerance=1e-10):
    (total, gradient), (right, theirs) = found, expected
    torch.testing.assert_close(total, right, rtol=tolerance, atol=tolerance)
    scale = max(1.0, *(float(each.abs().max()) for each in theirs if each is not None))
    for mine, each in zip(gradient, theirs, strict=True):
        apart = mine if each is None else mine - each
        assert float(apart.abs().max()) <= 10 * tolerance * scale


@st.composite
def problems(draw):
    depth = draw(st.integers(0, 4), label="hidden layers")
    criterion = draw(st.sampled_from([CE, nn.CrossEntropyLoss(label_smoothing=0.2), BCE, MSE]))
    widths = [draw(st.integers(1, 4)) for _ in range(depth + 1)]
    widths.append(draw(st.integers(2 if isinstance(criterion, nn.CrossEntropyLoss) else 1, 4)))
    kinds = [draw(st.sampled_from(UNITS)) for _ in range(depth)]
    model = network(widths, kinds, draw(st.integers(0, 9999)), bias=draw(st.booleans()))
    for parameter in model.parameters():
        parameter.requires_grad_(draw(st.integers(0, 3)) > 0)
    next(model[-1].parameters()).requires_grad_()
    return model, criterion, batch(criterion, widths[0], widths[-1], draw(st.integers(1, 7)))


@given(problems())
def test_loss_and_trace_are_those_of_brute_force(problem):
    model, criterion, data = problem
    penalty = lowland.HessianTrace(criterion, 0.3, method="exact", limit=1e9)
    require_same(ours(penalty, model, *data), by_hand(model, criterion, *data, 0.3), 1e-9)


@given(cases(), st.sampled_from(["hessian", "ggn", "residual"]))
def test_the_trace_is_that_of_the_blocks(case, matrix):
    case = case.with_gradients()
    setup = prepare(case).of(matrix)
    both = setup.moments("parameters").trace, setup.trace()
    gradients = [
        torch.autograd.grad(each.sum(), case.weights, materialize_grads=True) for each in both
    ]
    _, slopes = TOLERANCES[torch.float64]
    torch.testing.assert_close(both[1], both[0], rtol=1e-9, atol=1e-12)
    scale = max(float(part.abs().max()) for part in gradients[0])
    for one, other in zip(*gradients, strict=True):
        assert float((one - other).abs().max()) <= slopes * scale + 1e-12


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_loss_of_ones_own_couples_its_logits(depth):
    from cases import make  # noqa: PLC0415
    from oracle import Network  # noqa: PLC0415

    case = make(
        Network(3, (4,) * depth, ("tanh",) * depth, "distance", "mean", 3), 5, ensemble=(2,)
    ).with_gradients()
    setup = prepare(case)
    assert setup.arch.loss is OF_ONES_OWN["distance"]
    assert bends_in_full(setup.arch) == (depth > 2)
    both = setup.moments("parameters").trace, setup.trace()
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(each.sum(), case.weights) for each in both]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def changes():
    """What may change between two calls, and how."""
    yield "activation", lambda model, _: model.__setitem__(1, nn.GELU())
    yield "negative slope", lambda model, _: setattr(model[3], "negative_slope", 0.4)
    yield "frozen", lambda model, _: model[0].weight.requires_grad_(requires_grad=False)
    yield "thawed", lambda model, _: model[4].bias.requires_grad_()
    yield "smoothing", lambda _, criterion: setattr(criterion, "label_smoothing", 0.3)
    yield "sum", lambda _, criterion: setattr(criterion, "reduction", "sum")
    yield (
        "weights of classes",
        lambda _, criterion: setattr(criterion, "weight", torch.tensor([1.0, 2, 3]).double()),
    )
    yield "ignored", lambda _, criterion: setattr(criterion, "ignore_index", 1)
    yield "other layer", lambda model, _: model.__setitem__(2, nn.Linear(5, 4).double())
    yield "numbers", lambda model, _: model[0].weight.data.mul_(1.5)
    yield "other weight", lambda model, _: setattr(model[0], "weight", doubled(model[0].weight))
    yield "other memory", lambda model, _: setattr(model[0].weight, "data", 2 * model[0].weight)
    yield "without biases", lambda model, _: model[0].register_parameter("bias", None)
    yield "one more layer", lambda model, _: model.insert(4, nn.Tanh())
    yield "one less layer", lambda model, _: model.__delitem__(1)
    yield "a sequence within", lambda model, _: model.__setitem__(1, nn.Sequential(nn.SiLU()))
    yield "class", lambda model, _: setattr(model[1], "__class__", nn.Sigmoid)
    yield (
        "single precision and back",
        lambda model, _: model.float().double()[0].weight.data.mul_(2),
    )


def doubled(weight):
    return nn.Parameter(2 * weight.detach())


def obstacles():
    """What keeps the closed form from a model that it has just been right for, and its reason."""
    yield (
        "hook on a layer",
        lambda model, _: model[1].register_forward_hook(lambda *_: None),
        "forward hooks on layer 1",
    )
    yield (
        "hook before the model",
        lambda model, _: model.register_forward_pre_hook(lambda *_: None),
        "forward hooks on the model",
    )
    yield (
        "hook on the criterion",
        lambda _, criterion: criterion.register_forward_hook(lambda *_: None),
        "forward hooks on the criterion",
    )
    yield "forward", lambda model, _: setattr(model[1], "forward", torch.sin), "forward hooks"
    yield "another layer", lambda model, _: model.__setitem__(1, nn.ELU()), "not covered"
    yield (
        "parametrized",
        lambda model, _: nn.utils.parametrizations.weight_norm(model[2]),
        "not covered",
    )
    yield "dropout", lambda model, _: model.insert(2, nn.Dropout(0.5).train()), "model.eval"
    yield "reduction", lambda _, criterion: setattr(criterion, "reduction", "none"), "reduction"
    yield "tied", lambda model, _: model.append(nn.Tanh()).append(model[2]), "share|fit"
    yield (
        "not a number",
        lambda model, _: model[0].weight.data.fill_(torch.nan),
        "NaN or infinite",
    )
    yield "infinity", lambda model, _: model[0].bias.data.fill_(-torch.inf), "NaN or infinite"
    yield "half precision", lambda model, _: model.half(), "float32 or float64"


@pytest.mark.parametrize("name", [name for name, _ in changes()])
def test_nothing_is_left_from_the_call_before(name):
    change = dict(changes())[name]
    model, criterion = network((3, 5, 4, 3), (nn.Tanh, nn.LeakyReLU)), nn.CrossEntropyLoss()
    model[4].bias.requires_grad_(requires_grad=False)
    penalty = lowland.HessianTrace(criterion, 0.3, method="exact", limit=1e9)
    data = batch(criterion, 3, 3)
    before, _ = ours(penalty, model, *data)
    change(model, criterion)
    after = ours(penalty, model, *data)
    require_same(after, by_hand(model, criterion, *data, 0.3))
    assert not torch.equal(before, after[0])


@pytest.mark.parametrize("name", [name for name, _, _ in obstacles()])
def test_a_model_that_has_changed_is_refused(name):
    change, why = {name: rest for name, *rest in obstacles()}[name]
    model, criterion = network((3, 5, 5, 3), (nn.Tanh, nn.LeakyReLU)), nn.CrossEntropyLoss()
    penalty, data = lowland.HessianTrace(criterion, 0.3, method="exact", limit=1e9), batch(CE, 3, 3)
    ours(penalty, model, *data)
    change(model, criterion)
    with pytest.raises((lowland.UnsupportedModelError, ValueError, TypeError), match=why):
        penalty.loss(model, *data)


@pytest.mark.parametrize("kinds", [(nn.ReLU,), (nn.GELU, nn.Tanh), (nn.Tanh, nn.SiLU, nn.GELU)])
@pytest.mark.parametrize("criterion", [CE, BCE, MSE])
def test_either_gradient_comes_alone_and_at_its_own_price(kinds, criterion, monkeypatch):
    model = network((3, *(4 for _ in kinds), 3), kinds)
    x, y = batch(criterion, 3, 3)
    parameters = list(model.parameters())
    logits, trace = read(model, criterion, x, y).logits_and_trace()
    loss = criterion(logits, y)
    together = torch.autograd.grad(loss + 0.3 * trace, parameters, retain_graph=True)
    of_trace = torch.autograd.grad(trace, parameters, retain_graph=True)
    monkeypatch.setattr(TracePass, "_rise", None)  # what the trace alone needs
    of_loss = torch.autograd.grad(loss, parameters)
    plain = torch.autograd.grad(criterion(model(x), y), parameters)
    alone = torch.autograd.grad(read(model, criterion, x, y).moments().trace, parameters)
    for both, one, other, right, blocks in zip(
        together, of_loss, of_trace, plain, alone, strict=True
    ):
        torch.testing.assert_close(one, right, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(other, blocks, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(both, one + 0.3 * other, rtol=1e-11, atol=1e-12)


def test_nothing_of_the_logits_is_kept_that_a_criterion_may_write_to():
    handed = []

    def keeps(s, y):
        handed.append(s)
        return Separable(s, torch.ones_like(s), torch.zeros_like(s))

    from lowland.exact.logits import at_logits  # noqa: PLC0415
    from lowland.exact.terms import Data  # noqa: PLC0415

    own = Loss("own", lambda s, _: s.square() / 2, keeps)
    logits = torch.randn(5, 2)
    found = at_logits(own, logits.mT, Data(torch.randn(5, 3), torch.zeros(5, 2), 1.0))
    before = found.residual().clone()
    logits.add_(1)
    assert torch.equal(found.residual(), before)
    assert handed


def test_batches_and_types_may_change():
    model = network((3, 5, 3), (nn.Tanh,))
    penalty = lowland.HessianTrace(CE, 0.3, method="exact", limit=1e9)
    for samples in (6, 1, 9):
        data = batch(CE, 3, 3, samples)
        require_same(ours(penalty, model, *data), by_hand(model, CE, *data, 0.3))
    data = batch(CE, 3, 3)
    expected = by_hand(model, CE, *data, 0.3)[0]
    single = penalty.loss(model.float(), data[0].float(), data[1])
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kinds", [(nn.GELU,), (nn.GELU, nn.Tanh), (nn.GELU, nn.Tanh, nn.Tanh)])
def test_pieces_of_a_batch_give_what_the_whole_gives(kinds):
    model = network((3, *(4 for _ in kinds), 3), kinds)
    data = batch(CE, 3, 3, 40)
    setup = read(model, CE, *data)
    low, high = 1, 1 << 24
    while low < high:  # the smallest budget
        middle = (low + high) // 2
        try:
            setup.trace_problem(middle)
        except ValueError:
            low = middle + 1
        else:
            high = middle
    assert setup.logits_and_trace(low) is None
    whole, pieces = (
        ours(
            lowland.HessianTrace(CE, 0.3, method="exact", memory_budget=budget, limit=1e9),
            model,
            *data,
        )
        for budget in (1 << 28, low)
    )
    require_same(pieces, whole)


def test_it_is_differentiated_once_and_no_tensor_may_change_before_that():
    model = network((3, 5, 3), (nn.Tanh,))
    penalty, data = lowland.HessianTrace(CE, 0.3, method="exact", limit=None), batch(CE, 3, 3)
    first, second = (
        torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
        for total in [penalty.loss(model, *data)] * 2
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    slopes = torch.autograd.grad(
        penalty.loss(model, *data), list(model.parameters()), create_graph=True
    )
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.autograd.grad(slopes[0].sum(), list(model.parameters()))
    for tensor in (model[0].weight.data, data[0]):
        total = penalty.loss(model, *data)
        with torch.no_grad():
            model[0].weight.mul_(1.1) if tensor is not data[0] else data[0].mul_(1.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


def test_what_a_step_held_is_free_without_the_collector(monkeypatch):
    made = []

    class Watched(TracePass):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    monkeypatch.setattr(with_loss, "TracePass", Watched)
    model, data = network((3, 5, 3), (nn.Tanh,)), batch(CE, 3, 3)
    gc.collect()
    gc.disable()
    try:
        lowland.HessianTrace(CE, 0.3, method="exact", limit=1e9).loss(model, *data).backward()
        assert made
        assert made[0]() is None
    finally:
        gc.enable()


def test_loss_and_trace_have_a_gradient_in_layers_below_those_of_the_trace():
    model, data = network((3, 5, 3), (nn.Tanh,)), batch(CE, 3, 3)
    found = []
    for method in ("exact", "dense"):
        head = lowland.HessianTrace(
            CE, 0.3, method=method, parameters=model[2].parameters(), limit=1e9
        )
        found.append(torch.autograd.grad(head.loss(model, *data), model[0].weight)[0])
    torch.testing.assert_close(*found)
    (alone,) = torch.autograd.grad(CE(model(data[0]), data[1]), model[0].weight)
    assert (found[0] - alone).norm() > 1e-3


@pytest.mark.parametrize("kinds", [(nn.ReLU,), (nn.GELU, nn.GELU)])
def test_of_fitted_samples_single_precision_keeps_its_digits(kinds):
    # All probability is in one class but for 1e-9: differences from one would leave nothing.
    model = network((3, *(6 for _ in kinds), 3), kinds)
    with torch.no_grad():
        model[-1].bias.copy_(torch.tensor([0.0, 20.0, 1.0]))
    x, y = torch.randn(8, 3).double(), torch.ones(8, dtype=torch.long)
    penalty = lowland.HessianTrace(CE, 1.0, method="exact", limit=1e9)
    exact = torch.autograd.grad(penalty(model, x, y), list(model.parameters()))
    model.float()
    single = torch.autograd.grad(penalty(model, x.float(), y), list(model.parameters()))
    for one, other in zip(single, exact, strict=True):
        assert relative_error(one, other) < 1e-4


def test_one_output_takes_a_column_of_targets():
    weights = [torch.randn(4, 5).double(), torch.randn(6, 1).double()]
    x, y = torch.randn(7, 3).double(), torch.rand(7).double()
    settings = {"activation": "tanh", "loss": "bce"}
    for call in (lowland.exact.trace, lambda *a, **k: lowland.exact.moments(*a, **k).trace_sq):
        flat, column = (call(weights, x, each, **settings) for each in (y, y.unsqueeze(1)))
        assert torch.equal(flat, column)
    many = [torch.randn(7, 4, 5).double(), torch.randn(6, 1).double()]
    own = torch.rand(7, 7, 1).double()
    flat, column = (lowland.exact.trace(many, x, each, **settings) for each in (own[..., 0], own))
    assert flat.shape == (7,)
    assert torch.equal(flat, column)


@pytest.mark.parametrize(("kind", "engine"), [(nn.ReLU, "exact"), (nn.Tanh, "probes")])
def test_bends_of_deep_networks_are_left_to_probes(kind, engine):
    model = network((8, *[64] * 20, 5), [kind] * 20, dtype=torch.float32)
    penalty = lowland.HessianTrace(CE, 0.1, limit=1e9)
    penalty.loss(model, *batch(CE, 8, 5, 64, torch.float32))
    assert penalty.used == engine

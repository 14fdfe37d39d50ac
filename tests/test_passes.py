import collections
import copy
import functools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowland
from lowland.passes import frozen_statistics, remember_randomness, remember_state

KINDS = {
    "batch": lambda: nn.BatchNorm2d(3),
    "batch, cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "synchronized": lambda: nn.SyncBatchNorm(3),
    "instance": lambda: nn.InstanceNorm2d(3, track_running_stats=True, affine=True),
}


ON_CPU = sorted(set(KINDS) - {"synchronized"})  # that one trains on accelerators alone


def network(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), KINDS[kind](), nn.Flatten(), nn.Linear(48, 1))


def images(seed):
    return torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(seed)) + 3


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def gradients(model, x):
    loss = model(x).square().sum()
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("kind", ON_CPU)
def test_a_frozen_pass_gives_the_same_gradient_and_leaves_the_statistics(kind):
    model = network(kind)
    model(images(0))
    before = buffers(model)
    with frozen_statistics(model):
        frozen = gradients(model, images(1))
    torch.testing.assert_close(buffers(model), before, rtol=0, atol=0)
    torch.testing.assert_close(gradients(model, images(1)), frozen, rtol=0, atol=0)
    assert not torch.equal(buffers(model)["1.running_mean"], before["1.running_mean"])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_everything_is_as_before_afterwards_even_after_an_error(kind):
    model = network(kind)
    state = model.state_dict(keep_vars=True)
    with pytest.raises(ZeroDivisionError), frozen_statistics(model), frozen_statistics(model):
        raise ZeroDivisionError
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[name] is state[name] for name in state)
    assert model[1].track_running_stats


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_evaluation_mode_goes_on_using_the_statistics(kind):
    model = network(kind).eval()
    expected = model(images(0))
    with frozen_statistics(model):
        assert torch.equal(model(images(0)), expected)


@pytest.mark.parametrize("kind", ON_CPU)
def test_a_pending_backward_pass_goes_through(kind):
    model = network(kind)
    plain = copy.deepcopy(model)
    expected = gradients(plain, images(0))[1]
    pending = model(images(0)).square().sum()
    with frozen_statistics(model):
        model(images(1)).sum().backward()
    torch.testing.assert_close(
        torch.autograd.grad(pending, list(model.parameters())), expected, rtol=0, atol=0
    )


def test_several_modules_at_once_and_one_twice():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    with frozen_statistics(model[0], model[0], model[1]):
        model(torch.randn(4, 3))
    assert all(layer.num_batches_tracked == 0 for layer in model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_inside_leaves_the_statistics_too(reentrant):
    model = network("batch")
    before = buffers(model)
    with frozen_statistics(model):
        checkpoint(model, images(0).requires_grad_(), use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(buffers(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_a_compiled_model_is_compiled_once(kind):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = network(kind)
    compiled = torch.compile(model, backend=backend)
    for _ in range(3):
        compiled(images(0))
        before = buffers(model)
        with frozen_statistics(compiled):
            compiled(images(1))
        torch.testing.assert_close(buffers(model), before, rtol=0, atol=0)
    assert len(graphs) == 1


class Counting(nn.Module):
    """Writes to its state in each way that there is: in place, anew, and as a plain number."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("total", torch.zeros(()), persistent=False)
        self.register_buffer("late", None)
        self.calls = 0

    def forward(self, x):
        self.steps += 1
        self.total = self.total + x.detach().sum()
        self.late = self.total.clone()
        if not hasattr(self, "cache"):
            self.register_buffer("cache", x.detach().mean())
        self.calls += 1
        return self.scale * x * (self.steps + self.calls)


def state_of(model):
    held = {name: value.clone() for name, value in model.named_buffers()}
    return held, [module.calls for module in model.modules() if hasattr(module, "calls")]


def counting():
    return nn.Sequential(Counting(), nn.Linear(3, 3))


def spectral():
    return nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))


def former_spectral():
    return nn.utils.spectral_norm(nn.Linear(3, 3))


@pytest.mark.parametrize("make", [counting, spectral, former_spectral])
def test_whatever_a_forward_pass_writes_to_is_as_before(make):
    model = make()
    before = state_of(model)
    with frozen_statistics(model):
        first, _ = (model(torch.ones(2, 3)) for _ in range(2))
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)
    torch.testing.assert_close(model(torch.ones(2, 3)), first, rtol=0, atol=0)


def test_a_remembered_state_comes_again_any_number_of_times():
    model = counting()
    again = remember_state(model)
    outputs = [model(torch.ones(2, 3))]
    model(torch.ones(2, 3))
    now = state_of(model)
    for _ in range(2):
        with again():
            outputs.append(model(torch.ones(2, 3)))
    torch.testing.assert_close(state_of(model), now, rtol=0, atol=0)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_buffer_under_two_names_stays_one():
    model = nn.Sequential(Counting(), Counting())
    model[1].steps = model[0].steps
    with frozen_statistics(model):
        model(torch.ones(2))
        assert model[0].steps is model[1].steps
        assert int(model[0].steps) == 2
    assert int(model[0].steps) == 0


def test_scripted_modules_are_given_their_values_back():
    model = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))
    before = buffers(model)
    with frozen_statistics(model):
        model(torch.randn(4, 3))
    torch.testing.assert_close(buffers(model), before, rtol=0, atol=0)


def test_random_numbers_come_again_any_number_of_times():
    torch.manual_seed(3)
    again = remember_randomness()
    first = torch.rand(5)
    for _ in range(2):
        with again():
            assert torch.equal(torch.rand(5), first)


def test_the_stream_goes_on_as_if_nothing_had_been_drawn_again():
    torch.manual_seed(3)
    expected = torch.rand(5), torch.rand(5)
    torch.manual_seed(3)
    again = remember_randomness(["cpu"])
    first = torch.rand(5)
    with pytest.raises(ZeroDivisionError), again():
        torch.rand(7).div(1 // 0)
    assert torch.equal(first, expected[0])
    assert torch.equal(torch.rand(5), expected[1])


def test_dropout_drops_the_same_units():
    dropout, x = nn.Dropout(), torch.ones(100)
    again = remember_randomness()
    first, second = dropout(x), dropout(x)
    with again():
        assert torch.equal(dropout(x), first)
        assert torch.equal(dropout(x), second)
    assert not torch.equal(first, second)


@pytest.mark.gpu
def test_random_numbers_of_an_accelerator_come_again():
    again = remember_randomness(["cuda:0"])
    first = torch.rand(5, device="cuda:0")
    expected = torch.rand(5, device="cuda:0")
    with again():
        assert torch.equal(torch.rand(5, device="cuda:0"), first)
        assert torch.equal(torch.rand(5, device="cuda:0"), expected)


def test_numpys_random_numbers_come_again():
    again = remember_randomness()
    first, after = np.random.rand(), np.random.rand()  # noqa: NPY002
    with again():
        assert np.random.rand() == first  # noqa: NPY002
    with again():
        assert [np.random.rand() for _ in range(2)] == [first, after]  # noqa: NPY002


class Tracker:
    """An object of a user's own."""

    def __init__(self):
        self.count, self.seen, self.last = 0, [], None

    def take(self, x):
        self.count += 1
        self.seen.append(x.detach().mean())
        self.last = x.detach().clone()


class Keeping(nn.Module):
    """A module that keeps state in whatever there is to keep it in."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.steps, self.history, self.by_name = [0], collections.deque(maxlen=3), {"sum": 0.0}
        self.memory, self.nested = [torch.zeros(3)], {"inner": [torch.zeros(2), {"n": 1}]}
        self.array, self.tracker, self.mode = np.zeros(3), Tracker(), "fresh"
        self.draws, self.numpy = random.Random(0), np.random.default_rng(0)  # noqa: S311
        self.names, self.hidden = set(), (torch.zeros(2), torch.zeros(2))

    def forward(self, x):
        self.steps[0] += 1
        self.history.append(float(x.detach().mean()))
        self.by_name["sum"] += 1.0
        self.by_name[f"call {self.steps[0]}"] = x.detach()
        self.memory[0] += x.detach().mean(0)
        self.memory.append(x.detach())
        self.nested["inner"][0].add_(1)
        self.nested["inner"][1]["n"] += 1
        self.array += 1
        self.tracker.take(x)
        self.mode = "used"
        self.names.add(self.steps[0])
        self.hidden = tuple(h + 1 for h in self.hidden)
        self.made_on_first_use = x.detach().std()
        noise = self.draws.random() + self.numpy.random()
        return self.layer(x) * (1 + self.steps[0] + noise + self.memory[0].mean())


def contents_of(model):
    plain = {n: v for n, v in vars(model).items() if not n.startswith("_")}
    plain["tracker"] = vars(model.tracker)
    plain["draws"], plain["numpy"] = model.draws.getstate(), model.numpy.bit_generator.state
    return copy.deepcopy(plain)


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple | collections.deque):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, np.ndarray):
        assert (one == other).all()
    else:
        assert one == other


@pytest.mark.parametrize("used", [False, True])
def test_state_in_collections_and_objects_stays_and_each_pass_starts_from_it(used):
    torch.manual_seed(0)
    model, x = Keeping(), torch.randn(5, 3)
    if used:
        model(x)
    held = model.history, model.memory, model.memory[0], model.array
    before = contents_of(model)
    with frozen_statistics(model):
        first = model(x)
        assert model.steps[0] == before["steps"][0] + 1
    assert_same(contents_of(model), before)
    with frozen_statistics(model):
        assert torch.equal(model(x), first)
    now = model.history, model.memory, model.memory[0], model.array
    assert all(one is other for one, other in zip(held, now, strict=True))
    assert hasattr(model, "made_on_first_use") is used
    again = remember_state(model)
    model(x)
    after = contents_of(model)
    with again():
        assert torch.equal(model(x), first)
    assert_same(contents_of(model), after)


def test_recurrent_layers_keep_their_weights_in_a_list():
    model, x = nn.LSTM(3, 2), torch.randn(4, 1, 3)
    again = remember_state(model)
    with again(), frozen_statistics(model):
        model(x)
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))


class Weighing:
    """A criterion of one's own, which counts its calls in an attribute and in a list."""

    def __init__(self):
        self.calls, self.losses = 0, []

    def __call__(self, output, y):
        self.calls += 1
        loss = nn.functional.cross_entropy(output, y) * (1 + 0.1 * self.calls)
        self.losses.append(float(loss.detach()))
        return loss


def by_variable():
    calls, losses = 0, []

    def criterion(output, y):
        nonlocal calls
        calls += 1
        losses.append(calls)
        return nn.functional.cross_entropy(output, y) * (1 + 0.1 * calls)

    return criterion, lambda: (calls, list(losses))


def weighing():
    criterion = Weighing()
    return criterion, lambda: (criterion.calls, list(criterion.losses))


def a_method():
    criterion = Weighing()
    return criterion.__call__, lambda: (criterion.calls, list(criterion.losses))


def within_partial():
    criterion = Weighing()
    return functools.partial(criterion), lambda: (criterion.calls, list(criterion.losses))


@pytest.mark.parametrize("make", [by_variable, weighing, a_method, within_partial])
@pytest.mark.parametrize("products", ["autograd", "differences"])
def test_criteria_without_modules_keep_their_state_too(make, products):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 2
    criterion, state = make()
    before = state()
    found = lowland.hessian_moments(model, criterion, x, y, method="dense", products=products)
    assert state() == before
    right = lowland.hessian_moments(model, nn.CrossEntropyLoss(), x, y, method="dense")
    torch.testing.assert_close(found.trace, 1.1 * right.trace, rtol=1e-5, atol=0)
    lowland.spectrum(model, criterion, [(x, y)], k=1)
    lowland.HSR(criterion, 0.1, products=products)(model, x, y)
    assert state() == before


def test_what_a_pass_counts_as_a_step_counts_once():
    model = nn.Linear(3, 2)
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    for products in ("autograd", "differences"):
        criterion = Weighing()
        lowland.HSR(criterion, 0.1, products=products).loss(model, x, y)
        assert criterion.calls == 1


class Follower(nn.Module):
    """An encoder that follows another one, in parameters that are constants."""

    def __init__(self, rate):
        super().__init__()
        self.own, self.key, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.key.requires_grad_(False)
        self.rate = rate

    def forward(self, x):
        with torch.no_grad():
            pairs = zip(self.key.parameters(), self.own.parameters(), strict=True)
            for mine, other in pairs:
                mine.mul_(1 - self.rate).add_(other, alpha=self.rate)
        return self.head(torch.tanh(self.own(x) + self.key(x)))


def following(rate=0.001):
    torch.manual_seed(0)
    return Follower(rate).double(), torch.randn(12, 4).double(), torch.arange(12) % 3


@pytest.mark.parametrize("products", ["autograd", "differences"])
def test_constants_that_a_forward_pass_writes_to_are_state(products):
    model, x, y = following()
    before = [p.clone() for p in model.key.parameters()]
    criterion = nn.CrossEntropyLoss()
    found = lowland.hessian_moments(model, criterion, x, y, method="dense", products=products)
    lowland.spectrum(model, criterion, [(x, y)], k=1)
    lowland.hessian_diagonal(model, criterion, x, y)
    for now, then in zip(model.key.parameters(), before, strict=True):
        assert torch.equal(now, then)
    plain, _, _ = following(0.0)
    with torch.no_grad():
        for mine, other in zip(plain.key.parameters(), plain.own.parameters(), strict=True):
            mine.mul_(0.999).add_(other, alpha=0.001)
    right = lowland.hessian_moments(plain, criterion, x, y, method="dense")
    torch.testing.assert_close(found.trace, right.trace, rtol=0.01, atol=0)


@pytest.mark.parametrize("products", ["autograd", "differences"])
@pytest.mark.parametrize("penalty", [lowland.HSR, lowland.HessianTrace, lowland.LambdaMax])
def test_a_penalty_writes_to_constants_once_a_step(penalty, products):
    (model, x, y), (other, _, _) = following(), following()
    made = penalty(nn.CrossEntropyLoss(), 0.1, products=products)
    for _ in range(3):
        made.loss(model, x, y)
        other(x)
        for mine, theirs in zip(model.key.parameters(), other.key.parameters(), strict=True):
            assert torch.equal(mine, theirs)


class Hidden(nn.Module):
    """Modules that are not registered, in a list, a dictionary and a partial function."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.held = [nn.BatchNorm1d(2, affine=False)]
        self.named = {"norm": nn.BatchNorm1d(2, affine=False)}
        self.called = functools.partial(nn.BatchNorm1d(2, affine=False).forward)

    def forward(self, x):
        return self.called(self.named["norm"](self.held[0](self.layer(x))))


def test_modules_that_are_not_registered_keep_their_state():
    torch.manual_seed(0)
    model, x, y = Hidden(), torch.randn(8, 3), torch.arange(8) % 2
    norms = [model.held[0], model.named["norm"], model.called.func.__self__]
    lowland.hessian_moments(model, nn.CrossEntropyLoss(), x, y)
    assert all(not norm.running_mean.any() for norm in norms)
    lowland.HSR(nn.CrossEntropyLoss(), 0.1).loss(model, x, y)
    assert [int(norm.num_batches_tracked) for norm in norms] == [1, 1, 1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_modules_are_measured_and_stay():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(8, 3).double(), torch.arange(8) % 2
    traced = torch.jit.trace(plain, x)
    for method in ("auto", "dense"):
        found = lowland.hessian_moments(traced, nn.CrossEntropyLoss(), x, y, method=method)
        right = lowland.hessian_moments(plain, nn.CrossEntropyLoss(), x, y)
        torch.testing.assert_close(found.trace_sq, right.trace_sq.detach())

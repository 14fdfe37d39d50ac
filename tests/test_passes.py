import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

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

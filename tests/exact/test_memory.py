"""Temporaries stay within the budget, whatever the order, the path and the number of samples."""

import re

import cases
import oracle
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowland import exact
from lowland.exact import compiled
from lowland.exact.api import prepare
from lowland.exact.engine import run_moments

needs_library = pytest.mark.skipif(not compiled.is_available(), reason="built without a compiler")

# inputs, hidden, samples, ensemble
SIZES = {
    "small": (3, 4, 9, ()),
    "many parameters": (10, 12, 9, ()),
    "ensemble": (3, 4, 6, (4,)),
    "wide ensemble": (8, 3, 6, (3,)),
}


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside have held at a time."""

    def __init__(self):
        super().__init__()
        self.bytes, self._live = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))} - set(self._live)
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:  # a view of what the caller owns is no temporary
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: each for key, each in self._live.items() if not each[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._live.values()))
        return result


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def make(size, **options):
    inputs, hidden, samples, ensemble = SIZES[size]
    network = oracle.Network(inputs, hidden, "gelu", "bce")
    return cases.make(network, samples, ensemble=ensemble, **options)


def problem_of(case, order, budget, *, path):
    weights = [part.detach().requires_grad_() for part in case.weights]
    setup = prepare(weights, case.x, case.y, "gelu", "bce", "mean")
    return setup, setup.problem(order, budget, compiled=path == "compiled"), weights


def peak(case, order, budget, *, path="pytorch"):
    """Bytes of temporaries of both passes."""
    setup, problem, weights = problem_of(case, order, budget, path=path)
    assert problem.plan.compiled == (path == "compiled")
    with Peak() as measured:
        first, second = run_moments(problem, setup.weights)
        torch.autograd.grad((first + second).sum(), weights)
    return measured.bytes


def smallest(case, order):
    """The smallest budget that PyTorch's path accepts, to the byte: it names it itself."""
    low, high = 1, 1 << 30
    while low < high:
        middle = (low + high) // 2
        try:
            problem_of(case, order, middle, path="pytorch")
        except ValueError:
            low = middle + 1
        else:
            high = middle
    return low


@pytest.mark.parametrize("order", cases.ORDERS)
@pytest.mark.parametrize("size", SIZES)
def test_no_budget_is_exceeded(size, order):
    case = make(size)
    for generosity in (1, 3, 40):
        budget = generosity * smallest(case, order)
        assert peak(case, order, budget) <= budget


@pytest.mark.parametrize("order", cases.ORDERS)
def test_the_budget_is_used(order):
    """Otherwise a plan of tiny pieces would pass all the rest."""
    case = cases.make(oracle.Network(3, 4, "gelu", "bce"), 200)
    assert peak(case, order, 1 << 18) >= (1 << 18) / 8


def test_the_peak_over_parameters_does_not_grow_with_the_samples():
    few, many = (
        peak(cases.make(oracle.Network(3, 4, "gelu", "bce"), samples), "parameters", 200_000)
        for samples in (1000, 4000)
    )
    assert many <= 1.05 * few


def test_the_peak_of_the_trace_does_not_grow_with_the_samples():
    peaks = []
    for samples in (200, 5000):
        case = cases.make(oracle.Network(3, 4, "tanh", "bce"), samples)
        setup = prepare(case.weights, case.x, case.y, "tanh", "bce", "mean")
        with Peak() as measured:
            run_moments(setup.linear_problem("trace", 100_000), setup.weights)
        peaks.append(measured.bytes)
    assert peaks[1] <= max(peaks[0], 100_000)


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("size", SIZES)
def test_workspaces_and_copies_of_the_compiled_code_fit(size, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(compiled, "_WORTH_A_THREAD", 1)
    case = make(size)
    inputs, hidden, _, _ = SIZES[size]
    shape = inputs + 1, hidden, hidden + 1
    budget = smallest(case, "parameters")
    while not problem_of(case, "parameters", budget, path="compiled")[1].plan.compiled:
        budget *= 2
    for generous in (budget, 2 * budget, 16 * budget):
        setup, problem, _ = problem_of(case, "parameters", generous, path="compiled")
        plan = problem.plan
        workspaces = threads * compiled.workspace_bytes(setup.size, plan.block)
        copies = (threads + 1) * plan.networks * compiled.packed_entries(*shape) * 8
        assert workspaces + copies <= generous
        assert peak(case, "parameters", generous, path="compiled") + workspaces <= generous


@needs_library
def test_compiled_code_allocates_nothing_that_grows_with_the_samples(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    few, many = (
        peak(
            cases.make(oracle.Network(3, 4, "gelu", "bce"), samples),
            "parameters",
            1 << 22,
            path="compiled",
        )
        for samples in (100, 10_000)
    )
    assert many == few


@pytest.mark.parametrize("order", cases.ORDERS)
def test_a_budget_too_small_names_what_is_needed(order):
    case = make("many parameters")
    needed = smallest(case, order)
    other = {"samples": "parameters", "parameters": "samples"}[order]
    with pytest.raises(ValueError, match="raise memory_budget") as caught:
        exact.moments(*case.arguments, **case.settings, order=order, memory_budget=needed - 1)
    message = str(caught.value)
    assert f"is too small for order={order!r}" in message
    assert f"order={other!r}" in message
    named = float(re.search(r"smallest piece here takes (\S+) MiB", message)[1]) * (1 << 20)
    assert named == pytest.approx(needed, rel=0.01)


def test_a_budget_too_small_for_one_order_lets_auto_take_the_other():
    case = make("many parameters")
    budget = smallest(case, "samples")
    assert budget < smallest(case, "parameters")
    moments = exact.moments(*case.arguments, **case.settings, memory_budget=budget)
    expected = exact.moments(*case.arguments, **case.settings)
    torch.testing.assert_close(moments.trace_sq, expected.trace_sq, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="raise memory_budget"):
        exact.moments(*case.arguments, **case.settings, memory_budget=100)


@pytest.mark.parametrize("with_compiled_code", [True, False])
def test_the_trace_alone_of_a_wide_network_needs_no_matrix(monkeypatch, with_compiled_code):
    if not with_compiled_code:
        monkeypatch.setattr(compiled, "is_available", lambda: False)
    case = cases.make(oracle.Network(2, 3000, "sigmoid", "bce"), 60)  # P = 12,001
    trace = exact.trace(*case.arguments, **case.settings, memory_budget=8 << 20)
    diagonal = torch.zeros((), dtype=torch.float64)
    for start in range(0, 3000, 1000):  # hidden units share no diagonal entry
        part = slice(start, start + 1000)
        weight, output = case.weights
        z = torch.sigmoid(weight[0, part] + case.x @ weight[1:, part])
        slope = z * (1 - z)
        v = output[1:, 0][part]
        logit = case.network.logits(oracle.flatten(case.weights), case.x)
        p = torch.sigmoid(logit)[:, None]
        u, c = v * slope, v * slope * (1 - 2 * z)
        x_sq = 1 + case.x.square().sum(1, keepdim=True)
        inner = p * (1 - p) * u.square() + (p - case.y[:, None]) * c
        diagonal += (x_sq * inner + p * (1 - p) * z.square()).sum(1).mean()
    diagonal += (p * (1 - p)).mean()
    torch.testing.assert_close(trace, diagonal, rtol=1e-10, atol=0)

"""Temporaries stay within the budget, whatever the order, the path and the number of samples."""

import re

import cases
import oracle
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lowland import exact
from lowland.exact import c_backend
from lowland.exact.problem import run_moments

# Shapes are checked elsewhere; here are many small runs.
pytestmark = pytest.mark.usefixtures("as_installed")

needs_library = pytest.mark.skipif(not c_backend.is_available(), reason="built without a compiler")

SHALLOW = {  # network, samples, ensemble
    "small": (oracle.Network(3, 4, "gelu", "bce"), 6, ()),
    "many parameters": (oracle.Network(10, 12, "gelu", "bce"), 6, ()),
    "ensemble": (oracle.Network(3, 4, "gelu", "bce"), 4, (4,)),
    "wide ensemble": (oracle.Network(8, 3, "gelu", "bce"), 4, (3,)),
}
SIZES = {
    **SHALLOW,
    "linear": (oracle.Network(6, (), (), "ce", outputs=4), 6, ()),
    "many inputs, no hidden layer": (oracle.Network(40, (), (), "mse", outputs=2), 6, ()),
    "several outputs": (oracle.Network(5, 6, "gelu", "mse", outputs=3), 6, ()),
    "many classes": (oracle.Network(3, 4, "gelu", "ce", outputs=12), 7, ()),
    "a wide layer": (oracle.Network(3, 40, "gelu", "ce", outputs=2), 6, ()),
    "wide layers over a narrow one": (oracle.Network(3, (2, 20), "gelu", "bce"), 6, (2,)),
    "two hidden layers": (oracle.Network(5, (6, 4), "gelu", "ce", outputs=3), 6, ()),
    "many parameters in depth": (oracle.Network(8, (10, 9), "tanh", "bce"), 6, ()),
    "a bottleneck": (oracle.Network(8, (1, 8), "tanh", "mse", outputs=2), 4, (2,)),
    "four hidden layers": (oracle.Network(3, (4, 3, 4, 2), "gelu", "ce", outputs=3), 4, ()),
    "deep ensemble": (oracle.Network(2, (3, 2, 3), "gelu", "bce"), 3, (3,)),
}


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside have held at a time."""

    def __init__(self):
        super().__init__()
        self.bytes, self._held, self._live = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {storage._cdata for storage in _storages(args, *(kwargs or {}).values())}
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            key = storage._cdata
            # A view of what the caller owns is no temporary.
            if key in self._live or key not in given:
                self._held += storage.nbytes() - self._live.get(key, (None, 0))[1]
                self._live[key] = StorageWeakRef(storage), storage.nbytes()
        if self._held > self.bytes:  # or less, if some are gone
            self._live = {key: each for key, each in self._live.items() if not each[0].expired()}
            self._held = sum(size for _, size in self._live.values())
            self.bytes = max(self.bytes, self._held)
        return result


def _storages(*values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage()
        elif isinstance(value, list | tuple):
            yield from _storages(*value)


def make(size, **options):
    network, samples, ensemble = SIZES[size]
    return cases.make(network, samples, ensemble=ensemble, **options)


def peak(case, order, budget, *, path="pytorch", unbiased=False, matrix="hessian"):
    """Bytes of temporaries of both passes."""
    case = case.with_gradients()
    problem = (
        cases.prepare(case)
        .of(matrix)
        .problem(order, budget, compiled=path == "compiled", unbiased=unbiased)
    )
    assert problem.plan.compiled == (path == "compiled")
    weights = cases.prepare(case).weights
    with Peak() as measured:
        first, second = run_moments(problem, weights)
        torch.autograd.grad((first + second).sum(), case.weights)
    return measured.bytes


@pytest.mark.slow
@pytest.mark.parametrize("order", cases.ORDERS)
@pytest.mark.parametrize("size", SIZES)
def test_no_budget_is_exceeded(size, order):
    case = make(size)
    smallest = cases.smallest_budget(case, order)
    for generosity in (1, 3, 40):
        assert peak(case, order, generosity * smallest) <= generosity * smallest
    assert peak(case, order, 3 * smallest, unbiased=True) <= 3 * smallest
    for matrix in ("ggn", "residual"):
        assert peak(case, order, 3 * smallest, matrix=matrix) <= 3 * smallest


ALONE = {
    **SIZES,
    "more classes than samples": (oracle.Network(3, 8, "tanh", "ce", outputs=40), 12, ()),
    "more classes than samples, deep": (
        oracle.Network(3, (8, 5), "tanh", "ce", outputs=40),
        12,
        (),
    ),
}


@pytest.mark.parametrize("size", ALONE)
def test_no_budget_is_exceeded_by_the_trace_the_diagonal_and_the_gradient_of_the_loss(
    size, monkeypatch
):
    monkeypatch.setattr(c_backend, "is_available", lambda: False)
    network, samples, ensemble = ALONE[size]
    case = cases.make(network, samples, ensemble=ensemble).with_gradients()
    setup = cases.prepare(case)
    # A gradient of the weights' size and that of some networks are the results.
    results = 2 * sum(part.numel() * part.element_size() for part in case.weights)

    def trace_with_gradient(budget):
        torch.autograd.grad(setup.trace(budget).sum(), case.weights)

    residual = setup.of("residual").diagonal
    for compute in (trace_with_gradient, setup.loss_gradient, setup.diagonal, residual):
        with pytest.raises(ValueError, match="one sample's terms take") as caught:
            compute(1)
        smallest = float(re.search(r"terms take (\S+) MiB", str(caught.value))[1]) * (1 << 20)
        for generosity in (1.01, 3, 40):
            budget = int(generosity * smallest)
            with Peak() as measured:
                compute(budget)
            assert measured.bytes <= budget + results


GROWING = {
    "shallow": oracle.Network(3, 4, "gelu", "bce"),
    "no hidden layer": oracle.Network(6, (), (), "ce", outputs=4),
    "deep": oracle.Network(3, (4, 3), "gelu", "ce", outputs=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("order", cases.ORDERS)
@pytest.mark.parametrize("what", GROWING)
def test_the_budget_is_used(what, order):
    """Otherwise a plan of tiny pieces would pass all the rest."""
    case = cases.make(GROWING[what], 40)
    assert peak(case, order, 1 << 17) >= (1 << 17) / 8


@pytest.mark.slow
@pytest.mark.parametrize("what", GROWING)
def test_the_peak_over_parameters_does_not_grow_with_the_samples(what):
    few, many = (
        peak(cases.make(GROWING[what], samples), "parameters", 200_000) for samples in (200, 1000)
    )
    assert many <= 1.5 * few  # chunks are about as long, not exactly


@pytest.mark.slow
@pytest.mark.parametrize("what", GROWING)
def test_the_peak_of_the_trace_does_not_grow_with_the_samples(what):
    peaks = []
    for samples in (200, 5000):
        setup = cases.prepare(cases.make(GROWING[what], samples))
        with Peak() as measured:
            run_moments(setup.trace_problem(100_000), setup.weights)
        peaks.append(measured.bytes)
    assert peaks[1] <= max(peaks[0], 100_000)


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("size", SHALLOW)
def test_workspaces_and_copies_of_the_compiled_code_fit(size, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(c_backend, "_WORTH_A_THREAD", 1)
    case = make(size)
    setup = cases.prepare(case)
    inputs, hidden, _ = case.network.widths
    shape = inputs + 1, hidden, hidden + 1
    budget = cases.smallest_budget(case, "parameters")
    while not setup.problem("parameters", budget).plan.compiled:
        budget *= 2
    for generous in (budget, 2 * budget, 16 * budget):
        plan = setup.problem("parameters", generous).plan
        workspaces = threads * c_backend.workspace_bytes(setup.size, plan.chunk)
        copies = (threads + 1) * plan.networks * c_backend.packed_entries(*shape) * 8
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
@pytest.mark.parametrize("size", ["many parameters", "four hidden layers"])
def test_a_budget_too_small_names_what_is_needed(size, order):
    case = make(size)
    needed = cases.smallest_budget(case, order)
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
    budget = cases.smallest_budget(case, "samples")
    assert budget < cases.smallest_budget(case, "parameters")
    moments = exact.moments(*case.arguments, **case.settings, memory_budget=budget)
    expected = exact.moments(*case.arguments, **case.settings)
    torch.testing.assert_close(moments.trace_sq, expected.trace_sq, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="raise memory_budget"):
        exact.moments(*case.arguments, **case.settings, memory_budget=100)


@pytest.mark.parametrize("with_compiled_code", [True, False])
def test_the_trace_alone_of_a_wide_network_needs_no_matrix(monkeypatch, with_compiled_code):
    if not with_compiled_code:
        monkeypatch.setattr(c_backend, "is_available", lambda: False)
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


@pytest.mark.parametrize("order", cases.ORDERS)
def test_gradients_in_many_inputs_stay_within_the_budget(order):
    case = cases.make(oracle.Network(200, 8, "gelu", "ce", outputs=2), 600)
    x = case.x.clone().requires_grad_()
    weights = [part.requires_grad_() for part in case.weights]
    budget = 48 << 20
    with Peak() as peak:
        moments = exact.moments(
            weights, x, case.y, **case.settings, order=order, memory_budget=budget
        )
        torch.autograd.grad(moments.upper, [x, *weights])
    assert peak.bytes <= budget


@pytest.mark.parametrize("name", ["ensemble", "two hidden layers"])
@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_functions_of_eigenvalues_stay_within_the_budget(name, method):
    network, samples, ensemble = SIZES[name]
    case = cases.make(network, samples, ensemble=ensemble).with_gradients()
    settings = {**case.settings, "f": "lambda_max", "method": method}
    accepted, budget = 0, 1 << 12
    while accepted < 2:  # the first two that are not refused, which takes no time
        budget = 5 * budget // 4
        peak = Peak()
        try:
            with peak:
                value = exact.spectral(*case.arguments, **settings, memory_budget=budget)
                torch.autograd.grad(value.sum(), case.weights)
        except ValueError as refusal:
            assert "raise memory_budget" in str(refusal)  # noqa: PT017 - until it is enough
            continue
        accepted += 1
        assert peak.bytes <= budget

"""The compiled code is held to the PyTorch path, and both to brute force."""

import os
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cases
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowland import exact
from lowland.activations import leaky_relu
from lowland.exact import compiled
from lowland.exact.api import prepare
from lowland.exact.engine import run_moments
from lowland.exact.plan import DEFAULT_MEMORY_BUDGET

BOTH_TYPES = (torch.float64, torch.float32)

needs_library = pytest.mark.skipif(not compiled.is_available(), reason="built without a compiler")


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    """That many threads, however small the problem."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(compiled, "_WORTH_A_THREAD", 1)
    yield request.param
    torch.set_num_threads(before)


QUANTITIES = st.sampled_from(["moments", "trace"])


def solve(case, *, path, budget=DEFAULT_MEMORY_BUDGET, quantity="moments", activation=None, **rows):
    """``(trace, trace_sq, gradient of trace + 0.3 trace_sq)`` by one path."""
    network = case.network
    weights = [part.clone().requires_grad_() for part in case.weights]
    setup = prepare(
        weights,
        case.x,
        case.y,
        activation or network.activation,
        network.loss,
        network.reduction,
        **rows,
    )
    problem = setup.problem("parameters", budget, compiled=path == "compiled")
    assert problem.plan.compiled == (path == "compiled")
    problem = replace(problem, quantity=quantity)
    first, second = run_moments(problem, setup.weight, setup.output)
    grads = torch.autograd.grad((first + 0.3 * second).sum(), weights)
    return first.detach(), second.detach(), *grads


def in_double(case):
    return replace(
        case, weights=[part.double() for part in case.weights], x=case.x.double(), y=case.y.double()
    )


def assert_close(case, actual, expected):
    of_moments, of_gradient = case.tolerances
    # The trace is a sum of terms of both signs; sqrt(P Tr H^2) is what it cannot exceed.
    scale = (case.network.dim * expected[1]).sqrt().clamp(min=expected[0].abs())
    assert ((actual[0].double() - expected[0]).abs() <= of_moments * scale).all()
    assert ((actual[1].double() - expected[1]).abs() <= of_moments * expected[1]).all()
    for mine, theirs in zip(actual[2:], expected[2:], strict=True):
        assert mine.dtype == case.x.dtype
        assert cases.relative_error(mine, theirs) <= of_gradient


def assert_paths_agree(case, **options):
    expected = solve(in_double(case), path="pytorch", **options)
    assert_close(case, solve(case, path="compiled", **options), expected)


@st.composite
def trained_rows(draw, network):
    """The rows of ``W`` and ``v`` that frozen weights or biases leave."""
    whole = {"input_rows": network.inputs + 1, "output_rows": network.hidden + 1}
    slices = {
        name: draw(
            st.sampled_from([slice(0, n), slice(1, n), slice(0, 1), slice(1, 1)]), label=name
        )
        for name, n in whole.items()
    }
    empty = all(rows.start == rows.stop for rows in slices.values())
    return {"input_rows": slice(0, 1)} if empty else slices


@needs_library
@given(cases.cases(dtypes=BOTH_TYPES), QUANTITIES)
def test_compiled_code_agrees_with_pytorch(case, quantity):
    assert_paths_agree(case, quantity=quantity)


@needs_library
@settings(max_examples=20)
@given(
    st.sampled_from(sorted(oracle.ACTIVATIONS)),
    st.sampled_from(sorted(oracle.LOSSES)),
    st.sampled_from(BOTH_TYPES),
    st.integers(1, 1200),
    st.sampled_from([(), (2,), (7,)]),
    st.booleans(),
    QUANTITIES,
)
def test_blocks_lanes_and_threads_leave_no_seam(
    threads, activation, loss, dtype, samples, ensemble, own_data, quantity
):
    case = cases.make(
        oracle.Network(3, 5, activation, loss),
        samples,
        ensemble=ensemble,
        dtype=dtype,
        own_data=own_data,
    )
    assert_paths_agree(case, quantity=quantity)


@needs_library
@pytest.mark.parametrize("slope", [-0.5, 0.3, 1.0])
def test_any_slope_below_zero(slope):
    case = cases.make(oracle.Network(3, 5, "leaky_relu", "mse"), 50)
    assert_paths_agree(case, activation=leaky_relu(slope))


@given(cases.cases(), st.data())
def test_frozen_rows_leave_a_part_of_the_brute_force_hessian(case, data):
    network = case.network
    rows = data.draw(trained_rows(network))
    weighted = data.draw(st.booleans(), label="weighted")
    sample_weights = torch.linspace(0.5, 2, len(case.y.reshape(-1)), dtype=torch.float64)
    sample_weights = sample_weights.view(case.y.shape) if weighted else torch.ones_like(case.y)
    options = {**rows, "sample_weights": sample_weights} if weighted else rows
    paths = ["pytorch", "compiled"] if compiled.is_available() else ["pytorch"]
    results = [solve(case, path=path, **options) for path in paths]

    kept = torch.zeros(network.dim, dtype=torch.bool)
    w, v = oracle.unflatten(kept, network)
    w[rows.get("input_rows", slice(None))] = True
    v[rows.get("output_rows", slice(None))] = True
    every_weight = sample_weights.expand(*case.ensemble, -1)
    for number, (index, flat, x, y) in enumerate(case.singles()):
        scale = every_weight[index] / (len(x) if network.reduction == "mean" else 1)

        def part(flat, x=x, y=y, scale=scale):
            whole = torch.einsum("i,ijk->jk", scale, network.sample_hessians(flat, x, y))
            return whole[kept][:, kept]

        flat.requires_grad_()
        first, second = oracle.moments(part(flat))
        (expected,) = torch.autograd.grad(first + 0.3 * second, flat)
        for trace, trace_sq, *grads in results:
            assert (trace[number] - first).abs() <= 1e-10 * (network.dim * second).sqrt()
            assert (trace_sq[number] - second).abs() <= 1e-10 * second
            mine = oracle.flatten([grad[index] for grad in grads])
            assert cases.relative_error(mine, expected) <= 1e-9


@settings(max_examples=15)
@given(cases.cases(), st.sampled_from([1, 3, 20]), st.data())
def test_blocks_of_rows_leave_no_seam_in_pytorch(case, generosity, data):
    rows = data.draw(trained_rows(case.network))
    smallest = cases.smallest_budget(
        lambda memory_budget: solve(case, path="pytorch", budget=memory_budget, **rows)
    )
    actual = solve(case, path="pytorch", budget=generosity * smallest, **rows)
    assert_close(case, actual, solve(case, path="pytorch", **rows))


def test_without_the_library_pytorch_gives_the_numbers(monkeypatch):
    case = cases.make(oracle.Network(4, 5, "silu", "bce"), 100, ensemble=(3,))
    expected = solve(case, path="pytorch")
    monkeypatch.setattr(compiled, "_library", lambda: None)
    assert not compiled.is_available()
    weights = [part.clone().requires_grad_() for part in case.weights]
    moments = exact.moments(weights, case.x, case.y, **case.settings, order="parameters")
    grads = torch.autograd.grad((moments.trace + 0.3 * moments.trace_sq).sum(), weights)
    for one, other in zip((moments.trace, moments.trace_sq, *grads), expected, strict=True):
        assert torch.equal(one, other)
    trace = exact.trace(*case.arguments, **case.settings)
    torch.testing.assert_close(trace, moments.trace, rtol=1e-12, atol=0)


@needs_library
def test_callers_in_several_threads_do_not_disturb_each_other(threads):
    problems = [
        cases.make(oracle.Network(3, 2 + k % 3, "tanh", "bce"), 200, seed=k) for k in range(12)
    ]
    alone = [solve(case, path="compiled") for case in problems]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda case: solve(case, path="compiled"), problems))
    for one, other in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform does not fork")
def test_a_forked_child_has_threads_of_its_own(threads):
    case = cases.make(oracle.Network(3, 4, "tanh", "bce"), 200)
    expected = solve(case, path="compiled")  # the parent's threads are running now
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of any fork
        child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that waits for its parent's threads must not wait for ever
        with torch.no_grad():
            setup = prepare(*case.arguments, case.network.activation, case.network.loss, "mean")
            problem = setup.problem("parameters", DEFAULT_MEMORY_BUDGET)
            actual = run_moments(problem, setup.weight, setup.output)
        os._exit(0 if torch.equal(actual[1], expected[1]) else 1)
    assert os.waitpid(child, 0)[1] == 0


@needs_library
def test_a_workspace_that_cannot_be_had_is_an_error(monkeypatch):
    case = cases.make(oracle.Network(3, 4, "tanh", "bce"), 20)

    def without_memory(_kernel, _name):
        return lambda reference: setattr(reference._obj, "failed", 1)

    monkeypatch.setattr(compiled.Kernel, "_function", without_memory)
    with pytest.raises(MemoryError, match="workspace"):
        exact.moments(*case.arguments, **case.settings, order="parameters")

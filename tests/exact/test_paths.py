"""The compiled code is held to the PyTorch path, and both to brute force."""

import math
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
from lowland.activations import ACTIVATIONS, Activation, leaky_relu
from lowland.exact import c_backend
from lowland.exact.plan import DEFAULT_MEMORY_BUDGET
from lowland.exact.problem import run_moments
from lowland.exact.setup import prepare
from lowland.losses import LOSSES

BOTH_TYPES = (torch.float64, torch.float32)

needs_library = pytest.mark.skipif(not c_backend.is_available(), reason="built without a compiler")


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    """That many threads, however small the problem."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(c_backend, "_WORTH_A_THREAD", 1)
    yield request.param
    torch.set_num_threads(before)


COVERED = cases.shallow()
QUANTITIES = st.sampled_from(["moments", "trace"])


def solve(
    case,
    *,
    path,
    order="parameters",
    budget=DEFAULT_MEMORY_BUDGET,
    quantity="moments",
    activation=None,
    **options,
):
    """``(trace, trace_sq, gradient of trace + 0.3 trace_sq)`` by one path."""
    case = case.with_gradients()
    setup = cases.prepare(case, activation=activation, **options)
    problem = setup.problem(order, budget, compiled=path == "compiled")
    assert problem.plan.compiled == (path == "compiled")
    problem = replace(problem, quantity=quantity)
    first, second = run_moments(problem, setup.weights)
    grads = torch.autograd.grad((first + 0.3 * second).sum(), case.weights)
    return first.detach(), second.detach(), *grads


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
    expected = solve(case.in_double(), path="pytorch", **options)
    assert_close(case, solve(case, path="compiled", **options), expected)


@st.composite
def trained_rows(draw, network):
    """The rows of each layer's weights that frozen weights or biases leave."""
    rows = [
        draw(st.sampled_from([slice(0, n), slice(1, n), slice(0, 1), slice(1, 1)]), label="rows")
        for n, _ in network.shapes
    ]
    empty = all(part.start == part.stop for part in rows)
    return [slice(0, 1), *rows[1:]] if empty else rows


@pytest.mark.slow
@needs_library
@given(cases.cases(dtypes=BOTH_TYPES, networks=COVERED), QUANTITIES)
def test_compiled_code_agrees_with_pytorch(case, quantity):
    assert_paths_agree(case, quantity=quantity)


@needs_library
@settings(max_examples=40)
@given(cases.cases(networks=COVERED), st.data())
def test_compiled_matrices_and_contractions_agree_with_pytorch(case, data):
    setup = cases.prepare(case, rows=data.draw(trained_rows(case.network)))
    dim, networks = setup.size.dim, setup.size.networks
    half = torch.linspace(-1, 2, networks * dim * dim, dtype=torch.float64).view(-1, dim, dim)
    constant = half.sin() + half.sin().mT
    found = []
    for each in (setup, setup.of_plain_code()):
        problem = each.matrix_problem(DEFAULT_MEMORY_BUDGET, 8, "this")
        assert problem.plan.compiled == each.covered
        found.append(
            problem.on_backend(
                each.weights,
                lambda some, backend: (backend.hessian(), *backend.contraction(constant[some])),
            )
        )
    whole = [map(torch.cat, zip(*parts, strict=True)) for parts in found]
    for mine, theirs in zip(*whole, strict=True):
        assert cases.relative_error(mine.view_as(theirs), theirs) <= case.tolerances[1]


@needs_library
@settings(max_examples=20)
@given(
    st.sampled_from(sorted(oracle.ACTIVATIONS)),
    st.sampled_from(["bce", "mse"]),
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


SOFT = torch.linspace(0, 1, 10, dtype=torch.float64)
NOT_COVERED = {
    "no hidden layer": oracle.Network(3, (), (), "bce"),
    "two hidden layers": oracle.Network(3, (4, 2), "tanh", "bce"),
    "two outputs": oracle.Network(3, 4, "tanh", "bce", outputs=2),
    "classes": oracle.Network(3, 4, "tanh", "ce", outputs=2),
    "a loss of one's own": oracle.Network(3, 4, "tanh", "poisson"),
    "soft labels": oracle.Network(3, 4, "tanh", "bce"),
}


@pytest.mark.parametrize("what", NOT_COVERED)
def test_the_rest_takes_pytorch_without_being_asked_to(what):
    case = cases.make(NOT_COVERED[what], 10, y=SOFT if what == "soft labels" else None)
    setup = cases.prepare(case)
    assert not setup.problem("parameters", DEFAULT_MEMORY_BUDGET).plan.compiled
    assert not setup.trace_problem(DEFAULT_MEMORY_BUDGET).plan.compiled


@needs_library
def test_what_only_bears_the_name_of_a_known_one_takes_pytorch():
    x, y = torch.ones(5, 2, dtype=torch.float64), torch.ones(5)
    weights = cases.make(oracle.Network(2, 3, "tanh", "mse"), 5).weights
    half = replace(LOSSES["mse"], value=lambda s, y: (s - y) ** 2)
    other = Activation("tanh", ACTIVATIONS["gelu"].function)
    covered = [("tanh", "mse"), (leaky_relu(0.7), "bce")]
    for activation, loss in [*covered, ("tanh", half), (other, "mse")]:
        setup = prepare(weights, x, y, activation, loss, "mean")
        compiled_path = setup.problem("parameters", DEFAULT_MEMORY_BUDGET).plan.compiled
        assert compiled_path == ((activation, loss) in covered)


def weighed(case, scale):
    """A function of the flat parameters: the loss with a weight for each sample and output."""
    network = replace(case.network, reduction="sum")

    def loss(flat, x, y, scale):
        losses = network.losses(flat, x, y)
        return (losses.reshape(len(x), -1) * scale.reshape(len(x), -1)).sum()

    return torch.func.hessian(loss)


SCALES = st.sampled_from(["none", "samples", "outputs"])


def draw_scale(case, kind):
    """Weights of samples, or of each of their outputs, in the shape of each data set."""
    by_output = kind == "outputs" and case.network.loss != "ce"
    shape = (*case.x.shape[:-1], case.network.outputs if by_output else 1)
    scale = torch.linspace(0.5, 2, math.prod(shape), dtype=torch.float64).view(shape)
    return scale if by_output else scale.squeeze(-1)


@pytest.mark.slow
@settings(max_examples=60)
@given(cases.cases(), st.data())
def test_frozen_rows_leave_a_part_of_the_brute_force_hessian(case, data):
    network = case.network
    rows = data.draw(trained_rows(network))
    kind = data.draw(SCALES, label="scale")
    options = {"rows": rows}
    if kind == "none":
        terms = case.samples * (1 if network.loss == "ce" else network.outputs)
        scale = torch.ones(case.x.shape[:-1], dtype=torch.float64)
        scale = scale / terms if network.reduction == "mean" else scale
    else:
        scale = options["scale"] = draw_scale(case, kind)
    results = [
        solve(case, path="pytorch", order=order, quantity=quantity, **options)
        for order in cases.ORDERS
        for quantity in ("moments", "trace")
    ]
    if cases.prepare(case).covered:
        results.append(solve(case, path="compiled", **options))

    kept = torch.zeros(network.dim, dtype=torch.bool)
    for part, trained in zip(oracle.unflatten(kept, network), rows, strict=True):
        part[trained] = True
    own = scale.ndim - (case.x.ndim - 2)
    scales = scale.expand(*case.ensemble, *scale.shape[-own:])
    for number, (index, flat, x, y) in enumerate(case.singles()):
        flat.requires_grad_()
        whole = weighed(case, scales)(flat, x, y, scales[index])
        first, second = oracle.moments(whole[kept][:, kept])
        first_grad, second_grad = (
            torch.autograd.grad(part, flat, retain_graph=True, materialize_grads=True)[0]
            for part in (first, second)
        )
        size = (network.dim * second).sqrt()
        for trace, trace_sq, *grads in results:
            alone = not trace_sq.any()  # the trace alone was asked for, or there is no curvature
            assert (trace[number] - first).abs() <= 1e-10 * size
            expected = first_grad
            natural = first_grad.abs().max()
            if not alone:
                assert (trace_sq[number] - second).abs() <= 1e-10 * second
                expected = first_grad + 0.3 * second_grad
                natural = natural + 0.3 * second_grad.abs().max()
            mine = oracle.flatten([grad[index] for grad in grads])
            assert (mine - expected).abs().max() <= 1e-9 * natural


@pytest.mark.slow
@settings(max_examples=25)
@given(
    cases.cases(most_samples=6),
    st.sampled_from(cases.ORDERS),
    st.sampled_from([1, 3, 20]),
    st.data(),
)
def test_pieces_leave_no_seam_in_pytorch(case, order, generosity, data):
    options = {
        "rows": data.draw(trained_rows(case.network)),
        "scale": draw_scale(case, data.draw(SCALES)),
    }
    budget = generosity * cases.smallest_budget(case, order, **options)
    actual = solve(case, path="pytorch", order=order, budget=budget, **options)
    assert_close(case, actual, solve(case, path="pytorch", order=order, **options))


def test_without_the_library_pytorch_gives_the_numbers(monkeypatch):
    case = cases.make(oracle.Network(4, 5, "silu", "bce"), 100, ensemble=(3,))
    expected = solve(case, path="pytorch")
    monkeypatch.setattr(c_backend, "_library", lambda: None)
    assert not c_backend.is_available()
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
            setup = cases.prepare(case)
            problem = setup.problem("parameters", DEFAULT_MEMORY_BUDGET)
            actual = run_moments(problem, setup.weights)
        os._exit(0 if torch.equal(actual[1], expected[1]) else 1)
    assert os.waitpid(child, 0)[1] == 0


@needs_library
def test_a_workspace_that_cannot_be_had_is_an_error(monkeypatch):
    case = cases.make(oracle.Network(3, 4, "tanh", "bce"), 20)

    def without_memory(_backend, _name):
        return lambda share: setattr(share._obj, "failed", 1)

    monkeypatch.setattr(c_backend.CBackend, "_function", without_memory)
    with pytest.raises(MemoryError, match="workspace"):
        exact.moments(*case.arguments, **case.settings, order="parameters")

from dataclasses import replace
from functools import partial

import oracle
import plain
import pytest
import torch
from torch import nn

import lowland
from lowland.dense import dense_hessian
from lowland.studies.ensembles.extremes import extreme_eigenvalues
from lowland.studies.ensembles.networks import initial_weights, mean_loss
from lowland.studies.ensembles.training import (
    CURVES,
    METHODS,
    DivergenceError,
    Method,
    Schedule,
    lambda_max_gradient,
    train,
)

LAMBDA_MAX = Method("lambda-max", "", "", lambda_max_gradient)


def largest_eigenvalue(criterion, weight, **_):
    """A penalty that autograd differentiates through the decomposition."""
    return lambda model, x, y: (
        weight * torch.linalg.eigvalsh(dense_hessian(model, criterion, x, y))[-1]
    )


PENALTIES = {  # the library's modules, differentiated by autograd of the whole Hessian
    "lambda-max": largest_eigenvalue,
    "hsr": partial(lowland.HSR, limit=None),
    "hessian-trace": partial(lowland.HessianTrace, limit=None),
    "flatness-aware": partial(lowland.FlatnessAware, limit=None),
}


@pytest.fixture
def problem(generator):
    start = initial_weights(range(3), (2, 3, 1))
    x = torch.randn(3, 20, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    y = (x[:, :, 0] + 0.5 * noise > 0).double()
    return start, x, y


def run(methods, problem, *, loss="bce", **settings):
    start, x, y = problem
    schedule = Schedule(**settings)
    return train(methods, start, x, y, schedule=schedule, activation="tanh", loss=loss)


def plain_loop(method, problem, index, *, loss, steps, learning_rate, active_steps):
    """One network, one step at a time, in plain PyTorch."""
    weights, x, y = problem[0], problem[1][index], problem[2][index]
    model = plain.module(weights, index)
    criterion = nn.CrossEntropyLoss() if loss == "ce" else nn.BCEWithLogitsLoss()
    y = y if loss == "ce" else y[:, None]
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    for step in range(steps):
        optimizer.zero_grad()
        value = criterion(model(x), y)
        if method.penalty_gradient is not None and step < active_steps:
            penalty = PENALTIES[method.name](criterion, method.weight, method="dense")
            value = value + penalty(model, x, y)
        value.backward()
        optimizer.step()
    return plain.weights_of(model)


@pytest.mark.parametrize("method", [*METHODS.values(), LAMBDA_MAX], ids=lambda each: each.name)
@pytest.mark.parametrize(
    ("sizes", "loss"),
    [
        ((2, 3, 1), "bce"),
        ((2, 3, 2, 1), "bce"),
        ((2, 3, 3), "ce"),
        ((2, 3, 2, 2, 3), "ce"),
        ((2, 3), "ce"),
    ],
)
def test_training_is_a_plain_loop_over_networks(method, sizes, loss):
    weights = {"hsr": 0.2, "hessian-trace": 0.1, "flatness-aware": 5.0, "lambda-max": 0.2}
    method = replace(method, weight=weights.get(method.name, 0.0))
    problem = plain.problem(sizes, loss)
    settings = {"loss": loss, "steps": 9, "learning_rate": 0.5}
    (result,) = run([method], problem, active=0.5, **settings)
    for i in range(3):
        expected = plain_loop(method, problem, i, active_steps=5, **settings)  # 9 / 2, rounded up
        for part, single in zip(result.weights, expected, strict=True):
            torch.testing.assert_close(part[i], single, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 3, 1), (2, 3, 2, 1)])
def test_adaptive_sam_is_the_optimizer_step_by_step(sizes):
    method = Method("a-sam", "A-SAM", "L", radius=0.2)
    problem = plain.problem(sizes, "bce")
    (baseline,) = run([METHODS["baseline"]], problem, steps=6)
    criterion = nn.BCEWithLogitsLoss()
    for i in range(3):
        model = plain.module(problem[0], i)
        sam = lowland.SAM(model.parameters(), torch.optim.SGD, 0.2, adaptive=True, lr=0.7)
        sgd = torch.optim.SGD(model.parameters(), lr=0.7)
        x, y = problem[1][i], problem[2][i]

        def closure(model=model, x=x, y=y):
            model.zero_grad()
            loss = criterion(model(x).squeeze(1), y)
            loss.backward()
            return loss

        for steps in range(1, 7):
            # Of all 6 steps the first half is A-SAM's.
            active = min(steps, 3) / steps
            (result,) = run([method], problem, steps=steps, learning_rate=0.7, active=active)
            (sam if steps <= 3 else sgd).step(closure)
            for part, expected in zip(result.weights, plain.weights_of(model), strict=True):
                torch.testing.assert_close(part[i], expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(result.weights[0], baseline.weights[0], rtol=1e-3)


@pytest.mark.parametrize("method", [*METHODS.values(), Method("a-sam", "", "", radius=0.1)])
def test_shared_samples_are_those_of_every_network(problem, method):
    start, x, y = problem
    settings = {"steps": 60, "tolerance": 0.5, "checkpoints": 4}
    method = replace(method, weight=min(method.weight, 1.0))
    (shared,) = run([method], (start, x[:1], y[:1]), **settings)
    copies = x[:1].repeat(3, 1, 1), y[:1].repeat(3, 1)
    (copied,) = run([method], (start, *copies), **settings)
    assert shared.converged.any()  # so that networks left, and their data with them
    assert torch.equal(shared.steps, copied.steps)
    for part, other in zip(shared.weights, copied.weights, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-9, atol=1e-12)
    for name in CURVES:
        torch.testing.assert_close(shared.curves[name], copied.curves[name], rtol=1e-8, atol=1e-11)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("tolerance", [1e-3, 0.3])
def test_all_curves_are_right_at_a_checkpoint(problem, tolerance):
    """Also for a network that stopped since the checkpoint before."""
    settings = {"learning_rate": 1.0, "tolerance": tolerance}
    (whole,) = run([METHODS["hsr"]], problem, steps=60, checkpoints=4, active=0.5, **settings)
    assert whole.checkpoints == [0, 20, 40, 60]
    assert whole.curves.keys() == set(CURVES)
    assert bool(whole.converged.any()) is (tolerance == 0.3)
    network = oracle.Network(2, 3, "tanh", "bce")
    for index, steps in ((1, 20), (2, 40), (3, 60)):
        active = min(steps, 30) / steps
        (there,) = run([METHODS["hsr"]], problem, steps=steps, active=active, **settings)
        for i in range(3):
            flat = oracle.flatten([part[i] for part in there.weights])
            matrix = network.hessian(flat, problem[1][i], problem[2][i])
            values = torch.linalg.eigvalsh(matrix)
            upper = oracle.upper(*oracle.moments(matrix), network.dim)
            expected = {
                "loss": network.loss_of(flat, problem[1][i], problem[2][i]),
                "lambda_max": values[-1],
                "lambda_min": values[0],
                "upper_bound": upper,
                "lower_bound": 2 * matrix.trace() / network.dim - upper,
            }
            for name, value in expected.items():
                torch.testing.assert_close(
                    whole.curves[name][index, i], value, rtol=1e-8, atol=1e-10
                )


def test_a_penalty_changes_the_path_only_while_it_acts(problem):
    none, some = (run([METHODS["hsr"]], problem, steps=6, active=a)[0] for a in (0.0, 0.5))
    (never,) = run([METHODS["baseline"]], problem, steps=6)
    assert torch.equal(none.weights[0], never.weights[0])
    assert not torch.equal(some.weights[0], never.weights[0])


@pytest.mark.slow
def test_a_network_does_not_depend_on_its_ensemble(problem):
    start, x, y = problem
    together = run(list(METHODS.values()), problem, steps=12)
    for whole in together:
        alone = train(
            [whole.method],
            (start[0][1:2], start[1][1:2]),
            x[1:2],
            y[1:2],
            schedule=Schedule(steps=12),
            activation="tanh",
            loss="bce",
        )[0]
        for part, single in zip(whole.weights, alone.weights, strict=True):
            torch.testing.assert_close(part[1:2], single, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_methods_side_by_side_come_out_as_one_by_one():
    start, x, y = plain.problem((3, 4, 3), "ce")
    model = {"schedule": Schedule(steps=12), "activation": "tanh", "loss": "ce"}
    alone, together = (
        train(list(METHODS.values()), start, x, y, workers=workers, **model) for workers in (1, 3)
    )
    for one, other in zip(alone, together, strict=True):
        assert one.method == other.method
        assert all(torch.equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))
        assert all(torch.equal(one.curves[name], other.curves[name]) for name in CURVES)


def test_divergence_side_by_side_is_named_all_the_same(problem):
    start, x, y = problem
    method = replace(METHODS["hsr"], weight=1e308)
    with pytest.raises(DivergenceError, match=r"HSR diverged at step 1; use a smaller learning"):
        train(
            [METHODS["baseline"], method],
            start,
            x,
            y,
            schedule=Schedule(steps=5, learning_rate=1e6),
            activation="tanh",
            loss="bce",
            workers=2,
        )


def test_the_start_is_left_as_it_was(problem):
    before = [part.clone() for part in problem[0]]
    run(list(METHODS.values()), problem, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(before, problem[0], strict=True))


def test_converged_networks_stop_and_the_others_go_on(problem):
    (long,) = run([METHODS["baseline"]], problem, steps=400, tolerance=0.3, checkpoints=401)
    assert long.converged.all()
    first, middle = (int(step) for step in long.steps.sort().values[:2])
    assert first < middle  # or the test would not look at what it should
    (cut,) = run([METHODS["baseline"]], problem, steps=first + 1, tolerance=0.3)
    assert cut.converged.sum() == 1
    assert sorted(cut.steps.tolist()) == [first, first + 1, first + 1]
    stopped = int(cut.converged.nonzero())
    for part, longer in zip(cut.weights, long.weights, strict=True):
        assert torch.equal(part[stopped], longer[stopped])
    # Its curves stay where they were when it stopped.
    assert (long.loss[first:, stopped] == long.loss[first, stopped]).all()
    assert (long.lambda_max[first:, stopped] == long.lambda_max[first, stopped]).all()


def test_curves_of_a_stopped_network_end_where_it_stopped(problem):
    # It stops between the first checkpoint and the last.
    settings = {"steps": 3000, "learning_rate": 2.0, "tolerance": 0.3, "checkpoints": 2}
    (trained,) = run([METHODS["baseline"]], problem, **settings)
    assert trained.converged.all()
    _, x, y = problem
    expected = mean_loss(trained.weights, x, y, activation="tanh", loss="bce")
    _, largest = extreme_eigenvalues(trained.weights, x, y, activation="tanh", loss="bce")
    torch.testing.assert_close(trained.loss[-1], expected)
    torch.testing.assert_close(trained.lambda_max[-1], largest)


def test_a_network_stops_when_its_gradient_is_a_fraction_of_the_first(problem):
    (result,) = run([METHODS["baseline"]], problem, steps=400, tolerance=0.3)
    for i in range(3):

        def norm(weights, i=i):
            leaves = [part[i].clone().requires_grad_() for part in weights]
            hidden = torch.tanh(leaves[0][0] + problem[1][i] @ leaves[0][1:])
            logit = (leaves[1][0] + hidden @ leaves[1][1:]).squeeze(1)
            loss = nn.functional.binary_cross_entropy_with_logits(logit, problem[2][i])
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)]).norm()

        (before,) = run([METHODS["baseline"]], problem, steps=int(result.steps[i]) - 1)
        initial = norm(problem[0])
        assert norm(result.weights) < 0.3 * initial <= norm(before.weights)


def test_curves_are_measured_at_the_checkpoints(problem):
    (result,) = run([METHODS["hsr"]], problem, steps=10, checkpoints=3)
    assert result.checkpoints == [0, 5, 10]
    (half,) = run([METHODS["hsr"]], problem, steps=5, active=1.0, checkpoints=2)
    torch.testing.assert_close(result.loss[:2], half.loss)
    torch.testing.assert_close(result.lambda_max[:2], half.lambda_max)
    _, largest = extreme_eigenvalues(result.weights, *problem[1:], activation="tanh", loss="bce")
    torch.testing.assert_close(result.lambda_max[-1], largest)


@pytest.mark.parametrize(("steps", "expected"), [(1, [0, 1]), (3, [0, 1, 2, 3]), (8, [0, 4, 8])])
def test_checkpoints_are_even_and_hold_both_ends(steps, expected):
    count = 3 if steps == 8 else 41
    assert Schedule(steps=steps, checkpoints=count).checkpoint_steps == expected


def test_steps_are_reported_as_they_are_done(problem):
    seen = []
    start, x, y = problem
    train(
        [METHODS["baseline"]],
        start,
        x,
        y,
        schedule=Schedule(steps=4),
        activation="tanh",
        loss="bce",
        on_step=seen.append,
    )
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("steps", [1, 5])
def test_divergence_is_named_with_its_method_and_step(problem, steps):
    method = replace(METHODS["hsr"], weight=1e308)
    with pytest.raises(DivergenceError, match=r"HSR diverged at step 1; use a smaller learning"):
        run([METHODS["baseline"], method], problem, steps=steps, learning_rate=1e6)


def test_the_largest_eigenvalue_of_what_has_overflowed_is_told_as_divergence(problem):
    start, x, y = problem
    # Two units that cancel: the loss stays what it was, the Hessian's entries are squares of 1e200.
    twins, outputs = start[0].clone(), torch.zeros_like(start[1])
    twins[..., 1] = twins[..., 0]
    outputs[:, 1], outputs[:, 2] = 1e200, -1e200
    far = twins, outputs
    with pytest.raises(DivergenceError, match="diverged at step 1"):
        run([replace(LAMBDA_MAX, weight=1.0)], (far, x, y), steps=2, active=1.0)

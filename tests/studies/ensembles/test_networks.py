import plain
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lowland.studies.ensembles.networks import (
    initial_weights,
    logits,
    mean_loss,
    one_by_one,
    parameter_count,
    pick,
    select,
)

SIZES = st.lists(st.integers(1, 5), min_size=2, max_size=5)


@pytest.fixture
def problem(generator):
    weights = initial_weights(range(3), (4, 5, 1))
    x = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64)
    y = (torch.rand(3, 7, generator=generator) < 0.5).double()
    return weights, x, y


@given(SIZES)
def test_a_start_depends_on_its_seed_alone(sizes):
    several = initial_weights(range(5, 9), sizes)
    single = initial_weights(range(7, 8), sizes)
    assert all(torch.equal(a[2], b[0]) for a, b in zip(several, single, strict=True))
    assert not torch.equal(several[0][0], several[0][1])


def test_starts_are_distributed_as_those_of_linear_layers():
    weights = initial_weights(range(200), (9, 4, 16, 3))
    assert [part.shape[1:] for part in weights] == [(10, 4), (5, 16), (17, 3)]
    for part, bound in zip(weights, (1 / 3, 1 / 2, 1 / 4), strict=True):
        assert part.abs().max() <= bound
        assert part.abs().max() > 0.99 * bound
        assert abs(float(part.std()) / bound - 3**-0.5) < 0.03


def test_the_process_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    initial_weights(range(3), (2, 2, 1))
    assert torch.equal(torch.get_rng_state(), before)


@given(SIZES)
def test_parameters_are_counted_as_they_are_made(sizes):
    weights = initial_weights(range(1), sizes)
    assert parameter_count(sizes) == sum(part.numel() for part in weights)


@given(SIZES, st.sampled_from(["bce", "ce"]))
def test_an_ensemble_computes_what_its_modules_do(sizes, loss):
    assume(loss == "bce" or sizes[-1] > 1)
    weights, x, y = plain.problem(sizes, loss)
    values = logits(weights, x, "tanh")
    losses = mean_loss(weights, x, y, activation="tanh", loss=loss)
    for i in range(3):
        output = plain.module(weights, i)(x[i])
        torch.testing.assert_close(values[i], output)
        torch.testing.assert_close(losses[i], plain.loss_of(output, y[i], loss))


def test_a_squared_error_has_one_target_a_logit(generator):
    weights, x, _ = plain.problem((3, 2, 4), "bce")
    y = torch.randn(3, 12, 4, generator=generator, dtype=torch.float64)
    losses = mean_loss(weights, x, y, activation="tanh", loss="mse")
    torch.testing.assert_close(losses, (logits(weights, x, "tanh") - y).square().mean((1, 2)))


@given(SIZES)
def test_select_takes_some_networks(sizes):
    weights = initial_weights(range(3), sizes)
    for part, whole in zip(select(weights, torch.tensor([2, 0])), weights, strict=True):
        assert torch.equal(part, whole[[2, 0]])


@given(SIZES, st.booleans())
def test_networks_come_one_by_one_as_copies(sizes, shared):
    weights, x, y = plain.problem(sizes, "bce")
    if shared:
        x, y = x[:1], y[:1]
    seen = list(one_by_one(weights, x, y))
    assert len(seen) == 3
    for i, (own, own_x, own_y) in enumerate(seen):
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(own, weights, strict=True))
        assert torch.equal(own_x, x if shared else x[i : i + 1])
        assert torch.equal(own_y, y if shared else y[i : i + 1])
        own[0].zero_()
    assert weights[0].all()


def test_shared_data_serve_every_network(problem):
    weights, x, y = problem
    one, target = x[:1], y[:1]
    settings = {"activation": "tanh", "loss": "bce"}
    shared = mean_loss(weights, one, target, **settings)
    assert torch.equal(
        shared, mean_loss(weights, one.expand_as(x), target.expand_as(y), **settings)
    )
    assert pick(one, torch.tensor([2, 0])) is one
    assert torch.equal(pick(x, torch.tensor([2, 0])), x[[2, 0]])

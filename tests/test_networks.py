import pytest
import torch
from torch import nn

from lowland.networks import initial_weights, logits, mean_loss, pick, select


@pytest.fixture
def problem(generator):
    weights = initial_weights(range(3), inputs=4, hidden=5)
    x = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64)
    y = (torch.rand(3, 7, generator=generator) < 0.5).double()
    return weights, x, y


def module(weights, index):
    first, second = (part[index] for part in weights)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    with torch.no_grad():
        for layer, part in ((model[0], first), (model[2], second)):
            layer.bias.copy_(part[0])
            layer.weight.copy_(part[1:].T)
    return model


def test_a_start_depends_on_its_seed_alone():
    several = initial_weights(range(5, 9), inputs=4, hidden=3)
    single = initial_weights(range(7, 8), inputs=4, hidden=3)
    assert all(torch.equal(a[2], b[0]) for a, b in zip(several, single, strict=True))
    assert not torch.equal(several[0][0], several[0][1])


def test_starts_are_distributed_as_those_of_linear_layers():
    first, second = initial_weights(range(200), inputs=9, hidden=4)
    assert first.shape == (200, 10, 4)
    assert second.shape == (200, 5, 1)
    for part, bound in ((first, 1 / 3), (second, 1 / 2)):
        assert part.abs().max() <= bound
        assert part.abs().max() > 0.99 * bound
        assert abs(float(part.std()) / bound - 3**-0.5) < 0.03


def test_the_process_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    initial_weights(range(3), inputs=2, hidden=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_ensemble_computes_what_its_modules_do(problem):
    weights, x, y = problem
    values = logits(weights, x, "tanh")
    losses = mean_loss(weights, x, y, activation="tanh", loss="bce")
    for i in range(3):
        model = module(weights, i)
        output = model(x[i]).squeeze(1)
        torch.testing.assert_close(values[i], output)
        loss = nn.BCEWithLogitsLoss()(output, y[i])
        torch.testing.assert_close(losses[i], loss)


def test_select_takes_some_networks(problem):
    first, second = select(problem[0], torch.tensor([2, 0]))
    assert torch.equal(first, problem[0][0][[2, 0]])
    assert torch.equal(second, problem[0][1][[2, 0]])


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

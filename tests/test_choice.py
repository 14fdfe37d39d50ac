"""Which engine is taken, at the borders between them."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import lowland
from lowland.engines import choose
from lowland.estimation import Estimation
from lowland.exact.modules import read
from lowland.exact.plan import cost, gradient_cost
from lowland.objective import objective

CE, BCE = nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()


def classifier(*widths):
    layers = []
    for one, other in pairwise(widths):
        layers += [nn.Linear(one, other), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def digits(samples, inputs=784, classes=10):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, inputs, generator=generator)
    return x, torch.randint(classes, (samples,), generator=generator)


def test_the_trace_alone_takes_the_closed_form_where_both_moments_are_too_dear():
    model, data = classifier(784, 256, 128, 10), digits(64)
    trace, bound = lowland.HessianTrace(CE, 1.0), lowland.HSR(CE, 1.0)
    value = trace(model, *data)
    bound(model, *data)
    assert (trace.used, bound.used) == ("exact", "probes")
    exact = lowland.HessianTrace(CE, 1.0, method="exact")(model, *data)
    torch.testing.assert_close(value, exact)


def test_terms_that_leave_the_cache_make_the_closed_form_dearer_than_probes():
    # Time is linear in the samples, as a gradient's is: only the cache tells the two sizes apart.
    model, penalty = classifier(10, 8, 8, 3), lowland.HSR(CE, 1.0)
    near, far = (digits(samples, 10, 3) for samples in (3200, 6400))
    one, other = (read(model, CE, *data).relative_cost() for data in (near, far))
    assert 6 * one < other < 10 * one
    penalty(model, *near)
    assert penalty.used == "exact"
    penalty(model, *far)
    assert penalty.used == "probes"


def test_an_exact_value_is_worth_more_than_a_single_probe():
    model, data = classifier(10, 8, 8, 3), digits(50, 10, 3)
    assert 4 < read(model, CE, *data).relative_cost() < 8 * 4
    penalty = lowland.HSR(CE, 1.0, probes=1)
    penalty(model, *data)
    assert penalty.used == "exact"


def test_the_cheaper_order_is_what_the_closed_form_costs():
    # Of few samples in many parameters, and the reverse, one order costs far more than the other.
    few = read(classifier(200, 100, 2), CE, *digits(3, 200, 2))
    many = read(classifier(2, 3, 2), CE, *digits(3000, 2, 2))
    for setup in (few, many):
        prices = [cost(setup.size, path) for path in ("samples", "parameters")]
        assert max(prices) > 5 * min(prices)
        expected = min(prices) / gradient_cost(setup.size)
        assert setup.relative_cost() == pytest.approx(expected)


@pytest.mark.parametrize(("parameters", "method"), [(2048, "dense"), (2049, "probes")])
def test_brute_force_goes_up_to_its_limit(parameters, method):
    model, criterion = nn.Linear(parameters, 1, bias=False), nn.HuberLoss(delta=100.0)
    x, y = torch.randn(2, parameters), torch.randn(2, 1)
    assert lowland.hessian_moments(model, criterion, x, y, probes=2).method == method


def test_an_estimate_of_a_larger_data_sets_moments_takes_no_brute_force():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    x, y = torch.randn(10, 3), torch.rand(10, 1)
    assert lowland.hessian_moments(model, BCE, x, y).method == "dense"
    assert lowland.hessian_moments(model, BCE, x, y, unbiased=True).method == "probes"


def test_brute_force_is_not_taken_unasked_where_it_takes_minutes():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 12, 3, padding=1), nn.GELU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(192, 2))

    def chosen(samples, side):
        x, y = torch.randn(samples, 3, side, side), torch.arange(samples) % 2
        return choose(objective(model, nn.CrossEntropyLoss(), x, y), "auto", Estimation()).name

    assert chosen(2, 4) == "dense"
    assert chosen(64, 16) == "probes"

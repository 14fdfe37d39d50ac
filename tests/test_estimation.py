"""Settings that every engine is given."""

import pytest
import torch
from torch import nn

import lowland
from lowland.estimation import Estimation

pytestmark = pytest.mark.usefixtures("as_installed")


@pytest.mark.parametrize(("old", "new"), [("exact", "autograd"), ("finite", "differences")])
def test_former_words_mean_the_present_ones(old, new):
    assert Estimation(products=old).products == Estimation(products=new).products == new
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(9, 3).double(), torch.arange(9) % 2
    values = [
        lowland.HSR(
            nn.CrossEntropyLoss(),
            1.0,
            method="probes",
            products=word,
            generator=torch.Generator().manual_seed(0),
        )(model, x, y)
        for word in (old, new)
    ]
    assert torch.equal(*values)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"probes": 0}, ValueError, "probes must be a whole number of at least 1; got 0"),
        ({"products": "x"}, ValueError, "unknown products 'x': expected 'auto', 'autograd' or"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator; got 3"),
        ({"memory_budget": "1GB"}, TypeError, "memory_budget must be a number of bytes"),
        ({"memory_budget": float("nan")}, ValueError, "must be a finite number of bytes; got nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_every_call(settings, error, message):
    model, criterion = nn.Linear(2, 1), nn.MSELoss()
    x, y = torch.randn(5, 2), torch.randn(5)
    with pytest.raises(error, match=message):
        Estimation(**settings)
    with pytest.raises(error, match=message):
        lowland.hessian_moments(model, criterion, x, y, **settings)
    with pytest.raises(error, match=message):
        lowland.HSR(criterion, 0.1, **settings)

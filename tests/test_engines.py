import pytest
import torch
from torch import nn

import lowland
from lowland import engines

BCE = nn.BCEWithLogitsLoss()


@pytest.fixture
def data(generator):
    x = torch.randn(15, 3, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] > 0).double()


def shallow(middle=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), middle(), nn.Linear(4, 1)).double()


def refuse(*arguments, **options):
    raise AssertionError("this engine was not asked for")


@pytest.mark.parametrize("function", [engines.hessian_moments, engines.hessian_trace])
def test_auto_takes_the_closed_form_where_it_covers_the_model(function, monkeypatch, data):
    monkeypatch.setattr(engines, "dense_moments", refuse)
    function(shallow(), BCE, *data)


@pytest.mark.parametrize(
    "model",
    [
        shallow(lambda: nn.GELU("tanh")),
        nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 1)).double(),
    ],
)
def test_auto_falls_back_to_brute_force_for_small_models(model, data):
    auto = lowland.hessian_moments(model, BCE, *data)
    dense = lowland.hessian_moments(model, BCE, *data, method="dense")
    assert torch.equal(auto.trace_sq, dense.trace_sq)
    assert torch.equal(engines.hessian_trace(model, BCE, *data), dense.trace)


def test_auto_does_not_start_brute_force_on_large_models(data):
    layers = nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 50), nn.GELU("tanh"), nn.Linear(50, 1)
    model = nn.Sequential(*layers).double()
    with pytest.raises(lowland.UnsupportedModelError, match=r"layer 3 .*use method='dense'"):
        lowland.hessian_moments(model, BCE, *data)
    for layer in layers[:3:2]:
        layer.requires_grad_(requires_grad=False)  # frozen parameters do not count
    assert lowland.hessian_moments(model, BCE, *data).dim == 51


def test_a_model_that_hooks_change_is_measured_as_it_is(data):
    model = shallow()
    model[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    doubled = shallow()
    with torch.no_grad():
        doubled[2].weight.mul_(2)
    # The output weights see doubled units; the function is that of doubled output weights.
    matrix = lowland.dense.dense_hessian(doubled, BCE, *data)
    scale = torch.ones(21, dtype=torch.float64)
    scale[16:20] = 2
    expected = (scale * matrix * scale.unsqueeze(1)).square().sum()
    actual = lowland.hessian_moments(model, BCE, *data).trace_sq
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_exact_is_refused_where_it_does_not_cover_the_model(data):
    model = shallow(lambda: nn.GELU("tanh"))
    for function in (engines.hessian_moments, engines.hessian_trace):
        with pytest.raises(lowland.UnsupportedModelError, match="use method='dense'"):
            function(model, BCE, *data, method="exact")


@pytest.mark.parametrize("function", [engines.hessian_moments, engines.hessian_trace])
@pytest.mark.parametrize("name", ["x", "y"])
def test_gradients_in_the_data_are_those_of_brute_force_or_refused(name, function, data):
    x, y = data
    asking = {"x": x, "y": 0.2 + 0.6 * y}
    asking[name] = asking[name].clone().requires_grad_()
    with pytest.raises(lowland.UnsupportedModelError, match=rf"use {name}\.detach\(\), or method"):
        function(shallow(), BCE, **asking, method="exact")
    auto, dense = (function(shallow(), BCE, **asking, method=how) for how in ("auto", "dense"))
    total = [getattr(found, "trace_sq", found) for found in (auto, dense)]
    mine, theirs = (torch.autograd.grad(each, asking[name])[0] for each in total)
    assert torch.equal(mine, theirs)
    assert mine.abs().sum() > 0
    with torch.no_grad():  # nobody can miss a gradient here
        function(shallow(), BCE, **asking, method="exact")
    large = nn.Sequential(nn.Linear(3, 999), nn.Tanh(), nn.Linear(999, 1)).double()
    with pytest.raises(
        lowland.UnsupportedModelError, match=rf"{name}\.detach.*4996 trainable param"
    ):
        function(large, BCE, **asking)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("function", [engines.hessian_moments, engines.hessian_trace])
def test_an_unknown_method(function, data):
    with pytest.raises(ValueError, match="unknown method 'probes': expected 'auto', 'exact' or"):
        function(shallow(), BCE, *data, method="probes")

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import lowland

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


def test_auto_takes_the_closed_form_where_it_covers_the_model(data):
    assert lowland.hessian_moments(shallow(), BCE, *data).method == "exact"


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
    assert auto.method == dense.method == "dense"
    assert torch.equal(auto.trace_sq, dense.trace_sq)


def test_auto_estimates_large_models_beyond_the_closed_form(data):
    layers = nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 50), nn.GELU("tanh"), nn.Linear(50, 1)
    model = nn.Sequential(*layers).double()
    assert lowland.hessian_moments(model, BCE, *data).method == "probes"
    for layer in layers[:3:2]:
        layer.requires_grad_(requires_grad=False)  # frozen parameters do not count
    found = lowland.hessian_moments(model, BCE, *data)
    assert (found.dim, found.method) == (51, "exact")  # the last layer alone is covered


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


class Attentive(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


@pytest.mark.slow
class Noisy(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=True)


def test_auto_estimates_what_draws_in_a_forward_pass_of_its_own(data, generator):
    x, y = data
    moments = lowland.hessian_moments(shallow(Noisy), nn.BCEWithLogitsLoss(), x, y)
    assert moments.method == "probes"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "setting", "steady", "unsteady"),
    [
        (partial(Recurrent, 4, 4, 2), "dropout", 0.0, 0.1),
        (partial(Attentive, 4, 1), "dropout", 0.0, 0.1),
        (nn.AlphaDropout, "p", 0.0, 0.1),
        (partial(nn.BatchNorm1d, 4), "track_running_stats", False, True),
    ],
)
def test_auto_estimates_layers_that_are_other_in_each_call_alone(
    layer, setting, steady, unsteady, data, generator
):
    x, y = data[0], data[1].unsqueeze(1)
    model = shallow(partial(layer, **{setting: steady}))
    found = lowland.hessian_moments(model, BCE, x, y)
    assert found.method == "dense"
    estimate = lowland.hessian_moments(model, BCE, x, y, "probes", probes=200, generator=generator)
    assert (estimate.trace_sq - found.trace_sq).abs() < 4 * estimate.stderr[1]
    model = shallow(partial(layer, **{setting: unsteady}))
    assert lowland.hessian_moments(model, BCE, x, y).method == "probes"
    assert lowland.hessian_moments(model.eval(), BCE, x, y).method == "dense"


def test_auto_estimates_where_the_closed_form_is_dearer():
    model = nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh())
    model.append(nn.Linear(128, 10))
    x, y, criterion = torch.randn(64, 784), torch.randint(10, (64,)), nn.CrossEntropyLoss()
    assert lowland.hessian_moments(model, criterion, x, y, probes=2).method == "probes"
    small = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 10))
    found = lowland.hessian_moments(small, criterion, x[:, :20], y, probes=2)
    assert found.method == "exact"


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
    with pytest.raises(lowland.UnsupportedModelError, match="use method='probes'"):
        lowland.hessian_moments(model, BCE, *data, method="exact")


@pytest.mark.parametrize("name", ["x", "y"])
def test_gradients_in_the_data_are_those_of_brute_force_or_refused(name, data):
    x, y = data
    asking = {"x": x, "y": 0.2 + 0.6 * y}
    asking[name] = asking[name].clone().requires_grad_()
    function = lowland.hessian_moments
    if name == "y":
        with pytest.raises(lowland.UnsupportedModelError, match=r"use y\.detach\(\), or method"):
            function(shallow(), BCE, **asking, method="exact")
    auto, dense = (function(shallow(), BCE, **asking, method=how) for how in ("auto", "dense"))
    mine, theirs = (torch.autograd.grad(each.trace_sq, asking[name])[0] for each in (auto, dense))
    torch.testing.assert_close(mine, theirs)
    assert mine.abs().sum() > 0
    with torch.no_grad():  # nobody can miss a gradient here
        function(shallow(), BCE, **asking, method="exact")


@pytest.mark.usefixtures("as_installed")
def test_an_unknown_method(data):
    with pytest.raises(ValueError, match="unknown method 'guess': expected 'auto', 'exact', 'pro"):
        lowland.hessian_moments(shallow(), BCE, *data, method="guess")


def test_four_moments_are_not_estimated(data):
    model = shallow(lambda: nn.GELU("tanh"))
    with pytest.raises(lowland.UnsupportedModelError, match="moments=4 needs the closed form or"):
        lowland.hessian_moments(model, BCE, *data, method="probes", moments=4)


@pytest.mark.parametrize("products", ["autograd", "differences"])
def test_estimates_are_within_their_errors_and_can_be_differentiated(products, data, generator):
    model = shallow()
    exact = lowland.hessian_moments(model, BCE, *data)
    found = lowland.hessian_moments(
        model, BCE, *data, method="probes", probes=200, products=products, generator=generator
    )
    assert found.method == "probes"
    assert exact.stderr is None
    parameters = list(model.parameters())
    for mine, stderr, theirs in zip(
        (found.trace, found.trace_sq), found.stderr, (exact.trace, exact.trace_sq), strict=True
    ):
        assert (mine - theirs).abs() < 4 * stderr
        parts = [
            torch.autograd.grad(each, parameters, retain_graph=True) for each in (mine, theirs)
        ]
        one, other = (torch.cat([part.flatten() for part in each]) for each in parts)
        assert torch.cosine_similarity(one, other, dim=0) > 0.95


def test_a_subset_of_the_parameters_is_the_same_for_all_engines(data, generator):
    model = shallow()
    subset = [model[0].bias, model[2].weight]
    chosen = [*range(12, 16), *range(16, 20)]
    block = lowland.dense.dense_hessian(model, BCE, *data)[chosen][:, chosen]
    for method in ("auto", "exact", "dense"):
        found = lowland.hessian_moments(model, BCE, *data, method, parameters=iter(subset))
        assert found.dim == 8
        torch.testing.assert_close(found.trace, block.trace())
        torch.testing.assert_close(found.trace_sq, block.square().sum())
    found = lowland.hessian_moments(
        model, BCE, *data, "probes", parameters=iter(subset), probes=400, generator=generator
    )
    assert (found.trace_sq - block.square().sum()).abs() < 4 * found.stderr[1]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["auto", "exact", "dense", "probes"])
def test_parameters_of_another_model_are_refused(method, data):
    for others in ([nn.Linear(2, 2).weight], [shallow()[0].weight], []):
        with pytest.raises(ValueError, match="parameters= must be trainable parameters of the mod"):
            lowland.hessian_moments(shallow(), BCE, *data, method, parameters=others)


@pytest.mark.parametrize("middle", [nn.Tanh, lambda: nn.GELU("tanh")])
def test_compiled_models_are_measured_as_they_were_written(middle, data):
    model = shallow(middle)
    expected = lowland.hessian_moments(model, BCE, *data)
    found = lowland.hessian_moments(torch.compile(model, backend="aot_eager"), BCE, *data)
    assert found.method == expected.method
    assert torch.equal(found.trace_sq, expected.trace_sq)


def test_what_makes_an_engine_is_given_the_loss_and_the_settings(data):
    model, given = shallow(), []

    def mine(target, settings):
        given.append((target.model, settings.probes, settings.unbiased))
        return lowland.dense.BruteForce(target, replace(settings, unbiased=False))

    found = lowland.hessian_moments(model, BCE, *data, mine, probes=5, unbiased=True)
    assert given == [(model, 5, True)]
    assert torch.equal(found.trace_sq, lowland.hessian_moments(model, BCE, *data, "dense").trace_sq)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("made", [None, (1, 2), object()])
def test_what_makes_no_engine_is_refused(made, data):
    with pytest.raises(TypeError, match="must make an engine, with a name and the methods"):
        lowland.hessian_moments(shallow(), BCE, *data, method=lambda target, settings: made)


def test_hooks_on_all_modules_keep_the_closed_form_away(data):
    def double(module, inputs, output):
        return 2 * output if isinstance(module, nn.Tanh) else None

    handle = torch.nn.modules.module.register_module_forward_hook(double)
    try:
        found = lowland.hessian_moments(shallow(), BCE, *data)
    finally:
        handle.remove()
    assert found.method == "dense"
    assert lowland.hessian_moments(shallow(), BCE, *data).method == "exact"


def test_public_modules_are_attributes():
    code = "import lowland; lowland.penalties.HSR, lowland.losses.Loss, lowland.jobs.Store"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)  # noqa: S603

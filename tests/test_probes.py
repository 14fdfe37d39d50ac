"""Moments of any module from a few random directions."""

import any_models
import pytest
import torch
from any_models import CROSS_ENTROPY, build, trainable
from test_products import brute_force
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lowland
from lowland.dense import dense_hessian
from lowland.estimation import Estimation
from lowland.objective import objective
from lowland.probes import Estimate, probe_moments, rademacher
from lowland.products import quadratic_forms


def loader_moments(model, criterion, loader, **settings):
    return lowland.hessian_moments(model, criterion, loader, method="probes", **settings)


def signs(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", any_models.MODELS)
def test_moments_are_the_means_of_single_directions_and_errors_theirs(name):
    model, x, y = build(name)
    found = probe_moments(model, CROSS_ENTROPY, x, y, probes=5, generator=signs())
    drawn = signs()
    directions = [rademacher(trainable(model), drawn) for _ in range(5)]
    expected = brute_force(model, x, y, directions)
    assert found.dim == sum(p.numel() for p in trainable(model))
    for mine, stderr, values in zip(
        (found.trace, found.trace_sq), found.stderr, expected, strict=True
    ):
        torch.testing.assert_close(mine, values.mean(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(stderr, values.detach().std() / 5**0.5, rtol=1e-10, atol=1e-12)
        assert not stderr.requires_grad
    single = probe_moments(model, CROSS_ENTROPY, x, y, generator=signs())
    assert all(error.isnan() for error in single.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("products", ["autograd", "differences"])
def test_standard_errors_cover_the_truth(products):
    model, x, y = build("cnn_in_evaluation")
    exact = lowland.dense.dense_moments(model, CROSS_ENTROPY, x, y)
    generator, repeats = signs(), 40
    off = []
    for _ in range(repeats):
        with torch.no_grad():
            found = probe_moments(
                model, CROSS_ENTROPY, x, y, probes=20, products=products, generator=generator
            )
        off.append(
            [
                ((found.trace - exact.trace) / found.stderr[0]).item(),
                ((found.trace_sq - exact.trace_sq) / found.stderr[1]).item(),
            ]
        )
    off = torch.tensor(off)
    within = (off.abs() < 2).double().mean(0)
    assert (within > 0.8).all()
    assert (off.abs().max() > 1).all()  # nor are they far too large
    assert (off.mean(0).abs() < 4 / repeats**0.5).all()


def test_signs():
    parameters = [torch.empty(30, 11), torch.empty((), dtype=torch.float64), torch.empty(0, 3)]
    before = torch.get_rng_state()
    parts = rademacher(parameters, signs())
    assert torch.equal(torch.get_rng_state(), before)
    for part, parameter in zip(parts, parameters, strict=True):
        assert (part.shape, part.dtype) == (parameter.shape, parameter.dtype)
        assert (part.abs() == 1).all()
    assert all(
        torch.equal(a, b) for a, b in zip(parts, rademacher(parameters, signs()), strict=True)
    )
    torch.manual_seed(0)
    globally = rademacher(parameters, None)
    assert not torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(globally[0], rademacher(parameters, None)[0])


def test_signs_are_independent():
    generator, count = signs(), 4000
    drawn = torch.stack([rademacher([torch.empty(19)], generator)[0] for _ in range(count)])
    means = drawn.T @ drawn / count - torch.eye(19)
    assert means.abs().max() < 5 / count**0.5
    assert drawn.mean(0).abs().max() < 5 / count**0.5


def test_a_subset_is_measured_by_its_own_block():
    model, x, y = build("mlp")
    subset = [model[0].bias, model[4].weight]
    target = objective(model, CROSS_ENTROPY, x, y, iter(subset))
    directions = [rademacher(subset, signs())]
    _, trace, square = quadratic_forms([target], directions, "autograd")
    chosen = [*range(20, 25), *range(43, 49)]
    block = dense_hessian(model, CROSS_ENTROPY, x, y)[chosen][:, chosen]
    v = any_models.flat(directions[0])
    torch.testing.assert_close(trace[0], v @ block @ v)
    torch.testing.assert_close(square[0], (block @ v).square().sum())
    found = probe_moments(model, CROSS_ENTROPY, x, y, parameters=subset, generator=signs())
    torch.testing.assert_close(found.trace_sq, square[0])
    assert found.dim == 11


@pytest.mark.parametrize("products", ["autograd", "differences"])
def test_the_loss_comes_with_the_moments(products):
    model, x, y = build("cnn")
    settings = Estimation(3, products, signs())
    target = objective(model, CROSS_ENTROPY, x, y)
    loss, found = Estimate(target, settings).loss_and_moments()
    assert model[2].num_batches_tracked == 1
    again = probe_moments(
        model, CROSS_ENTROPY, x, y, products=products, generator=signs(), probes=3
    )
    assert model[2].num_batches_tracked == 1
    torch.testing.assert_close(found.trace_sq, again.trace_sq)
    parameters = list(model.parameters())
    mine, plain = (
        torch.autograd.grad(each, parameters, retain_graph=True)
        for each in (loss, CROSS_ENTROPY(model(x), y))
    )
    for one, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(one, other)


# All batches of a loader.


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("products", ["autograd", "differences"])
def test_a_loader_is_the_joined_data(products, reduction):
    model, x, y = build("Attention", samples=23)
    model.eval()
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    settings = {"probes": 4, "products": products}
    loader = DataLoader(TensorDataset(x, y), batch_size=7)  # the last one has 2
    found = loader_moments(model, criterion, loader, generator=signs(), **settings)
    expected = probe_moments(model, criterion, x, y, generator=signs(), **settings)
    rtol = 1e-10 if products == "autograd" else 1e-3
    for mine, theirs in zip(
        (found.trace, found.trace_sq, *found.stderr),
        (expected.trace, expected.trace_sq, *expected.stderr),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs.detach(), rtol=rtol, atol=rtol)
    assert not found.trace_sq.requires_grad
    called = lowland.hessian_moments(model, criterion, loader, generator=signs(), **settings)
    assert called.method == "probes"
    assert torch.equal(called.trace_sq, found.trace_sq)
    subset = [*model.head.parameters()]
    parts = [
        function(model, criterion, *data, generator=signs(), parameters=iter(subset), **settings)
        for function, data in ((loader_moments, (loader,)), (probe_moments, (x, y)))
    ]
    torch.testing.assert_close(parts[0].trace_sq, parts[1].trace_sq.detach(), rtol=rtol, atol=rtol)


def test_a_loader_leaves_statistics_alone():
    model, x, y = build("cnn")
    before = model[2].running_mean.clone()
    loader_moments(model, CROSS_ENTROPY, [(x, y), (x[:3], y[:3])])
    assert torch.equal(model[2].running_mean, before)


@pytest.mark.usefixtures("as_installed")
def test_loaders_that_give_nothing():
    model, x, y = build("mlp")
    used = iter([(x, y)])
    lowland.hessian_moments(model, CROSS_ENTROPY, used)
    for empty in ([], used):
        with pytest.raises(ValueError, match=r"data is empty.*may be used up"):
            lowland.hessian_moments(model, CROSS_ENTROPY, empty)
    with pytest.raises(TypeError, match=r"got torch.Tensor: a tensor alone leaves open"):
        lowland.hessian_moments(model, CROSS_ENTROPY, x)


@pytest.mark.parametrize("settings", [{"method": "dense"}, {"moments": 4}, {"unbiased": True}])
def test_over_a_loader_there_are_estimates_or_two_moments(settings):
    model, x, y = build("mlp")
    with pytest.raises(lowland.UnsupportedModelError, match="over a data loader are estimated"):
        lowland.hessian_moments(model, CROSS_ENTROPY, [(x, y)], **settings)


# Bad input.


@pytest.mark.usefixtures("as_installed")
def test_settings_that_make_no_sense():
    model, x, y = build("mlp")
    for probes in (0, -1, 1.5):
        with pytest.raises(ValueError, match="probes must be a whole number of at least 1; got"):
            probe_moments(model, CROSS_ENTROPY, x, y, probes=probes)
    with pytest.raises(ValueError, match="unknown products 'x': expected 'auto', 'autograd' or"):
        loader_moments(model, CROSS_ENTROPY, [(x, y)], products="x")
    for parameters in ([nn.Linear(2, 2).weight], []):
        with pytest.raises(ValueError, match="parameters= must be trainable parameters of the mod"):
            probe_moments(model, CROSS_ENTROPY, x, y, parameters=parameters)
    model.requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="the model has no trainable parameter"):
        probe_moments(model, CROSS_ENTROPY, x, y)


def test_unbiased_estimates_need_halves_of_a_mean():
    model, x, y = build("mlp")
    for samples in (0, 1, 7):
        with pytest.raises(ValueError, match=f"an even number of samples; got {samples}"):
            probe_moments(model, CROSS_ENTROPY, x[:samples], y[:samples], unbiased=True)
    with pytest.raises(TypeError, match="x and y must be tensors; got list and Tensor"):
        probe_moments(model, CROSS_ENTROPY, [x], y, unbiased=True)
    weighed = nn.CrossEntropyLoss(weight=torch.ones(2).double())
    for criterion in (nn.CrossEntropyLoss(reduction="sum"), weighed):
        with pytest.raises(ValueError, match="the moments of a mean over samples; got a sum"):
            probe_moments(model, criterion, x, y, unbiased=True)


@pytest.mark.parametrize("how", ["weights", "ignored", "padded"])
def test_a_loader_counts_classes_as_the_criterion_does(how):
    torch.manual_seed(0)
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,))
    criterion = nn.CrossEntropyLoss()
    if how == "weights":
        criterion = nn.CrossEntropyLoss(torch.tensor([0.2, 3.0, 1.0]).double())
    else:
        criterion = nn.CrossEntropyLoss(ignore_index=1 if how == "ignored" else -100)
    if how == "padded":
        y[8:21] = -100  # all of one batch
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 3)).double()
    loader = [(x[i : i + 10], y[i : i + 10]) for i in (0, 10, 20)]

    def found(*data):
        signs = torch.Generator().manual_seed(0)
        method = {"method": "probes", "probes": 3, "generator": signs}
        return lowland.hessian_moments(model, criterion, *data, **method)

    whole, parts, pair = found(x, y), found(loader), found((x, y))
    for name in ("trace", "trace_sq"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name).detach())
        assert torch.equal(getattr(pair, name), getattr(whole, name))

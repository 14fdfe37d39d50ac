"""Samples that are left out: never more than is certified, most of those that are fitted."""

import itertools

import cases
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lowland
from lowland import exact
from lowland.errors import UnsupportedModelError
from lowland.exact.pruning import _Ledger
from lowland.exact.sample_bounds import sample_bounds
from lowland.exact.setup import prepare

BUDGET = 1 << 28
ROUNDING = 1e-9
KINDS = {
    "logistic regression": oracle.Network(3, (), (), "bce"),
    "softmax regression": oracle.Network(3, (), (), "ce", outputs=3),
    "one hidden layer": oracle.Network(2, 5, "tanh", "bce"),
    "several outputs": oracle.Network(2, (3, 2), "silu", "mse", outputs=2),
    "two layers": oracle.Network(2, (4, 3), ("gelu", "relu"), "bce"),
    "classes": oracle.Network(2, (3, 3), "softplus", "ce", outputs=3),
    "four layers": oracle.Network(2, (2, 3, 2), "sigmoid", "bce"),
    "kinks": oracle.Network(2, (4, 4), "relu", "ce", outputs=4),
    "counts": oracle.Network(2, 3, "tanh", "poisson"),
    "coupled, one's own": oracle.Network(2, 3, "tanh", "distance", outputs=2),
}


def prepared(case, matrix="hessian"):
    """The library's setup of a case."""
    options = case.settings
    return prepare(
        *case.arguments, options["activation"], options["loss"], options["reduction"]
    ).of(matrix)


def looked_at(weights, x, y, **options):
    """Both moments, and the gradient of each, of each network: ``(networks, ...)``."""
    leaves = [weight.detach().clone().requires_grad_() for weight in weights]
    moments = exact.moments(leaves, x, y, **options)
    found = []
    for moment in (moments.trace, moments.trace_sq):
        grads = torch.autograd.grad(moment.sum(), leaves, retain_graph=True)
        found.append(torch.cat([part.flatten(-2) for part in grads], -1))
    return moments, found


def separated(widths, loss="bce", *, samples=300, gain=6.0, seed=0, activation="tanh"):
    """A network with labels of its own making: most samples are far from where classes meet."""
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(rows + 1, columns, generator=generator).double() / rows**0.5
        for rows, columns in itertools.pairwise(widths)
    ]
    x = 2 * torch.randn(samples, widths[0], generator=generator).double()
    z = x
    function = oracle.ACTIVATIONS[activation]
    for index, weight in enumerate(weights):
        z = (function(z) if index else z) @ weight[1:] + weight[0]
    y = z.argmax(1) if loss == "ce" else (z[:, 0] > 0).double()
    weights[-1] *= gain
    return weights, x, y, {"activation": activation, "loss": loss}


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.sampled_from(sorted(KINDS)),
    st.integers(0, 99),
    st.floats(0.1, 6.0),
    st.sampled_from(["hessian", "ggn", "residual"]),
)
def test_no_sample_has_more_than_its_bounds(kind, seed, gain, matrix):
    case = cases.make(KINDS[kind], 3, seed=seed, gain=gain)
    bounds = sample_bounds(prepared(case, matrix), BUDGET)
    ((_, flat, x, y),) = case.singles()

    step, dim = 1e-6, len(flat)
    steps = step * torch.eye(dim, dtype=flat.dtype)
    around = torch.cat([flat[None], flat + steps, flat - steps])
    for i in range(3):
        # Of the sample's own Hessian, and of all its derivatives by differences.
        networks = [
            part.view(-1, *like.shape)
            for part, like in zip(
                around.split([part.numel() for part in case.weights], 1), case.weights, strict=True
            )
        ]
        one = slice(i, i + 1)
        own, above, below = exact.hessian(
            networks, x[one], y[one], **case.settings, matrix=matrix
        ).split([1, dim, dim])
        change = (above - below) / (2 * step)
        truth = [
            own.diagonal(dim1=1, dim2=2).sum().abs(),
            own.norm(),
            change.diagonal(dim1=1, dim2=2).sum(1).norm(),
            torch.linalg.matrix_norm(change.flatten(1), 2),
        ]
        for bound, true, noise in zip(bounds.parts, truth, (0, 0, 1e-7, 1e-7), strict=True):
            share = true / 3  # in the mean over all samples
            assert bound[0, i] >= share * (1 - 1e-7) - noise * own.norm() - 1e-12


@pytest.mark.parametrize("gain", [0.5, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_certificates_hold_for_hundreds_of_networks_whatever_is_left_out(kind, gain):
    # With all kinds and gains 4,000 networks.
    case = cases.make(KINDS[kind], 12, ensemble=(200,), gain=gain)
    setup = prepared(case)
    ledger = _Ledger(sample_bounds(setup, BUDGET), 4 * [0.1])
    kept = torch.tensor([0, 3, 4, 7, 8, 10, 11])
    scale = setup.data.scale
    summed = {**case.settings, "reduction": "sum"}
    every, all_grads = looked_at(*case.arguments, **summed)
    some, some_grads = looked_at(case.weights, case.x[kept], case.y[kept], **summed)
    norm = scale * some.trace_sq.detach().clamp(min=0).sqrt()[:, None]
    certificates = ledger.certificates(ledger.without(kept), norm)
    powers = (scale, scale**2)
    errors = [
        power * (getattr(every, name) - getattr(some, name)).abs()
        for name, power in zip(("trace", "trace_sq"), powers, strict=True)
    ]
    errors += [
        power * (mine - theirs).norm(dim=-1)
        for mine, theirs, power in zip(all_grads, some_grads, powers, strict=True)
    ]
    sizes = [scale * every.trace.abs(), scale**2 * every.trace_sq]
    sizes += [power * mine.norm(dim=-1) for mine, power in zip(all_grads, powers, strict=True)]
    for certificate, error, size in zip(certificates, errors, sizes, strict=True):
        assert (error <= certificate.squeeze(1) * (1 + ROUNDING) + 1e-13 * size).all()


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-5])
@pytest.mark.parametrize(
    ("widths", "loss", "activation"),
    [
        ((2, 6, 1), "bce", "tanh"),
        ((2, 6, 1), "bce", "relu"),
        ((3, 5, 4, 1), "bce", "gelu"),
        ((3, 6, 3), "ce", "tanh"),
        ((3, 4, 4, 3), "ce", "relu"),
        ((4, 1), "bce", "tanh"),
    ],
)
def test_errors_are_below_the_certificates_and_these_below_the_tolerance(
    widths, loss, activation, tolerance
):
    weights, x, y, network = separated(widths, loss, gain=60.0, activation=activation)
    full, full_grads = looked_at(weights, x, y, **network)
    found, grads = looked_at(weights, x, y, **network, prune=tolerance)
    report = found.pruned
    assert 0 < report.dropped < len(x)
    pairs = [(full.trace, found.trace, report.trace)]
    pairs.append((full.trace_sq, found.trace_sq, report.trace_sq))
    certificates = (report.trace_gradient, report.trace_sq_gradient)
    pairs += list(zip(full_grads, grads, certificates, strict=True))
    for whole, part, certificate in pairs:
        assert (whole - part).norm() <= certificate * (1 + ROUNDING) + 1e-13 * whole.norm()
        assert certificate <= tolerance * whole.norm()


def test_most_samples_of_a_fitted_network_are_left_out_and_the_others_weigh_the_same():
    weights, x, y, network = separated((2, 6, 1), gain=200.0)
    found = exact.moments(weights, x, y, **network, prune=1e-2)
    kept = found.pruned.kept
    assert found.pruned.dropped > 0.8 * len(x)
    some = exact.moments(weights, x[kept], y[kept], **network, reduction="sum")
    torch.testing.assert_close(found.trace, some.trace / len(x))
    torch.testing.assert_close(found.trace_sq, some.trace_sq / len(x) ** 2)


def test_without_gradients_the_moments_alone_are_held_to_the_tolerance():
    weights, x, y, network = separated((2, 6, 1), gain=60.0)
    values = exact.moments(weights, x, y, **network, prune=1e-3)
    leaves = [weight.clone().requires_grad_() for weight in weights]
    with torch.no_grad():
        again = exact.moments(leaves, x, y, **network, prune=1e-3)
    assert torch.equal(values.trace_sq, again.trace_sq)
    asking = exact.moments(leaves, x, y, **network, prune=1e-3)
    assert asking.pruned.dropped < values.pruned.dropped
    assert values.pruned.trace_sq <= 1e-3 * values.trace_sq


def test_where_nothing_can_be_left_out_the_numbers_are_the_same():
    case = cases.make(KINDS["two layers"], 20, ensemble=(3,)).with_gradients()
    plain = exact.moments(*case.arguments, **case.settings)
    found = exact.moments(*case.arguments, **case.settings, prune=1e-6)
    assert found.pruned.dropped == 0
    assert found.pruned.kept.tolist() == list(range(20))
    assert not found.pruned.trace_sq_gradient.any()
    assert torch.equal(found.trace, plain.trace)
    assert torch.equal(found.trace_sq, plain.trace_sq)
    mine, theirs = (torch.autograd.grad(m.upper.sum(), case.weights) for m in (found, plain))
    assert all(map(torch.equal, mine, theirs))


def test_a_sample_is_left_out_of_an_ensemble_only_if_all_networks_may_do_without():
    fitted, x, y, network = separated((2, 6, 1), gain=200.0)
    alike = [torch.stack([weight, 1.1 * weight]) for weight in fitted]
    one_is_not = [torch.stack([weight, 0.01 * weight]) for weight in fitted]
    report = exact.moments(alike, x, y, **network, prune=1e-2).pruned
    assert report.dropped > 0.5 * len(x)
    assert report.trace.shape == (2,)
    assert exact.moments(one_is_not, x, y, **network, prune=1e-2).pruned.dropped == 0


@pytest.mark.parametrize("order", cases.ORDERS)
def test_order_and_memory_change_nothing(order):
    weights, x, y, network = separated((3, 6, 3), "ce", gain=200.0)
    expected = exact.moments(weights, x, y, **network, prune=1e-2)
    found = exact.moments(weights, x, y, **network, prune=1e-2, order=order, memory_budget=200_000)
    assert torch.equal(found.pruned.kept, expected.pruned.kept)
    torch.testing.assert_close(found.trace_sq, expected.trace_sq)


def test_overflow_leaves_nothing_out():
    weights, x, y, network = separated((2, 4, 1), activation="relu")
    weights = [(1e25 * weight).float() for weight in weights]
    with torch.no_grad():
        moments = exact.moments(weights, x.float(), y.float(), **network, prune=1e-2)
    assert moments.pruned.dropped == 0


def test_saturated_to_zero_one_sample_stays():
    weights, x, y, network = separated((2, 1), gain=1e6)
    far = x[:, :1].abs() > 0
    x = torch.where(far, 100 * x.sign(), x)
    y = (x @ weights[0][1:] + weights[0][0])[:, 0].gt(0).double()
    moments = exact.moments(weights, x, y, **network, prune=1e-2)
    assert moments.trace == 0
    assert moments.pruned.dropped == len(x) - 1


def test_the_result_is_differentiable_once_and_by_torch_func():
    weights, x, y, network = separated((2, 6, 1), gain=200.0)
    leaves = [weight.requires_grad_() for weight in weights]

    def upper(weights):
        moments = exact.moments(weights, x, y, **network, prune=1e-2)
        assert moments.pruned.dropped
        return moments.upper

    grads = torch.autograd.grad(upper(leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(grads[0].sum(), leaves)
    mine = torch.func.grad(upper)([weight.detach() for weight in leaves])
    for one, other in zip(grads, mine, strict=True):
        torch.testing.assert_close(one.detach(), other)


def test_frozen_layers_have_no_gradient():
    weights, x, y, network = separated((2, 6, 1), gain=200.0)
    weights[1].requires_grad_()
    moments = exact.moments(weights, x, y, **network, prune=1e-2)
    (found,) = torch.autograd.grad(moments.trace_sq, weights[1])
    (expected,) = torch.autograd.grad(exact.moments(weights, x, y, **network).trace_sq, weights[1])
    assert (found - expected).norm() <= moments.pruned.trace_sq_gradient
    assert moments.pruned.dropped


def model_of(weights):
    layers = []
    for weight in weights:
        linear = nn.Linear(weight.shape[0] - 1, weight.shape[1]).double()
        linear.weight.data, linear.bias.data = weight[1:].T.clone(), weight[0].clone()
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def test_models_and_penalties_are_pruned_alike():
    weights, x, y, network = separated((2, 6, 1), gain=200.0)
    expected = exact.moments(
        [weight.requires_grad_() for weight in weights], x, y, **network, prune=1e-2
    )
    model, criterion = model_of(weights), nn.BCEWithLogitsLoss()
    found = lowland.hessian_moments(model, criterion, x, y[:, None], method="exact", prune=1e-2)
    assert torch.equal(found.pruned.kept, expected.pruned.kept)
    torch.testing.assert_close(found.trace_sq, expected.trace_sq)
    assert "pruned=Pruned(" in repr(found)
    penalty = lowland.HSR(criterion, weight=0.5, method="exact", prune=1e-2)
    assert "prune=0.01" in repr(penalty)
    torch.testing.assert_close(penalty(model, x, y[:, None]), 0.5 * found.upper)


def test_weights_of_classes_and_frozen_parameters_are_in_the_certificates():
    weights, x, y, _ = separated((3, 6, 3), "ce", gain=200.0)
    model = model_of(weights)
    model[0].bias.requires_grad_(False)
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]).double())
    full = lowland.hessian_moments(model, criterion, x, y, method="exact")
    found = lowland.hessian_moments(model, criterion, x, y, method="exact", prune=0.1)
    trained = [part for part in model.parameters() if part.requires_grad]
    for name in ("trace", "trace_sq"):
        whole, part = getattr(full, name), getattr(found, name)
        assert (whole - part).abs() <= getattr(found.pruned, name) <= 0.1 * whole
        grads = [
            torch.cat([g.flatten() for g in torch.autograd.grad(m, trained, retain_graph=True)])
            for m in (whole, part)
        ]
        assert (grads[0] - grads[1]).norm() <= getattr(found.pruned, f"{name}_gradient")
    assert found.pruned.dropped


def test_networks_with_data_of_their_own_leave_out_the_same_places():
    weights, x, y, network = separated((2, 6, 1), gain=200.0)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    double = [weight.expand(2, *weight.shape) for weight in weights]
    own_x, own_y = torch.stack([x, x[order]]), torch.stack([y, y[order]])
    full, full_grads = looked_at(double, own_x, own_y, **network)
    found, grads = looked_at(double, own_x, own_y, **network, prune=0.1)
    assert found.pruned.dropped
    assert ((full.trace - found.trace).abs() <= found.pruned.trace).all()
    assert ((full_grads[1] - grads[1]).norm(dim=-1) <= found.pruned.trace_sq_gradient).all()


def test_weight_decay_widens_the_certificate_of_the_square_by_that_of_the_trace():
    weights, x, y, network = separated((2, 6, 1), gain=200.0)
    plain = exact.moments(weights, x, y, **network)
    found = exact.moments(weights, x, y, **network, prune=0.3)
    error = (plain.shifted(3.0).trace_sq - found.shifted(3.0).trace_sq).abs()
    widened = found.shifted(3.0).pruned
    assert error <= widened.trace_sq
    torch.testing.assert_close(
        widened.trace_sq - found.pruned.trace_sq, 2 * 3.0 * found.pruned.trace
    )


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("prune", [0, 1.0, float("nan"), -1e-3, True, "1e-3"])
def test_a_tolerance_is_a_number_between_0_and_1(prune):
    error = TypeError if isinstance(prune, str) else ValueError
    weights, x, y, network = separated((2, 3, 1))
    with pytest.raises(error, match="prune must be a relative tolerance"):
        exact.moments(weights, x, y, **network, prune=prune)
    with pytest.raises(error, match="prune must be a relative tolerance"):
        lowland.hessian_moments(
            model_of(weights), nn.BCEWithLogitsLoss(), x, y, method="exact", prune=prune
        )


def test_what_is_not_certified_is_refused():
    weights, x, y, network = separated((2, 3, 1))
    for options in ({"moments": 4}, {"unbiased": True}):
        with pytest.raises(UnsupportedModelError, match="prune= certifies"):
            exact.moments(weights, x, y, **network, prune=0.1, **options)
    with pytest.raises(UnsupportedModelError, match=r"x asks for one.*detach"):
        exact.moments(weights, x.clone().requires_grad_(), y, **network, prune=0.1)
    model, criterion = model_of(weights), nn.BCEWithLogitsLoss()
    for method in ("auto", "probes", "dense"):
        with pytest.raises(UnsupportedModelError, match="use method='exact'"):
            lowland.hessian_moments(model, criterion, x, y, method=method, prune=0.1)
    with pytest.raises(UnsupportedModelError, match="pass all samples as tensors"):
        lowland.hessian_moments(model, criterion, [(x, y)], method="exact", prune=0.1)
    with pytest.raises(UnsupportedModelError, match="HessianTrace is a function of other"):
        lowland.HessianTrace(criterion, weight=1.0, method="exact", prune=0.1)
    with pytest.raises(UnsupportedModelError, match="use method='exact'"):
        lowland.HSR(criterion, weight=1.0, prune=0.1)

"""Every engine means one loss by a criterion and its targets."""

import warnings
from functools import partial

import pytest
import torch
from any_models import differences_of_loss, error, flat
from cases import OF_ONES_OWN
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import lowland
from lowland import criteria
from lowland.objective import objective
from lowland.products import hessian_products

N, CLASSES = 10, 3


@pytest.fixture(autouse=True)
def poisson(monkeypatch):
    """One criterion more than the library's own, as a user would register it."""
    monkeypatch.setattr(criteria, "_CLOSED_FORMS", dict(criteria._CLOSED_FORMS))
    lowland.exact.register_criterion(nn.PoissonNLLLoss, lambda criterion: OF_ONES_OWN["poisson"])


ELEMENTWISE = {
    "bce": nn.BCEWithLogitsLoss(),
    "bce, sum": nn.BCEWithLogitsLoss(reduction="sum"),
    "bce, weights": nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)),
    "mse": nn.MSELoss(),
    "poisson": nn.PoissonNLLLoss(),
    "poisson, full": nn.PoissonNLLLoss(full=True),
    "huber": nn.HuberLoss(delta=0.5),
    "smooth l1": nn.SmoothL1Loss(),
    "soft margin": nn.SoftMarginLoss(),
    "several labels": nn.MultiLabelSoftMarginLoss(),
    "kl": nn.KLDivLoss(reduction="batchmean"),
    "function": functional.mse_loss,
    "partial": partial(functional.huber_loss, delta=0.5),
}
BY_CLASS = {
    "ce": nn.CrossEntropyLoss(),
    "ce, sum": nn.CrossEntropyLoss(reduction="sum"),
    "ce, weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0])),
    "ce, ignored": nn.CrossEntropyLoss(ignore_index=1),
    "ce, weights, ignored": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0]), ignore_index=1),
    "ce, smooth": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]), label_smoothing=0.2),
    "function": partial(functional.cross_entropy, ignore_index=1),
}


def in_double(criterion):
    return criterion.double() if isinstance(criterion, nn.Module) else criterion


def network(outputs, *, squeezed=False):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)]
    return nn.Sequential(*layers, *([nn.Flatten(0)] if squeezed else [])).double()


def by_all_engines(model, criterion, x, y):
    """``(name, Tr H, Tr H^2 or the Hessian)`` by each engine and each form of the data."""
    call = partial(lowland.hessian_moments, model, criterion)
    for method in ("auto", "exact", "dense"):
        try:
            found = call(x, y, method)
        except lowland.UnsupportedModelError:
            assert method == "exact"
            continue
        yield method, found.trace, found.trace_sq
    target = objective(model, criterion, x, y)
    eye = torch.eye(target.dim, dtype=torch.float64)
    sizes = [p.numel() for p in target.parameters]
    directions = [
        [part.view_as(p) for part, p in zip(row.split(sizes), target.parameters, strict=True)]
        for row in eye
    ]
    matrix = torch.stack([flat(each) for each in hessian_products(target, directions, "autograd")])
    yield "products", matrix.trace(), matrix.square().sum()
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    for name, data in (("spectrum", (x, y)), ("spectrum of batches", batches)):
        values = lowland.spectrum(model, criterion, data, k=None).eigenvalues
        yield name, values.sum(), values.square().sum()
    one, other = (
        call(*data, method="probes", probes=2, generator=torch.Generator().manual_seed(1))
        for data in ((x, y), (batches,))
    )
    assert error(other.trace, one.trace) < 1e-9
    assert error(other.trace_sq, one.trace_sq) < 1e-9


def agree(model, criterion, x, y, loss_of):
    matrix = differences_of_loss(model, loss_of)
    for name, trace, square in by_all_engines(model, criterion, x, y):
        assert error(trace, matrix.trace()) < 1e-6, name
        assert error(square, matrix.square().sum()) < 1e-6, name


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize("shape", [(N,), (N, 1)])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_one_target_a_sample_is_one_target_a_sample_for_every_engine(name, shape, squeezed):
    criterion, model = in_double(ELEMENTWISE[name]), network(1, squeezed=squeezed)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (N,), generator=generator).double()
    column = y[:, None] if name != "soft margin" else 2 * y[:, None] - 1

    def loss_of():
        return criterion(model(x).reshape(N, 1), column)

    with warnings.catch_warnings():
        # Of shapes that PyTorch broadcasts.
        warnings.filterwarnings("error", "Using a target size")
        agree(model, criterion, x, column.reshape(shape), loss_of)


@pytest.mark.parametrize("name", BY_CLASS)
def test_classes_count_by_their_weights_for_every_engine(name):
    criterion, model = in_double(BY_CLASS[name]), network(CLASSES)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 2, 1, 0, 2, 1, 1, 0])
    agree(model, criterion, x, y, lambda: criterion(model(x), y))


@pytest.mark.parametrize("method", ["exact", "dense", "probes"])
@pytest.mark.parametrize("shape", [(N, 2), (1, N), (2 * N,)])
def test_targets_that_would_be_broadcast_are_refused(method, shape):
    x, y = torch.randn(N, 3).double(), torch.ones(shape).double()
    with pytest.raises(ValueError, match="x and y do not match"):
        lowland.hessian_moments(network(1), nn.MSELoss(), x, y, method)
    with pytest.raises(ValueError, match="x and y do not match"):
        lowland.spectrum(network(1), nn.HuberLoss(), (x, y))


def test_a_criterion_of_ones_own_is_given_its_targets_as_they_are():
    class Weighted(nn.MSELoss):  # targets and their weights
        def forward(self, output, y):
            return (y[:, 1] * (output.squeeze(1) - y[:, 0]).square()).mean()

    model, x, y = network(1), torch.randn(N, 3).double(), torch.rand(N, 2).double()
    agree(model, Weighted(), x, y, lambda: Weighted()(model(x), y))


def test_a_registered_loss_that_is_not_the_criterion_is_refused():
    x, y = torch.randn(N, 3).double(), torch.ones(N).double()
    criterion = nn.PoissonNLLLoss()
    lowland.hessian_moments(network(1), criterion, x, y, "exact")
    criterion.log_input = False  # the registered one knows of logarithms alone
    for other in (criterion, nn.PoissonNLLLoss(log_input=False)):
        with pytest.raises(ValueError, match="is not the mean of the loss 'poisson'"):
            lowland.hessian_moments(network(1), other, x, y, "exact")


def test_a_mean_over_ignored_targets_is_not_split_in_halves():
    model, x = network(CLASSES), torch.randn(4, 3).double()
    criterion = nn.CrossEntropyLoss(ignore_index=1)
    for method in ("exact", "probes"):
        with pytest.raises(ValueError, match="denominator depends on the batch"):
            lowland.hessian_moments(
                model, criterion, x, torch.tensor([0, 1, 2, 0]), method, unbiased=True
            )
    lowland.hessian_moments(
        model, criterion, x, torch.tensor([0, 2, 2, 0]), "probes", unbiased=True
    )


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([*BY_CLASS, *ELEMENTWISE]))
def test_means_of_batches_add_up_to_the_mean_of_all(first, second, name):
    by_class = name in BY_CLASS
    criterion = in_double(BY_CLASS[name] if by_class else ELEMENTWISE[name])
    output = torch.randn(first + second, CLASSES).double().log_softmax(1)
    y = torch.arange(first + second) % CLASSES
    if not by_class:
        y = functional.one_hot(y, CLASSES).double()
    else:
        y[:1], y[-1:] = 0, 2  # of each batch one that counts
    cut = [slice(0, first), slice(first, None)]
    masses = [criteria.mass(criterion, y[part]) for part in cut]
    losses = [criterion(output[part], y[part]) for part in cut]
    total = sum(m * loss for m, loss in zip(masses, losses, strict=True))
    total = total / (1 if criteria.is_sum(criterion) else sum(masses))
    torch.testing.assert_close(total, criterion(output, y))


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.KLDivLoss(reduction="batchmean")])
def test_batches_of_longer_samples_count_by_what_their_means_divide_by(criterion):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(1)).double()
    batches = [
        (torch.randn(samples, length, 3).double(), torch.rand(samples, length).double())
        for samples, length in ((2, 5), (4, 2))
    ]
    # Outputs of a mean, samples of a mean over the batch.
    masses = (10, 8) if criterion.reduction == "mean" else (2, 4)
    traces = [lowland.hessian_moments(model, criterion, x, y, "dense").trace for x, y in batches]
    expected = sum(m * trace for m, trace in zip(masses, traces, strict=True)) / sum(masses)
    found = lowland.spectrum(model, criterion, batches, k=None).eigenvalues.sum()
    assert error(found, expected) < 1e-9


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
@pytest.mark.parametrize("squeezed", [False, True])
def test_a_last_batch_of_one_sample_is_a_batch(shape, squeezed):
    model, x = network(1, squeezed=squeezed), torch.randn(5, 3).double()
    y = torch.randn(5, *shape[1:]).double()
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    whole = lowland.spectrum(model, nn.MSELoss(), (x, y), k=None)
    cut = lowland.spectrum(model, nn.MSELoss(), batches, k=None)
    torch.testing.assert_close(cut.eigenvalues, whole.eigenvalues)
    alone = lowland.HSR(nn.MSELoss(), 1.0, method="dense")
    assert alone.loss(model, *batches[1]) > alone(model, *batches[1])


def test_a_batch_of_ignored_targets_alone_is_left_out():
    model, x = network(CLASSES), torch.randn(6, 3).double()
    y, criterion = torch.tensor([0, 2, 1, 2, -100, -100]), nn.CrossEntropyLoss()
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    cut = lowland.spectrum(model, criterion, batches, k=None).eigenvalues
    torch.testing.assert_close(cut, lowland.spectrum(model, criterion, (x, y), k=None).eigenvalues)


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double(), ignore_index=1)


@pytest.mark.parametrize(
    "wrap",
    [partial, lambda criterion: torch.compile(criterion, backend="eager")],
    ids=["partial", "compiled"],
)
def test_a_criterion_within_another_call_is_that_criterion(wrap):
    x, y = torch.randn(N, 3).double(), torch.arange(N) % CLASSES
    assert criteria.mass(wrap(WEIGHTED), y) == criteria.mass(WEIGHTED, y)
    target = torch.randn(N).double()
    expected = lowland.hessian_moments(network(1), nn.MSELoss(), x, target, "dense")
    found = lowland.hessian_moments(network(1), wrap(nn.MSELoss()), x, target, "dense")
    torch.testing.assert_close(found.trace_sq, expected.trace_sq)


class Scaled(nn.Module):
    reduction = "mean"

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.ones(1).double())
        self.more = [1.0]

    def forward(self, output, y):
        return (self.factor * self.more[0] * (output - y).square()).mean()


def unlike(criterion):
    criterion.factor.fill_(3)


@pytest.mark.parametrize("change", [unlike, lambda criterion: criterion.more.__setitem__(0, 2.0)])
def test_settings_of_any_kind_that_change_are_compared_again(change):
    lowland.exact.register_criterion(Scaled, lambda criterion: lowland.losses.LOSSES["mse"])
    x, y, criterion = torch.randn(N, 3).double(), torch.randn(N).double(), Scaled()
    lowland.hessian_moments(network(1), criterion, x, y, "exact")
    change(criterion)
    with pytest.raises(ValueError, match="is not the mean of the loss 'mse'"):
        lowland.hessian_moments(network(1), criterion, x, y, "exact")


def test_every_target_is_compared_and_pytorchs_own_criteria_too():
    class Late(Scaled):
        def forward(self, output, y):
            return ((1 + 9 * (y > 2)) * (output - y).square()).mean()

    lowland.exact.register_criterion(Late, lambda criterion: lowland.losses.LOSSES["mse"])
    lowland.exact.register_criterion(nn.MSELoss, lambda criterion: OF_ONES_OWN["poisson"])
    x, y = torch.randn(N, 3).double(), torch.linspace(0, 5, N).double()
    for criterion in (Late(), nn.MSELoss()):
        with pytest.raises(ValueError, match="is not the mean of the loss"):
            lowland.hessian_moments(network(1), criterion, x, y, "exact")


def refuse(criterion):
    raise lowland.UnsupportedModelError("not with these settings")


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("read", [lambda criterion: None, refuse])
def test_what_is_registered_may_say_that_settings_have_no_closed_form(read):
    lowland.exact.register_criterion(nn.PoissonNLLLoss, read)
    x, y = torch.randn(N, 3).double(), torch.ones(N).double()
    criterion = nn.PoissonNLLLoss()
    assert lowland.hessian_moments(network(1), criterion, x, y).method == "dense"
    lowland.HSR(criterion, 0.1).loss(network(1), x, y).backward()
    with pytest.raises(lowland.UnsupportedModelError, match="these settings"):
        lowland.hessian_moments(network(1), criterion, x, y, "exact")


def test_batches_with_dictionaries_of_targets_count_by_their_samples():
    model, x, y = network(1), torch.randn(7, 3).double(), torch.randn(7, 1).double()

    def criterion(output, target):
        return functional.mse_loss(output, target["y"])

    batches = [(x[:5], {"y": y[:5], "id": 1}), (x[5:], {"y": y[5:], "id": 2})]
    found, expected = (
        lowland.hessian_moments(
            model,
            *arguments,
            method="probes",
            probes=2,
            generator=torch.Generator().manual_seed(0),
        )
        for arguments in ((criterion, batches), (nn.MSELoss(), x, y))
    )
    torch.testing.assert_close(found.trace_sq, expected.trace_sq.detach())


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("criterion", [nn.MSELoss, "mse"])
def test_what_is_no_criterion_is_refused(criterion):
    x, y = torch.randn(N, 3).double(), torch.randn(N).double()
    with pytest.raises(TypeError, match="expected a criterion that can be called"):
        lowland.hessian_moments(network(1), criterion, x, y)
    with pytest.raises(TypeError, match="expected a criterion that can be called"):
        lowland.spectrum(network(1), criterion, (x, y))

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


# Functions, and what PyTorch's criteria do within them


def one_target():
    torch.manual_seed(0)
    return torch.randn(N, 3).double(), torch.rand(N).double()


class Objects:
    """Criteria as people write them."""

    def method(self, output, y):
        return functional.mse_loss(output.squeeze(1), y)

    def __call__(self, output, y):
        return self.method(output, y)


def function(output, y):
    return Objects().method(output, y)


CALLABLES = {
    "function": function,
    "lambda": lambda output, y: function(output, y) * 1,
    "partial": partial(function),
    "bound method": Objects().method,
    "object": Objects(),
    "compiled": torch.compile(function, backend="eager"),
    "compiled within": lambda output, y: 1 * torch.compile(function, backend="eager")(output, y),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # looked at by torch.compile
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * ("compiled" in name)) for name in CALLABLES],
)
def test_whatever_can_be_called_is_a_criterion_in_every_call(name):
    criterion, model, (x, y) = CALLABLES[name], network(1), one_target()
    agree(model, criterion, x, y, lambda: function(model(x), y))
    for kind in (lowland.HSR, lowland.HessianTrace, lowland.FlatnessAware):
        kind(criterion, 0.1).loss(model, x, y).backward()
        kind(criterion, 0.1, products="differences")(model, x, y).backward()
    lowland.HSR(criterion, 0.1, unbiased=True)(model, x, y).backward()


BROADCAST = [
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
    functional.poisson_nll_loss,
    functional.kl_div,
    functional.soft_margin_loss,
    functional.multilabel_soft_margin_loss,
    functional.hinge_embedding_loss,
]


def in_every_call(model, criterion, x, y):
    return [
        partial(lowland.hessian_moments, model, criterion, x, y),
        partial(lowland.hessian_moments, model, criterion, [(x, y)]),
        partial(lowland.spectrum, model, criterion, (x, y)),
        partial(lowland.HSR(criterion, 1.0).loss, model, x, y),
    ]


@pytest.mark.parametrize("criterion", BROADCAST, ids=lambda criterion: criterion.__name__)
@pytest.mark.parametrize("squeezed", [False, True])
def test_what_a_criterion_within_another_would_broadcast_is_refused(criterion, squeezed):
    x, y = one_target()
    y = y if not squeezed else y[:, None]
    model = network(1, squeezed=squeezed)
    by_place, by_name = lambda o, y: 1 * criterion(o, y), lambda o, y: criterion(target=y, input=o)
    for call in in_every_call(model, by_place, x, y) + in_every_call(model, by_name, x, y):
        with pytest.raises(ValueError, match=rf"^{criterion.__name__} within the criterion"):
            call()


def test_a_variance_beside_does_not_hide_what_is_broadcast():
    x, y = one_target()
    with pytest.raises(ValueError, match="gaussian_nll_loss within the criterion"):
        lowland.spectrum(
            network(1), lambda o, y: functional.gaussian_nll_loss(o, y, torch.ones_like(o)), (x, y)
        )


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_what_is_meant_to_be_broadcast_can_be_said():
    x, y = one_target()
    plain = lowland.hessian_moments(network(1), nn.MSELoss(), x, y, "dense")
    found = lowland.hessian_moments(
        network(1), lambda output, y: functional.mse_loss(output, y.view_as(output)), x, y
    )
    torch.testing.assert_close(found.trace_sq, plain.trace_sq)
    one_number = partial(lambda output, y: functional.mse_loss(output, y.mean()))
    lowland.hessian_moments(network(1), one_number, x, y)


LEGACY = {
    "size_average": (partial(functional.mse_loss, size_average=False), True),
    "reduce and size_average": (
        partial(functional.mse_loss, reduce=True, size_average=False),
        True,
    ),
    "size_average, a mean": (partial(functional.mse_loss, size_average=True), False),
    "classes": (partial(functional.cross_entropy, size_average=False, ignore_index=1), True),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("name", LEGACY)
def test_former_names_of_the_reduction_are_known(name):
    criterion, is_sum = LEGACY[name]
    assert criteria.is_sum(criterion) == is_sum
    x, y = one_target()
    if name == "classes":
        y = torch.arange(N) % CLASSES
    model = network(CLASSES if name == "classes" else 1)
    agree(
        model,
        criterion,
        x,
        y,
        lambda: criterion(model(x), y if y.ndim > 1 else (y if name == "classes" else y[:, None])),
    )
    with pytest.raises(ValueError, match="must be 'mean' or 'sum'"):
        lowland.spectrum(model, partial(functional.mse_loss, reduce=False), (x, y))


def test_criteria_of_several_tensors_work_in_every_call():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network(4)

        def forward(self, x):
            both = self.body(x)
            return both[:, :1], both[:, 1:]

    def criterion(output, y):
        return functional.mse_loss(output[0].squeeze(1), y[0]) + functional.cross_entropy(
            output[1], y[1]
        )

    model, (x, y) = Heads(), one_target()
    targets = y, torch.arange(N) % CLASSES
    matrix = differences_of_loss(model, lambda: criterion(model(x), targets))
    found = lowland.hessian_moments(model, criterion, x, targets)
    assert error(found.trace_sq, matrix.square().sum()) < 1e-6
    batches = [(x[s], tuple(each[s] for each in targets)) for s in (slice(3), slice(3, None))]
    for data in ((x, targets), batches):
        values = lowland.spectrum(model, criterion, data, k=None).eigenvalues
        assert error(values.square().sum(), matrix.square().sum()) < 1e-6
    lowland.FlatnessAware(criterion, 0.1).loss(model, x, targets).backward()


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (lambda made: (made, made), "a tuple of 2"),
        (lambda made: {"logits": made, "loss": made.sum()}, "dict with logits, loss"),
    ],
)
def test_a_criterion_that_does_not_take_what_the_model_returns_says_so(output, says):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network(1)

        def forward(self, x):
            return output(self.body(x))

    (x, y), model = one_target(), Other()

    def own(out, target):
        return functional.mse_loss(out, target)

    for criterion, match in (
        (nn.MSELoss(), rf"MSELoss takes a tensor, and the model returns {says}: give a criterion"),
        (functional.mse_loss, rf"mse_loss takes a tensor, and the model returns {says}"),
        (own, rf"criterion own does not take what the model returns, {says}, with y, a tensor of"),
    ):
        for call in in_every_call(model, criterion, x, y):
            with pytest.raises(TypeError, match=match):
                call()


def test_targets_that_are_missing_or_no_tensor_are_named():
    x, y = one_target()
    for method in ("auto", "dense", "probes"):
        with pytest.raises(TypeError, match=r"y is missing: give \(x, y\), or \(x, x\)"):
            lowland.HSR(nn.MSELoss(), 1.0, method=method)(network(1), x, None)
        with pytest.raises(TypeError, match=r"targets y as a torch.Tensor; got dict with y"):
            lowland.hessian_moments(network(1), nn.MSELoss(), x, {"y": y}, method)
    with pytest.raises(TypeError, match=r"targets y as a torch.Tensor; got dict with y"):
        lowland.hessian_moments(network(1), nn.MSELoss(), [(x, {"y": y})] * 2)
    loss = lowland.HSR(lambda output, _: output.square().mean(), 1.0).loss(network(1), x)
    assert loss.isfinite()  # of a criterion that takes none
    with pytest.raises(TypeError, match=r"put all that the criterion takes beside"):
        lowland.spectrum(network(1), nn.MSELoss(), [(x, y, y)])


def test_sparse_inputs_are_inputs():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(3, 1).double())

        def forward(self, x):
            return (
                torch.sparse.mm(x, self.weight).tanh() if x.is_sparse else (x @ self.weight).tanh()
            )

    (x, y), model = one_target(), Sparse()
    x = x * (x > 0)
    plain = lowland.hessian_moments(model, nn.MSELoss(), x, y, "dense")
    sparse = x.to_sparse()
    for method in ("auto", "dense"):
        found = lowland.hessian_moments(model, nn.MSELoss(), sparse, y, method)
        torch.testing.assert_close(found.trace_sq, plain.trace_sq)
    for data in ((sparse, y), [(sparse, y), (sparse, y)]):
        values = lowland.spectrum(model, nn.MSELoss(), data, k=None).eigenvalues
        torch.testing.assert_close(values.sum(), plain.trace.detach())
    lowland.HSR(nn.MSELoss(), 1.0).loss(model, sparse, y).backward()
    with pytest.raises(TypeError, match=r"MSELoss takes dense targets y; .*to_dense"):
        lowland.hessian_moments(network(3), nn.MSELoss(), x, sparse)
    linear = nn.Linear(3, 1).double()  # which the closed form would cover
    assert lowland.hessian_moments(linear, nn.MSELoss(), sparse, y).method == "dense"
    with pytest.raises(lowland.UnsupportedModelError, match="takes x as a dense tensor"):
        lowland.hessian_moments(linear, nn.MSELoss(), sparse, y, "exact")

"""What a batch counts is known, said, or measured; a loss over batches is that over all samples."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from any_models import error
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import lowland
from lowland._shares import Shares, UnevenError, shares_by_gradients, shares_by_outputs
from lowland._weights import Weights
from lowland.objective import over

CLASSES = 3


def network(outputs=CLASSES):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, outputs)).double()


def labelled(samples=14, ignored=()):
    torch.manual_seed(1)
    x, y = torch.randn(samples, 4).double(), torch.arange(samples) % CLASSES
    y[list(ignored)] = -100
    return x, y


def cut(x, y, *sizes):
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


class Root(nn.MSELoss):
    def forward(self, output, y):
        return super().forward(output, y).sqrt()


class Inside(nn.Module):
    """A criterion of one's own around one of PyTorch's, with settings that nobody sees."""

    reduction = "sum"  # which it is not

    def __init__(self):
        super().__init__()
        self.inner = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0]).double(), ignore_index=0)

    def forward(self, output, y):
        return self.inner(output, y)

    def method(self, output, y):
        return self(output, y)


class Summed(nn.CrossEntropyLoss):
    """A sum, though its reduction says mean."""

    def forward(self, output, y):
        return functional.cross_entropy(output, y, reduction="sum")


def doubled(criterion):
    criterion.register_forward_hook(lambda module, inputs, output: output * len(inputs[1]))
    return criterion


WEIGHT = torch.ones(3)
UNKNOWN = {
    "lambda": lambda output, y: 1 * functional.cross_entropy(output, y),
    "weights": partial(
        lambda output, y, w: 1 * functional.cross_entropy(output, y, w),
        w=torch.tensor([1.0, 2.0, 5.0]).double(),
    ),
    "module": Inside(),
    "bound method": Inside().method,
    "sum": lambda output, y: functional.cross_entropy(output, y, reduction="sum"),
    "sum of a subclass": Summed(),
    "weights in it": lambda output, y: functional.cross_entropy(output, y) + WEIGHT.square().sum(),
    "hooked": doubled(nn.CrossEntropyLoss()),
    "last layer's width": lambda output, y: (output[y >= 0].logsumexp(1).square()).mean(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_batches_of_a_criterion_that_is_not_known_are_measured(name):
    criterion, model = UNKNOWN[name], network()
    x, y = labelled(ignored=() if name in ("module", "bound method", "hooked") else (0, 7, 13))
    batches = cut(x, y, 5, 6, 3)
    expected = lowland.hessian_moments(model, criterion, x, y, "dense")
    found = lowland.spectrum(model, criterion, batches, k=None).eigenvalues
    assert error(found.sum(), expected.trace) < 1e-9
    assert error(found.square().sum(), expected.trace_sq) < 1e-9
    signs = [torch.Generator().manual_seed(0) for _ in range(2)]
    one, other = (
        lowland.hessian_moments(
            model, criterion, *data, method="probes", probes=2, generator=generator
        )
        for data, generator in zip(((x, y), (batches,)), signs, strict=True)
    )
    assert error(other.trace_sq, one.trace_sq) < 1e-9


@pytest.mark.parametrize("where", [0, 1, 2])
def test_batches_of_ignored_targets_alone_count_nothing_wherever_they_stand(where):
    x, y = labelled()
    sizes = [5, 6, 3]
    starts = [0, 5, 11]
    y[starts[where] : starts[where] + sizes[where]] = -100
    for criterion in (UNKNOWN["lambda"], nn.CrossEntropyLoss(), partial(functional.cross_entropy)):
        batches, model = cut(x, y, *sizes), network()
        expected = lowland.hessian_moments(model, criterion, x, y, "dense")
        found = lowland.spectrum(model, criterion, batches, k=None).eigenvalues
        assert error(found.square().sum(), expected.trace_sq) < 1e-9


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), UNKNOWN["lambda"]])
def test_a_batch_of_ignored_targets_alone_has_no_loss(criterion):
    x, y = labelled(6, range(6))
    known = isinstance(criterion, nn.Module)
    match = "every target of the batch is ignored" if known else "the loss is not finite"
    for data in ((x, y), ([(x, y)],)):
        with pytest.raises(ValueError, match=match if len(data) == 2 else "weight zero|not finite"):
            lowland.hessian_moments(network(), criterion, *data, method="probes")
    with pytest.raises(ValueError, match=match):
        lowland.HSR(criterion, 1.0, method="probes").loss(network(), x, y)


def test_a_loss_that_is_not_finite_is_no_ignored_batch():
    x, y = labelled()
    model, batches = network(), cut(x, y, 5, 9)

    def broken(output, y):
        return functional.cross_entropy(output, y) / (len(y) != 9)

    for data in (batches, batches[::-1]):
        with pytest.raises(ValueError, match=r"not finite|neither the mean"):
            lowland.hessian_moments(model, broken, data)


@pytest.mark.parametrize(
    ("criterion", "why"),
    [
        (Root(), "neither the mean of theirs nor the sum"),
        (lambda output, y: (output - output.T).square().mean(), "neither the mean"),
        (lambda output, y: output.square().mean() + output.sum(), "neither the mean"),
        (lambda output, y: output.square().sum() + 0.1 * WEIGHT.square().sum(), "neither the mean"),
    ],
)
def test_a_loss_that_is_neither_a_mean_nor_a_sum_is_refused(criterion, why):
    x, y = torch.randn(7, 4).double(), torch.randn(7, 1).double()
    for call in (lowland.hessian_moments, lowland.spectrum):
        with pytest.raises(ValueError, match=rf"{why}.*say it by count=.*'samples', 'batches'"):
            call(network(1), criterion, cut(x, y, 4, 3))
    # A remedy that works.
    moments = lowland.hessian_moments(network(1), criterion, cut(x, y, 4, 3), count="batches")
    assert moments.trace.isfinite()


def test_samples_of_other_lengths_need_a_count_and_it_is_what_counts():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, CLASSES).double()

        def forward(self, x):
            return self.layer(x)

    def criterion(output, y):
        return functional.cross_entropy(output.flatten(0, 1), y.flatten())

    torch.manual_seed(2)
    batches = []
    for samples, length in ((3, 5), (2, 7)):
        y = torch.randint(CLASSES, (samples, length))
        y[0, 3:] = -100
        batches.append((torch.randn(samples, length, 4).double(), y))
    model = Tagger()
    with pytest.raises(ValueError, match=r"have no common rows.*count=lambda x, y: \(y != -100\)"):
        lowland.spectrum(model, criterion, batches, k=None)
    x = torch.cat([x.flatten(0, 1) for x, _ in batches])
    y = torch.cat([y.flatten() for _, y in batches])
    expected = lowland.hessian_moments(model, nn.CrossEntropyLoss(), x, y, "dense").trace

    def count(x, y):
        return (y != -100).sum()

    found = lowland.spectrum(model, criterion, batches, k=None, count=count).eigenvalues.sum()
    assert error(found, expected) < 1e-9
    layers = lowland.layer_spectra(model, criterion, batches, k=None, count=count)
    assert error(layers["layer"].eigenvalues.sum(), expected) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "weights"),
    [
        ("samples", (5, 9)),
        ("batches", (1, 1)),
        ("sum", (2, 2)),
        (lambda x, y: len(y) ** 2, (25, 81)),
        (lambda x, y: torch.tensor(float(x.shape[1])), (1, 1)),
    ],
)
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), UNKNOWN["lambda"]])
def test_what_the_caller_says_counts(count, weights, criterion):
    model, batches = network(), cut(*labelled(), 5, 9)
    one, other = (
        lowland.hessian_moments(model, criterion, *batch, "dense").trace for batch in batches
    )
    total = 2 if count == "sum" else sum(weights)
    expected = (weights[0] * one + weights[1] * other) / total
    found = lowland.spectrum(model, criterion, batches, k=None, count=count).eigenvalues.sum()
    assert error(found, expected) < 1e-9
    signs = torch.Generator().manual_seed(0)
    estimate = lowland.hessian_moments(
        model, criterion, batches, method="probes", probes=200, generator=signs, count=count
    )
    assert (estimate.trace - expected).abs() < 4 * estimate.stderr[0]


@pytest.mark.usefixtures("as_installed")
def test_counts_that_make_no_sense():
    call = partial(lowland.hessian_moments, network(), UNKNOWN["lambda"], [labelled()])
    for data in ([labelled()], labelled()):
        with pytest.raises(ValueError, match="unknown count 'rows': expected a function"):
            lowland.hessian_moments(network(), UNKNOWN["lambda"], data, count="rows")
    with pytest.raises(TypeError, match="count must be a function of a batch's x and y; got 3"):
        call(count=3)
    for said in (-1, float("nan"), "many", None, torch.ones(2)):
        with pytest.raises(ValueError, match="must give a finite number of at least 0"):
            call(count=lambda x, y, said=said: said)
    with pytest.raises(ValueError, match=r"weight zero, .* or count="):
        call(count=lambda x, y: 0)


class OwnLoss(nn.Module):
    """As Hugging Face's models: named arguments, an output with the loss and the logits."""

    def __init__(self, middle=nn.Tanh):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 3), middle(), nn.Linear(3, CLASSES)).double()

    def forward(self, inputs=None, mask=None, labels=None):
        logits = self.body(inputs)
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def own(output, batch):
    return output.loss


def from_logits(output, batch):
    return functional.cross_entropy(output.logits, batch["labels"])


@pytest.mark.parametrize("criterion", [own, from_logits])
def test_batches_that_hold_their_labels_work_in_every_call(criterion):
    x, y = labelled(ignored=(0, 7, 13))
    model = OwnLoss()
    whole = {"inputs": x, "labels": y}
    batches = [{"inputs": a, "labels": b} for a, b in cut(x, y, 5, 6, 3)]
    expected = lowland.hessian_moments(model.body, nn.CrossEntropyLoss(), x, y, "dense")
    one = lowland.hessian_moments(model, criterion, whole)
    assert one.method == "dense"
    assert error(one.trace_sq, expected.trace_sq) < 1e-9
    count = {"count": lambda x, y: (y["labels"] != -100).sum()}
    for data, settings in ((whole, {}), (batches, {}), (batches, count)):
        found = lowland.spectrum(model, criterion, data, k=None, **settings)
        assert error(found.eigenvalues.square().sum(), expected.trace_sq) < 1e-9
        plain = float(nn.CrossEntropyLoss()(model.body(x), y).detach())
        assert abs(float(found.along(0, [0.0])) - plain) < 1e-9
        signs = torch.Generator().manual_seed(0)
        estimate = lowland.hessian_moments(
            model, criterion, data, method="probes", probes=100, generator=signs, **settings
        )
        assert (estimate.trace_sq - expected.trace_sq).abs() < 4 * estimate.stderr[1]
    for method in ("auto", "dense", "probes"):
        penalty = lowland.FlatnessAware(criterion, 1.0, method=method, probes=40)
        penalty.loss(model, batches[0], None).backward()
    exact = lowland.FlatnessAware(nn.CrossEntropyLoss(), 1.0, method="dense")
    mine = lowland.FlatnessAware(criterion, 1.0, method="dense")
    torch.testing.assert_close(mine(model, whole), exact(model.body, x, y))
    late = lowland.HSR(criterion, 1.0, active=(5, 6))  # no penalty yet: the loss alone
    torch.testing.assert_close(late.loss(model, whole), nn.CrossEntropyLoss()(model.body(x), y))


def test_a_model_s_own_loss_is_not_measured_through_layers_that_mix_samples():
    x, y = labelled()
    batches = [{"inputs": a, "labels": b} for a, b in cut(x, y, 5, 9)]
    training = OwnLoss(lambda: nn.BatchNorm1d(3))
    with pytest.raises(
        ValueError, match=r"number of the whole batch.*let samples .* see each other"
    ):
        lowland.hessian_moments(training, own, batches)
    untracked = OwnLoss(lambda: nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="neither the mean of theirs nor the sum"):
        lowland.hessian_moments(untracked, own, batches)
    lowland.hessian_moments(training, own, batches, count="samples")
    lowland.hessian_moments(training, from_logits, batches)  # in the outputs nothing is mixed


def test_measuring_leaves_the_model_and_the_random_numbers_alone():
    x, y = labelled()
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    model.double()
    before = {name: part.clone() for name, part in model.state_dict().items()}

    def criterion(output, y):
        torch.rand(3)  # it draws numbers
        return functional.cross_entropy(output, y)

    weigh = Weights(over(model, criterion, ()))
    state = torch.get_rng_state()
    weights = [weigh(*batch) for batch in cut(x, y, 5, 6, 3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(torch.tensor(weights), torch.tensor([1, 6 / 5, 3 / 5]))


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([-9, 0, 9]), st.booleans())
def test_shares_are_those_of_the_denominators_at_any_scale(first, second, scale, summed):
    y = torch.arange(first + second) % CLASSES
    output = torch.randn(first + second, CLASSES).double() * 2.0**scale
    parts = [(output[:first], y[:first]), (output[first:], y[first:])]

    def criterion(output, y):
        return functional.cross_entropy(output, y, reduction="sum" if summed else "mean")

    try:
        shares = shares_by_outputs(criterion, *parts)
    except UnevenError:  # of logits this large one may be flat to the last bit
        assert scale == 9
        return
    total = first + second
    expected = (1.0, 1.0) if summed else (first / total, second / total)
    torch.testing.assert_close(torch.tensor(shares), torch.tensor(expected))
    assert shares.is_sum == summed


def test_a_sum_over_a_number_of_the_batch_is_not_taken_for_a_sum():
    (x, y), model = labelled(12), network()

    def criterion(output, target):
        return functional.cross_entropy(output, target["y"], reduction="sum") / target["n"]

    for number in (int, torch.tensor):
        batches = [(a, {"y": b, "n": number(6)}) for a, b in cut(x, y, 6, 6)]
        with pytest.raises(ValueError, match=r"hold numbers, which the sum .* may be divided by"):
            lowland.hessian_moments(model, criterion, batches)
        found = lowland.spectrum(model, criterion, batches, k=None, count=lambda x, y: y["n"])
        plain = lowland.hessian_moments(model, nn.CrossEntropyLoss(), x, y, "dense")
        assert error(found.eigenvalues.sum(), plain.trace) < 1e-9


def test_gradients_of_batches_alike_do_not_tell():
    g = [torch.randn(5).double()]
    h = [torch.randn(5).double()]
    assert shares_by_gradients([g[0] + h[0]], g, h) == Shares(1.0, 1.0)
    torch.testing.assert_close(
        torch.tensor(shares_by_gradients([0.25 * g[0] + 0.75 * h[0]], g, h)),
        torch.tensor([0.25, 0.75]),
    )
    for both, one, two in ((g, g, g), (h, g, g), ([g[0] * h[0]], g, h)):
        with pytest.raises(UnevenError):
            shares_by_gradients(both, one, two)


def test_halves_of_a_criterion_that_is_no_mean_are_refused():
    x, y = labelled(8)
    lowland.hessian_moments(network(), UNKNOWN["lambda"], x, y, "probes", unbiased=True)
    with pytest.raises(ValueError, match="halves' shares in the loss are 1 and 1"):
        lowland.hessian_moments(network(), UNKNOWN["sum"], x, y, "probes", unbiased=True)
    y[0] = -100
    with pytest.raises(ValueError, match=r"shares in the loss are 0\.4286 and 0\.5714"):
        lowland.HSR(UNKNOWN["lambda"], 1.0, unbiased=True).loss(network(), x, y)


def test_batches_of_several_processes_are_not_measured_one_by_one(monkeypatch):
    x, y = labelled()
    target = over(network(), UNKNOWN["lambda"], ())
    monkeypatch.setattr(type(target), "parallel", property(lambda self: object()))
    with pytest.raises(ValueError, match=r"several processes', .* say it by count="):
        Weights(target)(x, y)
    assert Weights(target, "samples")(x, y) == 14


def test_a_loader_may_write_each_batch_into_the_same_memory():
    x, y = labelled(12)
    y[:5] = -100
    batches = cut(x, y, 6, 6)
    inside, outside = torch.empty(6, 4).double(), torch.empty(6).long()

    def overwriting():
        for a, b in batches:
            inside.copy_(a)
            outside.copy_(b)
            yield inside, outside

    signs = [torch.Generator().manual_seed(0) for _ in range(2)]
    found, expected = (
        lowland.hessian_moments(network(), UNKNOWN["lambda"], data, generator=generator)
        for data, generator in zip((overwriting(), batches), signs, strict=True)
    )
    torch.testing.assert_close(found.trace_sq, expected.trace_sq)


def test_surfaces_and_histories_read_the_same_batches():
    x, y = labelled(ignored=(0, 7, 13))
    model = OwnLoss()
    batches = [{"inputs": a, "labels": b} for a, b in cut(x, y, 5, 6, 3)]
    plain = float(nn.CrossEntropyLoss()(model.body(x), y).detach())

    def count(x, y):
        return (y["labels"] != -100).sum()

    for settings in ({}, {"count": count}):
        curve = lowland.surface(model, own, batches, dimensions=1, points=3, **settings)
        assert abs(float(curve.losses[1]) - plain) < 1e-9
        history = lowland.eigenvalues_over(model, own, batches, [model.state_dict()], **settings)
        top = lowland.spectrum(model, own, batches, k=1, **settings)
        assert abs(float(history.losses[0]) - plain) < 1e-9
        torch.testing.assert_close(history.eigenvalues[0], top.eigenvalues, rtol=1e-4, atol=1e-6)

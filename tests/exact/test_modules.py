"""Models and criteria as PyTorch has them: read right, or refused; never silently wrong."""

import itertools

import cases
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

import lowland
from lowland import UnsupportedModelError, criteria, exact
from lowland.exact.modules import read
from lowland.losses import Loss, Separable

ACTIVATIONS = {
    "identity": nn.Identity,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky relu": nn.LeakyReLU,
    "leaky relu of another slope": lambda: nn.LeakyReLU(0.3),
}
CRITERIA = {
    "bce": nn.BCEWithLogitsLoss,
    "bce, sum": lambda: nn.BCEWithLogitsLoss(reduction="sum"),
    "bce, rare class": lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)),
    "bce, rare class, sum": lambda: nn.BCEWithLogitsLoss(
        pos_weight=torch.tensor([0.25]), reduction="sum"
    ),
    "mse": nn.MSELoss,
    "mse, sum": lambda: nn.MSELoss(reduction="sum"),
}
FREEZING = {
    "nothing": [],
    "first layer": ["0.weight", "0.bias"],
    "last layer": ["2.weight", "2.bias"],
    "biases": ["0.bias", "2.bias"],
    "weights": ["0.weight", "2.weight"],
    "all but the last bias": ["0.weight", "0.bias", "2.weight"],
    "first weight, last bias": ["0.weight", "2.bias"],
}
BCE = nn.BCEWithLogitsLoss()


def network(middle=nn.Tanh, *, inputs=3, hidden=4, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layers = nn.Linear(inputs, hidden, **options), middle(), nn.Linear(hidden, 1, **options)
    return nn.Sequential(*layers).to(dtype)


def data(samples=12, inputs=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64)
    y = (torch.randn(samples, generator=generator) > 0).double()
    return x.to(dtype), y.to(dtype)


def gradient(model, criterion, x, y, method):
    """The moments and the gradient of both, flat over the trainable parameters."""
    moments = lowland.hessian_moments(model, criterion, x, y, method)
    trained = [p for p in model.parameters() if p.requires_grad]
    total = moments.trace + 0.3 * moments.trace_sq
    grads = torch.autograd.grad(total, trained, allow_unused=True, materialize_grads=True)
    return moments, torch.cat([grad.flatten() for grad in grads])


def assert_exact_is_dense(model, criterion, x, y):
    closed, mine = gradient(model, criterion, x, y, "exact")
    dense, theirs = gradient(model, criterion, x, y, "dense")
    assert closed.dim == dense.dim == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert closed.trace.shape == closed.trace_sq.shape == ()
    scale = (dense.dim * dense.trace_sq).sqrt()
    assert (closed.trace - dense.trace).abs() <= 1e-10 * scale
    assert (closed.trace_sq - dense.trace_sq).abs() <= 1e-10 * dense.trace_sq
    assert cases.relative_error(mine, theirs) <= 1e-9


@pytest.mark.slow
@settings(max_examples=60)
@given(
    st.sampled_from(sorted(ACTIVATIONS)),
    st.sampled_from(sorted(CRITERIA)),
    st.sampled_from(sorted(FREEZING)),
    st.booleans(),
    st.booleans(),
)
def test_every_covered_model_agrees_with_brute_force(middle, criterion, frozen, bias, column):
    model = network(ACTIVATIONS[middle], bias=bias)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in FREEZING[frozen])
    assume(any(p.requires_grad for p in model.parameters()))
    x, y = data()
    assert_exact_is_dense(model, CRITERIA[criterion](), x, y.unsqueeze(1) if column else y)


SEVERAL = {  # criteria of three outputs, and the targets that they take
    "ce": (nn.CrossEntropyLoss, "labels"),
    "ce, sum": (lambda: nn.CrossEntropyLoss(reduction="sum"), "labels"),
    "ce, class weights": (
        lambda: nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.0])),
        "labels",
    ),
    "ce, smoothed": (lambda: nn.CrossEntropyLoss(label_smoothing=0.2), "labels"),
    "ce, class weights, smoothed, sum": (
        lambda: nn.CrossEntropyLoss(
            torch.tensor([0.5, 2.0, 1.0]), reduction="sum", label_smoothing=0.1
        ),
        "labels",
    ),
    "ce, class weights, smoothed": (
        lambda: nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.0]), label_smoothing=0.1),
        "labels",
    ),
    "ce, some ignored": (
        lambda: nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.0]), ignore_index=1),
        "labels",
    ),
    "ce, shares": (lambda: nn.CrossEntropyLoss(label_smoothing=0.1), "shares"),
    "ce, shares, class weights": (
        lambda: nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.0])),
        "shares",
    ),
    "multi-label": (nn.BCEWithLogitsLoss, "bits"),
    "multi-label, rare": (
        lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 3.0, 0.5])),
        "bits",
    ),
    "multi-label, weighed": (
        lambda: nn.BCEWithLogitsLoss(torch.tensor([1.0, 3.0, 0.5]), reduction="sum"),
        "bits",
    ),
    "mse": (nn.MSELoss, "numbers"),
    "mse, sum": (lambda: nn.MSELoss(reduction="sum"), "numbers"),
}


def targets(kind, samples=12, outputs=3):
    generator = torch.Generator().manual_seed(2)
    numbers = torch.randn(samples, outputs, generator=generator, dtype=torch.float64)
    return {
        "labels": numbers.argmax(1),
        "shares": numbers.softmax(1),
        "bits": (numbers > 0).double(),
        "numbers": numbers,
    }[kind]


@pytest.mark.slow
@settings(max_examples=60)
@given(st.data(), st.sampled_from(sorted(SEVERAL)))
def test_models_of_any_depth_and_several_outputs_agree_with_brute_force(draw, name):
    torch.manual_seed(0)
    widths = [3, *draw.draw(st.lists(st.integers(1, 4), max_size=3), label="widths"), 3]
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        layers.append(nn.Linear(inputs, outputs, bias=draw.draw(st.booleans(), label="bias")))
        names = st.lists(st.sampled_from(sorted({*ACTIVATIONS} - {"relu in place"})), max_size=2)
        layers += [ACTIVATIONS[each]() for each in draw.draw(names, label="activations")]
    while type(layers[-1]) is not nn.Linear:
        layers.pop()
    model = nn.Sequential(nn.Flatten(), *layers).double()
    parameters = list(model.parameters())
    frozen = draw.draw(st.sets(st.integers(0, len(parameters) - 1)), label="frozen")
    assume(len(frozen) < len(parameters))
    for index in frozen:
        parameters[index].requires_grad_(requires_grad=False)
    make, kind = SEVERAL[name]
    assert_exact_is_dense(model, make().double(), data()[0], targets(kind))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [None, 0.0, 0.25, 3.0])
def test_soft_labels(weight, reduction):
    y = torch.linspace(0, 1, 12, dtype=torch.float64)
    positive = None if weight is None else torch.tensor(weight).double()
    criterion = nn.BCEWithLogitsLoss(pos_weight=positive, reduction=reduction)
    assert_exact_is_dense(network(), criterion, data()[0], y)


def test_soft_labels_of_several_outputs():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    criterion = nn.BCEWithLogitsLoss(
        torch.tensor([1.0, 3.0, 0.5]), pos_weight=torch.tensor([0.5, 2.0, 0.0])
    )
    assert_exact_is_dense(model, criterion.double(), data()[0], targets("bits"))
    assert_exact_is_dense(model, criterion.double(), data()[0], targets("shares"))


@pytest.mark.parametrize("positive", [None, torch.tensor(3.0)])
def test_labels_beyond_zero_and_one(positive):
    x, y = data()
    criterion = nn.BCEWithLogitsLoss(pos_weight=positive)
    with pytest.raises(ValueError, match=r"labels between 0 and 1 for 'bce'; got 1.5"):
        lowland.hessian_moments(network(), criterion, x, y + 0.5)


def test_images_are_flattened():
    images = data()[0].view(12, 3, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    assert_exact_is_dense(model, nn.CrossEntropyLoss(), images, targets("labels"))


def test_what_is_done_to_the_inputs_is_no_layer():
    model = nn.Sequential(nn.Tanh(), nn.Linear(3, 4), nn.Linear(4, 1)).double()
    assert_exact_is_dense(model, BCE, *data())


def test_dropout_in_evaluation_mode_does_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    assert_exact_is_dense(model.eval(), BCE, *data())


def test_a_loss_of_ones_own(monkeypatch):
    monkeypatch.setattr(criteria, "_CLOSED_FORMS", dict(criteria._CLOSED_FORMS))

    def derivatives(s, y):
        rate = s.exp()
        return Separable(rate - y, rate, rate)

    poisson = Loss("poisson", lambda s, y: s.exp() - y * s, derivatives)
    exact.register_criterion(nn.PoissonNLLLoss, lambda _: poisson)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    assert_exact_is_dense(model, nn.PoissonNLLLoss(), data()[0], targets("bits"))


def test_biases_may_be_frozen_or_missing_layer_by_layer():
    x, y = data()
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 1)).double()
    assert_exact_is_dense(model, BCE, x, y)
    model[2].bias.requires_grad_(requires_grad=False)
    assert_exact_is_dense(model, BCE, x, y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_labels_of_integer_types(dtype):
    x, y = data()
    assert_exact_is_dense(network(), BCE, x, y.to(dtype))
    weighted = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0))
    assert_exact_is_dense(network(), weighted, x, y.to(dtype))


def test_single_precision_model():
    expected = lowland.hessian_moments(network(), BCE, *data(), "exact")
    model = network(dtype=torch.float32)
    moments = lowland.hessian_moments(model, BCE, *data(dtype=torch.float32), "exact")
    assert moments.trace.dtype == torch.float32
    torch.testing.assert_close(moments.trace_sq.double(), expected.trace_sq, rtol=1e-5, atol=0)


def test_identities_stand_anywhere():
    x, y = data()
    first, last = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()
    assert_exact_is_dense(nn.Sequential(nn.Identity(), first, nn.GELU(), last), BCE, x, y)
    assert_exact_is_dense(nn.Sequential(first, nn.GELU(), last, nn.Identity()), BCE, x, y)


def test_sequences_within_sequences_are_read_layer_by_layer():
    def block(inputs, outputs):
        return nn.Sequential(nn.Linear(inputs, outputs), nn.Sequential(nn.Tanh(), nn.Identity()))

    model = nn.Sequential(nn.Sequential(nn.Flatten()), block(3, 4), block(4, 2), nn.Linear(2, 1))
    assert_exact_is_dense(model.double(), BCE, *data())
    closed = lowland.hessian_moments(model, BCE, *data(), "exact")
    flat = nn.Sequential(model[1][0], nn.Tanh(), model[2][0], nn.Tanh(), model[3])
    assert torch.equal(closed.trace_sq, lowland.hessian_moments(flat, BCE, *data()).trace_sq)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_a_model(bias):
    x, y = data()
    assert_exact_is_dense(nn.Linear(3, 1, bias=bias).double(), BCE, x, y)
    model = nn.Linear(3, 3, bias=bias).double()
    assert_exact_is_dense(model, nn.CrossEntropyLoss(), x, targets("labels"))


def test_nothing_is_left_to_flatten_after_a_linear_layer():
    x, y = data()
    model = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Tanh(), nn.Linear(4, 1), nn.Flatten())
    assert_exact_is_dense(model.double(), BCE, x, y)
    with pytest.raises(
        UnsupportedModelError, match=r"takes x of shape \(samples, 3\); got \(4, 1, 3\)"
    ):
        lowland.hessian_moments(model, BCE, x.view(4, 1, 3, 3)[:, :, 0], y[:4], "exact")


def test_dropout_of_no_unit_does_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.0), nn.Linear(4, 1)).double()
    assert model.training
    closed = lowland.hessian_moments(model, BCE, *data(), "exact")
    torch.testing.assert_close(
        closed.trace_sq, lowland.hessian_moments(model.eval(), BCE, *data(), "dense").trace_sq
    )


def test_a_subclass_of_sequential_that_only_builds_is_read():
    class Classifier(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    assert_exact_is_dense(Classifier().double(), BCE, *data())


def test_order_and_budget_reach_the_closed_form():
    x, y = data()
    expected = read(network(), BCE, x, y).moments().trace_sq
    for order in cases.ORDERS:
        moments = read(network(), BCE, x, y).moments(order, 1 << 20)
        torch.testing.assert_close(moments.trace_sq, expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="memory budget"):
        read(network(), BCE, x, y).moments(memory_budget=16)
    unbiased = read(network(), BCE, x, y).moments(unbiased=True)
    assert unbiased.trace_sq < expected
    assert read(network(), BCE, x, y).moments(moments=4).higher is not None


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_trace_alone(reduction):
    model, (x, y) = network(nn.SiLU), data()
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0), reduction=reduction)
    trace = read(model, criterion, x, y).trace()
    expected = lowland.hessian_moments(model, criterion, x, y, "dense").trace
    torch.testing.assert_close(trace, expected, rtol=1e-10, atol=0)
    grads = torch.autograd.grad(trace, list(model.parameters()))
    brute = torch.autograd.grad(expected, list(model.parameters()), materialize_grads=True)
    for mine, theirs in zip(grads, brute, strict=True):
        assert cases.relative_error(mine, theirs) <= 1e-9


def test_training_mode_and_gradients_so_far_are_left_alone():
    model, (x, y) = network(), data()
    model.train()
    BCE(model(x).squeeze(1), y).backward()
    before = [p.grad.clone() for p in model.parameters()]
    lowland.hessian_moments(model, BCE, x, y, "exact")
    assert model.training
    for parameter, grad in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, grad)


class _Doubled(nn.Linear):
    def forward(self, values):
        return 2 * super().forward(values)


class _DoubledSlope(nn.LeakyReLU):
    def forward(self, values):
        return 2 * super().forward(values)


class _Always(nn.Dropout):
    def forward(self, values):
        return nn.functional.dropout(values, self.p, training=True)


class _DoubledModel(nn.Sequential):
    def forward(self, values):
        return 2 * super().forward(values)


class _DoubledLoss(nn.BCEWithLogitsLoss):
    def forward(self, logits, targets):
        return 2 * super().forward(logits, targets)


def _tied_weight():
    model = network(inputs=1, hidden=1)
    model[2].weight = model[0].weight
    return model


def _tied_bias():
    model = network(hidden=1)
    model[2].bias = model[0].bias
    return model


def _hooked():
    model = network()
    model[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def _hooked_before():
    model = network()
    model.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return model


def _patched():
    model = network()
    model[0].forward = lambda values: torch.zeros(len(values), 4, dtype=values.dtype)
    return model


def _normalized():
    model = network()
    parametrizations.weight_norm(model[0])
    return model


def _pruned():
    model = network()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


NOT_COVERED = {
    "not a sequential": (
        lambda: nn.Bilinear(3, 3, 1),
        "reads nn.Linear, or nn.Sequential.*got Bilinear",
    ),
    "own linear model": (lambda: _Doubled(3, 1), "reads nn.Linear, or .*got _Doubled"),
    "own forward within": (
        lambda: nn.Sequential(nn.Identity(), _DoubledModel(nn.Linear(3, 1))),
        r"layer 1 of the model, _DoubledModel.* is not covered",
    ),
    "hooks within": (
        lambda: nn.Sequential(nn.Linear(3, 3), _hooked()),
        r"forward hooks on layer 1\.1 of the model, Tanh\(\) may",
    ),
    "hooks on a sequence within": (
        lambda: nn.Sequential(nn.Linear(3, 3), _hooked_before()),
        r"forward hooks on layer 1 of the model, Sequential may",
    ),
    "hooks on a lone layer": (
        lambda: _hooked()[1:],
        "forward hooks on layer 1 of the model, Tanh",
    ),
    "deep layers": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Sequential(nn.Softmax(1)))),
        r"layer 1\.0\.0 of the model, Softmax",
    ),
    "dropout of one's own": (
        lambda: nn.Sequential(nn.Linear(3, 4), _Always(0.5), nn.Linear(4, 1)).eval(),
        r"layer 1 of the model, _Always\(p=0.5.* is not covered",
    ),
    "own forward": (
        lambda: _DoubledModel(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
        "nn.Sequential.*got _DoubledModel",
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 1), nn.Tanh(), nn.Linear(4, 1)),
        r"layer 0 of the model, Conv1d\(3, 4.* is not covered",
    ),
    "softmax": (lambda: network(nn.Softmax), r"layer 1 of the model, Softmax\(dim=None\)"),
    "tanh GELU": (lambda: network(lambda: nn.GELU("tanh")), "layer 1 .*approximate='tanh'"),
    "steep softplus": (lambda: network(lambda: nn.Softplus(beta=2)), r"layer 1 .*Softplus\(beta=2"),
    "cut softplus": (lambda: network(lambda: nn.Softplus(threshold=1)), "layer 1 .*threshold=1"),
    "own linear layer": (
        lambda: nn.Sequential(nn.Identity(), _Doubled(3, 4), nn.Tanh(), nn.Linear(4, 1)),
        "layer 1 of the model, _Doubled",
    ),
    "own activation": (lambda: network(_DoubledSlope), "layer 1 of the model, _DoubledSlope"),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1)),
        r"layer 2 of the model, Dropout\(p=0.5.*call model.eval\(\) first",
    ),
    "activation at the end": (
        lambda: nn.Sequential(nn.Linear(3, 1), nn.Sigmoid()),
        r"layer 1 of the model, Sigmoid\(\), stands after the last Linear.*takes logits",
    ),
    "batch normalization": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
        r"layer 1 of the model, BatchNorm1d\(4.* is not covered",
    ),
    "another flatten": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Flatten(0), nn.Linear(4, 1)),
        r"layer 1 of the model, Flatten.* with its default dimensions",
    ),
    "tied weight": (_tied_weight, "Linear layers 1 and 2 of the model.* share a parameter"),
    "tied bias": (_tied_bias, "Linear layers 1 and 2 of the model.* share a parameter"),
    "hook": (_hooked, r"hooks on layer 1 of the model, Tanh\(\) may.*remove them"),
    "hook before": (_hooked_before, "forward hooks on the model may"),
    "patched": (_patched, "forward hooks on layer 0 of the model"),
    "weight normalization": (_normalized, "(?s)layer 0 of the model, ParametrizedLinear"),
    "pruning": (_pruned, "forward hooks on layer 0 of the model"),
}


@pytest.mark.parametrize("what", NOT_COVERED)
def test_models_that_are_not_covered(what):
    make, message = NOT_COVERED[what]
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        lowland.hessian_moments(make().double(), BCE, *data(), "exact")
    assert what == "dropout" or "use method='probes'" in str(caught.value)


@pytest.mark.parametrize(
    ("criterion", "error", "message"),
    [
        (nn.L1Loss(), UnsupportedModelError, "nn.MSELoss; got L1Loss; use method='probes'"),
        (_DoubledLoss(), UnsupportedModelError, "got _DoubledLoss"),
        (
            nn.BCEWithLogitsLoss(weight=torch.ones(12)),
            UnsupportedModelError,
            r"BCEWithLogitsLoss\(weight=...\) must hold one value.*with 1 output got shape \(12,\)",
        ),
        (
            nn.BCEWithLogitsLoss(pos_weight=torch.ones(2)),
            UnsupportedModelError,
            r"pos_weight=...\) must hold one value.*with 1 output got shape \(2,\)",
        ),
        (nn.MSELoss(reduction="none"), ValueError, "must be 'mean' or 'sum'.*got 'none'"),
    ],
)
def test_criteria_that_are_not_covered(criterion, error, message):
    with pytest.raises(error, match=message):
        lowland.hessian_moments(network(), criterion, *data(), "exact")


def test_a_batch_without_any_weight():
    model = nn.Sequential(nn.Linear(3, 3)).double()
    for criterion in (
        nn.CrossEntropyLoss(torch.zeros(3).double()),
        nn.CrossEntropyLoss(ignore_index=1),
    ):
        with pytest.raises(ValueError, match="every sample has weight zero"):
            lowland.hessian_moments(model, criterion, data()[0], torch.ones(12).long(), "exact")


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (
            nn.CrossEntropyLoss(torch.tensor([1.0, -2.0, 1.0])),
            r"CrossEntropyLoss\(weight=...\).*-2",
        ),
        (nn.BCEWithLogitsLoss(torch.tensor([1.0, -2.0, 1.0])), r"BCE\w+\(weight=...\).*got -2"),
        (
            nn.BCEWithLogitsLoss(pos_weight=torch.tensor(-2.0)),
            r"BCEWithLogitsLoss\(pos_weight=...\) must hold numbers of at least 0; got -2",
        ),
    ],
)
def test_negative_weights(criterion, message):
    model = nn.Linear(3, 3).double()
    y = targets("labels" if isinstance(criterion, nn.CrossEntropyLoss) else "bits")
    with pytest.raises(ValueError, match=message):
        lowland.hessian_moments(model, criterion.double(), data()[0], y)
    for name in ("weight", "pos_weight"):
        if getattr(criterion, name, None) is not None:
            getattr(criterion, name).abs_().requires_grad_()
    with pytest.raises(UnsupportedModelError, match=r"weight=...\) without requires_grad"):
        lowland.hessian_moments(model, criterion, data()[0], y, method="exact")


def test_rows_of_whole_numbers_are_no_labels():
    model, (x, _) = nn.Linear(3, 3).double(), data()
    rows = nn.functional.one_hot(targets("labels"), 3)
    criterion = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"got shape \(12, 3\), as of one-hot rows: use y.argmax"):
        lowland.hessian_moments(model, criterion, x, rows)
    expected = lowland.hessian_moments(model, criterion, x, rows.argmax(-1)).trace_sq
    soft = lowland.hessian_moments(model, criterion, x, rows.double()).trace_sq
    torch.testing.assert_close(soft, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision(dtype):
    x, y = data(dtype=dtype)
    with pytest.raises(
        TypeError, match=r"must be float32 or float64; '0.weight' is .*16.*model\.float\(\)"
    ):
        lowland.hessian_moments(network(dtype=dtype), BCE, x, y)


@pytest.mark.parametrize("method", ["auto", "exact", "dense"])
def test_lazy_layers_have_to_see_data_first(method):
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(1)).double()
    x, y = data()
    with pytest.raises(
        ValueError, match=r"parameter '0.weight' belongs to a lazy.*call model\(x\)"
    ):
        lowland.hessian_moments(model, BCE, x, y, method)
    model(x)
    assert lowland.hessian_moments(model, BCE, x, y, method).dim == 21


@pytest.mark.usefixtures("as_installed")
def test_arrays_are_no_tensors():
    x, y = data()
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor; got numpy.ndarray"):
        lowland.hessian_moments(network(), BCE, x.numpy(), y, "exact")
    with pytest.raises(TypeError, match=r"y must be a torch.Tensor; got builtins.list"):
        lowland.hessian_moments(network(), BCE, x, y.tolist(), "exact")


def test_layers_that_do_not_fit():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(5, 1)).double()
    with pytest.raises(ValueError, match=r"gives 4 values and Linear\(in_features=5.* takes 5"):
        lowland.hessian_moments(model, BCE, *data())


@pytest.mark.parametrize("shape", [(12, 2), (12,), (2, 12, 2)])
def test_inputs_that_the_model_does_not_take(shape):
    x = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"Linear\(in_features=3.*takes x of shape \(samples, 3\)"):
        lowland.hessian_moments(network(), BCE, x, data()[1])


def test_positions_within_a_sample_are_for_other_engines():
    model, x, y = network(), torch.randn(2, 6, 3).double(), torch.rand(2, 6, 1).double()
    with pytest.raises(UnsupportedModelError, match=r"got \(2, 6, 3\), for which use"):
        lowland.hessian_moments(model, BCE, x, y, "exact")
    assert lowland.hessian_moments(model, BCE, x, y).method == "dense"
    one_by_one = lowland.hessian_moments(model, BCE, x.flatten(0, 1), y.flatten(0, 1))
    torch.testing.assert_close(lowland.hessian_moments(model, BCE, x, y).trace, one_by_one.trace)
    lowland.HSR(BCE, 0.1).loss(model, x, y).backward()


@pytest.mark.parametrize("shape", [(), (12, 2), (11,), (2, 12)])
def test_targets_that_do_not_match(shape):
    with pytest.raises(ValueError, match=r"y must have shape \(12,\) or \(12, 1\).*got"):
        lowland.hessian_moments(network(), BCE, data()[0], torch.zeros(shape))


def test_a_model_of_another_type_than_its_data():
    with pytest.raises(TypeError, match="x is float64 on cpu but the weights are float32"):
        lowland.hessian_moments(network(dtype=torch.float32), BCE, *data())


@pytest.mark.parametrize("method", ["exact", "dense", "auto"])
def test_a_model_frozen_altogether(method):
    with pytest.raises(ValueError, match=r"no trainable parameter.*set requires_grad"):
        lowland.hessian_moments(network().requires_grad_(requires_grad=False), BCE, *data(), method)

"""What is refused at the door, and in which words."""

import math
from dataclasses import replace

import cases
import oracle
import pytest
import torch

from lowland import UnsupportedModelError, exact
from lowland.losses import LOSSES
from lowland.validation import is_binary

pytestmark = pytest.mark.usefixtures("as_installed")

EVERY_CALL = [
    exact.moments,
    exact.trace,
    exact.loss_gradient,
    exact.hessian,
    exact.direction,
    exact.sample_contributions,
    exact.pair_contributions,
]
SETTINGS = {"activation": "tanh", "loss": "bce"}


def good(**changes):
    """A problem that every function takes: 3 inputs, 4 hidden units, 6 samples."""
    case = cases.make(oracle.Network(3, 4, "tanh", "bce"), 6)
    problem = {"w": case.weights[0], "v": case.weights[1], "x": case.x, "y": case.y, **changes}
    return [problem["w"], problem["v"]], problem["x"], problem["y"]


def zeros(*shape, **options):
    return torch.zeros(*shape, **{"dtype": torch.float64, **options})


def with_value(shape, value):
    tensor = zeros(*shape)
    tensor.view(-1)[-1] = value
    return tensor


@pytest.mark.parametrize("call", EVERY_CALL)
def test_the_good_problem_is_taken(call):
    call(*good(), **SETTINGS)


SHAPES = {
    "x without samples' axis": ({"x": zeros(3)}, r"expected x of shape \(samples, 3\).*got \(3,\)"),
    "too many inputs": ({"x": zeros(6, 4)}, r"expected x of shape \(samples, 3\).*got \(6, 4\)"),
    "too few inputs": ({"x": zeros(6, 2)}, r"bias in row 0; got \(6, 2\)"),
    "more targets than samples": (
        {"y": zeros(7)},
        r"x has 6 samples, so y must have shape \(6,\) or \(6, 1\); got \(7,\)",
    ),
    "a scalar target": ({"y": zeros(())}, r"y must have shape \(6,\) or \(6, 1\); got \(\)"),
    "layers that do not chain": (
        {"v": zeros(4, 1)},
        r"do not chain: .*\(4, 4\) has 4 outputs, so weights\[1\] must have 5 rows.*\(4, 1\)",
    ),
    "more outputs than targets": (
        {"v": zeros(5, 2)},
        r"with 6 samples and 2 outputs y must have shape \(6, 2\) for 'bce'; got \(6,\)",
    ),
    "more targets than outputs": (
        {"v": zeros(5, 2), "y": zeros(6, 3)},
        r"y must have shape \(6, 2\) for 'bce'; got \(6, 3\)",
    ),
    "targets on their side": (
        {"v": zeros(5, 2), "y": zeros(2, 6)},
        r"y must have shape \(6, 2\) for 'bce'; got \(2, 6\)",
    ),
    "a flat output layer": (
        {"v": zeros(5)},
        r"expected weights\[1\] of shape \(\*ensemble, inputs \+ 1, outputs\), bias.*got \(5,\)",
    ),
    "ensembles that do not broadcast": (
        {"w": zeros(2, 4, 4), "v": zeros(3, 5, 1)},
        r"leading \(ensemble\) dimensions do not broadcast: weights \(2,\) and \(3,\)",
    ),
    "data of another ensemble": (
        {"w": zeros(2, 4, 4), "x": zeros(3, 6, 3)},
        r"do not broadcast: weights \(2,\) and \(\), x \(3,\), y \(\)",
    ),
    "targets of another ensemble": ({"w": zeros(2, 4, 4), "y": zeros(3, 6)}, r"y \(3,\)"),
    "no samples": ({"x": zeros(0, 3), "y": zeros(0)}, r"x is empty: got shape \(0, 3\)"),
    "no networks": ({"w": zeros(0, 4, 4)}, r"weights\[0\] is empty: got shape \(0, 4, 4\)"),
    "no networks in the targets": ({"y": zeros(0, 6)}, r"at least one network"),
    "no hidden units": ({"w": zeros(4, 0), "v": zeros(1, 1)}, r"weights\[0\] is empty"),
}


@pytest.mark.parametrize("call", EVERY_CALL)
@pytest.mark.parametrize("what", SHAPES)
def test_shapes_that_do_not_match(what, call):
    changes, message = SHAPES[what]
    with pytest.raises(ValueError, match=message):
        call(*good(**changes), **SETTINGS)


@pytest.mark.parametrize("name", ["w", "v", "x"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.complex128])
def test_types_that_the_closed_form_does_not_have(name, dtype):
    weights, x, _ = good()
    tensor = {"w": weights[0], "v": weights[1], "x": x}[name].to(dtype)
    shown = {"w": r"weights\[0\]", "v": r"weights\[1\]", "x": "x"}[name]
    message = rf"{shown} must be float32 or float64; got {str(dtype).removeprefix('torch.')}"
    with pytest.raises(TypeError, match=message):
        exact.moments(*good(**{name: tensor}), **SETTINGS)


def test_types_that_differ():
    with pytest.raises(TypeError, match="x is float32 on cpu but the weights are float64 on cpu"):
        exact.moments(*good(x=zeros(6, 3, dtype=torch.float32)), **SETTINGS)
    with pytest.raises(TypeError, match=r"weights\[1\] is float32 on cpu but the weights are"):
        exact.moments(*good(v=zeros(5, 1, dtype=torch.float32)), **SETTINGS)


def test_devices_that_differ():
    with pytest.raises(TypeError, match="x is float64 on meta but the weights are float64 on cpu"):
        exact.moments(*good(x=zeros(6, 3, device="meta")), **SETTINGS)
    with pytest.raises(TypeError, match="y is float64 on meta but the weights are float64 on cpu"):
        exact.moments(*good(y=zeros(6, device="meta")), **SETTINGS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "shape", "shown"),
    [
        ("w", (4, 4), r"weights\[0\] has 1 NaN or infinite value out of 16"),
        ("v", (5, 1), r"weights\[1\] has 1 NaN or infinite value out of 5"),
        ("x", (6, 3), "x has 1 NaN or infinite value out of 18; remove or impute"),
        ("y", (6,), "y has 1 NaN or infinite value out of 6"),
    ],
)
def test_values_that_are_not_finite(name, shape, shown, value):
    with pytest.raises(ValueError, match=shown):
        exact.moments(*good(**{name: with_value(shape, value)}), activation="tanh", loss="mse")


def test_infinities_that_cancel_in_a_sum_are_counted():
    x = with_value((6, 3), math.inf)
    x[0, 0] = -math.inf
    with pytest.raises(ValueError, match="x has 2 NaN or infinite values out of 18"):
        exact.moments(*good(x=x), **SETTINGS)


def test_finite_values_whose_sum_overflows_are_taken():
    x = torch.full((6, 3), 1e300, dtype=torch.float64)
    x[0] = torch.finfo(torch.float64).max
    exact.moments(*good(w=zeros(4, 4), x=x), **SETTINGS)


@pytest.mark.parametrize("value", [-1.0, -1e-6, 2.5])
def test_labels_outside_zero_and_one(value):
    message = f"y must hold labels between 0 and 1 for 'bce'; got {value:g}. Encode two classes"
    with pytest.raises(ValueError, match=message):
        exact.moments(*good(y=with_value((6,), value)), **SETTINGS)
    exact.moments(*good(y=with_value((6,), value)), activation="tanh", loss="mse")


def test_losses_of_ones_own_may_insist_on_labels():
    hard = replace(LOSSES["bce"], name="hard", targets="binary")
    weights, x, y = good()
    exact.moments(weights, x, y, activation="tanh", loss=hard)
    with pytest.raises(ValueError, match=r"y must hold labels 0 or 1 for 'hard'; got 0.5"):
        exact.moments(weights, x, y / 2 + 0.5, activation="tanh", loss=hard)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.float32])
def test_no_number_but_zero_and_one_passes_for_a_label(dtype):
    for number in [*range(2, 128), 2**30]:
        y = torch.tensor([0, 1, number]).to(dtype)
        assert is_binary(y) == (int(y[-1]) in {0, 1})
    assert not is_binary(torch.tensor([1e-320], dtype=torch.float64))


@pytest.mark.parametrize("call", EVERY_CALL)
@pytest.mark.parametrize("name", ["x", "y"])
def test_data_that_ask_for_gradients(name, call):
    weights, x, y = good()
    {"x": x, "y": y}[name].requires_grad_()
    if name == "x" and call in (exact.moments, exact.trace):  # these have the gradient
        return
    message = rf"expected {name} without requires_grad.*use {name}\.detach\(\)"
    with pytest.raises(UnsupportedModelError, match=message):
        call(weights, x, y, **SETTINGS)
    call(weights, x.detach(), y.detach(), **SETTINGS)


def test_data_that_a_transform_would_differentiate():
    weights, x, y = good()
    found = torch.func.grad(lambda x: exact.trace(weights, x, y, **SETTINGS))(x)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(exact.trace(weights, x, y, **SETTINGS), x)
    torch.testing.assert_close(found, expected)
    x.requires_grad_(requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"expected x without requires_grad"):
        torch.func.grad(lambda x: exact.hessian(weights, x, y, **SETTINGS).trace())(x)


def test_complex_targets():
    with pytest.raises(TypeError, match="y is complex128 on cpu"):
        exact.moments(*good(y=zeros(6, dtype=torch.complex128)), **SETTINGS)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float32])
def test_labels_of_any_type_are_the_same_labels(dtype):
    weights, x, y = good()
    expected = exact.moments(weights, x, y, **SETTINGS)
    actual = exact.moments(weights, x, y.to(dtype), **SETTINGS)
    assert torch.equal(actual.trace_sq, expected.trace_sq)


@pytest.mark.parametrize("call", EVERY_CALL)
def test_weights_that_are_no_sequence_of_tensors(call):
    weights, x, y = good()
    with pytest.raises(ValueError, match=r"sequence of weight tensors, one for each.*got none"):
        call([], x, y, **SETTINGS)
    with pytest.raises(ValueError, match=r"sequence of weight tensors, one for each.*got a tensor"):
        call(weights[0], x, y, **SETTINGS)


@pytest.mark.parametrize("call", EVERY_CALL)
@pytest.mark.parametrize("count", [0, 2, 3])
def test_other_numbers_of_activations_than_of_hidden_layers(call, count):
    message = f"expected one activation, or one for each of the 1 hidden layers; got {count}"
    with pytest.raises(ValueError, match=message):
        call(*good(), activation=["tanh"] * count, loss="bce")


CLASSES = {
    "labels beyond the last class": (
        {"y": torch.tensor([0, 1, 2, 3, 0, 1])},
        "labels from 0 to 2.*got 3",
    ),
    "negative labels": ({"y": torch.tensor([0, 1, 2, -1, 0, 1])}, "labels from 0 to 2.*got -1"),
    "fractions of labels": ({"y": zeros(6) + 0.5}, "labels from 0 to 2.*got 0.5"),
    "labels that are not finite": ({"y": with_value((6,), math.nan)}, "y has 1 NaN or infinite"),
    "negative probabilities": (
        {"y": with_value((6, 3), -0.5)},
        "y must hold a probability for each class; got -0.5, which is negative",
    ),
    "probabilities that are not finite": (
        {"y": with_value((6, 3), math.inf)},
        "y has 1 NaN or inf",
    ),
    "probabilities for fewer classes": (
        {"y": zeros(6, 2)},
        r"y must have shape \(6,\); got \(6, 2\)",
    ),
    "one-hot rows": (
        {"y": torch.ones(6, 3).long()},
        r"one whole number for each sample; got shape \(6, 3\).* use y.argmax",
    ),
    "labels for fewer samples": (
        {"y": torch.zeros(5).long()},
        r"must have shape \(6,\); got \(5,\)",
    ),
    "one class": (
        {"v": zeros(5, 1)},
        "'ce' takes one logit for each of at least two classes; got one output: use 'bce'",
    ),
}


@pytest.mark.parametrize("call", EVERY_CALL)
@pytest.mark.parametrize("what", CLASSES)
def test_targets_that_are_no_classes(what, call):
    changes, message = CLASSES[what]
    problem = good(**{"v": zeros(5, 3), "y": torch.tensor([0, 1, 2, 2, 1, 0]), **changes})
    with pytest.raises(ValueError, match=message):
        call(*problem, activation="tanh", loss="ce")


def test_numbers_of_moments_that_there_are_not():
    for count in (0, 1, 3, 5):
        with pytest.raises(ValueError, match=f"moments must be 2 or 4.*got {count}"):
            exact.moments(*good(), **SETTINGS, moments=count)


@pytest.mark.parametrize("call", EVERY_CALL)
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"activation": "swish"}, "unknown activation 'swish': expected one of identity, sigmoid"),
        ({"activation": ["swish"]}, "unknown activation 'swish': expected one of identity"),
        ({"loss": "hinge"}, "unknown loss 'hinge': expected one of bce, ce, mse"),
        ({"reduction": "none"}, "unknown reduction 'none': expected 'mean' or 'sum'"),
    ],
)
def test_unknown_names(call, setting, message):
    with pytest.raises(ValueError, match=message):
        call(*good(), **{**SETTINGS, **setting})


@pytest.mark.parametrize("call", EVERY_CALL)
@pytest.mark.parametrize("activation", [None, 3, [None], [["tanh"]], torch.tanh])
def test_activations_of_another_kind(activation, call):
    with pytest.raises(TypeError, match=r"activation must be a name such as 'tanh'.*; got"):
        call(*good(), activation=activation, loss="bce")


@pytest.mark.parametrize("loss", [None, ["bce"], torch.nn.MSELoss()])
def test_losses_of_another_kind(loss):
    with pytest.raises(ValueError, match=r"unknown loss .*one of bce, ce, mse, or a lowland"):
        exact.moments(*good(), activation="tanh", loss=loss)


@pytest.mark.parametrize("call", [exact.moments, exact.trace, exact.direction])
def test_budgets_that_are_no_number_of_bytes(call):
    with pytest.raises(TypeError, match=r"memory_budget must be a number of bytes.*got '1GB'"):
        call(*good(), **SETTINGS, memory_budget="1GB")
    with pytest.raises(ValueError, match="memory_budget must be a finite number of bytes; got inf"):
        call(*good(), **SETTINGS, memory_budget=math.inf)
    call(*good(), **SETTINGS, memory_budget=1e9)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_vmap_is_pointed_to_ensembles(index):
    weights, x, y = good()
    tensors = [*weights, x, y]

    def trace(part):
        *weights, x, y = [*tensors[:index], part, *tensors[index + 1 :]]
        return exact.trace(weights, x, y, **SETTINGS)

    twice = torch.stack([tensors[index]] * 2)
    with pytest.raises(RuntimeError, match=r"comes from torch.func.vmap.*leading dimensions"):
        torch.func.vmap(trace)(twice)
    assert trace(twice).shape == (2,)
    if index < 2:
        with pytest.raises(RuntimeError, match=r"comes from torch.func.vmap"):
            torch.func.vmap(torch.func.grad(trace))(twice)


@pytest.mark.parametrize("call", [exact.moments, exact.direction, exact.sample_contributions])
def test_an_unknown_order(call):
    with pytest.raises(ValueError, match=r"unknown order 'rows': expected 'auto', 'samples'"):
        call(*good(), **SETTINGS, order="rows")

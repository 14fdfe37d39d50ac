import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp
from torch.nn import functional

from lowland.losses import LOSSES, get_loss

BOTH_TYPES = (torch.float64, torch.float32)


@given(
    st.sampled_from(BOTH_TYPES),
    st.floats(-1000, 1000) | st.floats(-6, 6),
    st.sampled_from([0.0, 1.0, 0.3, 1e-12]),
)
def test_cross_entropy_keeps_its_digits_from_fitted_to_misfitted(dtype, value, target):
    logit = torch.tensor(value, dtype=dtype)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    with mpmath.workdps(60):
        s = mp.mpf(float(logit))
        high, low = 1 / (1 + mp.exp(-s)), 1 / (1 + mp.exp(s))
        label = torch.tensor(target, dtype=dtype)
        y = mp.mpf(float(label))
        expected = (1 - y) * high - y * low, high * low, high * low * (low - high)
        # A soft label is fitted where two terms cancel; no digits can be lost but theirs.
        sizes = (1 - y) * high + y * low, expected[1], expected[1]
        actual = LOSSES["bce"].derivatives(logit, label)
        for mine, theirs, size in zip(actual, expected, sizes, strict=True):
            assert mine.dtype == dtype
            error = abs(mp.mpf(float(mine)) - theirs)
            assert error <= 8 * eps * (1 + abs(value)) * size + 8 * tiny


@pytest.mark.parametrize("dtype", BOTH_TYPES)
def test_a_sample_fitted_beyond_the_rounding_of_its_probability_still_counts(dtype):
    # 1 - sigmoid(40) is zero in both types, exp(-40) is not.
    residual, curvature, third = LOSSES["bce"].derivatives(
        torch.tensor([40.0], dtype=dtype), torch.ones(1, dtype=dtype)
    )
    expected = torch.exp(torch.tensor([-40.0], dtype=dtype))
    torch.testing.assert_close(residual, -expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(curvature, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(third, -expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["bce", "mse"])
def test_values_and_derivatives_are_pytorchs(name, generator):
    brute = {
        "bce": functional.binary_cross_entropy_with_logits,
        "mse": functional.mse_loss,
    }[name]
    logits = torch.randn(9, generator=generator, dtype=torch.float64)
    targets = (torch.randn(9, generator=generator) > 0).double()
    targets[:3] = torch.rand(3, generator=generator)

    def derivative(function):
        return torch.func.grad(lambda s: function(s).sum())

    def first(s):
        return derivative(lambda u: brute(u, targets, reduction="none"))(s)

    def second(s):
        return derivative(first)(s)

    loss = LOSSES[name]
    expected = brute(logits, targets, reduction="none")
    torch.testing.assert_close(loss.value(logits, targets), expected)
    orders = first(logits), second(logits), derivative(second)(logits)
    for mine, theirs in zip(loss.derivatives(logits, targets), orders, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
@given(st.integers(2, 5), st.sampled_from([0.3, 3.0, 30.0]), st.integers(0, 2**31))
def test_derivatives_of_several_logits_are_autograds(classes, size, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = size * torch.randn(4, classes, generator=generator, dtype=torch.float64)
    target = torch.rand(4, classes, generator=generator, dtype=torch.float64)  # any weights
    matrix = torch.randn(4, classes, classes, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.mT
    loss = LOSSES["ce"]
    found = loss.derivatives(logits, target)
    for index in range(4):

        def value(s, index=index):
            return -(target[index] * functional.log_softmax(s, -1)).sum()

        def curved(s, value=value, index=index):
            return (torch.func.hessian(value)(s) * matrix[index]).sum()

        s = logits[index]
        torch.testing.assert_close(loss.value(logits, target)[index], value(s))
        close = {"rtol": 1e-9, "atol": 1e-12}
        torch.testing.assert_close(found.residual[index], torch.func.grad(value)(s), **close)
        torch.testing.assert_close(found.curvature[index], torch.func.hessian(value)(s), **close)
        torch.testing.assert_close(found.third(matrix)[index], torch.func.grad(curved)(s), **close)


def test_labels_are_one_hot_distributions(generator):
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1, 0])
    expected = functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(LOSSES["ce"].value(logits, labels), expected)
    hot = functional.one_hot(labels, 3).double()
    torch.testing.assert_close(LOSSES["ce"].value(logits, hot), expected)


@pytest.mark.parametrize("dtype", BOTH_TYPES)
def test_a_fitted_sample_of_several_classes_still_counts(dtype):
    # p rounds to one; what is left are exp(-40) and exp(-45).
    logits = torch.tensor([[40.0, 0.0, -5.0]], dtype=dtype)
    found = LOSSES["ce"].derivatives(logits, torch.tensor([[1.0, 0.0, 0.0]], dtype=dtype))
    small = torch.exp(torch.tensor([-40.0, -45.0], dtype=dtype))
    expected = torch.stack([-small.sum(), small[0], small[1]])
    torch.testing.assert_close(found.residual[0], expected, rtol=1e-5, atol=0)
    diagonal = torch.stack([small.sum(), small[0], small[1]])
    torch.testing.assert_close(found.curvature[0].diagonal(), diagonal, rtol=1e-5, atol=0)
    first = torch.zeros(1, 3, 3, dtype=dtype)
    first[0, 0, 0] = 1  # the gradient of p (1 - p) at p = 1 is minus that of p
    slope = torch.stack([-small.sum(), small[0], small[1]])
    torch.testing.assert_close(found.third(first)[0], slope, rtol=1e-5, atol=0)


def test_names_and_losses_are_looked_up():
    assert get_loss("bce") is LOSSES["bce"]
    assert get_loss(LOSSES["mse"]) is LOSSES["mse"]
    with pytest.raises(ValueError, match="unknown loss 'hinge': expected one of bce, ce, mse"):
        get_loss("hinge")

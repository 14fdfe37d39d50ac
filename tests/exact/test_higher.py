"""Tr H^3 and Tr H^4 of the closed form, and the brackets that they narrow."""

import cases
import oracle
import pytest
import torch
from hypothesis import given

from lowland import exact


@pytest.mark.slow
@given(cases.cases())
def test_higher_moments_are_those_of_the_brute_force_hessian(case):
    moments = exact.moments(*case.arguments, **case.settings, moments=4)
    third, fourth = moments.higher
    assert third.shape == fourth.shape == case.ensemble
    assert not third.requires_grad
    for index, flat, x, y in case.singles():
        values = torch.linalg.eigvalsh(case.network.hessian(flat, x, y))
        scale = values.square().sum()
        assert (third[index] - (values**3).sum()).abs() <= 1e-10 * scale**1.5
        assert (fourth[index] - (values**4).sum()).abs() <= 1e-10 * scale**2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_brackets_hold_the_eigenvalues_and_are_narrower(dtype):
    network = oracle.Network(4, (5, 3), "tanh", "ce", outputs=3)
    case = cases.make(network, 40, dtype=dtype)
    moments = exact.moments(*case.arguments, **case.settings, moments=4)
    ((_, flat, x, y),) = case.singles()
    values = torch.linalg.eigvalsh(network.hessian(flat, x, y)).flip(0)
    slack = 1e-4 if dtype == torch.float32 else 1e-9
    for k in range(1, network.dim + 1):
        low, high = moments.bracket(k, moments=4)
        assert low - slack <= values[k - 1] <= high + slack
    two, four = (high - low for low, high in (moments.bracket(1), moments.bracket(1, moments=4)))
    assert four < 0.7 * two


def test_a_budget_too_small_for_the_square_of_the_hessian():
    case = cases.make(oracle.Network(10, 12, "gelu", "bce"), 9)
    with pytest.raises(ValueError, match=r"moments=4 squares the Hessian.*raise memory_budget"):
        exact.moments(*case.arguments, **case.settings, moments=4, memory_budget=400_000)


@pytest.mark.usefixtures("as_installed")
def test_other_numbers_of_moments():
    case = cases.make(oracle.Network(2, 3, "gelu", "bce"), 9)
    with pytest.raises(ValueError, match="2 or 4"):
        exact.moments(*case.arguments, **case.settings, moments=3)

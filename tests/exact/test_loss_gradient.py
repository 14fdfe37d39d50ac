import cases
import oracle
import pytest
import torch
from hypothesis import given

from lowland import exact
from lowland.exact import c_backend


def expected_gradient(case):
    """By autograd, network by network; flat."""
    network = case.network
    for index, flat, x, y in case.singles():
        leaf = flat.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network.loss_of(leaf, x, y), leaf)
        yield index, gradient


@pytest.fixture(params=["compiled", "pytorch"], scope="module", autouse=True)
def path(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "pytorch":
            patch.setattr(c_backend, "is_available", lambda: False)
        elif not c_backend.is_available():
            pytest.skip("the compiled code was not built")
        yield request.param


@given(cases.cases(dtypes=(torch.float64, torch.float32)))
def test_it_is_that_of_autograd(case):
    gradient = exact.loss_gradient(*case.arguments, **case.settings)
    for part, weight in zip(gradient, case.weights, strict=True):
        assert part.shape == (*case.ensemble, *weight.shape[-2:])
        assert part.dtype == weight.dtype
        assert not part.requires_grad
    for index, expected in expected_gradient(case):
        actual = oracle.flatten([part[index] for part in gradient])
        assert cases.relative_error(actual, expected) <= case.tolerances[0]


def test_a_network_has_the_same_gradient_bit_for_bit_in_any_ensemble(path):
    if path == "pytorch":
        pytest.skip("matrix products of PyTorch may add up in another order")
    case = cases.make(oracle.Network(2, 5, "sigmoid", "bce"), 1000, ensemble=(40,))
    together = exact.loss_gradient(*case.arguments, **case.settings)
    some = [part[13:20] for part in case.weights]
    few = exact.loss_gradient(some, case.x, case.y, **case.settings)
    for one, other in zip(together, few, strict=True):
        assert torch.equal(one[13:20], other)

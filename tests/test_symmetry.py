"""Function-preserving maps: predictions stay, everything else is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import lowland
from lowland.errors import UnsupportedModelError


def mlp(*, activation=nn.ReLU, bias=True):
    return nn.Sequential(
        nn.Linear(5, 7, bias=bias),
        activation(),
        nn.Sequential(nn.Dropout(), nn.Linear(7, 4), activation()),
        nn.Linear(4, 3),
    )


def convolutional(activation=nn.ReLU, norm=nn.Identity):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        norm(),
        nn.LeakyReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 4, 3),
    )


def sequences():
    return nn.Sequential(nn.Linear(5, 4), nn.PReLU(), nn.Flatten(), nn.Linear(12, 2))


CASES = {
    "mlp": (mlp, (8, 5), [7, 4]),
    "without bias": (lambda: mlp(bias=False), (8, 5), [7, 4]),
    "leaky": (lambda: mlp(activation=nn.LeakyReLU), (8, 5), [7, 4]),
    "convolutional": (convolutional, (3, 2, 12, 12), [4, 6]),
}


def build(make, shape, seed=0):
    torch.manual_seed(seed)
    return make().double().eval(), torch.randn(shape).double()


@given(st.sampled_from(sorted(CASES)), st.integers(0, 1), st.floats(1e-3, 1e3), st.booleans())
def test_rescaling_keeps_predictions(case, layer, factor, by_unit):
    make, shape, units = CASES[case]
    model, x = build(make, shape)
    if by_unit:
        factor = factor ** torch.linspace(-1, 1, units[layer]).double()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    changed = lowland.rescale(model, layer, factor)
    torch.testing.assert_close(changed(x), model(x), rtol=1e-10, atol=1e-12)
    for name, part in model.state_dict().items():
        assert torch.equal(part, before[name])
    again = lowland.rescale(changed, layer, 1 / factor)
    torch.testing.assert_close(again.state_dict(), before, rtol=1e-12, atol=0)


def test_powers_of_two_keep_predictions_to_the_last_bit():
    model, x = build(*CASES["mlp"][:2])
    changed = lowland.rescale(model, 0, 8.0)
    assert torch.equal(changed(x), model(x))
    assert torch.equal(changed[0].weight, 8 * model[0].weight)
    assert torch.equal(changed[2][1].bias, model[2][1].bias)


def test_rescaling_moves_the_curvature():
    model, x = build(mlp, (40, 5))
    y = torch.arange(40) % 3
    trace = [
        lowland.hessian_moments(m, nn.CrossEntropyLoss(), x, y).trace.item()
        for m in (model, lowland.rescale(model, 0, 32.0))
    ]
    assert trace[1] > 10 * trace[0]


@given(st.sampled_from([*sorted(CASES), "sequences"]), st.integers(0, 1), st.integers(0, 99))
def test_permuting_keeps_predictions(case, layer, seed):
    cases = {**CASES, "sequences": (sequences, (8, 3, 5), [4])}
    make, shape, units = cases[case]
    layer = min(layer, len(units) - 1)
    model, x = build(make, shape)
    order = torch.randperm(units[layer], generator=torch.Generator().manual_seed(seed))
    changed = lowland.permute(model, layer, order)
    torch.testing.assert_close(changed(x), model(x), rtol=1e-10, atol=1e-12)
    back = lowland.permute(changed, layer, order.argsort())
    assert all(
        torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.Softplus])
def test_permuting_takes_any_elementwise_activation(activation):
    model, x = build(lambda: mlp(activation=activation), (8, 5))
    changed = lowland.permute(model, 0, torch.arange(7).flip(0))
    torch.testing.assert_close(changed(x), model(x))


def test_permuting_takes_batch_normalization_along():
    model, x = build(lambda: convolutional(norm=lambda: nn.BatchNorm2d(6)), (3, 2, 12, 12))
    model.train()(x)
    nn.init.normal_(model.eval()[4].weight)
    changed = lowland.permute(model, 1, torch.arange(6).roll(1))
    torch.testing.assert_close(changed(x), model(x))
    with pytest.raises(UnsupportedModelError, match="BatchNorm2d"):
        lowland.rescale(model, 1, 2.0)


def test_permuting_takes_slopes_along():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.PReLU(3), nn.Conv1d(3, 1, 1)).double()
    nn.init.normal_(model[1].weight)
    x = torch.randn(4, 2, 5).double()
    torch.testing.assert_close(lowland.permute(model, 0, torch.tensor([2, 0, 1]))(x), model(x))


def test_sequences_are_rescaled_unit_by_unit():
    model, x = build(sequences, (8, 3, 5))
    factor = torch.tensor([0.5, 1.0, 2.0, 3.0])
    torch.testing.assert_close(lowland.rescale(model, 0, factor)(x), model(x))


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.GELU, nn.ReLU6, nn.Softplus])
def test_rescaling_refuses_what_is_not_homogeneous(activation):
    with pytest.raises(UnsupportedModelError, match=f"homogeneous.*{activation.__name__}"):
        lowland.rescale(mlp(activation=activation), 0, 2.0)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_rescaling_refuses_factors_that_are_not_positive(factor):
    with pytest.raises(ValueError, match="positive"):
        lowland.rescale(mlp(), 0, factor)


def test_what_does_not_fit_is_refused():
    shared = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="from 0 to 1; got 2 of 3"):
        lowland.rescale(mlp(), 2, 2.0)
    with pytest.raises(ValueError, match="each of the 7 units"):
        lowland.rescale(mlp(), 0, torch.ones(3))
    with pytest.raises(ValueError, match="once"):
        lowland.permute(mlp(), 0, torch.zeros(7, dtype=torch.long))
    with pytest.raises(UnsupportedModelError, match=r"nn\.Sequential"):
        lowland.rescale(nn.Linear(2, 2), 0, 2.0)
    with pytest.raises(UnsupportedModelError, match="shares"):
        lowland.rescale(nn.Sequential(shared, nn.ReLU(), shared), 0, 2.0)
    with pytest.raises(UnsupportedModelError, match="LayerNorm"):
        lowland.permute(
            nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1)), 0, torch.arange(4)
        )
    with pytest.raises(UnsupportedModelError, match="one group"):
        lowland.rescale(
            nn.Sequential(nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Conv1d(4, 4, 1, groups=2)), 0, 2.0
        )
    with pytest.raises(UnsupportedModelError, match="MaxPool1d"):
        lowland.permute(
            nn.Sequential(nn.Linear(4, 4), nn.MaxPool1d(3, 1, 1), nn.Linear(4, 1)),
            0,
            torch.arange(4),
        )
    with pytest.raises(UnsupportedModelError, match="PReLU"):
        lowland.permute(
            nn.Sequential(nn.Linear(5, 4), nn.PReLU(4), nn.Flatten(), nn.Linear(16, 2)),
            0,
            torch.arange(4),
        )
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(UnsupportedModelError, match="parametrization"):
        lowland.rescale(nn.Sequential(normed, nn.ReLU(), nn.Linear(4, 1)), 0, 2.0)
    with pytest.raises(UnsupportedModelError, match="takes 3 inputs"):
        lowland.rescale(nn.Sequential(nn.Conv1d(2, 3, 1), nn.ReLU(), nn.Linear(3, 1)), 0, 2.0)


class Squared(nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 2


class Bounded(nn.ReLU):
    def forward(self, x):
        return torch.tanh(super().forward(x))


def hooked():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].register_forward_hook(lambda *_: _[2] + 1)
    return model


def patched():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[1].forward = torch.tanh
    return model


@pytest.mark.parametrize(
    "model",
    [
        hooked(),
        patched(),
        nn.Sequential(Squared(3, 4), nn.ReLU(), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(3, 4), Bounded(), nn.Linear(4, 2)),
    ],
)
def test_layers_that_compute_something_else_are_refused(model):
    with pytest.raises(UnsupportedModelError, match="something else than PyTorch's layer"):
        lowland.rescale(model, 0, 2.0)
    with pytest.raises(UnsupportedModelError, match="something else than PyTorch's layer"):
        lowland.permute(model, 0, torch.arange(4))


def test_pruned_layers_are_told_what_to_do():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    with pytest.raises(UnsupportedModelError, match=r"(?s)cannot be copied .*prune\.remove"):
        lowland.rescale(model, 0, 2.0)
    prune.remove(model[0], "weight")
    x = torch.randn(5, 3)
    torch.testing.assert_close(lowland.rescale(model, 0, 2.0)(x), model(x), rtol=0, atol=0)


def test_arguments_that_are_none_are_refused(as_installed):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for layer in (0.0, "0", True):
        with pytest.raises(TypeError, match="layer must be a whole number"):
            lowland.rescale(model, layer, 2.0)
    with pytest.raises(ValueError, match="two linear or convolutional layers"):
        lowland.rescale(nn.Sequential(nn.Linear(3, 4)), 0, 2.0)
    with pytest.raises(TypeError, match=r"order must be a torch\.Tensor; got builtins\.list"):
        lowland.permute(model, 0, [0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"order must hold whole numbers, shape \(4,\); got torch"):
        lowland.permute(model, 0, torch.arange(4.0))

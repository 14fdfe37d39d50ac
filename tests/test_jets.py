"""Second derivatives along a direction by one pass, beside brute force and differences."""

from dataclasses import replace

import pytest
import torch
from any_models import CROSS_ENTROPY, flat, trainable
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import grad

import lowland
from lowland.dense import dense_hessian
from lowland.jets import along, covers
from lowland.objective import objective
from lowland.products import form_along, traces_along

ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid]
CRITERIA = [
    nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.CrossEntropyLoss(reduction="sum"),
    nn.MSELoss(),
    nn.HuberLoss(delta=0.7),
]


def tied():
    layer = nn.Linear(4, 4)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), layer, nn.LeakyReLU(0.1), layer)


NETWORKS = {
    "an inner sequence": lambda: (
        nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.SiLU(), nn.Linear(4, 4, bias=False))),
        torch.randn(6, 5),
    ),
    "tied weights": lambda: (tied(), torch.randn(6, 5)),
    "convolutions": lambda: (
        nn.Sequential(
            *(nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular"), nn.SiLU()),
            *(nn.MaxPool2d(3, stride=2, padding=1), nn.Conv2d(3, 2, 3, groups=1), nn.Softplus()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 4)),
        ),
        torch.randn(6, 1, 8, 8),
    ),
    "of one dimension": lambda: (
        nn.Sequential(
            *(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(9, 4)),
        ),
        torch.randn(6, 2, 8),
    ),
}


def loss_of(model, criterion, x, chosen=None):
    y = torch.randint(4, (6,)) if isinstance(criterion, nn.CrossEntropyLoss) else None
    y = torch.randn(6, 4, dtype=x.dtype) if y is None else y
    return objective(model, criterion, x, y, chosen)


def third_by_differences(target, direction, step=1e-4):
    here = [p.detach().clone() for p in target.parameters]

    def gradient(way):
        return target.gradient([p + way * v for p, v in zip(here, direction, strict=True)])[1]

    parts = zip(gradient(step), gradient(0.0), gradient(-step), strict=True)
    return flat([(a - 2 * b + c) / step**2 for a, b, c in parts])


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from([*NETWORKS, *ACTIVATIONS]),
    criterion=st.sampled_from(CRITERIA),
    once=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_form_product_and_gradient_are_those_of_the_hessian(name, criterion, once, scale, seed):
    torch.manual_seed(seed)
    if name in NETWORKS:
        model, x = NETWORKS[name]()
    else:
        model, x = nn.Sequential(nn.Linear(5, 3), name(), nn.Linear(3, 4)), torch.randn(6, 5)
    model, x = model.double(), scale * x.double()
    target = replace(loss_of(model, criterion, x), once=once)
    assert covers(target)
    direction = [torch.randn_like(p) for p in target.parameters]
    direction = [v / flat(direction).norm() for v in direction]
    matrix = dense_hessian(model, criterion, *target.batch).detach()
    loss, form, product = form_along(target, direction)
    torch.testing.assert_close(loss, target.value())
    torch.testing.assert_close(form, flat(direction) @ matrix @ flat(direction))
    torch.testing.assert_close(flat(product), matrix @ flat(direction))
    parameters = target.parameters
    found = flat(grad(form, parameters, retain_graph=True, materialize_grads=True))
    apart = (found - third_by_differences(target, direction)).norm()
    assert apart <= 1e-4 * (found.norm() + matrix.norm())
    torch.testing.assert_close(
        flat(grad(loss, target.parameters)), flat(target.gradient()[1]), rtol=1e-9, atol=1e-12
    )


def test_a_form_of_some_parameters_has_its_gradient_in_all_and_in_the_data():
    model, x = NETWORKS["convolutions"]()
    model, x = model.double(), x.double().requires_grad_()
    chosen = [model[0].bias, *model[3].parameters(), model[-1].weight]
    target = loss_of(model, CRITERIA[0], x, chosen).with_others()
    assert covers(target)
    direction = [torch.randn_like(p) for p in target.parameters]
    _, form = along(target, direction)
    gradient = grad(target.loss(), target.parameters, create_graph=True)
    product = grad(gradient, target.parameters, direction, create_graph=True)
    expected = flat(product) @ flat(direction)
    torch.testing.assert_close(form, expected)
    for inputs in (trainable(model), [x]):
        torch.testing.assert_close(
            *(flat(grad(f, inputs, retain_graph=True)) for f in (form, expected))
        )


def test_what_is_not_known_layer_by_layer_is_left_to_others():
    model, x = NETWORKS["an inner sequence"]()
    assert covers(loss_of(model, CROSS_ENTROPY, x))
    with torch.autocast("cpu"):
        assert not covers(loss_of(model, CROSS_ENTROPY, x))
    assert not covers(loss_of(nn.Sequential(*model, nn.Dropout(0.1)), CROSS_ENTROPY, x))
    assert not covers(loss_of(nn.Sequential(*model, nn.BatchNorm1d(4)), CROSS_ENTROPY, x))
    assert not covers(loss_of(nn.Sequential(*model, nn.PReLU()), CROSS_ENTROPY, x))
    assert not covers(loss_of(nn.Linear(5, 4), CROSS_ENTROPY, x))
    assert not covers(objective(model, lambda output, _: output.square().mean(), x, x))
    handle = model[0].register_forward_hook(lambda *_: None)
    assert not covers(loss_of(model, CROSS_ENTROPY, x))
    handle.remove()
    assert covers(loss_of(model, CROSS_ENTROPY, x))
    handle = model[0].register_full_backward_hook(lambda *_: None)
    assert not covers(loss_of(model, CROSS_ENTROPY, x))
    handle.remove()
    model[0].forward = lambda x: x[:, :4]
    assert not covers(loss_of(model, CROSS_ENTROPY, x))


def test_a_layer_that_has_changed_since_the_last_call_is_seen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    x, y = torch.randn(6, 5).double(), torch.randint(4, (6,))

    def values():
        penalties = [lowland.LambdaMax(CROSS_ENTROPY, 1.0, limit=None, generator=fixed())]
        penalties += [
            lowland.HessianTrace(
                CROSS_ENTROPY, 1.0, limit=None, method="probes", generator=fixed(), products=way
            )
            for way in ("autograd", "differences")
        ]
        return [float(p.measure(model, x, y).detach()) for p in penalties]

    def fixed():
        return torch.Generator().manual_seed(1)

    before = values()
    assert before[1] == pytest.approx(before[2], rel=1e-3)
    model[1] = nn.Softplus()
    after = values()
    assert after[1] == pytest.approx(after[2], rel=1e-3)
    assert after[1] != pytest.approx(before[1], rel=1e-3)
    handle = model[1].register_forward_hook(lambda *args: 2 * args[-1])
    hooked = values()
    handle.remove()
    assert hooked[1] == pytest.approx(hooked[2], rel=1e-3)
    assert hooked[1] != pytest.approx(after[1], rel=1e-3)
    assert values() == after


def test_probes_of_the_trace_alone_do_not_know_the_other_moment():
    model, x = NETWORKS["an inner sequence"]()
    target = loss_of(model.double(), CROSS_ENTROPY, x.double())
    directions = [[torch.randn_like(p) for p in target.parameters] for _ in range(3)]
    loss, traces = traces_along(target, directions)
    matrix = dense_hessian(model, CROSS_ENTROPY, *target.batch)
    vectors = torch.stack([flat(direction) for direction in directions])
    torch.testing.assert_close(loss, target.loss())
    torch.testing.assert_close(traces, ((vectors @ matrix) * vectors).sum(1))
    penalty = lowland.HessianTrace(CROSS_ENTROPY, 1.0, method="probes", probes=4)
    found = penalty.moments(model, *target.batch)
    assert found.trace.isfinite()
    assert found.stderr[0] > 0
    assert found.trace_sq.isnan()

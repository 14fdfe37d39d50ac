"""The closed form of a model's last layers, on top of whatever stands below them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import lowland

CE = nn.CrossEntropyLoss()


class Body(nn.Module):
    """A convolution with batch normalization and dropout, then a head of the caller's."""

    def __init__(self, head):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.drop, self.head = nn.Dropout(0.3), head

    def below(self, x):
        return self.drop(torch.tanh(self.norm(self.conv(x))).flatten(1))

    def forward(self, x):
        return self.head(self.below(x))


def head(*, inplace=False):
    return nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.ReLU(inplace=inplace), nn.Linear(4, 3))


@pytest.fixture
def build():
    def make(kind=Body, layers=None):
        torch.manual_seed(0)
        return kind(layers or head()).double()

    return make


@pytest.fixture
def data():
    torch.manual_seed(1)
    return torch.randn(7, 1, 4, 4).double(), torch.randint(3, (7,))


def gradients(model, x, y, method, chosen, **settings):
    torch.manual_seed(2)
    found = lowland.hessian_moments(model, CE, x, y, method, parameters=chosen, **settings)
    value = 0.3 * found.trace + found.trace_sq
    return found, torch.autograd.grad(value, list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("method", ["exact", "auto"])
@pytest.mark.parametrize("which", ["all", "last", "first and last bias", "inplace"])
def test_moments_and_gradients_down_to_the_first_layer_are_those_of_brute_force(
    which, method, build, data
):
    model = build(layers=head(inplace=which == "inplace"))
    chosen = {
        "last": list(model.head[3].parameters()),
        "first and last bias": [model.head[0].weight, model.head[3].bias],
    }.get(which, list(model.head.parameters()))
    before = copy.deepcopy(model.state_dict())
    mine, slopes = gradients(model, *data, method, chosen)
    theirs, expected = gradients(model, *data, "dense", chosen)
    assert (mine.method, mine.dim) == ("exact", theirs.dim)
    torch.testing.assert_close(mine.trace, theirs.trace, rtol=1e-12, atol=0)
    torch.testing.assert_close(mine.trace_sq, theirs.trace_sq, rtol=1e-12, atol=0)
    for own, other in zip(slopes, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)
    assert slopes[0].abs().max() > 0  # the convolution
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("kind", [lowland.HSR, lowland.HessianTrace, lowland.FlatnessAware])
def test_a_penalty_goes_down_to_the_first_layer_by_every_engine(kind, build, data):
    x, y = data
    found = []
    for method in ("exact", "dense"):
        model = build()
        penalty = kind(CE, 0.5, method=method, parameters=model.head.parameters())
        torch.manual_seed(3)
        penalty.loss(model, x, y).backward()
        assert penalty.used == method
        assert model.norm.num_batches_tracked == 1
        found.append([p.grad for p in model.parameters()])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-12)


def test_loss_and_penalty_take_one_pass_where_that_leaves_no_trace(build, data):
    x, y = data
    for training in (False, True):
        model = build().train(training)
        head = model.head.parameters()
        penalty = lowland.HSR(CE, 0.5, method="exact", parameters=head, limit=1e9)
        runs = []
        model.conv.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        penalty.loss(model, x, y)  # the model is looked at once
        runs.clear()
        torch.manual_seed(3)
        found = penalty.loss(model, x, y)
        assert len(runs) == 1 + training
        slopes = torch.autograd.grad(found, list(model.parameters()))
        torch.manual_seed(3)
        separate = CE(model(x), y)
        torch.manual_seed(3)
        separate = separate + penalty(model, x, y)
        torch.testing.assert_close(found, separate)
        others = torch.autograd.grad(separate, list(model.parameters()))
        for own, other in zip(slopes, others, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


def test_estimates_have_gradients_in_the_layers_below_too(build, data):
    model = build().eval()
    chosen = list(model.head.parameters())
    _, expected = gradients(model, *data, "exact", chosen)
    _, found = gradients(
        model, *data, "probes", chosen, probes=400, generator=torch.Generator().manual_seed(0)
    )
    similar = torch.cosine_similarity(found[0].flatten(), expected[0].flatten(), dim=0)
    assert similar > 0.9


def test_a_head_above_frozen_layers_is_covered(build, data):
    model = build().eval()
    model.requires_grad_(requires_grad=False).head.requires_grad_()
    found = lowland.hessian_moments(model, CE, *data, "exact")
    expected = lowland.hessian_moments(model, CE, *data, "dense")
    torch.testing.assert_close(found.trace_sq, expected.trace_sq, rtol=1e-12, atol=0)


def test_without_gradients_the_numbers_are_the_same(build, data):
    model = build().eval()
    chosen = list(model.head.parameters())
    expected = lowland.hessian_moments(model, CE, *data, "exact", parameters=chosen)
    with torch.no_grad():
        found = lowland.hessian_moments(model, CE, *data, "exact", parameters=chosen)
    assert torch.equal(found.trace_sq, expected.trace_sq)
    assert not found.trace_sq.requires_grad


@pytest.mark.parametrize("matrix", ["ggn", "residual", "fisher"])
def test_other_matrices_of_a_head_are_covered(matrix, build, data):
    model = build().eval()
    chosen = list(model.head.parameters())
    settings = {"parameters": chosen, "matrix": matrix}
    found = lowland.hessian_moments(model, CE, *data, "exact", **settings)
    expected = lowland.hessian_moments(model, CE, *data, "dense", **settings)
    torch.testing.assert_close(found.trace_sq, expected.trace_sq, rtol=1e-11, atol=0)


def test_a_mapping_may_go_into_the_model(data):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(16, 5), nn.Linear(5, 3)

        def forward(self, pixels):
            return self.head(self.body(pixels).sin())

    model, (x, y) = Named().double(), data
    chosen = list(model.head.parameters())
    batch = {"pixels": x.flatten(1)}
    found = lowland.hessian_moments(model, CE, batch, y, "exact", parameters=chosen)
    expected = lowland.hessian_moments(model, CE, batch, y, "dense", parameters=chosen)
    torch.testing.assert_close(found.trace_sq, expected.trace_sq)


# What would give a wrong number is refused.


class Scaled(Body):
    def forward(self, x):
        return 2 * self.head(self.below(x))


class Written(Body):
    def forward(self, x):
        return self.head(self.below(x)).mul_(2)


class WrittenData(Body):
    def forward(self, x):
        output = self.head(self.below(x))
        output.data.mul_(2)
        return output


class Between(Body):
    def forward(self, x):
        *first, last = self.head
        return last(nn.Sequential(*first)(self.below(x)) + 1)


class Twice(Body):
    def forward(self, x):
        features = self.below(x)
        return self.head(features + 0 * self.head(features).sum())


class Used(Body):
    def forward(self, x):
        features = self.below(x)
        return self.head(features * functional.linear(features, self.head[0].weight).mean())


class Changed(Body):
    def forward(self, x):
        features = self.below(x)
        output = self.head(features)
        features.data.add_(0)
        features.add_(1)
        return output


class Checkpointed(Body):
    def forward(self, x):
        return checkpoint(self.head, self.below(x.requires_grad_()), use_reentrant=True)


class Dictionary(Body):
    def forward(self, x):
        return {"logits": self.head(self.below(x))}


class Normed(Body):
    def forward(self, x):
        return self.head(self.below(x) * self.head[0].weight.detach().norm())


class FedBack(Body):
    def forward(self, x):
        features = self.below(x)
        with torch.no_grad():
            first = functional.linear(features, self.head[0].weight)
        return self.head(features + first.mean(1, keepdim=True))


@pytest.mark.parametrize(
    "kind",
    [
        *(Scaled, Written, WrittenData, Between, Twice, Used, Changed, Checkpointed, Dictionary),
        *(Normed, FedBack),
    ],
)
def test_layers_that_are_not_the_end_of_the_model_are_refused(kind, build, data):
    model = build(kind).eval()
    x, y = data
    chosen = list(model.head.parameters())
    with pytest.raises(lowland.UnsupportedModelError, match="use method='probes'"):
        lowland.hessian_moments(model, CE, x, y, "exact", parameters=chosen)
    if kind not in (Dictionary, Checkpointed, WrittenData, Changed, Normed, FedBack):
        found = lowland.hessian_moments(model, CE, x, y, "auto", parameters=chosen)
        assert found.method == "dense"


@pytest.mark.parametrize("place", ["head", "model", "inside"])
def test_hooks_that_change_an_output_are_refused(place, build, data):
    model = build().eval()
    layer = {"head": model.head, "model": model, "inside": model.head[1]}[place]
    layer.register_forward_hook(lambda _, __, output: 2 * output)
    with pytest.raises(lowland.UnsupportedModelError, match="use method='probes'"):
        lowland.hessian_moments(model, CE, *data, "exact", parameters=model.head.parameters())


def test_tied_weights_are_refused(data):
    x, y = data
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
    model.double()[3].weight = model[1].weight
    with pytest.raises(lowland.UnsupportedModelError, match="use method='probes'"):
        lowland.hessian_moments(model, CE, x, y, "exact", parameters=model[3].parameters())


def test_parameters_of_other_layers_are_refused(build, data):
    model = build()
    chosen = [model.conv.weight, *model.head.parameters()]
    with pytest.raises(lowland.UnsupportedModelError, match="use method='probes'"):
        lowland.hessian_moments(model, CE, *data, "exact", parameters=chosen)
    model.head.insert(1, nn.Dropout(0.5))
    with pytest.raises(lowland.UnsupportedModelError, match=r"call model.eval\(\) first"):
        lowland.hessian_moments(model, CE, *data, "exact", parameters=model.head.parameters())

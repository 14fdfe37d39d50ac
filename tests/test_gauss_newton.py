"""Gauss-Newton and Fisher matrices beside those made of first gradients, by their definitions."""

import math
import warnings
from functools import partial
from itertools import pairwise

import any_models
import pytest
import torch
from any_models import CROSS_ENTROPY, build, error, flat, trainable
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lowland
from lowland.dense import BruteForce
from lowland.errors import UnsupportedModelError
from lowland.estimation import Estimation
from lowland.objective import objective
from lowland.passes import frozen_statistics
from lowland.probes import rademacher
from lowland.products import hessian_products, quadratic_forms

MATRICES = ("ggn", "fisher", "residual")


def jacobian(model, x):
    """``J``, one first gradient for each output, and the outputs."""
    with frozen_statistics(model):
        outputs = model(x)
    rows = []
    for each in outputs.reshape(-1):
        parts = torch.autograd.grad(
            each, trainable(model), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(flat([part.to_dense() if part.is_sparse else part for part in parts]))
    return torch.stack(rows), outputs.detach()


def in_parameters(model, x, in_outputs):
    """``J^T Q J`` of a function that gives ``Q`` for outputs."""
    rows, outputs = jacobian(model, x)
    return rows.T @ in_outputs(outputs).reshape(len(rows), len(rows)) @ rows


def gauss_newton(model, criterion, x, y):
    return in_parameters(model, x, torch.func.hessian(lambda z: criterion(z, y)))


def dense(model, criterion, x, y, matrix):
    return BruteForce(objective(model, criterion, x, y, matrix=matrix), Estimation()).hessian()


def moments(model, criterion, x, y, matrix, **settings):
    return lowland.hessian_moments(model, criterion, x, y, matrix=matrix, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", any_models.MODELS)
def test_the_matrices_of_any_model(name):
    model, x, y = build(name)
    hessian = dense(model, CROSS_ENTROPY, x, y, "hessian").detach()
    ggn, fisher, residual = (
        dense(model, CROSS_ENTROPY, x, y, matrix).detach() for matrix in MATRICES
    )
    expected = gauss_newton(model, CROSS_ENTROPY, x, y)
    assert error(ggn, expected) < 1e-12
    assert error(fisher, expected) < 1e-12
    assert error(residual, hessian - expected) < 1e-12
    for matrix, whole in zip(MATRICES, (expected, expected, hessian - expected), strict=True):
        found = moments(model, CROSS_ENTROPY, x, y, matrix, method="dense", moments=4)
        powers = [torch.linalg.matrix_power(whole, k).trace() for k in (1, 2, 3, 4)]
        torch.testing.assert_close(
            torch.stack([found.trace, found.trace_sq, *found.higher]).detach(), torch.stack(powers)
        )
        assert (found.matrix, found.method) == (matrix, "dense")


@settings(max_examples=15)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=4),
    st.sampled_from([nn.GELU, nn.Tanh, nn.ReLU]),
    st.integers(1, 7),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.sampled_from(["mean", "sum"]),
    st.integers(0, 99),
)
def test_products_of_any_shape_and_scale(widths, activation, samples, scale, reduction, seed):
    torch.manual_seed(seed)
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), activation())]
    model = nn.Sequential(*layers[:-1]).double()
    x, y = (
        scale * torch.randn(samples, widths[0]).double(),
        torch.rand(samples, widths[-1]).double(),
    )
    criterion = nn.BCEWithLogitsLoss(reduction=reduction)
    expected = gauss_newton(model, criterion, x, y)
    (direction,) = [rademacher(trainable(model), None)]
    target = objective(model, criterion, x, y, matrix="ggn")
    (found,) = hessian_products(target, [direction])
    torch.testing.assert_close(
        flat(found), expected @ flat(direction), rtol=1e-9, atol=1e-12 * (1 + scale**2)
    )


def value(model, criterion, x, y, matrix, directions, slopes=(0.7, -0.3)):
    """A function of the quadratic forms."""
    target = objective(model, criterion, x, y, matrix=matrix)
    with frozen_statistics(model):
        _, traces, squares = quadratic_forms([target], directions)
    return slopes[0] * traces.sum() + slopes[1] * squares.sum()


def by_differences(model, function):
    """The derivative of a function along a random direction, by central differences."""
    along, step = [torch.randn_like(p) for p in trainable(model)], 1e-6
    sides = []
    for sign in (1, -2):
        with torch.no_grad():
            torch._foreach_add_(trainable(model), along, alpha=sign * step)
        sides.append(function().detach())
    with torch.no_grad():
        torch._foreach_add_(trainable(model), along, alpha=step)
    return (sides[0] - sides[1]) / (2 * step), flat(along)


CURVED = {
    "cross-entropy": nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0]).double()),
    "distance": lambda z, y: (1 + (z - y[:, None]).square().sum(1)).sqrt().mean(),
}


@pytest.mark.parametrize("criterion", CURVED)
@pytest.mark.parametrize("matrix", ["ggn", "residual"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "Attention"])
def test_gradients_of_the_moments(name, matrix, criterion, generator):
    model, x, y = build(name)
    directions = [rademacher(trainable(model), generator) for _ in range(2)]
    function = partial(value, model, CURVED[criterion], x, y, matrix, directions)
    slope, along = by_differences(model, function)
    found = flat(torch.autograd.grad(function(), trainable(model)))
    torch.testing.assert_close(found @ along, slope, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("matrix", MATRICES)
def test_gradients_of_brute_force(matrix):
    model, x, y = build("mlp")

    def function():
        found = moments(model, CROSS_ENTROPY, x, y, matrix, method="dense", moments=4)
        return found.trace - 0.3 * found.trace_sq + found.higher[0] - 0.5 * found.higher[1]

    slope, along = by_differences(model, function)
    found = flat(torch.autograd.grad(function(), trainable(model)))
    torch.testing.assert_close(found @ along, slope, rtol=1e-6, atol=1e-9)


# Criteria, and what the Fisher information in the outputs is by its definition


def regression(criterion, y, ends=()):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2), *ends).double()
    return model, criterion, torch.randn(6, 4).double(), y


def expected_square(score, outcomes, probabilities):
    """``E[g g^T]`` over outcomes of one sample, of the gradient ``g`` of its own loss."""
    scores = torch.stack([score(outcome) for outcome in outcomes])
    return torch.einsum("k,ki,kj->ij", probabilities, scores, scores)


def gradient_of(loss, z):
    z = z.detach().requires_grad_()
    return torch.autograd.grad(loss(z), z)[0]


def fisher_by_class(z, own, total):
    """Of one categorical distribution a row; ``own`` is a row's loss for a class."""
    blocks = []
    for row in z:
        classes = torch.arange(z.shape[1])
        p = torch.stack([torch.exp(-own(row, c)) for c in classes])
        assert abs(p.sum() - 1) < 1e-9
        blocks.append(
            expected_square(lambda c, r=row: gradient_of(lambda s: own(s, c), r), classes, p)
        )
    return torch.block_diag(*blocks) / total


def fisher_by_output(z, own, outcomes, total):
    """Of a distribution for each output; ``outcomes`` gives values and probabilities."""
    entries = []
    for s in z.reshape(-1):
        values, probabilities = outcomes(s)
        scores = torch.stack([gradient_of(partial(own, target=v), s) for v in values])
        entries.append((probabilities * scores.square()).sum())
    return torch.diag(torch.stack(entries)) / total


def binary(s):
    return torch.tensor([0.0, 1.0]).double(), torch.stack([torch.sigmoid(-s), torch.sigmoid(s)])


def counts(rate):
    k = torch.arange(80).double()
    return k, torch.exp(k * rate.log() - rate - torch.lgamma(k + 1))


def two_points(s):
    """A rule that is exact for what is quadratic in a Gaussian of the variance 1/2."""
    return torch.stack([s - math.sqrt(0.5), s + math.sqrt(0.5)]), torch.tensor([0.5, 0.5]).double()


def ce(s, c):
    return functional.cross_entropy(s, c)


def poisson_of_rate(rate, target):
    return rate - target * torch.log(rate)


def poisson(s, target):
    return functional.poisson_nll_loss(s, target, reduction="sum")


LABELS = torch.tensor([0, 1, 1, 0, 1, 0])
KEPT = torch.diag((LABELS > 0).repeat_interleave(2).double())
HALVES = torch.rand(6, 2, generator=torch.Generator().manual_seed(0)).double()
KNOWN = {
    "ce": (*regression(nn.CrossEntropyLoss(), LABELS), lambda z: fisher_by_class(z, ce, 6)),
    "ce, sum": (
        *regression(nn.CrossEntropyLoss(reduction="sum"), LABELS),
        lambda z: fisher_by_class(z, ce, 1),
    ),
    "ce, smoothed": (
        *regression(partial(functional.cross_entropy, label_smoothing=0.2), LABELS),
        lambda z: fisher_by_class(z, ce, 6),
    ),
    "ce, soft": (
        *regression(nn.CrossEntropyLoss(), HALVES.softmax(1)),
        lambda z: fisher_by_class(z, ce, 6),
    ),
    "ce, ignored": (
        *regression(nn.CrossEntropyLoss(), LABELS.where(LABELS > 0, -100)),
        lambda z: KEPT @ fisher_by_class(z, ce, 3),
    ),
    "nll": (
        *regression(nn.NLLLoss(), LABELS, [nn.LogSoftmax(1)]),
        lambda z: fisher_by_class(z, lambda s, c: -s[c], 6),
    ),
    "bce with logits": (
        *regression(nn.BCEWithLogitsLoss(), HALVES.round()),
        lambda z: fisher_by_output(z, functional.binary_cross_entropy_with_logits, binary, 12),
    ),
    "bce": (
        *regression(nn.BCELoss(), HALVES.round(), [nn.Sigmoid()]),
        lambda z: fisher_by_output(
            z, functional.binary_cross_entropy, lambda p: binary(p.logit()), 12
        ),
    ),
    "mse": (
        *regression(nn.MSELoss(), HALVES),
        lambda z: fisher_by_output(z, functional.mse_loss, two_points, 12),
    ),
    "poisson": (
        *regression(nn.PoissonNLLLoss(), HALVES.round()),
        lambda z: fisher_by_output(z, poisson, lambda s: counts(s.exp()), 12),
    ),
    "poisson of rates": (
        *regression(nn.PoissonNLLLoss(log_input=False), HALVES.round(), [nn.Softplus()]),
        lambda z: fisher_by_output(z, poisson_of_rate, counts, 12),
    ),
    "soft margin": (
        *regression(nn.SoftMarginLoss(), 2 * HALVES.round() - 1),
        lambda z: fisher_by_output(
            z, functional.binary_cross_entropy_with_logits, binary, 12
        ),
    ),
    "soft margin, several labels": (
        *regression(nn.MultiLabelSoftMarginLoss(), HALVES.round()),
        lambda z: fisher_by_output(
            z, functional.binary_cross_entropy_with_logits, binary, 12
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_fisher_matrices_are_expectations_over_the_models_own_predictions(name):
    model, criterion, x, y, in_outputs = KNOWN[name]
    expected = in_parameters(model, x, in_outputs)
    assert error(dense(model, criterion, x, y, "fisher"), expected) < 1e-7
    found = moments(model, criterion, x, y, "fisher")
    torch.testing.assert_close(found.trace.detach(), expected.trace(), rtol=1e-7, atol=0)
    assert found.matrix == "fisher"
    # The labels of the data do not matter, only which of them are ignored.
    if name not in ("ce, ignored", "nll"):
        other = (1 - y) if y.dtype == torch.long else y.roll(1, 0)
        assert error(dense(model, criterion, x, other, "fisher"), expected) < 1e-7


@pytest.mark.parametrize("name", ["bce", "poisson of rates"])
def test_fisher_is_not_gauss_newton_where_outputs_are_no_natural_parameters(name):
    model, criterion, x, y, _ = KNOWN[name]
    ggn = dense(model, criterion, x, y, "ggn")
    assert error(ggn, gauss_newton(model, criterion, x, y)) < 1e-10
    assert error(dense(model, criterion, x, y, "fisher"), ggn) > 1e-2


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(weight=torch.ones(2).double()),
        partial(functional.cross_entropy, weight=torch.ones(2).double()),
        nn.HuberLoss(),
        lambda z, y: functional.cross_entropy(2 * z, y),
    ],
)
def test_what_has_no_fisher_matrix_is_refused_by_name(criterion):
    model, x, y = build("mlp")
    y = y if not isinstance(criterion, nn.HuberLoss) else torch.rand(8, 2).double()
    for method in ("dense", "probes"):
        with pytest.raises(UnsupportedModelError, match="matrix='ggn'"):
            moments(model, criterion, x, y, "fisher", method=method)
    assert moments(model, criterion, x, y, "ggn").trace > 0  # the remedy


def test_distributions_that_are_none_have_no_fisher_matrix():
    model, x, y = build("mlp")
    with pytest.raises(UnsupportedModelError, match="LogSoftmax"):
        moments(model, nn.NLLLoss(), x, y, "fisher")
    with pytest.raises(UnsupportedModelError, match="add up to 1"):
        moments(model, nn.CrossEntropyLoss(), x, torch.rand(8, 2).double(), "fisher")


# The split at the output


class Several(nn.Module):
    """Logits beside the features that they are made of, in whatever container."""

    def __init__(self, pack):
        super().__init__()
        self.features, self.head, self.pack = nn.Linear(4, 3), nn.Linear(3, 2), pack

    def forward(self, x):
        features = torch.tanh(self.features(x))
        return self.pack(features, self.head(features))


def as_dict(features, logits):
    return {"features": features, "steps": 3, "inside": (logits, None)}


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (as_dict, lambda out: (out["features"], out["inside"][0])),
        (lambda a, b: (a, [b]), lambda out: (out[0], out[1][0])),
    ],
)
def test_all_tensors_of_the_output_are_where_the_loss_is_split(pack, unpack):
    torch.manual_seed(0)
    model, x, y = Several(pack).double(), torch.randn(5, 4).double(), torch.arange(5) % 2

    def of_both(features, logits):
        return functional.cross_entropy(logits, y) + features.pow(4).mean() * logits.exp().mean()

    def criterion(output, y):
        return of_both(*unpack(output))

    joined = Several(lambda a, b: torch.cat([a, b], 1)).double()
    joined.load_state_dict(model.state_dict())
    expected = gauss_newton(joined, lambda z, _: of_both(z[:, :3], z[:, 3:]), x, y)
    assert error(dense(model, criterion, x, y, "ggn"), expected) < 1e-12
    whole, residual = (dense(model, criterion, x, y, m) for m in ("hessian", "residual"))
    assert error(residual, whole - expected) < 1e-12


def test_a_criterion_may_write_over_what_it_gets():
    model, x, _ = build("mlp")
    y = torch.rand(8, 2).double()

    def criterion(z, y):
        return z.sub_(y).pow_(4).mean()

    expected = gauss_newton(model, lambda z, y: (z - y).pow(4).mean(), x, y)
    assert error(dense(model, criterion, x, y, "ggn"), expected) < 1e-12


def test_what_cannot_be_split_is_refused():
    model, x, y = build("mlp")

    def decayed(output, y):
        return CROSS_ENTROPY(output, y) + model[0].weight.square().sum()

    distributed = nn.Sequential(*model, nn.Identity())
    distributed.register_forward_hook(lambda *args: torch.distributions.Normal(args[2], 1.0))
    for method in ("dense", "probes"):
        with pytest.raises(ValueError, match=r"0\.weight by another way"):
            moments(model, decayed, x, y, "ggn", method=method)
        with pytest.raises(ValueError, match="let the model return tensors"):
            moments(
                distributed, lambda d, _: -d.log_prob(x[:, :2]).mean(), x, y, "ggn", method=method
            )
        for products in ("autograd", "differences"):
            with pytest.raises(ValueError, match="NLLLoss is linear"):
                moments(
                    nn.Sequential(model, nn.LogSoftmax(1)), nn.NLLLoss(), x, y, "ggn",
                    method="probes", products=products,
                )  # fmt: skip


@pytest.mark.usefixtures("as_installed")
def test_a_matrix_that_there_is_none_of():
    model, x, y = build("mlp")
    with pytest.raises(ValueError, match="unknown matrix 'gauss'"):
        moments(model, CROSS_ENTROPY, x, y, "gauss")
    with pytest.raises(ValueError, match="unknown matrix 'gauss'"):
        lowland.spectrum(model, CROSS_ENTROPY, (x, y), matrix="gauss")


LINEAR = {
    "in a function": lambda z, y: 2 * functional.nll_loss(z, y),
    "divergence": lambda z, y: functional.kl_div(
        z, functional.one_hot(y, 2).double(), reduction="sum"
    ),
    "the model's own": lambda z, y: z[0, 0],
}


@pytest.mark.parametrize("criterion", LINEAR)
def test_linear_criteria_have_no_gauss_newton_matrix(criterion):
    model, x, y = build("mlp")
    with pytest.raises(ValueError, match="is linear in the model's outputs"):
        moments(model, LINEAR[criterion], x, y, "ggn")


@pytest.mark.parametrize("criterion", [nn.L1Loss(), nn.HuberLoss(delta=0.01)])
def test_of_criteria_that_are_linear_in_pieces_it_may_be_zero(criterion):
    model, x, _ = build("mlp")
    y = torch.full((8, 2), 5.0).double()
    assert moments(model, criterion, x, y, "ggn").trace_sq == 0
    hessian, residual = (dense(model, criterion, x, y, m) for m in ("hessian", "residual"))
    assert error(residual, hessian) < 1e-12


def test_of_a_linear_criterion_all_curvature_is_the_residuals():
    model, x, y = build("mlp")
    model = nn.Sequential(model, nn.LogSoftmax(1))
    hessian, residual = (dense(model, nn.NLLLoss(), x, y, m) for m in ("hessian", "residual"))
    assert error(residual, hessian) < 1e-12


def test_an_engine_of_ones_own_must_know_the_matrix():
    model, x, y = build("mlp")

    class Engine:
        name = "mine"

        def __init__(self, target, settings):
            pass

        def moments(self, count=2):
            return lowland.HessianMoments(3, torch.tensor(1.0), torch.tensor(2.0))

        def loss_and_moments(self, count=2):
            raise NotImplementedError

    with pytest.raises(UnsupportedModelError, match="'mine'"):
        moments(model, CROSS_ENTROPY, x, y, "ggn", method=Engine)


# Ways to a product


class _Cube(torch.autograd.Function):
    """A function whose gradient has no derivative."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class _CubeBothWays(_Cube):
    @staticmethod
    def jvp(ctx, tangent):
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


class Through(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.head, self.function = nn.Linear(4, 3), nn.Linear(3, 2), function

    def forward(self, x):
        return self.head(functional.dropout(self.function(self.layer(x)), 0.3))


def test_forward_mode_where_a_gradient_has_no_derivative(generator):
    torch.manual_seed(0)
    x, y = torch.randn(5, 4).double(), torch.arange(5) % 2
    found = {}
    for name, function in (("plain", lambda a: a**3), ("forward", _CubeBothWays.apply)):
        torch.manual_seed(1)
        model = Through(function).double()
        torch.manual_seed(2)  # of the dropped units
        with torch.no_grad():
            found[name] = moments(
                model, CROSS_ENTROPY, x, y, "ggn", method="probes",
                generator=generator.manual_seed(0),
            )  # fmt: skip
    assert error(found["forward"].trace, found["plain"].trace) < 1e-12
    assert error(found["forward"].trace_sq, found["plain"].trace_sq) < 1e-12
    with pytest.raises(RuntimeError, match=r"within torch\.no_grad"):
        moments(model, CROSS_ENTROPY, x, y, "ggn", method="probes")
    torch.manual_seed(2)
    formed = moments(model, CROSS_ENTROPY, x, y, "ggn", method="dense")
    plain = Through(lambda a: a**3).double()
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(2)
    expected = moments(plain, CROSS_ENTROPY, x, y, "ggn", method="dense")
    torch.testing.assert_close(formed.trace_sq, expected.trace_sq)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        formed.trace.backward()


def test_differences_where_there_is_no_other_way(generator):
    torch.manual_seed(0)
    x, y = torch.randn(5, 4).double(), torch.arange(5) % 2
    model = Through(_Cube.apply).double()
    with pytest.raises(RuntimeError, match="products='differences'"):
        moments(model, CROSS_ENTROPY, x, y, "ggn", method="probes", products="autograd")
    plain = Through(lambda a: a**3).double()
    plain.load_state_dict(model.state_dict())
    for matrix in ("ggn", "residual"):
        found = []
        for each, products in ((model, "differences"), (plain, "autograd")):
            torch.manual_seed(2)
            found.append(
                moments(
                    each, CROSS_ENTROPY, x, y, matrix, method="probes", products=products,
                    generator=generator.manual_seed(0),
                )
            )  # fmt: skip
        torch.testing.assert_close(found[0].trace, found[1].trace, rtol=1e-4, atol=1e-5)
        for method in ("dense", "probes"):  # which is what happens by itself
            by_itself = moments(model, CROSS_ENTROPY, x, y, matrix, method=method)
            assert by_itself.method == f"{method}, differences"
        torch.testing.assert_close(found[0].trace_sq, found[1].trace_sq, rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match="products='autograd'"):
            (CROSS_ENTROPY(model(x), y) + found[0].trace).backward()


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return self[2](checkpoint(self[1], self[0](x), use_reentrant=False))


def masked(x):
    return x.masked_fill(torch.tensor([False, False, True]), -math.inf)


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


WORDS = torch.arange(24).view(8, 3) % 5
UNUSUAL = {
    "a second derivative that PyTorch has not": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.Hardsigmoid(), nn.Linear(6, 2)), None
    ),
    "a second derivative that PyTorch has wrong": lambda: (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh()), None
    ),
    "sparse gradients": lambda: (
        nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(12, 2)), WORDS
    ),
    "infinite logits": lambda: (nn.Sequential(nn.Linear(4, 3), Lambda(masked)), None),
    "checkpoints": lambda: (Checkpointed(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), None),
    "groups": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.SiLU(), nn.Linear(6, 2)), None
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.parametrize("method", ["dense", "probes"])
def test_unusual_models(name, method, generator):
    torch.manual_seed(0)
    model, words = UNUSUAL[name]()
    model.double()
    x, y = torch.randn(8, 4).double() if words is None else words, torch.arange(8) % 2
    rows, outputs = jacobian(model, x)
    inside = torch.func.hessian(lambda z: CROSS_ENTROPY(z, y))(outputs).view(len(rows), -1)
    expected = rows.T @ inside @ rows
    with torch.no_grad():
        found = moments(
            model, CROSS_ENTROPY, x, y, "ggn", method=method, probes=5, generator=generator
        )
    if method == "probes":
        generator.manual_seed(0)
        vectors = torch.stack([flat(rademacher(trainable(model), generator)) for _ in range(5)])
        expected = vectors @ expected
        torch.testing.assert_close(found.trace, (expected * vectors).sum(1).mean())
        torch.testing.assert_close(found.trace_sq, expected.square().sum(1).mean())
        return
    torch.testing.assert_close(found.trace, expected.trace())
    torch.testing.assert_close(found.trace_sq, expected.square().sum())


def test_outputs_that_the_criterion_does_not_look_at_may_be_anything():
    torch.manual_seed(0)
    layer, x, y = nn.Linear(4, 2).double(), torch.randn(8, 4).double(), torch.arange(8) % 2
    model = nn.Sequential(layer, Lambda(lambda z: {"logits": z, "other": (0 * z).log()}))
    found = moments(model, lambda out, y: CROSS_ENTROPY(out["logits"], y), x, y, "ggn")
    torch.testing.assert_close(found.trace, gauss_newton(layer, CROSS_ENTROPY, x, y).trace())


# All calls


def test_over_a_loader_as_over_all_samples(generator):
    model, x, y = build("mlp", samples=10)
    weighed = nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.0]).double())
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    for criterion, matrix in ((weighed, "ggn"), (weighed, "residual"), (CROSS_ENTROPY, "fisher")):
        parts, whole = (
            moments(
                model, criterion, *data, matrix, method="probes",
                generator=generator.manual_seed(0),
            )
            for data in ((loader, None), (x, y))
        )  # fmt: skip
        torch.testing.assert_close(parts.trace, whole.trace.detach())
        torch.testing.assert_close(parts.trace_sq, whole.trace_sq.detach())
        assert parts.matrix == matrix
    assert "matrix='fisher'" in repr(parts)


def test_two_halves_of_a_batch_meet(generator):
    model, x, y = build("mlp")
    halves = [gauss_newton(model, CROSS_ENTROPY, x[s], y[s]) for s in (slice(4), slice(4, 8))]
    directions = [rademacher(trainable(model), generator.manual_seed(3)) for _ in range(1)]
    found = moments(
        model, CROSS_ENTROPY, x, y, "ggn", method="probes", probes=1, unbiased=True,
        generator=generator.manual_seed(3),
    )  # fmt: skip
    v = flat(directions[0])
    torch.testing.assert_close(found.trace_sq.detach(), (halves[0] @ v) @ (halves[1] @ v))


@pytest.mark.parametrize("method", ["dense", pytest.param("lanczos", marks=pytest.mark.slow)])
def test_spectra(method):
    model, x, y = build("cnn_in_evaluation")
    expected = {"ggn": gauss_newton(model, CROSS_ENTROPY, x, y)}
    expected["residual"] = dense(model, CROSS_ENTROPY, x, y, "hessian").detach() - expected["ggn"]
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    for matrix, whole in expected.items():
        found = lowland.spectrum(model, CROSS_ENTROPY, loader, k=3, matrix=matrix, method=method)
        values = torch.linalg.eigvalsh(whole).flip(0)
        torch.testing.assert_close(found.eigenvalues, values[:3], rtol=1e-4, atol=1e-6)
        assert abs(found.trace - whole.trace()) <= 4 * found.trace_stderr + 1e-9
        assert found.matrix == matrix
    layers = lowland.layer_spectra(model, CROSS_ENTROPY, loader, matrix="ggn", method="dense")
    traces = torch.tensor([layer.trace for layer in layers.values()])
    torch.testing.assert_close(traces.sum().double(), expected["ggn"].trace(), rtol=1e-6, atol=0)


def test_a_picture_names_its_matrix():
    model, x, y = build("mlp")
    for matrix, symbol in (("hessian", "H"), ("ggn", "G"), ("fisher", "F"), ("residual", "R")):
        found = lowland.spectrum(model, CROSS_ENTROPY, (x, y), k=2, matrix=matrix)
        assert rf"\mathrm{{Tr}}\,{symbol}$" in found.plot().get_title("left")


def by_curvlinops(kind, model, x, y, **settings):
    with warnings.catch_warnings():  # of a package that it imports, about PyTorch
        warnings.simplefilter("ignore")
        import curvlinops  # noqa: PLC0415

        operator = getattr(curvlinops, kind)(
            model, CROSS_ENTROPY, trainable(model), [(x, y)], **settings
        )
        return operator @ torch.eye(operator.shape[0], dtype=torch.float64)


@pytest.mark.parametrize("name", ["mlp", "cnn_in_evaluation", "frozen"])
def test_matrices_are_those_of_curvlinops(name):
    model, x, y = build(name)
    expected = by_curvlinops("GGNLinearOperator", model, x, y)
    for matrix in ("ggn", "fisher"):
        assert error(dense(model, CROSS_ENTROPY, x, y, matrix), expected) < 1e-12


def test_sampled_fisher_matrices_go_to_ours():
    model, x, y = build("mlp")
    sampled = by_curvlinops("FisherMCLinearOperator", model, x, y, mc_samples=3000)
    assert error(dense(model, CROSS_ENTROPY, x, y, "fisher"), sampled) < 0.1

"""The diagonal of the Hessian by every method, beside that of brute force."""

import any_models
import cases
import oracle
import pytest
import torch
from any_models import CROSS_ENTROPY, build, error, flat, trainable
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lowland
from lowland import exact
from lowland.dense import BruteForce
from lowland.errors import UnsupportedModelError
from lowland.estimation import Estimation
from lowland.objective import objective
from lowland.probes import rademacher

MATRICES = st.sampled_from(["hessian", "ggn", "residual"])


def matrix_of(model, criterion, x, y, matrix="hessian"):
    target = objective(model, criterion, x, y, matrix=matrix)
    return BruteForce(target, Estimation()).hessian().detach()


def check_tensors(case, matrix, **options):
    found = exact.diagonal(*case.arguments, **case.settings, matrix=matrix, **options)
    trace = exact.trace(*case.arguments, **case.settings, matrix=matrix)
    total = sum(part.sum((-2, -1)) for part in found)
    for index, flat_, x, y in case.singles():
        whole = case.network.matrix(matrix, flat_, x, y)
        size = float(case.network.hessian(flat_, x, y).norm() + whole.norm())
        mine = oracle.flatten([part[index] for part in found])
        assert (mine - whole.diagonal()).abs().max() <= 1e-10 * size
        assert (total[index] - trace[index]).abs() <= 1e-10 * size * len(mine) ** 0.5


@settings(max_examples=15)
@given(cases.cases(most_samples=6), MATRICES)
def test_the_closed_form_has_the_diagonal_of_brute_force(case, matrix):
    check_tensors(case, matrix)


@pytest.mark.slow
@settings(max_examples=80)
@given(cases.cases(), MATRICES)
def test_the_closed_form_at_length(case, matrix):
    check_tensors(case, matrix)
    _, smallest = cases.prepare(case), 1 << 12
    while True:
        try:
            return check_tensors(case, matrix, memory_budget=smallest)
        except ValueError:
            smallest *= 2


def test_outputs_that_outnumber_units_go_through_the_jacobian():
    for loss in ("ce", "mse"):
        network = oracle.Network(inputs=2, hidden=(3, 2), activation="tanh", loss=loss, outputs=5)
        check_tensors(cases.make(network, samples=4, seed=0), "hessian")


@pytest.mark.parametrize("name", any_models.MODELS)
@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_any_model_has_the_diagonal_of_its_matrix(name, matrix):
    model, x, y = build(name)
    model.eval()
    whole = matrix_of(model, CROSS_ENTROPY, x, y, matrix).diagonal()
    found = lowland.hessian_diagonal(model, CROSS_ENTROPY, x, y, matrix=matrix)
    assert found.method == ("exact" if name in ("mlp", "frozen") else "dense")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert list(found.values) == list(named)
    assert [part.shape for part in found.values.values()] == [p.shape for p in named.values()]
    assert error(list(found.values.values()), whole) < 1e-10
    torch.testing.assert_close(found.trace, whole.sum())
    assert found.stderr is None
    assert found.trace_stderr is None
    assert (found.dim, found.matrix) == (len(whole), matrix)
    assert not found.trace.requires_grad


def test_some_of_the_parameters():
    model, x, y = build("mlp")
    chosen = [model[0].bias, model[4].weight]
    whole = lowland.hessian_diagonal(model, CROSS_ENTROPY, x, y)
    for method in ("exact", "dense"):
        found = lowland.hessian_diagonal(model, CROSS_ENTROPY, x, y, method, parameters=chosen)
        assert list(found.values) == ["0.bias", "4.weight"]
        for name, part in found.values.items():
            torch.testing.assert_close(part, whole.values[name])
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        again = lowland.hessian_diagonal(model, CROSS_ENTROPY, x, y, "exact", parameters=chosen)
    torch.testing.assert_close(again.trace, found.trace)


@pytest.mark.parametrize("products", ["autograd", "differences"])
def test_estimates_are_the_mean_over_directions_and_errors_theirs(products, generator):
    model, x, y = build("cnn_in_evaluation")
    whole = matrix_of(model, CROSS_ENTROPY, x, y)
    found = lowland.hessian_diagonal(
        model, CROSS_ENTROPY, x, y, "probes", probes=11, products=products, generator=generator
    )
    generator.manual_seed(0)
    directions = torch.stack([flat(rademacher(trainable(model), generator)) for _ in range(11)])
    each = directions * (directions @ whole)
    close = (
        {"rtol": 1e-9, "atol": 1e-12} if products == "autograd" else {"rtol": 1e-3, "atol": 1e-5}
    )
    torch.testing.assert_close(flat(found.values.values()), each.mean(0), **close)
    torch.testing.assert_close(flat(found.stderr.values()), each.std(0) / 11**0.5, **close)
    torch.testing.assert_close(found.trace, each.sum(1).mean(), **close)
    torch.testing.assert_close(found.trace_stderr, each.sum(1).std() / 11**0.5, **close)
    assert [part.shape for part in found.stderr.values()] == [p.shape for p in trainable(model)]
    single = lowland.hessian_diagonal(model, CROSS_ENTROPY, x, y, "probes", probes=1)
    assert flat(single.stderr.values()).isnan().all()
    assert single.trace_stderr.isnan()


def test_standard_errors_cover_the_truth(generator):
    model, x, y = build("Attention")
    truth = matrix_of(model, CROSS_ENTROPY, x, y).diagonal()
    off = []
    for _ in range(20):
        found = lowland.hessian_diagonal(
            model, CROSS_ENTROPY, x, y, "probes", probes=30, generator=generator
        )
        apart = (flat(found.values.values()) - truth) / flat(found.stderr.values())
        off.append(apart[apart.isfinite()])
    within = (torch.cat(off).abs() < 2).double().mean()
    assert 0.9 < within < 0.99


@pytest.mark.parametrize("method", ["exact", "dense", "probes"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_over_a_loader_it_is_that_of_all_samples(method, reduction, generator):
    model, x, y = build("mlp", samples=10)
    criterion = nn.CrossEntropyLoss(
        weight=torch.tensor([0.3, 1.0]).double(), ignore_index=1, reduction=reduction
    )
    y[:5], y[5:8] = 1, 0  # the first batch's targets are all ignored
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    truth = matrix_of(model, criterion, x, y).diagonal()
    found = lowland.hessian_diagonal(
        model, criterion, iter(loader), method=method, probes=200, generator=generator
    )
    assert found.method == method
    if method != "probes":
        torch.testing.assert_close(flat(found.values.values()), truth, rtol=1e-9, atol=1e-12)
        return
    apart = (flat(found.values.values()) - truth).abs()
    assert (apart < 5 * flat(found.stderr.values()) + 1e-12).all()
    assert abs(found.trace - truth.sum()) < 5 * found.trace_stderr
    assert (flat(found.stderr.values()) < 0.3 * truth.abs().max()).all()


def test_errors_of_batches_add_up_in_squares(generator):
    model, x, y = build("mlp", samples=12)
    parts = [
        lowland.hessian_diagonal(
            model, CROSS_ENTROPY, x[s], y[s], "probes", probes=6, generator=generator
        )
        for s in (slice(8), slice(8, 12))
    ]
    generator.manual_seed(0)
    whole = lowland.hessian_diagonal(
        model, CROSS_ENTROPY, [(x[:8], y[:8]), (x[8:], y[8:])], method="probes", probes=6,
        generator=generator,
    )  # fmt: skip
    for name in whole.values:
        a, b = (part.stderr[name] for part in parts)
        torch.testing.assert_close(whole.stderr[name], ((2 / 3 * a) ** 2 + (b / 3) ** 2).sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("products", ["autograd", "differences"])
def test_measuring_changes_nothing_and_dropout_draws_one_mask(products, generator):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(0.5), nn.Linear(6, 2)
    ).double()
    x, y = torch.randn(12, 4).double(), torch.arange(12) % 2
    before = {name: part.clone() for name, part in model.state_dict().items()}
    torch.manual_seed(3)
    found = lowland.hessian_diagonal(
        model, CROSS_ENTROPY, x, y, probes=400, products=products, generator=generator
    )
    assert found.method == "probes"
    for name, part in model.state_dict().items():
        assert torch.equal(part, before[name])
    torch.manual_seed(3)
    truth = matrix_of(model, CROSS_ENTROPY, x, y).diagonal()
    apart = (flat(found.values.values()) - truth).abs()
    assert (apart < 6 * flat(found.stderr.values()) + 1e-6).all()


def test_what_cannot_be_done_is_refused(generator):
    model, x, y = build("cnn_in_evaluation")
    with pytest.raises(UnsupportedModelError, match="method='probes'"):
        lowland.hessian_diagonal(model, CROSS_ENTROPY, x, y, "exact")
    with pytest.raises(ValueError, match="is empty"):
        lowland.hessian_diagonal(model, CROSS_ENTROPY, [])
    with pytest.raises(TypeError, match="a tensor alone leaves open what the targets are"):
        lowland.hessian_diagonal(model, CROSS_ENTROPY, x)


@pytest.mark.usefixtures("as_installed")
def test_a_method_that_there_is_none_of():
    model, x, y = build("mlp")
    with pytest.raises(ValueError, match="unknown method 'lanczos'"):
        lowland.hessian_diagonal(model, CROSS_ENTROPY, x, y, "lanczos")


def test_it_is_shown_in_one_line(generator):
    values = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[4.0]])}
    found = lowland.HessianDiagonal(values, values, torch.tensor(0.25), "probes", "ggn")
    assert repr(found) == (
        "HessianDiagonal(dim=3, trace=3 ± 0.25, values=-2 to 4, method='probes', matrix='ggn')"
    )

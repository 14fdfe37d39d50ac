"""The closed form over batches and over processes is that of one call on all samples."""

from itertools import pairwise

import parallel_moments
import pytest
import torch
import two_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lowland
from lowland.exact import kept

CRITERIA = {
    "ce": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.3]).double()),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "mse": nn.MSELoss(),
    "bce": nn.BCEWithLogitsLoss(reduction="sum", pos_weight=torch.tensor(3.0).double()),
}


def network(*widths, seed=0):
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.GELU()]
    return nn.Sequential(*layers[:-1]).double()


def problem(samples, criterion="ce", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, generator=generator).double()
    y = torch.randint(3, (samples,), generator=generator)
    if criterion in ("mse", "bce"):
        y = nn.functional.one_hot(y, 3).double()
    return x, y


def split(x, y, *sizes):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def assert_same(found, expected, model, **tolerances):
    assert (found.method, found.dim) == ("exact", expected.dim)
    for name in ("trace", "trace_sq"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
        parameters = [p for p in model.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(mine, parameters, retain_graph=True)
        others = torch.autograd.grad(theirs, parameters, retain_graph=True)
        for own, other in zip(slopes, others, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-11, **tolerances)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    criterion=st.sampled_from(list(CRITERIA)),
    hidden=st.lists(st.integers(1, 4), max_size=3),
    ignored=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_batches_of_any_length_are_all_samples_together(sizes, criterion, hidden, ignored, seed):
    x, y = problem(sum(sizes), criterion, seed)
    if ignored and y.dtype == torch.int64:
        y[1 : 1 + sizes[0]] = -100
        y[0] = 1
    model = network(3, *hidden, 3, seed=seed)
    loader = split(x, y, *sizes)
    found = lowland.hessian_moments(model, CRITERIA[criterion], loader, method="exact")
    assert_same(found, lowland.hessian_moments(model, CRITERIA[criterion], x, y, "exact"), model)


def test_a_shuffled_loader_has_gradients_too():
    model, (x, y) = network(3, 5, 3), problem(23)
    loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True)
    found = lowland.hessian_moments(model, CRITERIA["ce"], loader, method="exact")
    assert_same(found, lowland.hessian_moments(model, CRITERIA["ce"], x, y, "exact"), model)


def test_auto_takes_the_closed_form_where_it_pays_and_loses_no_batch_elsewhere():
    model, (x, y) = network(3, 5, 3), problem(23)
    expected = lowland.hessian_moments(model, CRITERIA["ce"], x, y, "exact")
    found = lowland.hessian_moments(model, CRITERIA["ce"], iter(split(x, y, 7, 16)))
    assert found.method == "exact"
    torch.testing.assert_close(found.trace_sq, expected.trace_sq)
    wide, norm = network(3, 300, 3), nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).double()
    for other in (wide, norm):
        generator = torch.Generator().manual_seed(0)
        found = lowland.hessian_moments(
            other, CRITERIA["ce"], iter(split(x, y, 7, 16)), probes=8, generator=generator
        )
        assert found.method == "probes"
        dense = lowland.hessian_moments(
            other, CRITERIA["ce"], x, y, "exact" if other is wide else "dense"
        )
        assert abs(found.trace - dense.trace) < 6 * found.stderr[0]


def test_the_last_layers_of_any_model_and_what_is_below_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    x, y = problem(11)
    chosen = list(model[2].parameters())
    call = lowland.hessian_moments
    found = call(model, CRITERIA["ce"], split(x, y, 4, 7), method="exact", parameters=chosen)
    assert_same(found, call(model, CRITERIA["ce"], x, y, "dense", parameters=chosen), model)


@pytest.mark.parametrize("matrix", ["ggn", "residual", "fisher"])
def test_other_matrices(matrix):
    model, (x, y) = network(3, 4, 3), problem(11)
    call = lowland.hessian_moments
    found = call(model, CRITERIA["ce"], split(x, y, 4, 7), method="exact", matrix=matrix, l2=0.1)
    expected = call(model, CRITERIA["ce"], x, y, "exact", matrix=matrix, l2=0.1)
    assert found.matrix == matrix
    assert_same(found, expected, model)


def test_without_gradients_an_iterator_will_do_and_with_them_it_says_what_will():
    model, (x, y) = network(3, 4, 3), problem(11)
    with torch.no_grad():
        found = lowland.hessian_moments(
            model, CRITERIA["ce"], iter(split(x, y, 4, 7)), method="exact"
        )
    assert not found.trace_sq.requires_grad
    found = lowland.hessian_moments(model, CRITERIA["ce"], iter(split(x, y, 4, 7)), method="exact")
    with pytest.raises(RuntimeError, match=r"use the DataLoader itself, or list\(data\)"):
        found.trace_sq.backward()


class Changing:
    """Batches that are others in each pass."""

    def __init__(self, *passes):
        self.passes = list(passes)

    def __iter__(self):
        return iter(self.passes.pop(0))


@pytest.mark.parametrize("how", ["shorter", "longer", "other"])
def test_data_that_change_between_passes_are_refused(how):
    model, (x, y) = network(3, 4, 3), problem(12)
    whole = split(x, y, 4, 4, 4)
    others = {"shorter": whole[:2], "longer": [*whole, whole[0]], "other": split(x + 1, y, 4, 4, 4)}
    loader = Changing(whole, others[how])
    found = lowland.hessian_moments(model, CRITERIA["ce"], loader, method="exact")
    with pytest.raises(RuntimeError, match="give the same ones in each pass"):
        found.trace_sq.backward()


def test_parameters_that_change_between_passes_are_noticed():
    model, (x, y) = network(3, 4, 3), problem(12)
    found = lowland.hessian_moments(model, CRITERIA["ce"], split(x, y, 5, 7), method="exact")
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.trace_sq.backward()


def test_what_is_refused():
    model, (x, y) = network(3, 4, 3), problem(12)

    def call(given=model, data=((x, y), (x, y)), **more):
        return lowland.hessian_moments(given, CRITERIA["ce"], list(data), method="exact", **more)

    with pytest.raises(lowland.UnsupportedModelError, match="raise memory_budget"):
        call(memory_budget=1000)
    with pytest.raises(lowland.UnsupportedModelError, match=r"call model.eval\(\) first"):
        call(nn.Sequential(nn.Dropout(0.5), *model))
    with pytest.raises(lowland.UnsupportedModelError, match=r"use x.detach\(\)"):
        call(data=[(x, y), (x.clone().requires_grad_(), y)])
    with pytest.raises(ValueError, match="data is empty"):
        call(data=[])
    for more in ({"unbiased": True}, {"moments": 4}):
        with pytest.raises(lowland.UnsupportedModelError, match="estimated, or two of them exact"):
            call(**more)
    with pytest.raises(lowland.UnsupportedModelError, match="checkpoint= keeps a pass of"):
        lowland.hessian_moments(model, CRITERIA["ce"], x, y, "exact", checkpoint="pass")


# A pass that was killed.


class KilledError(Exception):
    pass


def dying(batches, after):
    for number, batch in enumerate(batches):
        if number == after:
            raise KilledError
        yield batch


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(kept, "_SHARE", 0)


@pytest.mark.usefixtures("always")
def test_a_killed_pass_goes_on_and_ends_with_the_same_numbers(tmp_path, monkeypatch):
    model, (x, y) = network(3, 4, 3), problem(24)
    batches, path = split(x, y, *[4] * 6), tmp_path / "pass"
    call = lowland.hessian_moments
    with pytest.raises(KilledError):
        call(model, CRITERIA["ce"], dying(batches, 4), method="exact", checkpoint=path)
    assert path.exists()
    read, seen = lowland.exact.over_batches.read_batch, []
    monkeypatch.setattr(
        "lowland.exact.over_batches.read_batch",
        lambda part, given: seen.append(part) or read(part, given),
    )
    found = call(model, CRITERIA["ce"], batches, method="exact", checkpoint=path)
    assert len(seen) == 3  # the first, to see what it is, and two
    assert not path.exists()
    assert_same(found, call(model, CRITERIA["ce"], x, y, "exact"), model)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("how", ["model", "parameters", "criterion", "data", "short", "torn"])
def test_a_pass_of_something_else_is_refused(how, tmp_path):
    model, (x, y) = network(3, 4, 3), problem(24)
    batches, path = split(x, y, *[4] * 6), tmp_path / "pass"
    criterion = CRITERIA["ce"]
    with pytest.raises(KilledError):
        lowland.hessian_moments(
            model, criterion, dying(batches, 4), method="exact", checkpoint=path
        )
    if how == "model":
        model = network(3, 5, 3)
    elif how == "parameters":
        model = network(3, 4, 3, seed=1)
    elif how == "criterion":
        criterion = CRITERIA["weights"]
    elif how == "data":
        batches[1] = batches[2]
    elif how == "short":
        batches = batches[:2]
    else:
        path.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"delete|does not exist yet"):
        lowland.hessian_moments(model, criterion, batches, method="exact", checkpoint=path)


# Several processes.


@pytest.mark.slow
def test_processes_together_are_all_samples(tmp_path):
    results = two_processes.run(parallel_moments.in_parallel, tmp_path)
    expected = parallel_moments.alone()
    assert expected
    for name, values in expected.items():
        for rank in range(2):
            for mine, theirs in zip(results[rank][name][:2], values[:2], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
        for one, other, theirs in zip(
            results[0][name][2:], results[1][name][2:], values[2:], strict=True
        ):
            torch.testing.assert_close((one + other) / 2, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_processes_that_do_not_agree_are_told(tmp_path):
    (first, second) = two_processes.run(parallel_moments.disagreeing, tmp_path)
    for said in (first, second):
        assert "ValueError: the processes have models of different architectures" in said[0]
    assert "is not covered by the closed form" in first[1]
    assert "process 0 refused its model or data" in second[1]
    assert "not finite" in first[2] or "NaN" in first[2]
    assert "process 0 refused its model or data" in second[2]

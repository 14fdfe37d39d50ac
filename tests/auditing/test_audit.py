"""The audit of a network: what moves under rescaling, what stays, and what is said of it."""

import builtins
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lowland
from lowland import weakness
from lowland.dense import dense_hessian

CE = nn.CrossEntropyLoss()
FEW = (0.25, 1, 8)


def mlp(outputs=3, activation=nn.ReLU, hidden=5):
    return nn.Sequential(
        nn.Linear(4, 6), activation(), nn.Linear(6, hidden), activation(),
        nn.Linear(hidden, outputs),
    )  # fmt: skip


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )


def case(build=mlp, shape=(4,), dtype=torch.float64, **settings):
    """A network that fits its few training points, these, and unseen ones."""
    torch.manual_seed(0)
    model = build(**settings).to(dtype)
    x, y = torch.randn(12, *shape, dtype=dtype), torch.arange(12) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        outputs = model(x)
        (CE(outputs, y) if outputs.shape[-1] == 3 else outputs.square().mean()).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, x, y, torch.randn(9, *shape, dtype=dtype)


@pytest.fixture(scope="module")
def audited():
    model, x, y, unseen = case()
    return lowland.audit(model, CE, x, y, unseen, factors=FEW)


def value(audit, name, factor):
    return audit.values[name][audit.factors.index(factor)]


# The numbers


@pytest.mark.parametrize(("build", "shape"), [(mlp, (4,)), (cnn, (1, 6, 6))])
def test_every_measure_is_that_of_the_rescaled_network(build, shape):
    model, x, y, unseen = case(build, shape)
    audit = lowland.audit(model, CE, x, y, unseen, factors=(3, 0.2))
    assert audit.factors == (0.2, 1.0, 3.0)
    assert audit.layer == 0
    for factor in audit.factors:
        changed = lowland.rescale(model, 0, factor)
        flat = torch.cat([p.detach().flatten() for p in changed.parameters()])
        matrix = dense_hessian(changed, CE, x, y).detach()
        relative = matrix * flat * flat[:, None]
        moments = lowland.hessian_moments(changed, CE, x, y, method="dense")
        hidden = [changed[:-1](part).detach() for part in (x, unseen)]
        outputs = changed(x).detach()
        expected = {
            "lambda_max": torch.linalg.eigvalsh(matrix)[-1],
            "trace": matrix.trace(),
            "upper": moments.upper.detach(),
            "adaptive_lambda_max": torch.linalg.eigvalsh(relative)[-1],
            "adaptive_trace": relative.trace(),
            "l2": flat.square().sum().sqrt(),
            "l1": flat.abs().sum(),
            "loss": CE(outputs, y),
            "accuracy": (outputs.argmax(1) == y).double().mean(),
            "predictions": 0,
            "patterns": len({tuple(row) for row in (hidden[1] > 0).tolist()}),
            "k_free": weakness.free_regions(*hidden),
            "free_parameters": weakness.free_parameters(hidden[0], 3, hidden[1]),
            "pair_proxy": weakness.pair_proxy(hidden[0], y, hidden[1], 3).count,
        }
        assert set(audit.values) == {*expected, "outputs"}
        for name, number in expected.items():
            assert value(audit, name, factor) == pytest.approx(float(number), rel=1e-8), name
    assert 0 < max(audit.values["outputs"]) < 1e-13
    assert audit.values["accuracy"] == (1, 1, 1)
    assert audit.values["pair_proxy"][0] > 0


@pytest.mark.slow
@settings(max_examples=15)
@given(st.floats(1e-3, 1e3), st.integers(0, 1))
def test_the_adaptive_hessian_is_exactly_invariant_biases_included(factor, layer):
    model, x, y, _ = case()
    changed = lowland.rescale(model, layer, factor)
    one, other = (
        dense_hessian(each, CE, x, y).detach() * scale * scale[:, None]
        for each in (model, changed)
        for scale in [torch.cat([p.detach().abs().flatten() for p in each.parameters()])]
    )
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13 * float(one.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_of_two_leave_every_invariant_as_it_is_to_the_last_bit(dtype):
    model, x, y, unseen = case(dtype=dtype)
    audit = lowland.audit(model, CE, x, y, unseen)
    assert len(audit.factors) == 7
    for measure in audit.measures:
        row = audit.values[measure.name]
        if measure.invariant:
            assert set(row) == {row[audit.base]}, measure.name
            assert audit.stays(measure.name)
        else:
            assert not audit.stays(measure.name)
            assert audit.change(measure.name) == max(row) / min(row) > 1.5


@pytest.mark.slow
def test_a_larger_network_is_estimated_and_says_so():
    model, x, y, unseen = case(hidden=90)
    audit = lowland.audit(model, CE, x, y, unseen, factors=(1, 8))
    assert audit.parameters > 512
    exact = [
        lowland.spectrum(model, CE, (x, y), k=1, method="dense", adaptive=adaptive)
        for adaptive in (False, True)
    ]
    assert value(audit, "lambda_max", 1) == pytest.approx(float(exact[0].eigenvalues), rel=1e-4)
    top = float(exact[1].eigenvalues)
    assert value(audit, "adaptive_lambda_max", 1) == pytest.approx(top, rel=1e-4)
    error = value(replace(audit, values=audit.stderr), "adaptive_trace", 1)
    assert 0 < error < 0.3 * exact[1].trace
    assert abs(value(audit, "adaptive_trace", 1) - exact[1].trace) < 4 * error
    assert audit.stays("adaptive_trace")
    assert "Estimated from 32 directions" in str(audit)
    again = lowland.audit(model, CE, x, y, unseen, factors=(1, 8))
    assert again.values == audit.values


@pytest.mark.slow
def test_digits_that_single_precision_does_not_have_are_not_claimed():
    model, x, y, unseen = case(hidden=90)  # whose loss is 3e-4
    data = x.float(), y, unseen.float()
    assert "are no more exact" in str(lowland.audit(model.float(), CE, *data, factors=(1, 8)))
    assert "are no more exact" not in str(
        lowland.audit(model.double(), CE, x, y, unseen, factors=(1, 8))
    )


def test_the_first_layer_that_can_be_rescaled_is_taken():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
    ).double()
    _, x, y, unseen = case()
    audit = lowland.audit(model, CE, x, y, unseen, factors=(1, 8))
    assert audit.layer == 1
    assert "Layer 1" in str(audit)
    with pytest.raises(lowland.UnsupportedModelError, match="Tanh"):
        lowland.audit(model, CE, x, y, unseen, layer=0)


def test_the_network_and_the_generator_stay_as_they_were():
    model, x, y, unseen = case()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    state = torch.get_rng_state()
    lowland.audit(model, CE, x, y, unseen, factors=(1, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[name], part) for name, part in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert not model[-1]._forward_pre_hooks


# Other tasks


@pytest.mark.slow
@pytest.mark.parametrize("column", [False, True])
def test_one_logit_has_the_pair_proxy_of_two_classes(column):
    model, x, y, unseen = case(outputs=1)
    model[-1].bias.data.sub_(model(x).detach().median() + 1e-3)
    y = (model(x) > 0).double().detach()  # so that some last layer fits
    y = y if column else y[:, 0]
    assert 0 < y.sum() < 12
    audit = lowland.audit(model, nn.BCEWithLogitsLoss(), x, y, unseen, factors=FEW)
    hidden = [model[:-1](part).detach() for part in (x, unseen)]
    expected = weakness.pair_proxy(hidden[0], y.flatten().long(), hidden[1], 2)
    assert audit.values["pair_proxy"] == (expected.count,) * 3
    assert audit.values["pair_proxy"][0] >= len(unseen)
    assert audit.values["free_parameters"][0] == weakness.free_parameters(hidden[0], 1, hidden[1])
    assert audit.values["accuracy"] == (1, 1, 1)
    assert not audit.left_out


class Own(nn.Module):
    def forward(self, outputs, y):
        return (outputs - y).square().sum()


@pytest.mark.parametrize(
    ("criterion", "y", "missing"),
    [
        (nn.MSELoss(), torch.linspace(-1, 1, 36).double().view(12, 3), "accuracy predictions"),
        (CE, torch.full((12, 3), 1 / 3).double(), "accuracy"),
        (nn.BCEWithLogitsLoss(), torch.eye(3).double().repeat(4, 1), ""),
        (Own(), torch.ones(12, 3).double(), "accuracy predictions"),
    ],
    ids=["regression", "soft targets", "several labels", "own"],
)
def test_what_needs_classes_is_left_out_with_a_reason(criterion, y, missing):
    model, x, _, unseen = case()
    audit = lowland.audit(model, criterion, x, y, unseen, factors=FEW)
    names = {*missing.split(), "pair_proxy"}
    assert set(audit.left_out) == names
    assert not names & set(audit.values)
    assert "Left out: " in str(audit)
    assert audit.stays("k_free")
    assert "pair proxy" not in audit.verdict.lower()
    with pytest.raises(KeyError, match="was not measured"):
        audit.change("pair_proxy")


def test_without_a_linear_last_layer_there_are_no_pairs():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    x, unseen = torch.randn(2, 9, 1, 6, 6).double()
    audit = lowland.audit(model, CE, x, torch.arange(9) % 3, unseen, factors=FEW)
    assert set(audit.left_out) == {"pair_proxy", "free_parameters"}
    assert "linear last layer" in audit.left_out["pair_proxy"]
    assert audit.stays("patterns")


def test_targets_that_are_ignored_do_not_count():
    model, x, y, unseen = case()
    some = torch.where(torch.arange(12) < 3, -100, y)
    audit = lowland.audit(model, CE, x, some, unseen, factors=FEW)
    hidden = [model[:-1](part).detach() for part in (x, unseen)]
    expected = weakness.pair_proxy(hidden[0][3:], y[3:], hidden[1], 3).count
    assert audit.values["pair_proxy"] == (expected,) * 3
    assert audit.values["accuracy"] == (1, 1, 1)


def test_points_that_no_last_layer_fits_are_pointed_to():
    model, x, y, unseen = case()
    x, y = torch.cat([x, x]), torch.cat([y, 2 - y])
    audit = lowland.audit(model, CE, x, y, unseen, factors=FEW)
    assert audit.values["pair_proxy"] == (0, 0, 0)
    assert str(audit).count("no last layer fits all training points") == 1


def test_unseen_points_that_were_seen_are_counted_and_refused_if_all_were():
    model, x, y, unseen = case()
    audit = lowland.audit(model, CE, x, y, torch.cat([x[3:5], unseen]), factors=FEW)
    assert "2 of the unseen points are training points" in str(audit)
    with pytest.raises(ValueError, match="none is unseen"):
        lowland.audit(model, CE, x, y, x[5:8])


# The words


def test_the_table_is_aligned_and_its_last_line_concludes(audited):
    lines = str(audited).splitlines()
    assert lines[-1] == audited.verdict
    (head,) = (line for line in lines if line.startswith("factor"))
    assert head.split() == ["factor", "0.25", "1", "8", "changes", "by"]
    rows = [line for line in lines if line.startswith("  ")]
    assert len(rows) == len(audited.measures) == 15
    assert {len(row) for row in rows} == {len(head)}
    (trace,) = (row for row in rows if row.split()[0] == "trace")
    assert float(trace.split()[-1]) == pytest.approx(audited.change("trace"), rel=1e-3)


def test_sharpness_that_moves_alone_is_said_to_mean_nothing(audited):
    changes = [audited.change(name) for name in ("lambda_max", "trace", "upper")]
    assert audited.verdict.startswith(
        "Sharpness (largest eigenvalue, trace and upper bound) moves by factors of "
        f"{min(changes):.3g} to {max(changes):.3g} between factors 0.25 and 8 without one "
        "prediction changing: its absolute value says nothing"
    )
    assert "k_free, free parameters and pair proxy stay: networks can be compared by those" in (
        audited.verdict
    )


def changed(audit, **rows):
    return replace(audit, values={**audit.values, **rows})


def test_what_should_have_stayed_and_moved_is_said_instead(audited):
    k_free = audited.values["k_free"][0]
    audit = changed(audited, k_free=(k_free, k_free, k_free + 1))
    assert not audit.stays("k_free")
    assert audit.stays_at("k_free") == [True, True, False]
    held, moved = audit.verdict.split("should have stayed and did not")
    assert f"Free regions k_free ({k_free} to {k_free + 1})" in held
    assert "k_free" not in moved
    assert "pair proxy stay" in moved
    first, _, last = audited.values["adaptive_trace"]
    audit = changed(audited, adaptive_trace=(first, first, last * 1.01))
    assert "Adaptive trace (1 %) should have stayed" in audit.verdict
    assert f"{audit.values['adaptive_trace'][2]:.4g}" in str(audit)


def test_predictions_that_changed_are_said_instead(audited):
    audit = changed(audited, outputs=(0.0, 0.0, 0.25), predictions=(0, 0, 3))
    assert audit.verdict.startswith(
        "Outputs did not stay: at factor 8 they differ by up to 0.25 of the largest one, and 3 "
        "predictions change."
    )
    assert "nothing" in audit.verdict
    assert "can be compared" not in audit.verdict
    # A tie that rounding decides.
    audit = changed(audited, outputs=(0.0, 0.0, 1e-9), predictions=(0, 0, 1))
    assert "without one prediction changing" not in audit.verdict
    assert "Predictions changed (0 to 1) should have stayed" in audit.verdict


def test_sharpness_that_stays_is_not_said_to_move(audited):
    still = dict.fromkeys(("lambda_max", "trace", "upper"), (2.0,) * 3)
    audit = changed(audited, **still)
    assert audit.verdict.startswith("Sharpness did not move beyond rounding")
    assert "can be compared" not in audit.verdict
    audit = changed(audited, **still | {"trace": (2.0, 2.0, 2.1)})
    assert audit.verdict.startswith("Sharpness (trace) moves by up to 5 % between")
    audit = changed(audited, **still | {"trace": (-1.0, 2.0, 3.5)})
    assert audit.verdict.startswith("Sharpness (trace -1 to 3.5) moves between")
    assert math.isnan(audit.change("trace"))


def test_what_went_beyond_the_numbers_is_said_to_have(audited):
    audit = changed(audited, upper=(1.0, math.nan, math.inf))
    assert audit.verdict.startswith("Sharpness (largest eigenvalue and trace) moves by")
    assert "Upper bound went beyond what float64 can hold: use model.double()" in audit.verdict
    assert "nan" not in audit.verdict


def test_counts_at_a_limit_are_not_said_to_tell_networks_apart(audited):
    assert audited.limits == {"patterns": 9, "k_free": 9, "pair_proxy": 27}
    audit = changed(audited, k_free=(0, 0, 0), patterns=(9, 9, 9), pair_proxy=(27, 27, 27))
    before, after = audit.verdict.split("networks can be compared by those")
    assert "Adaptive largest eigenvalue, adaptive trace and free parameters stay: " in before
    assert "(9), free regions k_free (0) and pair proxy (27) stay too, but at a limit" in after
    assert not any(audited.saturated(measure.name) for measure in audited.measures)


def test_the_pair_proxy_can_be_left_out():
    model, x, y, unseen = case()
    audit = lowland.audit(model, CE, x, y, unseen, factors=FEW, pairs=False)
    assert audit.left_out == {"pair_proxy": "pairs=False"}
    assert "pair_proxy" not in audit.values


def test_layers_that_are_frozen_leave_sharpness_alone():
    model, x, y, unseen = case()
    model[0].requires_grad_(requires_grad=False)
    model[2].requires_grad_(requires_grad=False)
    audit = lowland.audit(model, CE, x, y, unseen, factors=FEW)
    assert audit.parameters == 18
    assert audit.verdict.startswith("Sharpness did not move")


def test_a_factor_that_underflows_is_seen_to_change_predictions():
    model, x, y, unseen = case(dtype=torch.float32)
    with torch.no_grad():
        model[0].weight.mul_(2.0**-20)
        model[0].bias.mul_(2.0**-20)
        model[2].bias.zero_()
        model[4].weight.mul_(2.0**20)
    model[0].requires_grad_(requires_grad=False)  # as its curvature would overflow
    model[2].requires_grad_(requires_grad=False)
    audit = lowland.audit(model, CE, x, y, unseen, factors=(1, 2**-124))
    assert audit.verdict.startswith("Outputs did not stay: at factor")
    assert not audit.stays("outputs")


@pytest.mark.slow
def test_a_unit_within_rounding_of_its_kink_is_seen_to_move():
    # Of points at a right angle to all weights only rounding decides which units they activate.
    torch.manual_seed(0)
    weight, size = torch.tensor([0.37, -0.81]), torch.rand(8, 1) + 0.5
    model = nn.Sequential(nn.Linear(2, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))
    model[0].weight.data.copy_(size * weight)
    x, y = torch.tensor([[1.0, 2.0], [2.0, -1.0]]), torch.tensor([0, 1])
    unseen = torch.rand(30, 1) @ torch.tensor([[0.81, 0.37]])
    audit = lowland.audit(model, CE, x, y, unseen, factors=[1 + k / 7 for k in range(6)])
    assert audit.stays("outputs")
    assert not audit.stays("patterns")
    assert "patterns of unseen points (" in audit.verdict.lower()
    assert "powers of two" in audit.verdict
    assert lowland.audit(model, CE, x, y, unseen).stays("patterns")


# Bad input


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        return self.inner(x)


REFUSED = {
    "NaN": ({"x": torch.full((12, 4), float("nan")).double()}, ValueError, "x has 48 NaN"),
    "NaN unseen": (
        {"x_unseen": torch.full((3, 4), float("nan")).double()}, ValueError, "x_unseen has 12 NaN",
    ),
    "array": ({"x": torch.ones(12, 4).numpy()}, TypeError, "x must be a torch.Tensor"),
    "no unseen": ({"x_unseen": None}, TypeError, "x_unseen must be a torch.Tensor"),
    "empty": ({"x_unseen": torch.ones(0, 4).double()}, ValueError, "x_unseen is empty"),
    "other type": ({"x": torch.ones(12, 4)}, TypeError, "float32 on cpu but the weights"),
    "other shape": ({"x_unseen": torch.ones(3, 5).double()}, ValueError, r"\(points, 4\)"),
    "both other": (
        {"x": torch.ones(12, 5).double(), "x_unseen": torch.zeros(3, 5).double()}, ValueError,
        "the model does not take x",
    ),
    "fewer targets": ({"y": torch.arange(3)}, ValueError, "as many samples"),
    "labels": ({"y": torch.arange(12)}, ValueError, "the criterion does not take outputs"),
    "not reduced": (
        {"criterion": nn.CrossEntropyLoss(reduction="none")}, ValueError, "scalar tensor",
    ),
    "no criterion": ({"criterion": None}, TypeError, "criterion must map"),
    "model and criterion": ({"model": CE, "criterion": mlp()}, ValueError, "nn.Sequential"),
    "tanh": ({"model": mlp(activation=nn.Tanh).double()}, ValueError, "tanh allows flips"),
    "module": ({"model": Custom().double()}, ValueError, "expected an nn.Sequential"),
    "one layer": ({"model": nn.Sequential(nn.Linear(4, 3))}, ValueError, "the model has 1"),
    "training": (
        {"model": nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.Linear(3, 3)).double()},
        ValueError, "call model.eval",
    ),
    "frozen": (
        {"model": mlp().double().requires_grad_(requires_grad=False)}, ValueError,
        "^the model has no trainable parameter",
    ),
    "last layer": ({"layer": 2}, ValueError, "from 0 to 1"),
    "no index": ({"layer": 0.5}, TypeError, "whole number"),
    "zero": ({"factors": (0, 1)}, ValueError, "positive and finite; got 0"),
    "negative": ({"factors": (1, -2)}, ValueError, "positive and finite; got -2"),
    "one": ({"factors": (1,)}, ValueError, "another one than 1"),
    "one number": ({"factors": 4}, TypeError, "several numbers"),
    "letters": ({"factors": "12"}, TypeError, "several numbers"),
    "no number": ({"factors": (1, None)}, TypeError, "must be numbers"),
    "one probe": ({"probes": 1}, ValueError, "at least 2"),
    "overflow": ({"factors": (1e308,)}, ValueError, "at factor 1e"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("as_installed")
def test_what_cannot_be_audited_is_refused(name):
    model, x, y, unseen = case()
    given, error, message = REFUSED[name]
    call = {"model": model, "criterion": CE, "x": x, "y": y, "x_unseen": unseen, **given}
    with pytest.raises(error, match=message):
        lowland.audit(**call)


def test_weights_that_are_not_finite_are_named_as_such():
    model, x, y, unseen = case()
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not all finite at factor 1: look for NaN"):
        lowland.audit(model, CE, x, y, unseen)


@pytest.mark.parametrize("factors", [(2,), [0.5, 2.0], torch.tensor([2.0]), range(1, 3)])
@pytest.mark.usefixtures("as_installed")
def test_factors_come_in_any_form(factors):
    model, x, y, unseen = case()
    audit = lowland.audit(model, CE, x, y, unseen, factors=factors)
    assert 1.0 in audit.factors
    assert 2.0 in audit.factors


@pytest.fixture
def without(monkeypatch):
    """A package that is not installed."""
    plain = builtins.__import__

    def hide(missing):
        def find(name, *arguments, **named):
            if name.partition(".")[0] == missing:
                raise ModuleNotFoundError(f"No module named {name!r}")
            return plain(name, *arguments, **named)

        monkeypatch.setattr(builtins, "__import__", find)

    return hide


def test_without_a_solver_the_pair_proxy_is_left_out(without):
    model, x, y, unseen = case()
    without("highspy")
    audit = lowland.audit(model, CE, x, y, unseen, factors=FEW)
    assert "lowland[weakness]" in audit.left_out["pair_proxy"]
    assert "Left out: pair_proxy: " in str(audit)
    assert "free parameters stay" in audit.verdict


@pytest.mark.parametrize(
    ("missing", "extra"), [("scipy", "spectrum"), ("pandas", "cli"), ("matplotlib", "cli")]
)
def test_a_missing_extra_is_named(missing, extra, audited, without):
    without(missing)
    call = {
        "scipy": lambda: lowland.audit(*case()[:1], CE, *case()[1:]),
        "pandas": audited.to_frame,
        "matplotlib": audited.plot,
    }[missing]
    with pytest.raises(ImportError, match=rf"pip install 'lowland\[{extra}\]'"):
        call()


# Table and figure


def test_a_frame_has_a_row_for_each_measure_and_factor(audited):
    frame = audited.to_frame()
    assert list(frame.columns) == [
        "layer", "factor", "measure", "kind", "unit", "value", "stderr",
    ]  # fmt: skip
    assert len(frame) == 15 * 3
    wide = frame.pivot_table(index="measure", columns="factor", values="value")
    for name, row in audited.values.items():
        assert tuple(wide.loc[name]) == row
    assert set(frame["unit"][frame["kind"] == "sharpness"]) == {"loss/weight^2"}


def test_a_figure_marks_what_moved(audited):
    colors = pytest.importorskip("matplotlib.colors")
    audit = changed(audited, k_free=(1.0, 1.0, 2.0))
    for each, moved in ((audited, 0), (audit, 1)):
        figure = each.plot()
        figure.canvas.draw()
        left, right = figure.axes
        assert (left.get_xscale(), left.get_yscale(), right.get_xscale()) == ("log",) * 3
        assert ("all stay" in right.get_title(loc="left")) == (not moved)
        assert len(right.get_yticklabels()) == 10
        points = [line for line in right.lines if line.get_marker() == "D"]
        assert len(points) == moved
        ((x, y),) = left.lines[1].get_xydata()[-1:]
        assert (x, y) == (8, each.values["lambda_max"][-1] / each.values["lambda_max"][1])
    assert all(colors.to_rgb(p.get_color()) != colors.to_rgb("#0072b2") for p in points)


@pytest.mark.slow
def test_a_figure_of_many_factors_and_of_what_is_not_positive(audited):
    pytest.importorskip("matplotlib")
    model, x, y, unseen = case()
    factors = [2.0**k for k in range(-6, 7)]
    audit = lowland.audit(model, CE, x, y, unseen, factors=factors)
    figure = audit.plot()
    figure.canvas.draw()
    assert len(figure.axes[0].get_xticks()) < len(factors)
    left = changed(audited, trace=(-1.0, 2.0, 3.0)).plot().axes[0]
    assert len(left.get_legend().get_texts()) == 4
    assert "Tr" in left.get_legend().get_title().get_text()


@pytest.mark.gpu
def test_an_accelerator_gives_what_the_cpu_gives():
    model, x, y, unseen = case()
    expected = lowland.audit(model, CE, x, y, unseen, factors=FEW)
    found = lowland.audit(model.cuda(), CE, x.cuda(), y.cuda(), unseen.cuda(), factors=FEW)
    for name, row in expected.values.items():
        assert found.values[name] == pytest.approx(row, rel=1e-8, abs=1e-12)

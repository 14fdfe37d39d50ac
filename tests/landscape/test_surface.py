"""The loss on a grid, against losses computed by hand at each of its points."""

import copy
import math

import pytest
import torch
from any_models import MODELS, build
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import lowland
from lowland.landscape.directions import cosine, dot

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


def cnn(*, trained=True):
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
    ).double()  # fmt: skip
    for _ in range(3 * trained):
        model(torch.randn(50, 1, 6, 6).double() + 1)
    return model.eval()


def moved(model, surface, steps):
    """A copy of the model at a point of the grid."""
    other = copy.deepcopy(model)
    named = dict(other.named_parameters())
    with torch.no_grad():
        for step, direction in zip(steps, surface.directions, strict=True):
            for name, part in direction.items():
                named[name] += step * part
    return other


def everything(model):
    """All that a call might change: which tensors there are, their values, flags, versions."""
    parts = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(n, id(p), p._version, p.detach().clone(), p.requires_grad, p.grad) for n, p in parts],
        [
            (n, m.training, getattr(m, "momentum", None), getattr(m, "track_running_stats", None))
            for n, m in model.named_modules(remove_duplicate=False)
        ],
    )


def assert_same(before, after):
    assert before[1] == after[1]
    for one, other in zip(before[0], after[0], strict=True):
        assert one[:3] == other[:3]
        assert torch.equal(one[3], other[3])
        assert one[4:] == other[4:]


# Values


@given(st.integers(0, 2**16), st.floats(0.01, 100), st.integers(2, 6), st.integers(2, 6))
def test_a_linear_model_has_an_exact_quadratic(seed, extent, first, second):
    torch.manual_seed(seed)
    model = nn.Linear(4, 2).double()
    x, y = torch.randn(9, 4).double(), torch.randn(9, 2).double()
    surface = lowland.surface(
        model, MSE, (x, y), extent=extent, points=(first, second), biases=True, seed=seed
    )
    d, e = surface.directions
    slopes = [x @ v["weight"].T + v["bias"] for v in (d, e)]
    with torch.no_grad():
        rest = model(x) - y
    a, b = surface.coordinates
    for i in range(first):
        for j in range(second):
            expected = (rest + a[i] * slopes[0] + b[j] * slopes[1]).square().mean()
            assert float(surface.losses[i, j]) == pytest.approx(float(expected), rel=1e-11)
    assert surface.center_loss == pytest.approx(float(rest.square().mean()))
    assert surface.losses.dtype == torch.float64


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"cnn"}))
def test_each_point_is_the_loss_of_a_model_with_its_parameters(name):
    model, x, y = build(name)
    surface = lowland.surface(
        model, CE, (x, y), extent=(-0.5, 1), points=(3, 2), seed=4, batch_norm="running"
    )
    for i, a in enumerate(surface.coordinates[0]):
        for j, b in enumerate(surface.coordinates[1]):
            with torch.no_grad():
                expected = CE(moved(model, surface, (a, b))(x), y)
            assert float(surface.losses[i, j]) == pytest.approx(float(expected), rel=1e-9)


def test_batches_give_what_their_data_give_at_once():
    model, x, y = build("mlp", samples=9)
    whole = lowland.surface(model, CE, (x, y), points=3)
    parts = lowland.surface(model, CE, DataLoader(TensorDataset(x, y), batch_size=4), points=3)
    torch.testing.assert_close(parts.losses, whole.losses)


def test_batches_count_as_the_caller_says():
    model, x, y = build("mlp", samples=9)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]

    def unknown(output, y):
        return CE(output, y)  # whose mean nobody can see

    whole = lowland.surface(model, CE, (x, y), points=3)
    said = lowland.surface(model, unknown, batches, points=3, count=lambda x, y: len(y))
    torch.testing.assert_close(said.losses, whole.losses)
    over = lowland.eigenvalues_over(
        model, unknown, batches, [model], tolerance=1e-9, count=lambda x, y: len(y)
    )
    expected = lowland.spectrum(model, CE, (x, y), k=1).eigenvalues
    torch.testing.assert_close(over.eigenvalues[0], expected)


@pytest.mark.parametrize("batch_norm", ["running", "recomputed"])
def test_a_mapping_goes_to_the_model_by_names(batch_norm):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

        def forward(self, features, labels=None):
            return self.body(features)

    torch.manual_seed(0)
    model, x, y = Named().eval(), torch.randn(8, 4), torch.arange(8) % 2
    plain = lowland.surface(model.body, CE, (x, y), points=3, batch_norm=batch_norm)
    named = lowland.surface(
        model,
        lambda output, batch: CE(output, batch["labels"]),
        {"features": x, "labels": y},
        points=3,
        batch_norm=batch_norm,
    )
    torch.testing.assert_close(named.losses, plain.losses)


def test_the_center_is_a_point_of_the_grid_and_has_the_models_own_loss():
    model, x, y = build("mlp", dtype=torch.float32)
    surface = lowland.surface(model, CE, (x, y), extent=0.7, points=(11, 5))
    assert float(surface.coordinates[0][5]) == float(surface.coordinates[1][2]) == 0
    with torch.no_grad():
        own = float(CE(model(x), y))
    assert float(surface.losses[5, 2]) == surface.center_loss == surface.own_loss == own


def test_a_model_that_counts_its_calls_is_the_same_at_every_point():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            self.calls += 1
            return self.layer(x) * self.calls.clamp(max=1)

    torch.manual_seed(0)
    model, x, y = Counting(), torch.randn(8, 4), torch.arange(8) % 2
    surface = lowland.surface(model, CE, (x, y), extent=((-1, 1), (-1, 1)), points=3)
    assert float(surface.losses[1, 1]) == surface.center_loss
    assert float(model.calls) == 0


# Directions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_directions_have_the_norms_of_the_models_own_filters(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.LayerNorm([6, 4, 4]), nn.Flatten(), nn.Linear(96, 3),
    ).to(dtype).eval()  # fmt: skip
    x, y = torch.randn(8, 2, 5, 5, dtype=dtype), torch.arange(8) % 3
    surface = lowland.surface(model, CE, (x, y), points=2, seed=3)
    own = dict(model.named_parameters())
    for direction in surface.directions:
        for name, part in direction.items():
            if name in {"0.weight", "5.weight"}:
                lengths = part.flatten(1).norm(dim=1)
                expected = own[name].detach().flatten(1).norm(dim=1)
            elif name == "2.weight":  # an output's filter: column j of a group's inputs
                lengths, expected = (
                    torch.stack(
                        [w[2 * g : 2 * g + 2, j].norm() for g in range(2) for j in range(3)]
                    )
                    for w in (part, own[name].detach())
                )
            else:  # biases, and the parameters of normalizations whatever their shape
                assert not part.any()
                continue
            torch.testing.assert_close(lengths, expected)
            assert part.any()
    assert abs(cosine(*surface.directions)) < 1e-6


def test_biases_move_as_one_filter_each_if_asked_to():
    model, x, y = build("cnn_in_evaluation")
    surface = lowland.surface(model, CE, (x, y), points=2, biases=True, dimensions=1)
    for name, part in model.named_parameters():
        length = surface.directions[0][name].norm()
        if part.ndim < 2:
            torch.testing.assert_close(length, part.detach().norm())


@pytest.mark.parametrize("factor", [8.0, 1 / 64])
def test_rescaling_a_relu_network_leaves_the_surface_as_it_is(factor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    x, y = torch.randn(20, 5), torch.arange(20) % 3
    other = lowland.rescale(model, layer=0, factor=factor)
    first, second = (lowland.surface(m, CE, (x, y), points=5) for m in (model, other))
    torch.testing.assert_close(first.losses, second.losses, rtol=1e-5, atol=0)
    plain = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    first, second = (lowland.surface(m, CE, (x, y), plain, points=5) for m in (model, other))
    assert (first.losses - second.losses).abs().max() > 0.1  # as it would not be without


def test_the_same_seed_gives_the_same_directions_and_no_global_generator_is_touched():
    model, x, y = build("mlp")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (
        lowland.surface(model, CE, DataLoader(TensorDataset(x, y)), points=2, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.losses, same.losses)
    assert not torch.equal(one.losses, other.losses)


def test_along_eigenvectors_the_curvature_is_the_eigenvalue():
    model, x, y = build("mlp", samples=30)
    step = 1e-3
    surface = lowland.surface(model, CE, (x, y), "eigenvectors", extent=step, points=3)
    spectrum = lowland.spectrum(model, CE, (x, y), k=2)
    given = lowland.surface(model, CE, (x, y), spectrum, extent=step, points=3)
    assert torch.equal(given.losses, surface.losses)
    losses = surface.losses
    for axis, (low, middle, high) in enumerate((losses[:, 1], losses[1, :])):
        second = float(low - 2 * middle + high) / step**2
        assert second == pytest.approx(float(spectrum.eigenvalues[axis]), rel=1e-4)
    one = lowland.surface(model, CE, (x, y), spectrum, dimensions=1, extent=step, points=3)
    torch.testing.assert_close(one.losses, spectrum.along(0, one.coordinates[0]))
    assert "λ" in one.labels[0]


def test_a_spectrum_of_other_parameters_is_refused():
    model, x, y = build("mlp")
    spectrum = lowland.spectrum(model, CE, (x, y), k=2)
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(ValueError, match=r"other parameters .* spectrum.eigenvectors\[:2\]"):
        lowland.surface(model, CE, (x, y), spectrum)
    assert lowland.surface(model, CE, (x, y), spectrum.eigenvectors[:2], points=2).kind == "given"


def test_the_line_between_two_models_ends_at_both():
    one, x, y = build("mlp", seed=1)
    other, _, _ = build("mlp", seed=2)
    there = dict(other.named_parameters())
    between = {name: there[name] - part for name, part in one.named_parameters()}
    curve = lowland.surface(one, CE, (x, y), between, extent=(0, 1), points=4)
    with torch.no_grad():
        ends = [float(CE(m(x), y)) for m in (one, other)]
    assert [float(curve.losses[0]), float(curve.losses[-1])] == pytest.approx(ends)


def test_what_a_vector_leaves_out_stays():
    model, x, y = build("mlp")
    surface = lowland.surface(model, CE, (x, y), [{"0.bias": torch.ones(5)}], points=3)
    assert not surface.directions[0]["0.weight"].any()
    assert surface.directions[0]["0.bias"].dtype == torch.float64


# Batch normalization


def test_recomputed_statistics_are_those_of_a_pass_over_the_data_at_each_point():
    torch.manual_seed(3)
    model = cnn()
    x, y = torch.randn(23, 1, 6, 6).double(), torch.arange(23) % 3
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    surface = lowland.surface(model, CE, loader, points=3, batch_norm="recomputed")
    assert surface.statistics == "recomputed"
    for i, a in enumerate(surface.coordinates[0]):
        for j, b in enumerate(surface.coordinates[1]):
            other = moved(model, surface, (a, b))
            update_bn(loader, other)
            with torch.no_grad():
                expected = CE(other.eval()(x), y)
            assert float(surface.losses[i, j]) == pytest.approx(float(expected), rel=1e-10)
    with torch.no_grad():
        assert surface.own_loss == pytest.approx(float(CE(model(x), y)))
    assert surface.center_loss == float(surface.losses[1, 1]) != surface.own_loss
    assert "computed anew at every point" in surface.caption
    assert "own running statistics give" in surface.caption


def test_running_statistics_are_those_of_the_center():
    torch.manual_seed(3)
    model = cnn()
    x, y = torch.randn(23, 1, 6, 6).double(), torch.arange(23) % 3
    surface = lowland.surface(model, CE, (x, y), points=2, batch_norm="running")
    with torch.no_grad():
        expected = CE(moved(model, surface, (-1.0, 1.0))(x), y)
    assert float(surface.losses[0, 1]) == pytest.approx(float(expected))
    assert "running statistics of the center at every point" in surface.caption


@pytest.mark.parametrize("name", ["random", "eigenvectors"])
def test_which_statistics_are_used_unless_one_says(name):
    model, x, y = build("cnn_in_evaluation")
    surface = lowland.surface(model, CE, (x, y), name, points=2)
    assert surface.statistics == {"random": "recomputed", "eigenvectors": "running"}[name]
    model, x, y = build("mlp")
    assert lowland.surface(model, CE, (x, y), name, points=2).statistics == "none"


def test_a_batch_of_one_sample_has_no_statistics():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    x, y = torch.randn(5, 4), torch.arange(5) % 3
    loader = DataLoader(TensorDataset(x, y), batch_size=2)
    with pytest.raises(ValueError, match=r"drop_last=True.*batch_norm='running'"):
        lowland.surface(model, CE, loader, points=2)
    assert (
        lowland.surface(model, CE, loader, points=2, batch_norm="running").losses.isfinite().all()
    )


# The model


def shared():
    """A batch normalization and a layer that occur twice, and a recurrent layer."""
    norm, layer = nn.BatchNorm1d(4), nn.Linear(4, 4)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(norm, layer, nn.Tanh(), norm, layer)
            self.recurrent = nn.GRU(2, 2, batch_first=True)

        def forward(self, x):
            return self.recurrent(self.body(x).unflatten(1, (2, 2)))[0][:, -1]

    return Net().eval()


@pytest.mark.parametrize("batch_norm", ["running", "recomputed"])
@pytest.mark.parametrize("stop", [None, KeyboardInterrupt, ZeroDivisionError])
def test_the_model_is_left_as_it_was_whatever_ends_the_call(batch_norm, stop):
    torch.manual_seed(0)
    model, x, y = shared(), torch.randn(8, 4), torch.arange(8) % 2
    before = everything(model)
    flat = [id(part) for part in model.recurrent._flat_weights]
    calls = []

    def progress(title, done, total):
        calls.append((title, done, total))
        if stop and done == 5:
            raise stop

    call = {"points": 3, "batch_norm": batch_norm, "on_progress": progress}
    if stop:
        with pytest.raises(stop):
            lowland.surface(model, CE, (x, y), **call)
    else:
        lowland.surface(model, CE, (x, y), **call)
        assert calls == [("loss surface", i + 1, 9) for i in range(9)]
    assert_same(before, everything(model))
    assert [id(part) for part in model.recurrent._flat_weights] == flat


@pytest.mark.parametrize("at", [3, 7, 12])
def test_an_interrupt_within_a_forward_pass_leaves_the_model_as_it_was(at):
    class Interrupting(nn.Module):
        calls = 0

        def forward(self, x):
            Interrupting.calls += 1
            if Interrupting.calls == at:
                raise KeyboardInterrupt
            return x

    torch.manual_seed(0)
    model = nn.Sequential(shared(), Interrupting()).eval()
    x, y = torch.randn(8, 4), torch.arange(8) % 2
    before = everything(model)
    Interrupting.calls = 0
    with pytest.raises(KeyboardInterrupt):
        lowland.surface(model, CE, (x, y), points=4)
    assert_same(before, everything(model))


def test_a_pending_backward_pass_still_works():
    model, x, y = build("cnn_in_evaluation")
    loss = CE(model(x), y)
    lowland.surface(model, CE, (x, y), points=2)
    loss.backward()


# Points without a loss


def diverging():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        for part in model.parameters():
            part.fill_(1.0)
    huge = {name: torch.full_like(part, 1e25) for name, part in model.named_parameters()}
    return model, huge, {"0.bias": torch.ones(2)}


def test_points_that_diverge_keep_what_they_are():
    model, huge, small = diverging()
    x, y = torch.ones(4, 2), torch.zeros(4, 1)
    surface = lowland.surface(model, MSE, (x, y), [huge, small], points=3)
    assert surface.losses[1].isfinite().all()
    assert not surface.losses[2].isfinite().any()
    assert f"At {int((~surface.losses.isfinite()).sum())} of 9 points" in surface.caption


def test_a_criterion_that_refuses_what_diverged_gives_nan():
    model, huge, small = diverging()
    model.append(nn.Sigmoid())
    with torch.no_grad():
        model[2].weight[0, 1] = -1.0  # of two infinite activations the difference
    x, y = torch.ones(4, 2), torch.zeros(4, 1)
    huge = {"0.weight": torch.full((2, 2), 3e38), "0.bias": torch.full((2,), 3e38)}
    surface = lowland.surface(model, nn.BCELoss(), (x, y), [huge, small], extent=(0, 1), points=2)
    assert surface.losses[0].isfinite().all()
    assert surface.losses[1].isnan().all()


def test_other_errors_are_raised():
    model, x, y = build("mlp")

    def criterion(output, y):
        if float(output.detach().abs().max()) > limit:
            raise ValueError("too far")
        return CE(output, y)

    with torch.no_grad():
        limit = 1.01 * float(model(x).abs().max())
    with pytest.raises(ValueError, match="too far"):
        lowland.surface(model, criterion, (x, y), extent=20, points=3)


# At the door


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"directions": "hessian"}, ValueError, "unknown directions 'hessian': expected one of"),
        ({"directions": "path"}, ValueError, r"give them as path=\[...\]"),
        ({"directions": []}, ValueError, "one or two vectors.*path="),
        ({"directions": [{"0.weight": torch.ones(5, 4)}] * 2}, ValueError, "lie on one line"),
        ({"directions": {"0.weight": torch.ones(4, 5)}}, ValueError, r"shape \(5, 4\)"),
        ({"directions": {"9.weight": torch.ones(4, 5)}}, ValueError, "no trainable parameter"),
        ({"directions": {"0.weight": torch.zeros(5, 4)}}, ValueError, "direction 1 is zero"),
        ({"directions": {"0.bias": torch.full((5,), math.nan)}}, ValueError, "NaN or infinite"),
        ({"directions": {"0.bias": torch.ones(5)}, "dimensions": 2}, ValueError, "takes as many"),
        ({"dimensions": 3}, ValueError, "dimensions must be 1 .* or 2"),
        ({"extent": 0.0}, ValueError, "extent must be positive"),
        ({"extent": (1.0, -1.0)}, ValueError, "low < high"),
        ({"extent": ((0.0, 1.0),)}, ValueError, "got 1 pairs"),
        ({"extent": (0.0, math.inf)}, ValueError, "finite"),
        ({"points": 1}, ValueError, "at least 2"),
        ({"points": (3, 3, 3)}, ValueError, "got 3"),
        ({"batch_norm": "batch"}, ValueError, "unknown batch_norm 'batch'"),
    ],
)
@pytest.mark.usefixtures("as_installed")
def test_what_makes_no_surface_is_refused_before_any_work(arguments, error, message):
    model, x, y = build("mlp")
    with pytest.raises(error, match=message):
        lowland.surface(model, CE, (x, y), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"directions": 3}, "got builtins.int"),
        ({"directions": [3, 4]}, "direction 1 must be a mapping"),
        ({"directions": {"0.bias": [1.0]}}, "must have tensors; got list"),
        ({"extent": "far"}, "extent must be a number"),
        ({"extent": (("a", "b"), (0, 1))}, "each pair of extent must be two numbers"),
        ({"points": 2.5}, "points must be a whole number"),
    ],
)
@pytest.mark.usefixtures("as_installed")
def test_arguments_of_other_types_are_refused(arguments, message):
    model, x, y = build("mlp")
    with pytest.raises(TypeError, match=message):
        lowland.surface(model, CE, (x, y), **arguments)


def test_layers_that_draw_or_update_are_refused():
    model, x, y = build("cnn")
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        lowland.surface(model, CE, (x, y))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_scripted_models_are_refused():
    model, x, y = build("mlp")
    scripted = torch.jit.script(model)
    with pytest.raises(lowland.UnsupportedModelError, match="use the module that was scripted"):
        lowland.surface(scripted, CE, (x, y), points=2)
    with pytest.raises(lowland.UnsupportedModelError, match="use the module that was scripted"):
        lowland.eigenvalues_over(scripted, CE, (x, y), [model])


def test_a_model_without_filters_is_told_what_to_do():
    model = nn.BatchNorm1d(3, dtype=torch.float64).eval()
    x, y = torch.randn(8, 3).double(), torch.arange(8) % 3
    with pytest.raises(ValueError, match="use biases=True"):
        lowland.surface(model, CE, (x, y))
    assert lowland.surface(model, CE, (x, y), biases=True, points=2).losses.shape == (2, 2)


def test_lengths_are_summed_in_double_precision():
    part = {"w": torch.full((3_000_000,), 1e-3)}
    assert dot(part, part) == pytest.approx(3.0, rel=1e-6)

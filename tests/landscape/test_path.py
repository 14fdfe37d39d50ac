"""Checkpoints of training, on the plane to which they are closest."""

import pytest
import torch
from any_models import build
from torch import nn

import lowland

CE = nn.CrossEntropyLoss()


def vectors(model, count, seed=0):
    """Orthonormal directions in the space of the parameters."""
    torch.manual_seed(seed)
    shapes = [p.shape for p in model.parameters()]
    sizes = [shape.numel() for shape in shapes]
    flat = torch.linalg.qr(torch.randn(sum(sizes), count).double())[0].T
    names = [name for name, _ in model.named_parameters()]
    return [
        {n: p.view(s) for n, p, s in zip(names, each.split(sizes), shapes, strict=True)}
        for each in flat
    ]


def at(model, steps, directions):
    """A state dict some steps away from the model."""
    state = {name: part.detach().clone() for name, part in model.state_dict().items()}
    for step, direction in zip(steps, directions, strict=True):
        for name, part in direction.items():
            state[name] += step * part
    return state


PLACES = [(3.0, 1.0), (2.0, -0.5), (1.0, 0.7), (0.0, 0.0)]


def test_points_of_a_plane_are_where_they_are():
    model, x, y = build("mlp")
    plane = vectors(model, 2)
    path = [at(model, place, plane) for place in PLACES]
    surface = lowland.surface(model, CE, (x, y), path=path, points=4)
    found = surface.path
    assert surface.kind == "path"
    assert found.explained == pytest.approx(1, abs=1e-12)
    assert sum(found.shares) == pytest.approx(1, abs=1e-12)
    assert (found.distances < 1e-6).all()
    places = torch.tensor(PLACES).double()
    torch.testing.assert_close(found.coordinates @ found.coordinates.T, places @ places.T)
    for place, losses in zip(found.coordinates, path, strict=True):
        for name, part in losses.items():
            drawn = dict(model.named_parameters())[name].detach() + sum(
                c * d[name] for c, d in zip(place, surface.directions, strict=True)
            )
            torch.testing.assert_close(drawn, part)
    assert (found.coordinates[0] >= 0).all()  # the start of training
    low, high = (torch.stack([axis[i] for axis in surface.coordinates]) for i in (0, -1))
    assert ((low < found.coordinates) & (found.coordinates < high)).all()
    assert "4 checkpoints" in surface.caption
    assert "100.0%" in surface.caption


def test_the_directions_are_the_closest_to_the_checkpoints_and_distances_are_what_is_left():
    model, x, y = build("mlp")
    space = vectors(model, 5)
    torch.manual_seed(1)
    steps = torch.randn(6, 5).double() * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1])
    path = [at(model, step, space) for step in steps]
    surface = lowland.surface(model, CE, (x, y), path=path, points=2)
    singular = torch.linalg.svdvals(steps).square()
    shares = (singular / singular.sum())[:2]
    assert surface.path.shares == pytest.approx(shares.tolist())
    assert surface.path.explained == pytest.approx(float(shares.sum()))
    inside = surface.path.coordinates.square().sum(1)
    torch.testing.assert_close(inside + surface.path.distances**2, steps.square().sum(1))


def test_each_checkpoint_has_its_own_loss():
    model, x, y = build("mlp")
    path = [at(model, place, vectors(model, 2)) for place in PLACES]
    surface = lowland.surface(model, CE, (x, y), path=path, points=2)
    for state, loss in zip(path, surface.path.losses, strict=True):
        other, _, _ = build("mlp")
        other.load_state_dict(state)
        with torch.no_grad():
            assert float(loss) == pytest.approx(float(CE(other(x), y)))


def test_a_checkpoint_brings_its_own_running_statistics():
    model, x, y = build("cnn_in_evaluation")
    other, _, _ = build("cnn_in_evaluation", seed=1)
    surface = lowland.surface(
        model, CE, (x, y), path=[other], dimensions=1, points=2, batch_norm="running"
    )
    with torch.no_grad():
        assert float(surface.path.losses[0]) == pytest.approx(float(CE(other(x), y)))


def test_a_path_can_be_shown_on_any_plane():
    model, x, y = build("mlp")
    u, v, w = vectors(model, 3)
    path = [at(model, place, (u, v, w)) for place in ((3, 1, 2), (-4, 0, 1))]
    skew = {name: u[name] + v[name] for name in u}
    double = {name: 2 * u[name] for name in u}
    surface = lowland.surface(model, CE, (x, y), [double, skew], path=path, points=2)
    expected = torch.tensor([[1.0, 1.0], [-2.0, 0.0]]).double()
    torch.testing.assert_close(surface.path.coordinates, expected)
    torch.testing.assert_close(surface.path.distances, torch.tensor([2.0, 1.0]).double())
    assert surface.path.explained == pytest.approx(26 / 31)
    assert surface.path.shares is None
    assert "not perpendicular (cosine 0.707)" in surface.caption
    near = lowland.surface(model, CE, (x, y), [double, skew], path=path, points=2, extent=1.5)
    assert "1 of them lie beyond its edge" in near.caption


def test_one_checkpoint_gives_a_line_and_no_plane():
    model, x, y = build("mlp")
    path = [at(model, (2.0,), vectors(model, 1)), model.state_dict()]
    with pytest.raises(ValueError, match="span a line; use dimensions=1"):
        lowland.surface(model, CE, (x, y), path=path)
    curve = lowland.surface(model, CE, (x, y), path=path, dimensions=1, points=3)
    torch.testing.assert_close(curve.path.coordinates, torch.tensor([[2.0], [0.0]]).double())
    with pytest.raises(ValueError, match="span no direction"):
        lowland.surface(model, CE, (x, y), path=[model.state_dict()])


def test_rounding_spans_no_direction():
    model, x, y = build("mlp", dtype=torch.float32)
    (line,) = vectors(model, 1)
    path = [at(model, (step,), [line]) for step in (3.0, 1.7, 0.3)]
    with pytest.raises(ValueError, match="span a line"):
        lowland.surface(model, CE, (x, y), path=path)


# Of what form


def test_checkpoints_may_be_of_any_form(tmp_path):
    model, x, y = build("mlp")
    states = [at(model, place, vectors(model, 2)) for place in PLACES[:3]]
    whole = lowland.surface(model, CE, (x, y), path=states, points=2)
    torch.save(states[0], tmp_path / "plain.pt")
    prefixed = {f"module._orig_mod.{name}": part for name, part in states[1].items()}
    torch.save({"epoch": 3, "state_dict": prefixed, "optimizer": {}}, tmp_path / "trainer.pt")
    other, _, _ = build("mlp")
    other.load_state_dict(states[2])
    forms = [tmp_path / "plain.pt", str(tmp_path / "trainer.pt"), lambda: other]
    assert torch.equal(
        lowland.surface(model, CE, (x, y), path=forms, points=2).losses, whole.losses
    )
    again = lowland.surface(model, CE, (x, y), path=iter([*forms[:2], other]), points=2)
    assert torch.equal(again.losses, whole.losses)


def test_safetensors_are_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, x, y = build("mlp")
    state = at(model, (1.0,), vectors(model, 1))
    safetensors.save_file(state, tmp_path / "model.safetensors")
    path = [tmp_path / "model.safetensors"]
    surface = lowland.surface(model, CE, (x, y), path=path, dimensions=1, points=2)
    torch.testing.assert_close(surface.path.coordinates, torch.ones(1, 1).double())


@pytest.mark.parametrize("name", ["whole.pt", "words.pt", "empty.pt", "words.safetensors"])
def test_files_that_are_no_state_dict_are_refused(name, tmp_path):
    pytest.importorskip("safetensors")
    model, x, y = build("mlp")
    if name == "whole.pt":
        torch.save(model, tmp_path / name)
    else:
        (tmp_path / name).write_text("words" * 9 * ("words" in name))
    with pytest.raises(ValueError, match=f"checkpoint 0, '.*{name}', is no"):
        lowland.surface(model, CE, (x, y), path=[tmp_path / name], dimensions=1)


def test_references_to_the_models_own_parameters_are_refused():
    model, x, y = build("mlp")
    path = []
    for _ in range(3):
        with torch.no_grad():
            model[0].weight += 1
        path.append(model.state_dict())
    with pytest.raises(ValueError, match=r"checkpoints 0 and 1 are the same tensors.*clone\(\)"):
        lowland.surface(model, CE, (x, y), path=path)


@pytest.mark.usefixtures("as_installed")
def test_what_is_no_checkpoint_of_this_model_is_refused():
    model, x, y = build("mlp")
    good = at(model, (1.0,), vectors(model, 1))

    def refused(error, match, path):
        with pytest.raises(error, match=match):
            lowland.surface(model, CE, (x, y), path=path, dimensions=1)

    refused(TypeError, r"single .*dict: use \[checkpoint\]", good)
    refused(TypeError, "checkpoint 1 must be a state dict", [good, 3])
    refused(ValueError, "there is no checkpoint", [])
    missing = {name: part for name, part in good.items() if name != "2.bias"}
    refused(
        ValueError, "checkpoint 0 lacks 1 of the model's 6 parameters, such as '2.bias'", [missing]
    )
    refused(ValueError, r"shape \(2, 2\) for '0.weight'", [{**good, "0.weight": torch.ones(2, 2)}])
    refused(ValueError, "holds 2 state dicts", [{"model": good, "ema": dict(good)}])
    refused(ValueError, "NaN or infinite", [{**good, "2.bias": torch.full((3,), torch.nan)}])
    model[0].weight.requires_grad_(requires_grad=False)
    refused(ValueError, "'0.weight', which is frozen", [good])

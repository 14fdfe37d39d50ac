import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import config
from sklearn.metrics import f1_score
from study_in_small import PRESET

from lowland.studies.hsr import theory
from lowland.studies.hsr.control import control
from lowland.studies.hsr.preset import load_preset
from lowland.studies.hsr.run import FITTED, KINDS, run_study
from lowland.studies.hsr.search import distinct_points, search, select
from lowland.studies.hsr.task import flatten, samples, start
from lowland.studies.runs.jobs import Store
from lowland.studies.runs.presets import PresetError

pytestmark = pytest.mark.slow  # on a study that runs for some ten seconds

TINY = replace(
    PRESET,
    seeds=12,
    test_size=60,
    hidden=2,
    steps=60,
    tolerance=0.1,
    distinct=1.0,
    share=0.3,
    checkpoints=3,
    chunk=5,
    draws=3,
    sweep_datasets=(3, 2),
    sweep_seeds=3,
)
PUBLISHED = ("baseline", "hessian-trace", "a-sam", "hsr")
METHODS = (*PUBLISHED, "lambda-max")


def shorten(patch):
    """Theory in a fraction of a second."""
    patch.setattr(theory, "TIMED_SAMPLES", (4, 8))
    patch.setattr(theory, "TIMED_HIDDEN", (1, 2))
    patch.setattr(theory, "REPEATS", 1)
    patch.setattr(theory, "DESCENT_STEPS", 50)


@pytest.fixture
def short(monkeypatch):
    shorten(monkeypatch)


def toml(settings):
    return "".join(
        f"{key} = {list(value) if isinstance(value, tuple) else value}\n"
        for key, value in settings.items()
    )


def network(preset=TINY):
    return oracle.Network(2, preset.hidden, "sigmoid", "bce")


def assert_same(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


# Presets


def test_presets_are_found_by_name_and_by_path(tmp_path):
    paper, quick = load_preset("paper"), load_preset("quick")
    assert (paper.seeds, paper.steps, paper.active, paper.tolerance) == (3000, 10000, 0.5, 0.001)
    sizes = dict.fromkeys(("seeds", "distinct", "chunk", "draws"), 0)
    sizes |= {key: 0 for key in asdict(paper) if key.startswith("sweep_")}
    assert asdict(quick) | sizes == asdict(paper) | sizes
    path = tmp_path / "mine.toml"
    path.write_text(toml(asdict(TINY)))
    assert load_preset(str(path)) == TINY


def test_a_preset_names_the_four_methods_with_its_weights():
    methods = replace(TINY, hsr_weight=0.7, trace_weight=0.2, sam_radius=0.3).methods
    assert tuple(methods) == PUBLISHED
    assert [(m.weight, m.radius) for m in methods.values()] == [
        (0, 0),
        (0.2, 0),
        (0, 0.3),
        (0.7, 0),
    ]


def test_what_is_ours_is_none_of_the_papers_methods_and_as_strong_as_hsr():
    preset = replace(TINY, hsr_weight=0.7)
    assert not preset.ours.keys() & preset.methods.keys()
    assert [(m.weight, m.radius) for m in preset.ours.values()] == [(0.7, 0)]
    assert all("ours" in method.title for method in preset.ours.values())


@pytest.mark.parametrize("name", ["huge", "no/such.toml", "."])
def test_an_unknown_preset_is_refused(name):
    with pytest.raises(PresetError, match="expected 'paper', 'quick', 'small' or a TOML file"):
        load_preset(name)


@pytest.mark.parametrize("content", [b"seeds =", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_refused(tmp_path, content):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(PresetError, match="is not a TOML file: "):
        load_preset(str(tmp_path / "bad"))


def test_missing_and_unknown_settings_are_named(tmp_path):
    settings = {"sead": 3} | asdict(TINY)
    del settings["seeds"], settings["hidden"]
    (tmp_path / "bad").write_text(toml(settings))
    message = "missing settings: hidden, seeds; unknown settings: sead"
    with pytest.raises(PresetError, match=message):
        load_preset(str(tmp_path / "bad"))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seeds", "1.5", "a whole number; got 1.5"),
        ("seeds", "true", "a whole number; got True"),
        ("mean", "'one'", "a number; got 'one'"),
        ("steps", "0", "finite and at least 1; got 0"),
        ("chunk", "0", "finite and at least 1; got 0"),
        ("checkpoints", "1", "finite and at least 2; got 1"),
        ("train_size", "41", "even, half of each class; got 41"),
        ("data_seed", "-1", "finite and at least 0; got -1"),
        ("hsr_weight", "nan", "finite and at least 0; got nan"),
        ("tolerance", "inf", "finite and at least 0; got inf"),
        ("learning_rate", "0.0", "a finite number greater than 0; got 0.0"),
        ("share", "0.6", "from 0 to 0.5; got 0.6"),
        ("active", "2", "from 0 to 1; got 2"),
        ("sweep_hidden", "3", "a list, not empty; got 3"),
        ("sweep_hidden", "[]", r"a list, not empty; got \[\]"),
        ("sweep_hidden", "[3, 0]", r"a list, each entry finite and at least 1; got \[3, 0\]"),
        ("sweep_hidden", "[3, 3]", r"a list in which no entry is repeated; got \[3, 3\]"),
        ("sweep_datasets", "[1, 4]", r"a list, each entry finite and at least 2; got \[1, 4\]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, key, value, expected):
    (tmp_path / "bad").write_text(toml(asdict(TINY) | {key: value}))
    with pytest.raises(PresetError, match=f"bad': {key} must be {expected}$"):
        load_preset(str(tmp_path / "bad"))


def test_the_sweep_needs_a_number_of_data_sets_for_each_size(tmp_path):
    (tmp_path / "bad").write_text(toml(asdict(TINY) | {"sweep_datasets": [3, 3, 3]}))
    with pytest.raises(PresetError, match="one number for each of sweep_train_sizes; got 3 for 2"):
        load_preset(str(tmp_path / "bad"))


def test_every_setting_is_written_down_with_the_results():
    assert TINY.to_dict() == asdict(TINY)
    assert {field.name for field in fields(TINY)} == TINY.to_dict().keys()


# Samples and starts


def test_samples_are_two_gaussians_in_equal_parts():
    preset = replace(TINY, mean=1.5, variance=3.0)
    x, y = samples(preset, 20_000)
    assert x.shape == (1, 20_000, 2)
    assert y.sum() == 10_000
    for label, mean in ((0, -1.5), (1, 1.5)):
        own = x[0][y[0] == label]
        torch.testing.assert_close(own.mean(0), torch.full((2,), mean).double(), rtol=0, atol=0.06)
        torch.testing.assert_close(own.T.cov(), 3 * torch.eye(2).double(), rtol=0, atol=0.15)


def test_samples_follow_their_seed_and_test_samples_are_others():
    first, again = samples(TINY, 40), samples(TINY, 40)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    sets = [first[0], samples(TINY, 40, test=True)[0]]
    sets += [samples(replace(TINY, data_seed=1), 40, test=test)[0] for test in (False, True)]
    assert len({float(x.sum()) for x in sets}) == 4


def test_a_start_is_uniform_and_its_seeds_alone():
    first, second = start(TINY, list(range(2000)))
    assert first.shape == (2000, 3, 2)
    assert second.shape == (2000, 3, 1)
    values = flatten((first, second))
    assert values.abs().max() <= TINY.initial_range
    assert values.abs().max() > 0.999 * TINY.initial_range
    assert abs(values.mean()) < 0.1
    assert values.std() == pytest.approx(TINY.initial_range / 3**0.5, rel=0.02)
    some = start(TINY, [1999, 7])
    assert torch.equal(flatten(some), values[[1999, 7]])


# Search


@given(st.integers(1, 12), st.integers(1, 3), st.floats(0, 2), st.integers(0, 2**32))
def test_distinct_points_are_those_of_a_double_loop(count, dim, multiple, seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    keep, threshold = distinct_points(points, multiple)
    pairs = [
        float((points[i] - points[j]).norm()) for i in range(count) for j in range(i + 1, count)
    ]
    if len(pairs) > 1:
        mean = sum(pairs) / len(pairs)
        spread = (sum((d - mean) ** 2 for d in pairs) / (len(pairs) - 1)) ** 0.5
        assert threshold == pytest.approx(mean - multiple * spread, abs=1e-12)
    kept = []
    for i in range(count):
        if all((points[i] - points[j]).norm() >= threshold for j in kept):
            kept.append(i)
    assert keep.nonzero().flatten().tolist() == kept


def test_of_duplicates_the_first_is_kept():
    centers = 10 * torch.eye(3, dtype=torch.float64)
    points = centers[[0, 1, 0, 2, 1, 0]] + 1e-6 * torch.arange(6).double()[:, None]
    keep, threshold = distinct_points(points, 1.0)
    assert keep.tolist() == [True, True, False, True, False, False]
    assert 1e-4 < threshold < 10


def test_the_ends_of_the_bound_are_flat_and_sharp():
    count = 20
    generator = torch.Generator().manual_seed(1)
    found = {
        "converged": torch.arange(count) % 5 != 0,
        "parameters": torch.randn(count, 3, generator=generator, dtype=torch.float64),
        "upper_bound": torch.randperm(count, generator=generator).double(),
    }
    selection = select(replace(TINY, distinct=3.0, share=0.2), found)  # nothing is that close
    assert selection.distinct.tolist() == selection.converged.tolist()
    assert selection.converged.tolist() == [i for i in range(count) if i % 5]
    ordered = sorted(selection.converged.tolist(), key=lambda i: found["upper_bound"][i])
    assert selection.flat.tolist() == ordered[:3]  # 0.2 of 16
    assert selection.sharp.tolist() == ordered[-3:]
    assert selection.low == found["upper_bound"][ordered[2]]
    assert selection.high == found["upper_bound"][ordered[-3]]


def test_a_search_in_which_nothing_converges_says_what_to_do():
    preset = replace(TINY, steps=2, tolerance=0.0)
    with pytest.raises(PresetError, match="no network converged within 2 steps; set more steps"):
        select(preset, search(preset, 0, 3))


@pytest.mark.usefixtures("as_installed")
def test_a_seed_does_not_depend_on_its_chunk():
    whole = search(TINY, 0, 10)
    for first in range(0, 10, 3):
        part = search(TINY, first, min(first + 3, 10))
        assert_same(part, {name: tensor[first : first + 3] for name, tensor in whole.items()})


def test_a_search_reports_the_network_where_it_stopped():
    found = search(TINY, 3, 6)
    x, y = (part[0] for part in samples(TINY, TINY.train_size))
    assert found["seed"].tolist() == [3, 4, 5]
    assert found["converged"].any()
    for i, flat in enumerate(found["parameters"]):
        matrix = network().hessian(flat, x, y)
        values = torch.linalg.eigvalsh(matrix)
        upper = oracle.upper(*oracle.moments(matrix), len(flat))
        expected = {
            "loss": network().loss_of(flat, x, y),
            "lambda_max": values[-1],
            "lambda_min": values[0],
            "upper_bound": upper,
            "lower_bound": 2 * matrix.trace() / len(flat) - upper,
        }
        for name, value in expected.items():
            torch.testing.assert_close(found[name][i], value, rtol=1e-9, atol=1e-12)


# Control


@pytest.mark.parametrize("method", METHODS)
def test_control_measures_what_brute_force_measures(method):
    seeds = [7, 2, 9]
    result = control(TINY, method, seeds)
    assert result["seed"].tolist() == seeds
    assert result["curve_loss"].shape == (3, 3)
    x, y = (part[0] for part in samples(TINY, TINY.train_size))
    x_test, y_test = (part[0] for part in samples(TINY, TINY.test_size, test=True))
    for i, flat in enumerate(result["parameters"]):
        matrix = network().hessian(flat, x, y)
        torch.testing.assert_close(result["eigenvalues"][i], torch.linalg.eigvalsh(matrix))
        for name, end in (("bottom", 0), ("top", -1)):
            vector = result[name][i]
            torch.testing.assert_close(matrix @ vector, result["eigenvalues"][i, end] * vector)
            assert vector.norm() == pytest.approx(1)
        begin = flatten(start(TINY, [seeds[i]]))[0]
        for step, at in ((0, begin), (-1, flat)):
            torch.testing.assert_close(
                result["curve_loss"][i, step], network().loss_of(at, x, y), rtol=1e-12, atol=0
            )
        predicted = torch.sigmoid(network().logits(flat, x_test)) > 0.5
        assert result["macro_f1"][i] == f1_score(y_test.int(), predicted.int(), average="macro")


def test_control_by_the_baseline_ends_where_the_search_did():
    found, again = search(TINY, 0, 3), control(TINY, "baseline", [0, 1, 2])
    for name in ("parameters", "converged", "steps"):
        assert torch.equal(found[name], again[name])


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("method", METHODS)
def test_control_of_a_seed_does_not_depend_on_its_chunk(method):
    whole, part = control(TINY, method, [4, 8, 1, 6]), control(TINY, method, [8, 1])
    middle = {name: value[1:3] for name, value in whole.items()}
    assert_same(part, middle)


# Theory


def test_numerical_and_analytic_gradients_agree():
    result = theory.agreement(TINY)
    for rows in result.values():
        assert rows.shape == (TINY.draws, 4)
        assert (rows[:, :2] < 1e-6 * (1 + rows[:, 2:])).all()
        assert (rows[:, 2:] > 0).all()


def test_the_analytic_gradient_is_that_of_brute_force():
    weights, (x, y) = start(TINY, [1]), samples(TINY, 20)
    for index, moment in enumerate(("trace", "trace_sq")):
        expected = oracle.gradient(
            network(), flatten(weights)[0], x[0], y[0], lambda h, i=index: oracle.moments(h)[i]
        )
        for order in ("samples", "parameters"):
            parts = theory.analytic(weights, x, y, moment, order)
            torch.testing.assert_close(flatten(tuple(parts))[0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("short")
def test_timings_are_of_every_size():
    result = theory.timing(TINY)
    assert result["samples"][:, 0].tolist() == [4, 8]
    assert result["parameters"][:, 0].tolist() == [5, 9]
    assert all((rows[:, 1:] > 0).all() for rows in result.values())


def test_a_fitted_sample_leaves_the_gradient():
    """Proposition 1: with the outputs' scale, every sample on its right side is fitted."""
    weights = torch.zeros(1, 9, dtype=torch.float64)
    weights[0, :6] = torch.tensor([0.0, 0.0, 0.5, 0.2, 0.5, 0.3])  # W by rows: bias, x1, x2
    residuals, norms = [], []
    for scale in (1.0, 10.0, 100.0):
        weights[0, 6:] = scale * torch.tensor([-1.0, 1.0, 1.0])
        result = theory.fit(TINY, weights)
        residuals.append(result["residual"][0])
        norms.append(result["norm"][0])
    assert residuals[0].shape == norms[0].shape == (TINY.train_size,)
    fitted = residuals[2] < 1e-9
    assert fitted.sum() > 3
    assert (norms[0][fitted] > 1e-3).all()
    assert (norms[2][fitted] < 1e-4 * norms[0][fitted]).all()


def test_shares_and_residuals_are_each_networks_own():
    points = flatten(start(TINY, [0, 1, 2]))
    result = theory.fit(TINY, points)
    assert result["residual"].shape == result["norm"].shape == (3, TINY.train_size)
    x, y = (part[0] for part in samples(TINY, TINY.train_size))
    for i, flat in enumerate(points):
        residual = (torch.sigmoid(network().logits(flat, x)) - y).abs()
        torch.testing.assert_close(result["residual"][i], residual)
        alone = theory.fit(TINY, points[i : i + 1])
        torch.testing.assert_close(alone["norm"][0], result["norm"][i])


def test_the_mean_and_the_spread_part_make_up_the_bounds_gradient():
    x, y = (part[0] for part in samples(TINY, TINY.train_size))
    result = theory.parts(TINY)
    assert len(result["mean"]) == len(result["spread"]) == 10 * TINY.draws
    for i in range(2):
        flat = flatten(start(TINY, [i]))[0]

        def gradient(function, flat=flat):
            return oracle.gradient(network(), flat, x, y, function)

        def bound(h):
            return oracle.upper(*oracle.moments(h), len(h))

        mean = gradient(lambda h: h.trace() / len(h))
        torch.testing.assert_close(result["mean"][i], mean.norm())
        torch.testing.assert_close(result["spread"][i], (gradient(bound) - mean).norm())


def test_gradients_are_measured_over_every_covariance():
    result = theory.covariance(TINY)
    assert result["covariance"].abs().max() < TINY.variance
    for name in ("identity", "sigmoid"):
        assert result[name].shape == (len(result["covariance"]), TINY.draws)
        assert result[name].isfinite().all()
    assert (result["identity"][-1] > result["identity"][3]).all()


@pytest.mark.usefixtures("short")
def test_descent_on_the_bound_lowers_it_and_narrows_the_spectrum():
    result = theory.descent(replace(TINY, learning_rate=0.2))
    values = result["eigenvalues"]
    assert values.shape == (51, TINY.draws, 9)
    assert (result["upper_bound"].diff(dim=0) < 0).all()
    assert (values[:, :, -1] <= result["upper_bound"] * (1 + 1e-9)).all()
    assert (values[:, :, 0] >= result["lower_bound"] - 1e-9).all()
    assert (values[-1, :, -1] < values[0, :, -1]).all()
    x, y = (part[0] for part in samples(TINY, TINY.train_size))
    first = network().hessian(flatten(start(TINY, [0]))[0], x, y)
    torch.testing.assert_close(values[0, 0], torch.linalg.eigvalsh(first))


# The whole study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def whole(folder):
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        patch.setattr(config, "jaxtyping_disable", True)  # as installed
        return run_study(TINY, Store.open(folder, TINY.to_dict()))


@pytest.mark.usefixtures("as_installed")
def test_a_study_holds_every_network(whole):
    assert whole.found["seed"].tolist() == list(range(12))
    assert set(whole.controlled) == {(kind, method) for kind in KINDS for method in METHODS}
    for (kind, _), part in whole.controlled.items():
        assert torch.equal(part["seed"], getattr(whole.selection, kind))
    flat = whole.selection.flat.tolist()
    assert_same(whole.controlled["flat", "a-sam"], control(TINY, "a-sam", flat))
    distinct = len(whole.selection.distinct)
    assert whole.theory["fit"]["norm"].shape == (min(distinct, FITTED), TINY.train_size)


@pytest.mark.usefixtures("short")
def test_a_second_run_computes_nothing_and_finds_the_same(whole, folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    seen = []
    again = run_study(
        TINY,
        Store.open(folder, TINY.to_dict()),
        on_progress=lambda title, done, total: seen.append((done, total)),
    )
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    assert [total for _, total in seen] == [1, 3, 15]  # timing, search, all the rest
    assert all(done == total for done, total in seen)
    assert_same(again.found, whole.found)
    for key, part in whole.controlled.items():
        assert_same(again.controlled[key], part)


@pytest.mark.usefixtures("short", "as_installed")
def test_a_run_from_before_our_method_goes_on_with_that_alone(whole, folder, tmp_path):
    """Its settings are the same, and so is each piece that is there."""
    old = tmp_path / "old"
    for path in folder.rglob("*"):
        kept = path.suffix == ".safetensors" and not re.search("lambda-max|alignment", path.name)
        if kept or path.suffix == ".json":
            (old / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, old / path.relative_to(folder))
    before = set(old.rglob("*.safetensors"))
    published = run_study(TINY, Store.open(old, TINY.to_dict()), stages=["control"])
    assert set(published.methods) == set(PUBLISHED)
    assert set(old.rglob("*.safetensors")) == before
    run_study(TINY, Store.open(old, TINY.to_dict()))
    new = {path.stem for path in set(old.rglob("*.safetensors")) - before}
    assert new == {"lambda-max-00000", "alignment"}
    assert results(old) == results(folder)


@pytest.mark.usefixtures("short", "as_installed")
def test_pieces_may_come_in_any_order_and_of_any_size(whole, tmp_path):
    preset = replace(TINY, chunk=2)
    with ThreadPoolExecutor(3) as pool:
        other = run_study(preset, Store.open(tmp_path / "b", preset.to_dict()), executor=pool)
    assert_same(other.found, whole.found)
    for key, part in whole.controlled.items():
        assert_same(other.controlled[key], part)


SCRIPT = """
import json, sys
from pathlib import Path
from lowland.studies.hsr import theory
from lowland.studies.hsr.preset import Preset
from lowland.studies.hsr.run import run_study
from lowland.studies.runs.jobs import Store
theory.TIMED_SAMPLES, theory.TIMED_HIDDEN, theory.REPEATS = (4, 8), (1, 2), 1
theory.DESCENT_STEPS = 50
preset = Preset(**json.loads(sys.argv[2]))
run_study(preset, Store.open(Path(sys.argv[1]), preset.to_dict()))
"""


def results(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in {".safetensors", ".json"} and path.stem != "timing"
    }


@pytest.mark.usefixtures("short", "whole", "as_installed")
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="nothing kills as surely here")
def test_a_killed_study_goes_on_and_ends_bit_for_bit_like_another(folder, tmp_path):
    killed = tmp_path / "killed"
    delay = int.from_bytes(os.urandom(2)) / 2**16  # seconds after the first piece is there
    settings = (folder / "settings.json").read_text()
    command = [sys.executable, "-c", SCRIPT, str(killed), settings]
    with subprocess.Popen(command) as process:  # noqa: S603
        while process.poll() is None and not list(killed.glob("search/*.safetensors")):
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
    there = results(killed)
    assert process.returncode in {-signal.SIGKILL, 0}
    run_study(TINY, Store.open(killed, TINY.to_dict()))
    expected = results(folder)
    assert there.items() <= expected.items(), f"after {delay} s"
    assert results(killed) == expected, f"after {delay} s"

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from jaxtyping import config
from pagecheck import Page
from presetfile import toml
from torch import nn
from typer.testing import CliRunner

from lowland.cli.app import app
from lowland.studies.data.carried import digits
from lowland.studies.data.sources import Source
from lowland.studies.data.splits import stratified_splits
from lowland.studies.ensembles.networks import initial_weights
from lowland.studies.flatness import run as run_module
from lowland.studies.flatness.claims import judge
from lowland.studies.flatness.figures import FIGURES
from lowland.studies.flatness.preset import Preset, Task, load_preset
from lowland.studies.flatness.reproduce import EXPERIMENT
from lowland.studies.flatness.run import Results, run_study
from lowland.studies.flatness.tables import listings, networks, summary
from lowland.studies.flatness.tasks import samples
from lowland.studies.flatness.train import look_steps, train
from lowland.studies.runs.jobs import Store
from lowland.studies.runs.presets import PresetError

TASK = Task("digits", "digits", 3, (6,), 0.5, 64, 2, 0.05, (0.1,), (0.01,), (0.05,), (0.5,))
LOGISTIC = replace(TASK, name="logistic", data="breast-cancer", hidden=(), batch=50, epochs=1)
PRESET = Preset((0.0, 0.1, 1.0), 1, 5, 2, 8, 300, 4, 2, True, (TASK, LOGISTIC))


def study_of(preset, folder, **options):
    return run_study(preset, Store.open(folder, preset.to_dict()), **options)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "jaxtyping_disable", True)  # as installed
        patch.delenv("LOWLAND_DATA", raising=False)
        return study_of(PRESET, tmp_path_factory.mktemp("study"))


# Presets


def test_presets_have_the_published_weights_and_are_found_by_path(tmp_path):
    for name in ("quick", "paper"):
        assert load_preset(name).weights == (0, 0.001, 0.01, 0.1, 1)
    assert {task.data for task in load_preset("quick").tasks} == {"digits", "breast-cancer"}
    assert {task.data for task in load_preset("paper").tasks} >= {"mnist", "cifar-100"}
    (tmp_path / "mine.toml").write_text(toml(PRESET))
    assert load_preset(str(tmp_path / "mine.toml")) == PRESET


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (0.1, 0.2, 0.3)}, "three or more that rise from 0, the baseline"),
        ({"weights": (0.0, 1.0)}, "three or more that rise from 0"),
        ({"weights": (0.0, 1.0, 0.5)}, "rise from 0"),
        ({"looks": 1}, "looks must be finite and at least 2; got 1"),
        ({"tasks": (TASK, TASK)}, "each task needs a name of its own"),
        ({"tasks": (replace(TASK, name="a/b"),)}, "of letters, digits and dashes; got 'a/b'"),
        ({"tasks": (replace(TASK, data="iris"),)}, "task 1: data must be one of breast-cancer, "),
        (
            {"tasks": (replace(TASK, test_size=0.0),)},
            "task 1: test_size must be greater than 0; got 0.0",
        ),
        ({"tasks": (replace(TASK, hidden=(0,)),)}, "task 1: hidden must be a list, each entry"),
        ({"tasks": (replace(TASK, sam=(0.0,)),)}, "each entry a finite number greater than 0"),
        ({"tasks": (replace(TASK, seeds=1),)}, "task 1: seeds must be finite and at least 2"),
        ({"tasks": ()}, "tasks must be a list of tables"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, changes, message):
    (tmp_path / "bad").write_text(toml(replace(PRESET, **changes)))
    with pytest.raises(PresetError, match=message):
        load_preset(str(tmp_path / "bad"))


def test_a_switch_is_true_or_false(tmp_path):
    text = toml(PRESET).replace("verify = true", "verify = 1")
    (tmp_path / "bad").write_text(text)
    with pytest.raises(PresetError, match="verify must be true or false; got 1"):
        load_preset(str(tmp_path / "bad"))


# Training


def test_the_baseline_is_plain_stochastic_gradient_descent():
    """Against the same loop, written out."""
    preset, task, seed = PRESET, TASK, 2
    found = train(preset, task, preset.ways(task)["baseline"], seed, Source())
    splits = stratified_splits(digits(), range(seed, seed + 1), test_size=0.5)
    x, y = splits.x_train[0].float(), splits.y_train[0]
    model = nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))
    with torch.no_grad():
        starts = initial_weights(range(seed, seed + 1), [64, 6, 10])
        for layer, start in zip((model[0], model[2]), starts, strict=True):
            layer.bias.copy_(start[0, 0])
            layer.weight.copy_(start[0, 1:].T)
    drawn = torch.Generator().manual_seed(10 * seed + 1)
    for epoch in range(task.epochs):
        order = torch.randperm(len(x), generator=drawn)
        for first in range(0, len(x) - 63, 64):
            chosen = order[first : first + 64]
            model.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(task.learning_rate * parameter.grad)
        right = (model(splits.x_test[0].float()).argmax(1) == splits.y_test[0]).double().mean()
        assert found["accuracy"][epoch].item() == pytest.approx(right.item(), abs=0.003)


def test_a_run_can_be_repeated_to_the_bit():
    way = PRESET.ways(TASK)["flatness-aware-1"]
    runs = [train(PRESET, TASK, way, 0, Source()) for _ in range(2)]
    for name in runs[0].keys() - {"seconds"}:
        torch.testing.assert_close(runs[0][name], runs[1][name], rtol=0, atol=0, equal_nan=True)


def test_a_network_that_fails_is_said_to_have_failed():
    wild = replace(TASK, learning_rate=1e30, epochs=3)
    for way in ("baseline", "flatness-aware-1", "sam-0.05"):
        found = train(PRESET, wild, PRESET.ways(wild)[way], 0, Source())
        assert found["failed"].item()
        assert not found["loss"].item() < 2
        assert len(found["accuracy"]) == wild.epochs


def test_flatness_is_looked_at_from_the_first_step_on():
    assert look_steps(PRESET, 20) == [0, 4, 8, 12, 16]
    assert look_steps(PRESET, 3) == [0, 1, 2]


def test_two_classes_have_one_logit_and_labels_in_a_column():
    data = samples(LOGISTIC, 0, Source())
    assert data.outputs == 1
    assert data.y_train.shape == (len(data.x_train), 1)
    torch.testing.assert_close(data.x_train.mean(0), torch.zeros(30), rtol=0, atol=1e-5)


# The study


def test_every_task_is_trained_every_way_from_every_seed(study):
    table = networks(study)
    ways = ["baseline", "flatness-aware", "flatness-aware", "hsr", "hessian-trace", "sam"]
    ways.append("adaptive-sam")
    assert len(table) == 2 * 3 * len(ways)
    assert table.loc[table["task"] == "digits", "method"].tolist()[::3] == ways
    assert (table["best_accuracy"] >= table["final_accuracy"]).all()
    assert not table["failed"].any()
    assert (table["average_flatness"] > 0).all()


def test_the_largest_weight_ends_flatter_than_the_baseline(study):
    table = summary(study).set_index(["task", "method", "strength"])
    for task in ("digits", "logistic"):
        for measure in ("average_flatness", "final_trace_sq"):
            strong = table.loc[(task, "flatness-aware", 1.0), measure]
            assert strong < table.loc[(task, "baseline", 0.0), measure]


def test_the_baseline_costs_itself_and_a_penalty_more(study):
    table = summary(study)
    baseline = table["method"] == "baseline"
    assert (table.loc[baseline, "multiple"] == 1).all()
    assert (table.loc[~baseline, "multiple"] > 1).all()


def test_tables_show_the_papers_numbers_beside_ours(study):
    published, *ours = listings(study)
    assert published.rows[1][:4] == ("0.001", "0.2633", "0.2833", "23.050")
    assert [listing.title for listing in ours] == list(study.titles.values())
    assert [row[0] for row in ours[0].rows][:3] == ["λ = 0", "λ = 0.1", "λ = 1"]
    assert all(len(row) == len(listing.header) for listing in ours for row in listing.rows)


@pytest.mark.parametrize("number", FIGURES)
def test_each_figure_can_be_drawn(study, number):
    assert FIGURES[number].draw(study).axes


def test_data_that_is_not_there_is_left_out_and_said_to_be(tmp_path, monkeypatch):
    monkeypatch.delenv("LOWLAND_DATA", raising=False)
    mnist = replace(TASK, name="mnist", data="mnist")
    preset = replace(PRESET, tasks=(mnist, replace(LOGISTIC, sam=(), hsr=())))
    study = study_of(preset, tmp_path / "a", stages=["timing"])
    assert list(study.titles) == ["logistic"]
    assert study.skipped == {"mnist": "LOWLAND_DATA names no folder with the files of mnist"}
    monkeypatch.setenv("LOWLAND_DATA", str(tmp_path))
    with pytest.raises(PresetError, match="no task can be run: MNIST is not in"):
        study_of(replace(preset, tasks=(mnist,)), tmp_path / "b")


def test_cifar_is_trained_on_its_training_part_and_tested_on_the_other(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    for name, count in (("train.bin", 40), ("test.bin", 12)):
        table = random.integers(0, 256, (count, 3074), dtype=np.uint8)
        table[:, 0] %= 20
        table[:, 1] %= 100
        (tmp_path / name).write_bytes(table.tobytes())
    monkeypatch.setenv("LOWLAND_DATA", str(tmp_path))
    task = replace(TASK, name="cifar", data="cifar-100", test_size=0.0, batch=20, seeds=2)
    data = samples(task, 0, Source(tmp_path, verify=False))
    assert data.x_train.shape == (40, 3072)
    assert data.x_test.shape == (12, 3072)
    assert 0 <= data.x_train.min() < 0.01
    assert 0.99 < data.x_train.max() <= 1
    task = replace(task, hsr=(), hessian_trace=(), sam=(), adaptive_sam=())
    study = study_of(replace(PRESET, verify=False, tasks=(task,)), tmp_path / "out")
    assert len(networks(study)) == 2 * 3
    assert judge(study)


# Claims


def made_up(change):
    """A study with measures as a function of the weight, equal but for small noise over seeds."""
    random = np.random.default_rng(0)
    task = replace(TASK, seeds=8, hsr=(), hessian_trace=(), sam=(), adaptive_sam=())
    preset = replace(PRESET, weights=(0.0, 0.01, 0.1, 1.0), tasks=(task,), rounds=20)
    trained = {}
    for name, way in preset.ways(task).items():
        accuracy, flatness = change(way.strength)
        noise = random.normal(0, 1e-3, (2, 8))
        curve = torch.tensor(accuracy + noise[0])[:, None]
        trained[task.name, name] = {
            "accuracy": curve,
            "flatness": torch.tensor(flatness * (1 + noise[1]))[:, None],
            "trace_sq": torch.tensor(flatness * (1 + noise[1])),
            "stderr": torch.zeros(8),
            "loss": torch.zeros(8),
            "seconds": torch.ones(8),
            "failed": torch.zeros(8, dtype=torch.bool),
        }
    seconds = torch.tensor([[1, 5, 6, 7]], dtype=torch.float64).repeat(20, 1)
    return Results(preset, {task.name: "made up"}, {}, trained, {task.name: seconds})


def verdicts(study):
    words = ("falls", "ends", "moderate", "some", "costs")
    claims = judge(study)
    assert len(claims) == len(words)
    return dict(zip(words, (claim.holds for claim in claims), strict=True))


def test_claims_hold_where_the_papers_shape_is_there():
    study = made_up(lambda weight: (0.9 - (weight - 0.1) ** 2, 1 / (1 + weight)))
    assert all(verdicts(study).values())
    claims = judge(study)
    assert "23.050" in claims[0].published
    assert claims[0].where == "table"
    assert "a step takes 5.0 to 7.0 times the baseline's" in claims[-1].found


def test_claims_do_not_hold_where_it_is_not():
    rising = made_up(lambda weight: (0.8 + weight / 10, 1 + weight))
    assert verdicts(rising) == dict.fromkeys(("falls", "ends", "moderate"), False) | {
        "some": True,
        "costs": True,
    }
    level = made_up(lambda weight: (0.8, 1.0))
    assert verdicts(level) == dict.fromkeys(("falls", "ends", "moderate", "some"), False) | {
        "costs": True
    }
    dear = replace(level, timing={"digits": level.timing["digits"] * torch.tensor([1, 9, 9, 9])})
    assert not verdicts(dear)["costs"]


def test_nothing_is_concluded_from_networks_that_failed():
    study = made_up(lambda weight: (0.9, np.nan if weight == 1 else 1 / (1 + weight)))
    first = judge(study)[0]
    assert not first.holds
    assert "p not defined, since networks failed" in first.found


# The command


def command(*arguments):
    return CliRunner().invoke(app, ["reproduce", "flatness-aware", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    (folder / "small.toml").write_text(toml(PRESET))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "jaxtyping_disable", True)  # as installed
        result = command("--preset", folder / "small.toml", "--out", folder / "out", "--jobs", 1)
    assert result.exit_code == 0, result.output
    return result, folder


def test_a_run_writes_tables_figures_and_a_page_with_every_claim(finished):
    result, folder = finished
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {
        *("index.html", "summary.md", "pieces", "claims.csv", "networks.csv", "summary.csv"),
        *("accuracy.csv", "flatness.csv"),
        *(f"figure-{number:02d}.svg" for number in FIGURES),
    }
    parsed = Page((folder / "out" / "index.html").read_text())
    text = " ".join(parsed.text.split())
    assert parsed.open == []
    assert "The paper's table" in text
    assert "2290.77" in text
    claims = pd.read_csv(folder / "out" / "claims.csv", keep_default_na=False)
    assert set(claims["where"]) == {"table"}
    assert all(" ".join(claim.split()) in text for claim in claims["claim"])
    summary = (folder / "out" / "summary.md").read_text()
    assert "| 0.001 | 0.2633 | 0.2833 | 23.050 | 2290.77 | 37.6 |" in summary
    assert all(f"](figure-{number:02d}.svg)" in summary for number in FIGURES)
    lines = [line.split(":")[0] for line in result.stderr.splitlines()]
    assert lines == ["Timing steps", "Training networks"]


def test_a_second_run_only_draws_and_draws_the_same(finished, monkeypatch):
    _, folder = finished

    def forbidden(*arguments):
        raise AssertionError("computed again")

    monkeypatch.setattr(run_module, "train", forbidden)
    monkeypatch.setattr(run_module, "timing", forbidden)
    before = {path: path.read_bytes() for path in (folder / "out").glob("*.*")}
    options = ["--preset", folder / "small.toml", "--out", folder / "out"]
    result = command(*options, "--jobs", 1)
    assert result.exit_code == 0, result.output
    assert {path: path.read_bytes() for path in (folder / "out").glob("*.*")} == before
    result = command(*options, "--figure", 4)
    assert result.stdout == f"{folder / 'out' / 'figure-04.svg'}\n"
    assert {path: path.read_bytes() for path in (folder / "out").glob("*.*")} == before


def test_one_figure_needs_no_more_than_its_stage(finished, tmp_path):
    _, folder = finished
    result = command("--preset", folder / "small.toml", "--out", tmp_path, "--figure", 4)
    assert result.exit_code == 0, result.output
    assert {path.parent.name for path in tmp_path.rglob("*.safetensors")} == {"timing"}
    assert EXPERIMENT.needed([2, 4]) == {"timing", "training"}


def test_figures_that_do_not_exist_are_refused(tmp_path):
    result = command("--figure", 5, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "--figure must be 1 to 4; got 5" in result.stderr
    assert list(tmp_path.iterdir()) == []

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import study_in_small
import torch
from jaxtyping import config
from pagecheck import Page
from presetfile import toml
from torch import nn
from typer.testing import CliRunner

import lowland
from lowland.cli.app import app
from lowland.studies.data.sources import Source
from lowland.studies.ensembles.networks import as_module, as_weights, initial_weights, select
from lowland.studies.illusion import pieces
from lowland.studies.illusion.claims import judge
from lowland.studies.illusion.evaluation import evaluate, rescaled
from lowland.studies.illusion.figures import FIGURES
from lowland.studies.illusion.listings import listings
from lowland.studies.illusion.preset import Preset, Task, load_preset
from lowland.studies.illusion.published import published
from lowland.studies.illusion.reproduce import EXPERIMENT
from lowland.studies.illusion.run import Results, run_study
from lowland.studies.illusion.tables import (
    correlations,
    hsr_correlations,
    hsr_networks,
    networks,
    rescalings,
)
from lowland.studies.illusion.tasks import points
from lowland.studies.illusion.train import Descent, accuracy, descend
from lowland.studies.runs.jobs import Store
from lowland.studies.runs.presets import PresetError
from lowland.studies.runs.streams import stream
from lowland.weakness import ensemble_agreement, pair_proxy

pytestmark = pytest.mark.slow  # on a study that runs for some ten seconds

PAIRS = Task(
    "digit-pairs",
    "pairs",
    "digits",
    data_seed=0,
    test=200,
    hidden=(16, 6),
    seeds=6,
    sizes=(40,),
    batch=16,
    learning_rates=(0.2,),
    large_batch=0,
    large_learning_rates=(),
    drop_from=0,
    epochs=200,
    unseen=5,
    joint_unseen=3,
    joint_networks=5,
    rescaled=0,
    factors=(),
    second_factors=(),
)
SELECTION = replace(
    PAIRS, name="selection", kind="selection", unseen=0, joint_unseen=0, joint_networks=0
)
ADVANTAGE = replace(
    SELECTION,
    name="advantage",
    kind="advantage",
    sizes=(30, 60),
    learning_rates=(0.1, 0.1),
    large_batch=50,
    large_learning_rates=(0.5, 0.5),
    drop_from=60,
    rescaled=2,
    factors=(2.0, 20.0),
    second_factors=(20.0,),
)
PRESET = Preset(5, 0.99, 4, 4, 8, 2, 20, 100, "", 20, (PAIRS, SELECTION, ADVANTAGE))


def study_of(preset, folder, **options):
    return run_study(preset, Store.open(folder, preset.to_dict()), **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The preset with the HSR study's networks, in a folder of its own."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "hsr.toml").write_text(toml(study_in_small.PRESET))
    preset = replace(PRESET, hsr=str(folder / "hsr.toml"))
    (folder / "small.toml").write_text(toml(preset))
    return preset, folder


@pytest.fixture(scope="module")
def study(small, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "jaxtyping_disable", True)  # as installed
        patch.delenv("LOWLAND_DATA", raising=False)
        return study_of(small[0], tmp_path_factory.mktemp("study"))


# Presets


def test_presets_have_the_published_sizes_and_are_found_by_path(small):
    tasks = {task.name: task for task in load_preset("paper").tasks}
    assert tasks["mnist-pairs"].hidden == tasks["fashion-pairs"].hidden == (64, 8)
    assert tasks["mnist-selection"].seeds == 300
    assert tasks["mnist-full-advantage"].sizes == (500, 2000, 6000, 12000, 24000, 60000)
    assert {task.data for task in load_preset("quick").tasks} == {"digits"}
    preset, folder = small
    assert load_preset(str(folder / "small.toml")) == preset


def test_large_batches_hold_all_points_while_these_are_few():
    (task,) = (t for t in load_preset("paper").tasks if t.name == "mnist-full-advantage")
    regimes = {(r.size, r.batch): r for r in load_preset("paper").regimes(task)}
    assert [regimes[size, "large"].how.batch for size in task.sizes] == [500, 2000, *[4096] * 4]
    assert {regime.how.batch for (_, batch), regime in regimes.items() if batch == "small"} == {64}
    assert [regimes[size, "small"].how.drop for size in task.sizes] == [1, 1, 1, 0.8, 0.8, 0.8]
    assert regimes[24000, "large"].how.learning_rate == 0.3
    assert regimes[500, "large"].first == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "pair"}, "kind must be one of pairs, selection, advantage; got 'pair'"),
        ({"data": "iris"}, "data must be one of breast-cancer, digits, "),
        ({"hidden": (16,)}, r"hidden must be two entries; got \[16\]"),
        ({"test": 0}, "test must be greater than 0: the data has no test part; got 0"),
        ({"data": "mnist-full"}, "test must be 0: the data has a test part; got 200"),
        ({"sizes": (60, 30)}, "sizes must be rising"),
        ({"sizes": (30, 60)}, "sizes must be one entry, unless kind is advantage"),
        ({"large_batch": 9}, "large_batch must be 0 unless kind is advantage"),
        ({"learning_rates": (0.1, 0.1)}, "as many entries as sizes, 1; got"),
        ({"large_learning_rates": (0.1,)}, "empty unless kind is advantage"),
        ({"unseen": 0, "joint_unseen": 0}, "unseen must be 0 unless kind is pairs, then not"),
        ({"joint_unseen": 6}, "joint_unseen must be at most unseen, 5; got 6"),
        ({"rescaled": 1}, "rescaled must be 0 unless kind is advantage"),
        ({"seeds": 4}, "seeds must be finite and at least 5"),
        ({"name": "a/b"}, "of letters, digits and dashes; got 'a/b'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, changes, message):
    (tmp_path / "bad").write_text(toml(replace(PRESET, tasks=(replace(PAIRS, **changes),))))
    with pytest.raises(PresetError, match=message):
        load_preset(str(tmp_path / "bad"))


def test_the_hsr_studys_preset_is_looked_for_at_once(tmp_path):
    (tmp_path / "bad").write_text(toml(replace(PRESET, hsr="nowhere")))
    with pytest.raises(PresetError, match="unknown preset 'nowhere'"):
        load_preset(str(tmp_path / "bad"))


# Data


def test_training_and_test_points_are_apart_and_sizes_nested():
    less, more = (points(ADVANTAGE, size, Source()) for size in (30, 60))
    torch.testing.assert_close(less.x_train, more.x_train[:, :30], rtol=0, atol=0)
    torch.testing.assert_close(less.x_test, more.x_test, rtol=0, atol=0)
    assert more.x_test.shape == (1, 200, 64)
    assert (more.x_train.min(), more.x_train.max()) == (0, 1)
    every = points(ADVANTAGE, 1597, Source())
    assert torch.cdist(every.x_train[0], every.x_test[0]).min() > 0
    other = points(replace(ADVANTAGE, data_seed=1), 30, Source())
    assert not torch.equal(other.x_train, less.x_train)


def test_too_few_samples_are_said_to_be_too_few():
    with pytest.raises(PresetError, match="1,797 samples, too few to train on 1,598 and test"):
        points(ADVANTAGE, 1598, Source())


# Training


def ensemble(count=3, seed=0):
    data = points(PAIRS, 40, Source()).double()
    start = initial_weights(range(seed, seed + count), [64, 16, 6, 10])
    return data, start


def test_each_network_takes_the_steps_of_pytorchs_own_loop():
    data, start = ensemble()
    how = Descent(16, 0.3, 12, 5, 1.1, drop=0.5)
    found = descend(start, data.x_train, data.y_train, how, [stream(s, 1) for s in range(3)])
    for index in range(3):
        model = as_module(select(start, slice(index, index + 1)), nn.ReLU)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        drawn = stream(index, 1)
        for epoch in range(12):
            optimizer.param_groups[0]["lr"] = 0.3 if epoch < 6 else 0.03
            for chosen in torch.randperm(40, generator=drawn).split(16):
                optimizer.zero_grad()
                outputs = model(data.x_train[0, chosen])
                nn.functional.cross_entropy(outputs, data.y_train[0, chosen]).backward()
                optimizer.step()
        for ours, theirs in zip(found.weights, as_weights(model), strict=True):
            torch.testing.assert_close(ours[index : index + 1], theirs)
    assert found.epochs.tolist() == [12] * 3


def test_networks_leave_once_they_have_learnt_their_points_and_alone_are_the_same():
    data, start = ensemble(4)
    how = Descent(16, 0.3, 300, 5, 0.9999)
    found = descend(start, data.x_train, data.y_train, how, [stream(s, 1) for s in range(4)])
    assert found.accuracy.tolist() == [1, 1, pytest.approx(0.175), 1]  # the third one is dead
    assert found.epochs[2] == 300
    assert 5 < found.epochs[[0, 1, 3]].min() < found.epochs[[0, 1, 3]].max() < 300
    assert (found.epochs % 5 == 0).all()
    torch.testing.assert_close(
        accuracy(found.weights, data.x_train, data.y_train), found.accuracy, rtol=0, atol=0
    )
    for index in range(4):
        own = select(start, slice(index, index + 1))
        alone = descend(own, data.x_train, data.y_train, how, [stream(index, 1)])
        assert alone.epochs.item() == found.epochs[index].item()
        for one, all_ in zip(alone.weights, found.weights, strict=True):
            torch.testing.assert_close(one[0], all_[index])


def test_a_network_may_have_points_of_its_own():
    data, start = ensemble(2)
    x, y = (torch.cat([part, part.flip(1)]) for part in (data.x_train, data.y_train))
    how = Descent(40, 0.3, 7, 5, 1.1)
    found = descend(start, x, y, how, [stream(s, 1) for s in range(2)])
    shared = descend(start, data.x_train, data.y_train, how, [stream(s, 1) for s in range(2)])
    for one, other in zip(found.weights, shared.weights, strict=True):
        torch.testing.assert_close(one, other)


# Measures


def test_measures_are_those_of_the_library():
    data, start = ensemble(2)
    found = evaluate(start, data, bound=True)
    for index in range(2):
        model = as_module(select(start, slice(index, index + 1)), nn.ReLU)
        moments = lowland.hessian_moments(
            model, nn.CrossEntropyLoss(), data.x_train[0], data.y_train[0], "dense"
        )
        assert found["trace"][index] == pytest.approx(moments.trace.item())
        assert found["bound"][index] == pytest.approx(moments.upper.item())
        classes = model(data.x_test[0]).argmax(1)
        assert found["predictions"][index].tolist() == classes.tolist()
        assert found["accuracy"][index] == (classes == data.y_test[0]).double().mean()
        layers = [(model[: 2 * depth](data.x_test[0]) > 0).tolist() for depth in (1, 2)]
        assert [found[f"patterns_{depth}"][index] for depth in (1, 2)] == [
            len(set(map(tuple, layer))) for layer in layers
        ]
        seen = {tuple(row) for row in (model[:4](data.x_train[0]) > 0).tolist()}
        assert found["free_regions"][index] == len(set(map(tuple, layers[1])) - seen)
        flat = torch.cat([part.flatten() for part in model.parameters()])
        assert found["l1_norm"][index] == pytest.approx(flat.abs().sum().item())


def test_rescaling_moves_the_trace_and_nothing_else():
    data, start = ensemble(1)
    before, after = (rescaled(start, data, 1, factor) for factor in (1.0, 20.0))
    assert before["trace"] == pytest.approx(evaluate(start, data, bound=False)["trace"].item())
    assert after["trace"] > 10 * before["trace"]
    assert after["changed"] == before["changed"] == 0
    assert {k: v for k, v in after.items() if k != "trace"} == {
        k: v for k, v in before.items() if k != "trace"
    }


def test_the_hsr_studys_networks_are_judged_by_their_own_labels():
    preset = study_in_small.PRESET
    random = torch.Generator().manual_seed(0)
    parameters = torch.randn(2, 3 * preset.hidden + preset.hidden + 1, generator=random).double()
    values = torch.rand(2, parameters.shape[1], generator=random, dtype=torch.float64).sort(1)[0]
    controlled = {
        "parameters": parameters,
        "eigenvalues": values,
        "macro_f1": torch.zeros(2),
        "seed": torch.arange(2),
    }
    found = pieces.hsr(preset, controlled, 10)
    assert found["lambda_max"].tolist() == values[:, -1].tolist()
    torch.testing.assert_close(found["trace"], values.sum(1))
    assert (found["bound"] >= found["lambda_max"]).all()
    # Each unseen point can be put into the class that the network gives it, or into both.
    assert ((found["pair_proxy"] >= 10) & (found["pair_proxy"] <= 20)).all()


# The study


def test_every_network_of_every_regime_is_trained_and_measured(study):
    table = networks(study)
    sizes = table.groupby(["task", "size", "batch"], sort=False).size()
    assert (sizes == 6).all()
    assert len(sizes) == 2 + 4
    assert table[table["batch"] == "large"]["seed"].min() == 100
    own = table[table["task"] == "advantage"]
    assert (own["free_regions"] <= own["patterns_2"]).all()


def test_pair_proxies_are_those_of_the_networks_that_learnt(study):
    table = networks(study).query("task == 'digit-pairs'").set_index("seed")
    learnt = table.index[table["learnt"] >= PRESET.enough]
    assert len(learnt) > 3
    assert table.loc[learnt, "pair_proxy"].between(5, 50).all()
    assert table.drop(learnt)["pair_proxy"].isna().all()
    found = study.trained["digit-pairs/00040-small"]
    data = points(PAIRS, 40, Source())
    proxy = pair_proxy(
        found["features_train"][learnt[0]],
        data.y_train[0],
        found["features_unseen"][learnt[0]],
        10,
    )
    assert table.loc[learnt[0], "pair_proxy"] == proxy.count
    joint = table["joint"].notna()
    assert set(table.index[joint]) == {index for index in learnt if index < 5}


def test_agreement_is_with_both_regimes(study):
    table = networks(study).query("task == 'advantage' and size == 60")
    names = ["advantage/00060-small", "advantage/00060-large"]
    classes = torch.cat([study.trained[name]["predictions"] for name in names]).long()
    expected = ensemble_agreement(classes, study.labels["advantage"])
    np.testing.assert_allclose(table["agreement"], expected)


def test_correlations_are_given_together_and_by_regime(study):
    table = correlations(study)
    own = table.query("task == 'advantage' and size == 60 and measure == 'agreement'")
    assert own["batch"].tolist() == ["all", "small", "large"]
    assert own["count"].tolist() == [12, 6, 6]
    assert set(hsr_correlations(study)["method"]) == {"all", *study_in_small.PRESET.methods}


def test_each_rescaling_of_each_network_is_there(study):
    table = rescalings(study)
    assert len(table) == 2 * 2 * 4
    assert not table["changed"].any()
    per_network = table.groupby(["size", "seed"])
    assert (per_network["accuracy"].max() == per_network["accuracy"].min()).all()
    assert (per_network["trace"].max() / per_network["trace"].first() > 10).all()


def test_the_hsr_studys_networks_join(study):
    table = hsr_networks(study)
    assert set(table["kind"]) == {"sharp", "flat"}
    assert table["macro_f1"].between(0, 1).all()
    assert judge(study)[-1].figure == 7


@pytest.mark.parametrize("number", FIGURES)
def test_each_figure_can_be_drawn(study, number):
    assert FIGURES[number].draw(study).axes


def test_tables_are_whole_and_have_the_papers_numbers_beside_ours(study):
    found = listings(study)
    assert all(len(row) == len(listing.header) for listing in found for row in listing.rows)
    mnist = replace(ADVANTAGE, data="mnist", hidden=(256, 128))
    pairs = replace(PAIRS, hidden=(64, 8))
    assert published(mnist, 500).gain == "+1.2"
    assert published(replace(pairs, data="mnist-full"), 250).of("pair_proxy") == (
        "ρ = +0.374, p = 0.00012"
    )
    assert published(replace(pairs, data="fashion-mnist"), 250).lead("pair_proxy", "trace") == (
        "|ρ| larger by +0.143"
    )
    # What is not the paper's experiment has no number of the paper's beside it.
    assert published(replace(mnist, data="digits"), 500).of("trace") == ""
    assert published(replace(mnist, hidden=(16, 6)), 500).of("trace") == ""
    assert published(replace(pairs, data="mnist"), 40).of("trace") == ""


def test_data_that_is_not_there_is_left_out_and_said_to_be(tmp_path, monkeypatch):
    monkeypatch.delenv("LOWLAND_DATA", raising=False)
    mnist = replace(SELECTION, name="mnist", data="mnist")
    preset = replace(PRESET, tasks=(mnist, SELECTION))
    found = study_of(preset, tmp_path / "a", stages=["selection"])
    assert list(found.titles) == ["selection"]
    assert found.skipped == {"mnist": "LOWLAND_DATA names no folder with the files of mnist"}
    with pytest.raises(PresetError, match="no task can be run: LOWLAND_DATA names no folder"):
        study_of(replace(preset, tasks=(mnist,)), tmp_path / "b")


# Claims


def made_up(relation):
    """A study of pairs: test accuracy as a function of trace and pair proxy, with small noise."""
    random = np.random.default_rng(0)
    task = replace(PAIRS, data="mnist", seeds=60, hidden=(64, 8), sizes=(250,))
    trace, proxy = random.uniform(10, 90, 60), random.uniform(300, 900, 60)
    accuracy = relation(trace / 90, proxy / 900) + random.normal(0, 1e-3, 60)
    one = torch.ones(60, dtype=torch.float64)
    trained = {
        "accuracy": torch.tensor(accuracy),
        "trace": torch.tensor(trace),
        "learnt": one,
        "predictions": torch.zeros(60, 4, dtype=torch.uint8),
    }
    preset = replace(PRESET, tasks=(task,))
    regime = preset.regimes(task)[0].name
    return Results(
        preset,
        {task.name: "made up"},
        trained={regime: trained},
        labels={task.name: torch.zeros(4, dtype=torch.int64)},
        pairs={task.name: {"count": torch.tensor(proxy), "undecided": 0 * one}},
    )


def test_claims_hold_where_the_papers_shape_is_there():
    claims = judge(made_up(lambda trace, proxy: 0.7 + 0.1 * proxy - 0.05 * trace))
    assert [claim.holds for claim in claims] == [True, True, True]
    assert claims[0].published == "ρ = +0.374, p = 0.00012"
    assert claims[0].where == "tables 4 and 5"
    assert "60 networks" in claims[0].found


def test_claims_do_not_hold_where_it_is_not():
    claims = judge(made_up(lambda trace, proxy: 0.7 + 0.1 * trace))
    assert [claim.holds for claim in claims] == [False, False, False]
    claims = judge(made_up(lambda trace, proxy: 0.7 - 0.1 * proxy - 0.1 * trace))
    assert [claim.holds for claim in claims] == [False, True, False]


# The command


def command(*arguments):
    return CliRunner().invoke(app, ["reproduce", "illusion", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(small):
    _, folder = small
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "jaxtyping_disable", True)  # as installed
        patch.delenv("LOWLAND_DATA", raising=False)
        result = command("--preset", folder / "small.toml", "--out", folder / "out", "--jobs", 1)
    assert result.exit_code == 0, result.output
    return result, folder


def test_a_run_writes_tables_figures_and_a_page_with_every_claim(finished):
    _, folder = finished
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {
        *("index.html", "summary.md", "pieces", "claims.csv", "networks.csv", "correlations.csv"),
        *("rescalings.csv", "hsr.csv", "hsr_correlations.csv"),
        *(f"figure-{number:02d}.svg" for number in FIGURES),
    }
    parsed = Page((folder / "out" / "index.html").read_text())
    text = " ".join(parsed.text.split())
    assert parsed.open == []
    claims = pd.read_csv(folder / "out" / "claims.csv", keep_default_na=False)
    assert all(claim.replace("λ_max", "λmax") in text for claim in claims["claim"])
    assert "of the HSR study" in text
    rows = [
        line for line in (folder / "out" / "summary.md").read_text().splitlines() if "|" in line
    ]
    assert all(line.replace(r"\|", "").count("|") == 6 for line in rows[: len(claims) + 2])


def test_a_second_run_only_draws_and_draws_the_same(finished, monkeypatch):
    _, folder = finished

    def forbidden(*arguments):
        raise AssertionError("computed again")

    for name in ("train", "pairs", "joint", "rescale", "hsr"):
        monkeypatch.setattr(pieces, name, forbidden)
    before = {path: path.read_bytes() for path in (folder / "out").glob("*.*")}
    result = command("--preset", folder / "small.toml", "--out", folder / "out", "--jobs", 1)
    assert result.exit_code == 0, result.output
    assert {path: path.read_bytes() for path in (folder / "out").glob("*.*")} == before


def test_one_figure_needs_no_more_than_its_networks(finished, tmp_path):
    _, folder = finished
    result = command("--preset", folder / "small.toml", "--out", tmp_path, "--figure", 3)
    assert result.exit_code == 0, result.output
    assert {path.parent.name for path in tmp_path.rglob("*.safetensors")} == {"00040-small"}
    assert EXPERIMENT.needed([2, 6]) == {"pairs", "joint", "rescaling"}
    assert result.stdout == f"{tmp_path / 'figure-03.svg'}\n"


@pytest.mark.parametrize("epochs", [1, 200])
@pytest.mark.parametrize("kind", ["pairs", "selection"])
def test_a_run_of_one_kind_shows_what_it_has(tmp_path, monkeypatch, kind, epochs):
    """Also where no network learnt its points; and what is left out is said."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # as installed
    monkeypatch.delenv("LOWLAND_DATA", raising=False)
    task = replace(PAIRS if kind == "pairs" else SELECTION, epochs=epochs, joint_unseen=0)
    absent = replace(task, name="absent", data="mnist")
    (tmp_path / "one.toml").write_text(toml(replace(PRESET, tasks=(task, absent))))
    options = ["--preset", tmp_path / "one.toml", "--out", tmp_path / "out", "--jobs", 1]
    result = command(*options)
    assert result.exit_code == 0, result.output
    assert "Left out: absent: LOWLAND_DATA names no folder" in result.stderr
    drawn = {path.name for path in (tmp_path / "out").glob("*.svg")}
    own = {"pairs": "figure-02.svg", "selection": "figure-03.svg"}[kind]
    assert drawn == ({"figure-01.svg", own} if kind == "selection" or epochs > 1 else drawn)
    assert "figure-07.svg" not in drawn
    result = command(*options, "--figure", 5)
    assert result.exit_code == 2
    assert "networks that this run does not have" in result.stderr

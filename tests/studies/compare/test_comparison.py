import math
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import plain
import pytest
import torch
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, log_loss

from lowland.studies.compare.comparison import (
    METRICS,
    compare,
    constant_loss,
    labels,
    summarize,
)
from lowland.studies.compare.settings import DEFAULTS, Settings
from lowland.studies.data.dataset import Dataset
from lowland.studies.data.splits import stratified_splits
from lowland.studies.ensembles.networks import initial_weights
from lowland.studies.ensembles.training import BASELINE, METHODS, Schedule

pytestmark = pytest.mark.slow  # on a study that runs for some ten seconds


def small_dataset(classes=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    if classes == 2:
        y = (x[:, 0] + torch.randn(60, generator=generator) > 0).double()
        return Dataset("small", x, y, ("a", "b", "c"), ("no", "yes"))
    y = (x + torch.randn(60, 3, generator=generator)).argmax(1)
    return Dataset("small", x, y, ("a", "b", "c"), ("low", "middle", "high"))


SETTINGS = Settings(hidden=(2,), seeds=4, schedule=Schedule(steps=20))
KINDS = [(2, (2,)), (3, (2,)), (2, (3, 2)), (3, (3, 2, 2))]  # classes, hidden


@pytest.fixture(scope="module", params=KINDS, ids=str)
def comparison(request):
    classes, hidden = request.param
    return compare(small_dataset(classes), replace(SETTINGS, hidden=hidden))


def test_the_baseline_is_always_there_and_first():
    assert Settings(methods=(METHODS["hsr"], BASELINE)).methods == (BASELINE, METHODS["hsr"])
    assert Settings(methods=()).methods == (BASELINE,)


def test_every_network_has_a_row_with_all_measures(comparison):
    table = comparison.networks
    assert len(table) == 4 * len(METHODS)
    assert table.groupby("method", sort=False)["seed"].apply(list).to_dict() == {
        name: [0, 1, 2, 3] for name in METHODS
    }
    assert table[[metric.name for metric in METRICS]].notna().all(axis=None)
    assert (table["upper_bound"] >= table["lambda_max"]).all()
    assert (table["lower_bound"] <= table["lambda_min"]).all()
    assert (table["lambda_min"] <= table["trace"] / comparison.parameters).all()
    outputs = 1 if len(comparison.dataset.classes) == 2 else 3
    inner = comparison.settings.hidden
    expected = sum((i + 1) * o for i, o in zip((3, *inner), (*inner, outputs), strict=True))
    assert comparison.parameters == expected


def test_a_start_is_the_same_to_the_last_bit_from_version_to_version():
    first, second = initial_weights(range(7, 8), (3, 2, 1))
    generator = torch.Generator().manual_seed(7)
    inner = (2 * torch.rand(4, 2, generator=generator, dtype=torch.float64) - 1) / 3**0.5
    outer = (2 * torch.rand(3, 1, generator=generator, dtype=torch.float64) - 1) / 2**0.5
    assert torch.equal(first[0], inner)
    assert torch.equal(second[0], outer)


@pytest.mark.parametrize(("classes", "hidden"), KINDS)
def test_test_scores_are_those_of_scikit_learn(classes, hidden):
    """The baseline without a step is its start, whose predictions anyone can compute."""
    dataset = small_dataset(classes)
    schedule = Schedule(steps=1, learning_rate=1e-300)
    settings = Settings(methods=(), hidden=hidden, seeds=3, schedule=schedule)
    table = compare(dataset, settings).networks
    splits = stratified_splits(dataset, range(3), test_size=0.25)
    start = initial_weights(range(3), (3, *hidden, 1 if classes == 2 else classes))
    for seed in range(3):
        with torch.no_grad():
            output = plain.module(start, seed, torch.nn.Sigmoid)(splits.x_test[seed])
        if classes == 2:
            share = torch.sigmoid(output).squeeze(1).numpy()
            predicted = share > 0.5
        else:
            share = torch.softmax(output, 1).numpy()
            predicted = share.argmax(1)
        true = splits.y_test[seed].numpy()
        row = table[table["seed"] == seed].iloc[0]
        assert row["accuracy"] == accuracy_score(true, predicted)
        assert row["macro_f1"] == f1_score(true, predicted, average="macro")
        assert row["log_loss"] == pytest.approx(log_loss(true, share), rel=1e-12)


def test_the_likeliest_class_is_the_label():
    one = torch.tensor([[[-0.5], [0.5], [0.0]]])
    assert labels(one).tolist() == [[0, 1, 0]]
    three = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 2.0, -1.0]]])
    assert labels(three).tolist() == [[1, 0]]


def test_a_constant_loses_the_entropy_of_the_labels():
    y = torch.tensor([[0.0, 1, 1, 1], [0, 0, 0, 0]])
    expected = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    torch.testing.assert_close(constant_loss(y), torch.tensor([expected, 0.0]).double())
    torch.testing.assert_close(
        constant_loss(torch.tensor([[0, 1, 2, 2]])), torch.tensor([1.5 * math.log(2)]).double()
    )


@pytest.mark.parametrize(("classes", "hidden"), KINDS)
@pytest.mark.parametrize(("rate", "learned"), [(1e-9, False), (2.0, True), (1e7, False)])
def test_networks_that_learned_nothing_are_told_apart(classes, hidden, rate, learned):
    schedule = Schedule(steps=300, learning_rate=rate, checkpoints=2)
    settings = Settings(methods=(), hidden=hidden, seeds=3, schedule=schedule, activation="tanh")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = compare(small_dataset(classes), settings).networks
    assert (table["learned"] == learned).all()


def test_history_starts_at_one_point_and_ends_at_the_table(comparison):
    history = comparison.history
    start = history[history["step"] == 0].pivot_table(index="seed", columns="method", values="loss")
    assert start.eq(start["baseline"], axis=0).all(axis=None)
    end = history[history["step"] == 20].set_index(["method", "seed"])
    table = comparison.networks.set_index(["method", "seed"])
    np.testing.assert_allclose(end["loss"], table["train_loss"])
    np.testing.assert_allclose(end["lambda_max"], table["lambda_max"])


def test_the_same_settings_give_the_same_numbers(comparison):
    again = compare(comparison.dataset, comparison.settings)
    pd.testing.assert_frame_equal(again.networks, comparison.networks, check_exact=True)
    pd.testing.assert_frame_equal(again.history, comparison.history, check_exact=True)
    pd.testing.assert_frame_equal(again.summary, comparison.summary, check_exact=True)


def test_later_seeds_are_the_tail_of_a_longer_run(comparison):
    settings = replace(comparison.settings, seeds=2, first_seed=2)
    tail = compare(comparison.dataset, settings).networks
    whole = comparison.networks[comparison.networks["seed"] >= 2].reset_index(drop=True)
    pd.testing.assert_frame_equal(tail, whole, rtol=1e-9)


def test_the_number_of_threads_is_given_back(comparison):
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        compare(comparison.dataset, comparison.settings, on_step=interrupt)
    assert torch.get_num_threads() == before


def interrupt(_step):
    raise KeyboardInterrupt


def test_means_and_standard_errors_are_over_seeds(comparison):
    values = comparison.networks.query("method == 'hsr'")["lambda_max"].to_numpy()
    cell = comparison.cell("hsr", "lambda_max")
    assert cell.mean == pytest.approx(values.mean())
    assert cell.stderr == pytest.approx(stats.sem(values))
    base = comparison.networks.query("method == 'baseline'")["lambda_max"].to_numpy()
    assert cell.effect == pytest.approx(np.log(values / base).mean())
    assert math.isnan(comparison.cell("baseline", "lambda_max").p)


def test_the_summary_has_one_row_a_method(comparison):
    frame = comparison.to_frame()
    assert frame["method"].tolist() == list(METHODS)
    for metric in METRICS:
        for suffix in ("", "_stderr", "_p"):
            assert metric.name + suffix in frame
    assert (frame["seconds"] > 0).all()


def table_of(**values):
    """A table of networks in which every metric takes these values, by method."""
    return pd.DataFrame(
        [
            {"method": name, "seed": seed} | dict.fromkeys((m.name for m in METRICS), value)
            for name, column in values.items()
            for seed, value in enumerate(column)
        ]
    )


def test_positive_measures_are_compared_by_factor():
    # Each seed halves, so that the factor is sure and the difference is not.
    networks = table_of(baseline=[1.0, 2.0, 400.0], hsr=[0.51, 1.0, 199.0])
    summary = summarize(networks, test_fraction=1 / 3).set_index(["method", "metric"])
    assert summary.loc[("hsr", "lambda_max"), "p"] < 0.01
    assert summary.loc[("hsr", "accuracy"), "p"] > 0.3
    assert summary.loc[("hsr", "lambda_max"), "effect"] == pytest.approx(math.log(0.5), abs=0.01)


def test_a_measure_that_is_not_positive_after_all_is_compared_by_difference():
    networks = table_of(baseline=[1.0, 2.0, 3.0], hsr=[0.5, -1.0, 0.0])
    summary = summarize(networks, test_fraction=1 / 3).set_index(["method", "metric"])
    assert summary.loc[("hsr", "trace"), "effect"] == pytest.approx((-0.5 - 3 - 3) / 3)
    assert np.isfinite(summary.loc[("hsr", "trace"), "p"])


def test_differences_that_are_rounding_are_none():
    baseline = [0.95, 0.1 + 0.2, 3.0]
    networks = table_of(baseline=baseline, hsr=[math.nextafter(each, 9) for each in baseline])
    summary = summarize(networks, test_fraction=1 / 3).set_index(["method", "metric"])
    assert (summary.loc["hsr", "p"] == 1).all()
    assert (summary.loc["hsr", "effect"] == 0).all()


def test_infinite_values_on_both_sides_are_no_equality():
    networks = table_of(baseline=[math.inf, 1.0, 2.0], hsr=[math.inf, 1.0, 2.0])
    with np.errstate(invalid="ignore"):
        summary = summarize(networks, test_fraction=1 / 3).set_index(["method", "metric"])
    assert np.isnan(summary.loc[("hsr", "trace"), "p"])


def test_defaults_can_be_run():
    assert DEFAULTS["breast-cancer"] == Settings()
    for settings in DEFAULTS.values():
        assert settings.methods[0] == BASELINE
        assert [method.name for method in settings.methods] == list(METHODS)

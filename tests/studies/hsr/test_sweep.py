from dataclasses import replace

import numpy as np
import pytest
import torch
from study_in_small import PRESET

from lowland.studies.hsr.claims import judge
from lowland.studies.hsr.control import control
from lowland.studies.hsr.figures import figure_16
from lowland.studies.hsr.performance import macro_f1
from lowland.studies.hsr.search import search, sharpest
from lowland.studies.hsr.sweep import gains, sweep
from lowland.studies.hsr.task import samples, unflatten
from lowland.studies.reporting.statistics import interval


@pytest.mark.slow
@pytest.mark.usefixtures("as_installed")
def test_a_cell_is_what_search_and_control_find_data_set_by_data_set():
    count = PRESET.sweep_seeds
    cell = sweep(PRESET, 20, 3, 3)
    expected = []
    for index in range(3):
        own = replace(PRESET, train_size=20, hidden=3, data_seed=PRESET.data_seed + 1 + index)
        found = search(own, index * count, (index + 1) * count)
        converged = found["converged"].nonzero().flatten()
        assert cell["converged"][index] == len(converged) / count
        for network in converged[sharpest(found["upper_bound"][converged], own.share)].tolist():
            seed = int(found["seed"][network])
            flat = found["parameters"][network][None]
            # The test samples are the study's own, whatever the data set.
            score = macro_f1(replace(own, data_seed=PRESET.data_seed), unflatten(own, flat))
            row = [index, seed, float(score)]
            for name in ("hsr", "a-sam"):
                strong = replace(own, hsr_weight=2.0, sam_radius=0.3)
                part = control(strong, name, [seed])
                same = replace(own, data_seed=PRESET.data_seed)
                row += [
                    float(macro_f1(same, unflatten(own, part["parameters"]))),
                    float(part["eigenvalues"][0, -1]),
                ]
            expected.append(row)
    assert len(expected) >= 3
    names = ["dataset", "seed", "baseline"]
    names += ["f1_hsr-2", "lambda_max_hsr-2", "f1_a-sam-0.3", "lambda_max_a-sam-0.3"]
    table = torch.stack([cell[name].double() for name in names], 1)
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64))


def test_a_cell_in_which_nothing_converges_is_empty():
    cell = sweep(replace(PRESET, tolerance=0.0), 20, 2, 2)
    assert cell["converged"].tolist() == [0, 0]
    assert all(len(value) == 0 for name, value in cell.items() if name != "converged")
    assert len(gains(cell, "hsr-2")) == 0
    assert np.isnan(interval(gains(cell, "hsr-2"))).all()


def test_the_test_samples_are_not_of_the_sweep():
    test, _ = samples(PRESET, 20, test=True)
    for index in range(5):
        own, _ = samples(replace(PRESET, data_seed=PRESET.data_seed + 1 + index), 20)
        assert not torch.isclose(own, test).any()


def test_gains_are_means_over_each_data_set():
    cell = {
        "dataset": torch.tensor([0, 0, 2]),
        "baseline": torch.tensor([0.5, 0.5, 0.5]),
        "f1_x": torch.tensor([0.51, 0.53, 0.4]),
    }
    values = gains(cell, "x")
    assert values.index.tolist() == [0, 2]
    np.testing.assert_allclose(values, [2, -10], rtol=1e-5)


def test_the_figure_has_a_panel_for_each_width_and_an_interval_for_each_size(study):
    axes = figure_16(study).axes
    assert [ax.get_title(loc="left") for ax in axes] == ["2 hidden units", "3 hidden units"]
    for ax in axes:
        assert len(ax.containers) == len(PRESET.sweep_methods)
        for bar in ax.containers:
            assert len(bar.lines[0].get_ydata()) == len(PRESET.sweep_train_sizes)


def test_a_gain_is_claimed_where_there_is_one(study):
    text = "HSR (weight 2) classifies better"

    def with_gain(points):
        changed = {
            key: cell
            | {
                "f1_hsr-2": cell["baseline"]
                + points / 100
                + 1e-6 * torch.arange(len(cell["baseline"]))
            }
            for key, cell in study.sweep.items()
        }
        (claim,) = [c for c in judge(replace(study, sweep=changed)) if text in c.text]
        return claim

    assert all(len(gains(cell, "hsr-2")) == 6 for key, cell in study.sweep.items() if key[1] == 9)
    assert with_gain(2.0).holds
    assert "mean gain +2.00 points" in with_gain(2.0).found
    assert not with_gain(-2.0).holds

"""Data by their names in presets; and what CONTRIBUTING says about data of one's own, done."""

from dataclasses import replace

import contributing
import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from lowland.cli.app import app
from lowland.studies.data import carried, sources
from lowland.studies.data.dataset import Dataset
from lowland.studies.data.images import MissingDataError
from lowland.studies.data.sources import Reader, Source, available, missing, names, parts
from lowland.studies.flatness import preset as flatness
from lowland.studies.flatness.tasks import samples
from lowland.studies.illusion import preset as illusion
from lowland.studies.illusion.tasks import points
from lowland.studies.runs.presets import PresetError


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """The names of CONTRIBUTING's data; a source that has the files."""
    room = {"torch": torch, "np": np, "Dataset": Dataset, "Reader": Reader}
    room |= {"MissingDataError": MissingDataError}
    added_carried, added_files = {}, {}
    room |= {"CARRIED": added_carried, "FILES": added_files}
    for block in contributing.blocks("Data of your own"):
        exec(block, room)  # noqa: S102
    for registry, added in ((carried.CARRIED, added_carried), (sources.FILES, added_files)):
        for name, value in added.items():
            monkeypatch.setitem(registry, name, value)
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "shapes.npz",
        x=random.random((90, 4), dtype=np.float32),
        y=np.arange(90) % 3,
    )
    yield Source(tmp_path)
    parts.cache_clear()


def task_of(study, data):
    """A preset's first task, about other data."""
    return replace(study.load_preset("quick").tasks[0], name="own", data=data)


@pytest.mark.slow
def test_data_that_a_package_carries_can_be_compared(extended, tmp_path):
    words = ["compare", "--data", "wine", "--seeds", "2", "--steps", "3", "--methods", "hsr"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert len(pd.read_csv(tmp_path / "out" / "networks.csv")) == 4


@pytest.mark.parametrize("data", ["wine", "shapes"])
def test_tasks_can_be_about_data_of_ones_own(extended, data):
    assert data in names()
    task = task_of(flatness, data)
    found, reasons = available([task], extended)
    assert (found, reasons) == ([task], {})
    own = samples(task, 0, extended)
    assert own.outputs == 3
    if data == "shapes":  # pixels from files stay as they are
        assert own.x_train.min() >= 0
        assert own.x_train.max() <= 1
    else:
        torch.testing.assert_close(own.x_train.mean(0), torch.zeros(13), rtol=0, atol=1e-5)
    asked = points(replace(task_of(illusion, data), test=30), 20, extended)
    assert asked.classes == 3
    assert len(asked.y_test[0]) == 30


def test_files_that_are_not_there_are_said_to_be_missing(extended, tmp_path):
    (tmp_path / "shapes.npz").unlink()
    assert "shapes.npz" in missing("shapes", extended)
    assert missing("shapes", Source()).startswith("LOWLAND_DATA names no folder")
    with pytest.raises(PresetError, match="no task can be run: there is no"):
        available([task_of(flatness, "shapes")], extended)


def test_a_question_of_many_classes_is_not_asked_of_two():
    with pytest.raises(PresetError, match="has two classes; expected data of three or more"):
        points(task_of(illusion, "breast-cancer"), 20, Source())

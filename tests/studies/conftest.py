"""A study so small that it runs in seconds."""

import pytest
import study_in_small
from jaxtyping import config

from lowland.studies.hsr.run import run_study
from lowland.studies.runs.jobs import Store


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    preset = study_in_small.PRESET
    with pytest.MonkeyPatch.context() as patch:
        study_in_small.shorten(patch)
        patch.setattr(config, "jaxtyping_disable", True)  # as installed
        return run_study(preset, Store.open(tmp_path_factory.mktemp("study"), preset.to_dict()))

"""Documented modules are found under the names that they had before they moved."""

import subprocess
import sys
from importlib import import_module

import pytest

from lowland import _moved


@pytest.mark.parametrize(("former", "present"), _moved.NAMES.items())
def test_a_former_name_is_the_module_itself(former, present):
    assert import_module(former) is import_module(present)
    assert import_module(present).__spec__.name == present


@pytest.mark.slow
def test_former_names_work_in_every_form_of_import():
    code = """
import sys
import lowland
assert not any(name.startswith("lowland.studies") for name in sys.modules)
from lowland.jobs import Store
from lowland import workers
import lowland.experiments.hsr.run as study
import lowland.jobs
from lowland.studies.runs import jobs
assert lowland.jobs is jobs and Store is jobs.Store and Store.__module__ == jobs.__name__
assert study is sys.modules["lowland.studies.hsr.run"]
assert workers is sys.modules["lowland.studies.runs.workers"]
"""
    done = subprocess.run(  # noqa: S603 - this very interpreter, with the text above
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_other_names_are_still_unknown():
    with pytest.raises(ModuleNotFoundError, match=r"lowland\.sharpness"):
        import_module("lowland.sharpness")

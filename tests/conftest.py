"""Settings of all tests: annotations are checked, examples are few and repeatable."""

import importlib
import logging
import os

from hypothesis import HealthCheck, Phase, settings
from jaxtyping import config, install_import_hook

# Before anything imports lowland: each of its functions then checks shapes and types of arguments.
install_import_hook("lowland", "shapecheck.checked")

import pytest  # noqa: E402
import torch  # noqa: E402

settings.register_profile(
    "lowland",
    deadline=None,  # the first call of an operation is slow for reasons of its own
    max_examples=40,
    phases=set(Phase) - {Phase.explain},  # it traces every line of PyTorch, for minutes
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("lowland")

# On small problems a second thread gains nothing, and on a busy machine it waits for its turn.
# What threads have to do with the numbers is the business of tests that ask for several.
torch.set_num_threads(1)


@pytest.fixture
def as_installed(monkeypatch):
    """Run the library as its users do, who have no run-time check of annotations."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def cluster():
    """A Dask cluster of two processes on this machine."""
    distributed = pytest.importorskip("distributed")
    config = importlib.import_module("dask").config
    with (
        config.set({"distributed.scheduler.allowed-failures": 1}),  # 3 take their time
        distributed.LocalCluster(
            processes=True,
            n_workers=2,
            threads_per_worker=1,
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
        ) as cluster,
    ):
        yield cluster


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs CUDA")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)

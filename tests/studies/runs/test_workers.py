import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Thread

import pieces
import pytest
import torch

from lowland.errors import UserError
from lowland.studies.runs import workers as module
from lowland.studies.runs.jobs import JobError, Store, run_pieces
from lowland.studies.runs.workers import workers

EIGHT = {f"part/{n}": partial(pieces.square, n) for n in range(8)}

LONG = """
import sys
from functools import partial
from pathlib import Path
import pieces
from lowland.errors import UserError
from lowland.studies.runs.jobs import Store, run_pieces
from lowland.studies.runs.workers import workers

folder, jobs, scheduler = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] or None
work = {f"{n}": partial(pieces.linger, str(folder), n) for n in range(5)}
store = Store.open(folder / "run", {})
submitted = lambda done: (folder / "submitted").touch()
try:
    with workers(jobs, scheduler) as executor:
        run_pieces(work, store, executor=executor, on_done=submitted)
except UserError as error:
    sys.exit(str(error))
except KeyboardInterrupt:
    sys.exit(130)
finally:
    assert ("distributed" in sys.modules) == (scheduler is not None)
"""


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "run", {})


@pytest.fixture(params=["processes", "cluster"])
def choice(request):
    """Arguments that ask for other processes."""
    if request.param == "processes":
        return {"jobs": 2}
    return {"scheduler": request.getfixturevalue("cluster").scheduler_address}


@pytest.fixture
def long_run(tmp_path):
    """Starts a run of pieces that last a minute, in a process group of its own."""
    started = []

    def start(jobs=1, scheduler=""):
        places = [str(Path(pieces.__file__).parent), os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(  # noqa: S603 - this very interpreter
            [sys.executable, "-W", "error", "-c", LONG, str(tmp_path), str(jobs), scheduler],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))},
        )
        started.append(process)
        return process

    yield start
    (tmp_path / "over").touch()
    for process in started:
        with process:
            process.kill()


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def squares(store):
    return [store.load(name)["square"].item() for name in EIGHT if name in store]


def test_one_job_needs_no_executor():
    with workers() as executor:
        assert executor is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"jobs": 0}, "expected at least 1 job; got 0"),
        ({"jobs": 2, "scheduler": "tcp://a:1"}, "got 2 jobs and 'tcp://a:1'; choose one"),
        ({"scheduler": "somewhere"}, r"such as 'tcp://host:8786'; got 'somewhere' \(missing port"),
        ({"scheduler": "http://a:1"}, r"got 'http://a:1' \(unknown address scheme 'http'"),
        ({"scheduler": "tls://a:1"}, r"got 'tls://a:1' \(TLS expects"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    if "scheduler" in arguments and "jobs" not in arguments:
        pytest.importorskip("distributed")
    with pytest.raises(UserError, match=message) as caught, workers(**arguments):
        pass
    assert "\n" not in str(caught.value)


def test_a_cluster_without_dask_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(UserError, match=r"'distributed'; install it with pip install 'lowland\[cl"),
        workers(scheduler="tcp://127.0.0.1:8786"),
    ):
        pass


@pytest.mark.parametrize("who", ["nobody", "somebody silent", "a web server"])
def test_no_scheduler_at_the_address_is_said_soon_and_in_one_line(who, monkeypatch, caplog):
    pytest.importorskip("distributed")
    monkeypatch.setattr(module, "PATIENCE", 0.5)

    def answer():
        connection, _ = server.accept()
        with connection:
            connection.recv(1)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if who == "nobody":
            server.close()
        elif who == "a web server":
            Thread(target=answer).start()
        begin = time.monotonic()
        with (
            pytest.raises(UserError, match=f"^no Dask scheduler answers at '{address}'; start one"),
            workers(scheduler=address),
        ):
            pass
    assert time.monotonic() - begin < 5
    assert not caplog.records


def test_an_address_of_something_else_in_the_cluster_is_refused(cluster):
    (address, *_) = cluster.scheduler.workers
    with pytest.raises(UserError, match="there is a Worker"), workers(scheduler=address):
        pass


def test_pieces_are_computed_elsewhere_and_come_back_as_they_are(choice, store):
    with workers(**choice) as executor:
        run_pieces(EIGHT | {"unusual": pieces.unusual}, store, executor=executor)
    assert squares(store) == [n**2 for n in range(8)]
    assert os.getpid() not in {store.load(name)["process"].item() for name in EIGHT}
    unusual = store.load("unusual")
    for name, tensor in pieces.unusual().items():
        assert torch.equal(unusual[name], tensor)
        assert unusual[name].dtype == tensor.dtype


def test_an_error_of_the_work_passes_through_and_long_pieces_do_not_hold_it_up(choice, store):
    work = {"long": partial(pieces.linger, str(store.folder), 0)}
    work |= {"bad": partial(pieces.square, "two")}
    begin = time.monotonic()
    with (
        pytest.raises(ValueError, match="could not convert string to float: 'two'"),
        workers(**choice) as executor,
    ):
        run_pieces(work, store, executor=executor)
    assert time.monotonic() - begin < 30
    (store.folder / "over").touch()  # frees the cluster's worker


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True], ids=["while starting", "while computing"])
def test_an_interrupt_ends_local_workers_within_seconds_and_in_silence(begun, long_run, tmp_path):
    process = long_run(jobs=2)
    if begun:
        wait_until(lambda: len(list(tmp_path.glob("*.begun"))) == 2)
    else:
        wait_until((tmp_path / "submitted").exists)
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, _ = process.communicate(timeout=15)  # nobody is left who could say more
    assert (said, process.returncode) == ("", 130)


def test_workers_end_with_a_process_that_is_killed(long_run, tmp_path):
    process = long_run(jobs=2)
    wait_until(lambda: len(list(tmp_path.glob("*.begun"))) == 2)
    process.kill()
    process.communicate(timeout=15)


@pytest.mark.slow
def test_an_interrupt_takes_what_has_not_begun_off_the_cluster(cluster, long_run, tmp_path):
    process = long_run(scheduler=cluster.scheduler_address)
    wait_until(lambda: len(list(tmp_path.glob("*.begun"))) == 2)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=15)
    assert (said, process.returncode) == ("", 130)
    (tmp_path / "over").touch()
    wait_until(lambda: not cluster.scheduler.tasks)
    assert len(list(tmp_path.glob("*.begun"))) == 2


def test_the_cluster_keeps_no_results(cluster, store):
    with workers(scheduler=cluster.scheduler_address) as executor:
        run_pieces(EIGHT, store, executor=executor)
        wait_until(lambda: not cluster.scheduler.tasks)
    wait_until(lambda: not cluster.scheduler.clients.keys() - {"fire-and-forget"})


def test_workers_with_another_version_are_refused(cluster, store, monkeypatch):
    monkeypatch.setattr(module, "__version__", "0.0.9")
    with (
        pytest.raises(
            JobError, match=r"a worker of the cluster has lowland .* \(install 0\.0\.9 there"
        ),
        workers(scheduler=cluster.scheduler_address) as executor,
    ):
        run_pieces(EIGHT, store, executor=executor)


def test_workers_without_a_module_are_refused_by_its_name(cluster, store):
    work = {"part": partial(importlib.import_module, "lowland.not_there")}
    with (
        pytest.raises(JobError, match=r"has no module 'lowland\.not_there' \(install lowland"),
        workers(scheduler=cluster.scheduler_address) as executor,
    ):
        run_pieces(work, store, executor=executor)


def test_pieces_of_a_killed_worker_are_computed_by_another(cluster, store):
    work = EIGHT | {"part/3": partial(pieces.die_once, str(store.folder), 3)}
    with workers(scheduler=cluster.scheduler_address) as executor:
        run_pieces(work, store, executor=executor)
    assert squares(store) == [n**2 for n in range(8)]
    assert (store.folder / "3.tried").exists()


@pytest.mark.slow
def test_a_piece_that_kills_each_of_its_workers_ends_the_run_and_the_rest_is_kept(cluster, store):
    work = EIGHT | {"part/0": partial(pieces.die, str(store.folder / "part"), 0)}
    with (
        pytest.raises(JobError, match=r"workers died one after .*; what was finished is kept"),
        workers(scheduler=cluster.scheduler_address) as executor,
    ):
        run_pieces(work, store, executor=executor)
    assert "part/0" not in store
    assert squares(store)


def test_a_scheduler_that_is_killed_ends_the_run_in_one_line(long_run, tmp_path):
    pytest.importorskip("distributed")
    file = tmp_path / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard"]
    command += ["--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as scheduler:  # noqa: S603
        try:
            wait_until(lambda: file.exists() and file.read_text().endswith("}"))
            address = json.loads(file.read_text())["address"]
            process = long_run(scheduler=address)
            wait_until((tmp_path / "submitted").exists)
        finally:
            scheduler.kill()
    said, _ = process.communicate(timeout=15)
    assert said == (
        f"the scheduler at '{address}' went away or dropped the work; what was finished is kept, "
        "and the same command goes on from there\n"
    )

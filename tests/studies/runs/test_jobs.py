import json
import multiprocessing
import os
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import pieces
import pytest
import torch

from lowland.errors import UserError
from lowland.studies.runs import jobs
from lowland.studies.runs.jobs import JobError, Store, run_pieces

SETTINGS = {"seeds": 3, "rate": 0.5}
FIVE = {f"part/{n}": partial(pieces.square, n) for n in range(5)}
FAILING = dict.fromkeys(FIVE, partial(pieces.fail, 0))


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "run", SETTINGS)


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


class AtOnce(Executor):
    """The least that an executor can be."""

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - it belongs to the future
            future.set_exception(error)
        return future


def finished(store):
    return {name for name in FIVE if name in store}


def test_a_run_is_started_in_a_new_folder_and_gone_on_with(tmp_path):
    folder = tmp_path / "not" / "there"
    Store.open(folder, SETTINGS).save("one", pieces.square(3))
    again = Store.open(folder, dict(reversed(SETTINGS.items())))
    assert "one" in again
    assert "two" not in again
    assert again.load("one")["square"].item() == 9
    assert json.loads((folder / "settings.json").read_text()) == SETTINGS


@pytest.mark.parametrize(
    ("now", "change"),
    [
        ({"seeds": 4, "rate": 0.5}, r"\(seeds is 3 there, 4 now\)"),
        ({"seeds": 3}, r"\(rate is 0.5 there, None now\)"),
        (SETTINGS | {"new": "a"}, r"\(new is None there, 'a' now\)"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_by_name(store, now, change):
    with pytest.raises(JobError, match=f"other settings {change}; choose another folder"):
        Store.open(store.folder, now)
    Store.open(store.folder, SETTINGS)  # still that run's


@pytest.mark.parametrize("name", ["file", "file/below", "long" * 100])
def test_a_folder_that_cannot_be_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to '.*': "):
        Store.open(tmp_path / name, SETTINGS)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe"])
def test_a_file_that_holds_no_settings_is_refused(tmp_path, content):
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(JobError, match=r"settings.json' is not a run's settings; choose another"):
        Store.open(tmp_path, SETTINGS)
    assert (tmp_path / "settings.json").read_bytes() == content


def test_a_failure_in_the_middle_of_saving_leaves_nothing(store, monkeypatch):
    def half(tensors, path):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jobs, "save_file", half)
    with pytest.raises(JobError, match=r"cannot write '.*one.safetensors': .*No space left"):
        store.save("one", pieces.square(1))
    assert "one" not in store
    assert [path.name for path in store.folder.iterdir()] == ["settings.json"]


def test_a_failure_while_replacing_a_piece_keeps_the_old_one(store, monkeypatch):
    store.save("one", pieces.square(2))

    def interrupted(tensors, path):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.save("one", pieces.square(3))
    assert store.load("one")["square"].item() == 4


def test_drafts_of_a_killed_process_are_no_pieces_and_do_no_harm(store):
    for process in (1, os.getpid()):
        (store.folder / f"one.{process}.draft").write_bytes(b"half of it")
        (store.folder / f"settings.{process}.draft").write_bytes(b"{")
    again = Store.open(store.folder, SETTINGS)
    assert "one" not in again
    run_pieces({"one": partial(pieces.square, 3)}, again)
    assert again.load("one")["square"].item() == 9


def test_tensors_come_back_as_they_were(store):
    tensors = {
        "view": torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T,
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    store.save("deep/down", tensors)
    for name, tensor in store.load("deep/down").items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.dtype == tensors[name].dtype


@pytest.mark.parametrize("size", [0, 20])
def test_a_damaged_piece_is_named(store, size):
    store.save("one", pieces.square(1))
    path = store.path("one")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(JobError, match=r"cannot read '.*one.safetensors': .*; remove it, and"):
        store.load("one")


@pytest.mark.parametrize("kind", ["here", "processes", "threads", "at once"])
def test_only_what_is_missing_is_computed_and_progress_counts(store, kind, request):
    store.save("part/3", {"square": torch.tensor([-1.0])})
    seen = []
    executor = {
        "here": lambda: None,
        "processes": lambda: request.getfixturevalue("processes"),
        "threads": lambda: ThreadPoolExecutor(2),
        "at once": AtOnce,
    }[kind]()
    run_pieces(FIVE, store, executor=executor, on_done=seen.append)
    assert seen == [1, 2, 3, 4, 5]
    results = [store.load(name) for name in FIVE]
    assert [part["square"].item() for part in results] == [0, 1, 4, -1, 16]
    own = {int(part["process"]) == os.getpid() for part in results if "process" in part}
    assert own == {kind != "processes"}
    run_pieces(FAILING, store, executor=executor, on_done=seen.append)
    assert seen == [1, 2, 3, 4, 5, 5]


def test_a_dying_worker_is_named_and_what_was_finished_is_kept(store):
    work = {f"{n}": partial(pieces.die, str(store.folder), n) for n in range(4)}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for _ in range(2):  # the pool stays broken, and says so when asked for more
            with pytest.raises(JobError, match="a worker process died; what was finished is kept"):
                run_pieces(work, store, executor=pool)
    kept = [name for name in work if name in store]
    assert kept
    assert "0" not in kept
    assert all(store.load(name)["square"].item() == int(name) ** 2 for name in kept)
    run_pieces({name: partial(pieces.square, int(name)) for name in work}, store)
    assert all(name in store for name in work)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (BrokenProcessPool("any"), JobError, "a worker process died; what was finished is kept"),
        (BrokenExecutor("no more"), JobError, "no more; what was finished is kept"),
        (CancelledError(), JobError, "the work was cancelled; what was finished is kept"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
        (ZeroDivisionError("own"), ZeroDivisionError, "own"),
    ],
)
def test_what_finished_beside_a_failure_is_kept_and_the_rest_cancelled(
    store, error, expected, message
):
    """Whichever of the futures is looked at first."""
    waiting = Future()

    class Half(Executor):
        def submit(self, fn, /, *args, **kwargs):
            (number,) = fn.args
            if number == 4:
                return waiting
            future = Future()
            if number == 0:
                future.set_exception(error)
            else:
                future.set_result(fn())
            return future

    with pytest.raises(expected, match=message):
        run_pieces(FIVE, store, executor=Half())
    assert waiting.cancelled()
    assert finished(store) == {"part/1", "part/2", "part/3"}


@pytest.mark.parametrize("executor", [None, AtOnce()])
def test_an_interrupt_keeps_what_was_finished_before_it(store, executor):
    def interrupt(done):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pieces(FIVE, store, executor=executor, on_done=interrupt)
    assert len(finished(store)) == (2 if executor is None else 5)
    run_pieces(FIVE, store)
    assert finished(store) == set(FIVE)


@pytest.mark.parametrize("kind", ["here", "processes"])
def test_an_error_of_the_work_itself_passes_through(store, kind, request):
    executor = None if kind == "here" else request.getfixturevalue("processes")
    work = {"one": partial(pieces.square, 1), "bad": partial(pieces.square, "two")}
    with pytest.raises(ValueError, match="could not convert string to float: 'two'"):
        run_pieces(work, store, executor=executor)
    assert "bad" not in store

"""Who computes the pieces of a long run: this process, others beside it, or a Dask cluster."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any, TypeVar
from uuid import uuid4

from lowland import __version__
from lowland.errors import UserError

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds to wait for an answer that should come at once."""


@contextmanager
def workers(jobs: int = 1, scheduler: str | None = None) -> Iterator[Executor | None]:
    """Provide an executor for :func:`lowland.studies.runs.jobs.run_pieces`, and clean up after it.

    Where the block ends by an error or by Ctrl-C, local processes end at once, in the middle of a
    piece if need be. A cluster is given no more of the work, but pieces that run there run on to
    their end: Dask cannot stop them. It is left as it was otherwise; it belongs to somebody else.

    Args:
        jobs: How many processes on this machine; with 1, this one computes and there is no
            executor.
        scheduler: The address of a Dask scheduler, such as ``tcp://host:8786``, instead. Its
            workers need this very version of lowland, and one thread each (``--nthreads 1``);
            while there are none, the work waits for them.

    Raises:
        UserError: If that is not possible: no such number, no scheduler at the address, no Dask.
    """
    if jobs < 1:
        raise UserError(f"expected at least 1 job; got {jobs}")
    if scheduler is not None and jobs > 1:
        raise UserError(
            f"expected a number of jobs or a scheduler; got {jobs} jobs and {scheduler!r}; choose "
            "one (a cluster has as many jobs as it has workers)"
        )
    if scheduler is not None:
        with _cluster(scheduler) as executor:
            yield executor
    elif jobs > 1:
        with _processes(jobs) as executor:
            yield executor
    else:
        yield None


# Processes on this machine


class _Processes(ProcessPoolExecutor):
    """A pool whose processes never hear of Ctrl-C, not even while they start."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        # Processes are started here, and inherit which signals are blocked.
        with _interrupts_held():
            return super().submit(fn, *args, **kwargs)

    def end(self, hold: Connection) -> None:
        """Let go of the processes, and wait until they are gone."""
        manager = getattr(self, "_executor_manager_thread", None)  # which shutdown forgets
        # In this order: Python 3.11's pool stumbles where processes die while it still knows of
        # work that was cancelled. It lowers the flag when it has forgotten that.
        self.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + PATIENCE
        while (
            manager is not None
            and getattr(self, "_cancel_pending_futures", False)
            and time.monotonic() < deadline
        ):
            time.sleep(0.001)
        hold.close()
        if manager is not None:
            manager.join()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _processes(jobs: int) -> Iterator[Executor]:
    context = multiprocessing.get_context("spawn")
    # Only this process holds the line's other end. When it lets go, or dies, its workers end.
    line, hold = context.Pipe(duplex=False)
    with line, hold:
        pool = _Processes(jobs, context, initializer=_enlist, initargs=(line,))
        try:
            yield pool
        except BaseException:
            pool.end(hold)
            raise
        pool.shutdown()


def _enlist(line: Connection) -> None:
    """Make this process a worker that lives as long as somebody holds the other end of a line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who started it deals with it
    Thread(target=_end_with, args=(line,), daemon=True).start()


def _end_with(line: Connection) -> None:
    with suppress(EOFError, OSError):
        line.recv()  # nothing ever comes
    os._exit(1)


# A Dask cluster


class _Cluster(Executor):
    """A Dask client as an executor.

    Dask has one of its own. It leaves futures unfinished for good where fetching a result fails,
    and has the scheduler import what workers need.
    """

    def __init__(self, client: Any, address: str) -> None:  # distributed.Client, if installed
        self._client = client
        self._address = address

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        from cloudpickle import dumps  # noqa: PLC0415 - optional
        from dask.utils import funcname  # noqa: PLC0415 - optional

        call = pickle.dumps(_Call(dumps(partial(fn, *args, **kwargs))))
        try:
            # A name of its own: equal pieces are none of Dask's business. What precedes the
            # number makes pieces of one kind a group, which waits at the scheduler for its turn.
            remote = self._client.submit(pickle.loads, call, key=f"{funcname(fn)}-{uuid4()}")
        except Exception as error:
            raise self._lost() from error
        return asyncio.run_coroutine_threadsafe(
            self._outcome(remote), self._client.loop.asyncio_loop
        )

    async def _outcome(self, remote: Any) -> Any:
        """What became of a piece; the cluster forgets it when this ends, by a cancellation too."""
        from distributed import KilledWorker  # noqa: PLC0415 - optional

        try:
            result = await remote
        except Exception as error:
            if remote.status != "error":
                raise self._lost() from error
            if isinstance(error, KilledWorker):
                raise BrokenExecutor(
                    "workers died one after the other while they had the same piece (perhaps they "
                    "ran out of memory)"
                ) from error
            if isinstance(error, ModuleNotFoundError):
                raise BrokenExecutor(
                    f"a worker of the cluster has no module {error.name!r} (install lowland "
                    f"{__version__} there, with the extras that it has here)"
                ) from error
            raise  # the work's own
        return pickle.loads(result)  # noqa: S301 - as trusted as the cluster

    def _lost(self) -> BrokenExecutor:
        return BrokenExecutor(f"the scheduler at {self._address!r} went away or dropped the work")


class _Call:
    """Pickled work; unpickled twice, it is done.

    The scheduler unpickles whatever it is given. Bytes in bytes keep that quick, and spare it
    lowland and PyTorch.
    """

    def __init__(self, work: bytes) -> None:
        self._work = work

    def __reduce__(self) -> tuple[Callable[[str, bytes], bytes], tuple[str, bytes]]:
        return _compute, (__version__, self._work)


def _compute(version: str, work: bytes) -> bytes:
    """Do pickled work on a worker; pickled again, as Dask has no way with some types of tensor."""
    if version != __version__:
        raise BrokenExecutor(
            f"a worker of the cluster has lowland {__version__} (install {version} there)"
        )
    return pickle.dumps(pickle.loads(work)())  # noqa: S301 - the client's


@contextmanager
def _cluster(address: str) -> Iterator[Executor]:
    try:
        import_module("distributed")  # sets up its logging, which is then silenced
    except ModuleNotFoundError as error:
        raise UserError(
            f"a Dask cluster needs the package {error.name!r}; install it with "
            "pip install 'lowland[cluster]'"
        ) from None
    with _quiet("distributed", "distributed.client", "distributed.gc", "tornado.application"):
        client = _connect(address)
        try:
            yield _Cluster(client, address)
        finally:
            with suppress(TimeoutError):  # a lost scheduler may not hinder what is being raised
                client.close()


def _connect(address: str) -> Any:
    """A client of the scheduler at an address."""
    from distributed import Client  # noqa: PLC0415 - optional

    # A client that cannot connect goes on trying in the background, and complains; so ask first.
    try:
        # In a thread, since this one may have an event loop, as in a notebook.
        with ThreadPoolExecutor(1) as thread:
            kind = thread.submit(lambda: asyncio.run(_kind(address))).result()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"expected a scheduler's address such as 'tcp://host:8786'; got {address!r} "
            f"({_first_line(error)})"
        ) from None
    except Exception:  # noqa: BLE001 - strangers who answer cause errors of any kind
        raise UserError(
            f"no Dask scheduler answers at {address!r}; start one there with 'dask scheduler', or "
            "name another address"
        ) from None
    if kind != "Scheduler":
        raise UserError(f"expected a scheduler at {address!r}; there is a {kind}; name the former")
    try:
        return Client(address, timeout=PATIENCE, set_as_default=False)
    except Exception as error:
        raise UserError(
            f"cannot use the Dask scheduler at {address!r} ({_first_line(error)}); install the "
            "same version of Dask here and there"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


async def _kind(address: str) -> str:
    """What answers at an address: ``Scheduler``, ``Worker``, ``Nanny``."""
    from distributed import Security, rpc  # noqa: PLC0415 - optional

    security = Security().get_connection_args("client")
    async with (
        asyncio.timeout(2 * PATIENCE),
        rpc(address, timeout=PATIENCE, connection_args=security) as server,
    ):
        identity = await server.identity()
    return str(identity["type"])


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keep Dask from reporting on standard error what is reported by exceptions here."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

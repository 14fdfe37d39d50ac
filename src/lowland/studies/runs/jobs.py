"""Long runs in pieces: each result is kept as soon as it is there, and a new start goes on.

A run is a folder. ``settings.json`` says what is being computed; every finished piece is one
safetensors file beside it, written under another name first and then renamed. So the folder holds
whole pieces only, whenever the process was killed, and no piece is computed twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    as_completed,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowland.errors import UserError

Tensors = dict[str, Tensor]
Pieces = Mapping[str, Callable[[], Tensors]]


class JobError(UserError):
    """A folder that holds another run, or workers that died or do not fit."""


@dataclass(frozen=True)
class Store:
    """The finished pieces of one run.

    Attributes:
        folder: Where they are.
    """

    folder: Path

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any]) -> Store:
        """Start a run in a folder, or go on with the one that is there.

        Args:
            folder: Made if it does not exist.
            settings: Everything that decides the results, as JSON can hold it.

        Raises:
            JobError: If the folder holds results of other settings, or cannot be written to.
        """
        wanted = json.dumps(dict(settings), indent=2, sort_keys=True) + "\n"
        path = folder / "settings.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _require_same(_settings(path), json.loads(wanted), folder)
            else:
                _replace(path, lambda draft: draft.write_text(wanted))
        except OSError as error:
            raise JobError(f"cannot write to {str(folder)!r}: {error.strerror}") from None
        return cls(folder)

    def path(self, piece: str) -> Path:
        """The file of a piece."""
        return self.folder / f"{piece}.safetensors"

    def __contains__(self, piece: str) -> bool:
        return self.path(piece).exists()

    def load(self, piece: str) -> Tensors:
        """The tensors of a finished piece.

        Raises:
            JobError: If its file was damaged.
        """
        path = self.path(piece)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise JobError(
                f"cannot read {str(path)!r}: {error}; remove it, and the same command computes it "
                "again"
            ) from None

    def save(self, piece: str, tensors: Tensors) -> None:
        """Keep a finished piece: all of it or nothing.

        Raises:
            JobError: If it cannot be written.
        """
        path = self.path(piece)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, lambda draft: save_file(whole, draft))
        except (OSError, SafetensorError) as error:
            raise JobError(f"cannot write {str(path)!r}: {error}") from None


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError:  # not JSON, or not even text
        found = None
    if not isinstance(found, dict):
        raise JobError(f"{str(path)!r} is not a run's settings; choose another folder")
    return found


def _require_same(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    names = [name for name in wanted | found if found.get(name) != wanted.get(name)]
    if names:
        changes = ", ".join(
            f"{n} is {_short(found.get(n))} there, {_short(wanted.get(n))} now" for n in names
        )
        raise JobError(
            f"{str(folder)!r} holds a run with other settings ({changes}); choose another folder, "
            "or remove that one"
        )


def _short(setting: object) -> str:
    """A setting as people read it; of whole tables the beginning."""
    return shorten(repr(setting), 60, placeholder=" ...")


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, and rename it once it is whole."""
    draft = path.with_suffix(f".{os.getpid()}.draft")
    try:
        write(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def run_pieces(
    pieces: Pieces,
    store: Store,
    *,
    executor: Executor | None = None,
    on_done: Callable[[int], None] | None = None,
) -> None:
    """Compute the pieces that are missing from a store.

    Args:
        pieces: What computes each piece, by name. For an executor of processes it must be
            picklable, as a :func:`functools.partial` of an importable function is.
        store: Where results go, piece by piece as they come.
        executor: Any :class:`concurrent.futures.Executor`, as
            :func:`~lowland.studies.runs.workers.workers` gives; without one, this process computes.
        on_done: Called with the number of finished pieces, first with those already there.

    Raises:
        JobError: If workers died or do not fit, or their scheduler went away.
    """
    missing = {name: compute for name, compute in pieces.items() if name not in store}
    done = len(pieces) - len(missing)

    def keep(name: str, tensors: Tensors) -> None:
        nonlocal done
        store.save(name, tensors)
        done += 1
        if on_done is not None:
            on_done(done)

    if on_done is not None:
        on_done(done)
    if executor is None:
        for name, compute in missing.items():
            keep(name, compute())
    else:
        _run_elsewhere(missing, store, executor, keep)


def _run_elsewhere(
    pieces: Pieces,
    store: Store,
    executor: Executor,
    keep: Callable[[str, Tensors], None],
) -> None:
    futures: dict[Future[Tensors], str] = {}
    try:
        for name, compute in pieces.items():
            futures[executor.submit(compute)] = name
        for future in as_completed(futures):
            keep(futures[future], future.result())
            del futures[future]
    except (BrokenExecutor, CancelledError) as error:
        if isinstance(error, BrokenProcessPool):
            # The pool is about to fail all of its work, and Python 3.11's stumbles over what is
            # cancelled in the meantime.
            wait(futures, timeout=1)
        raise JobError(
            f"{_loss(error)}; what was finished is kept, and the same command goes on from there"
        ) from error
    finally:
        for future, name in futures.items():
            # Others may have finished beside the one that failed.
            if not future.cancel() and future.done() and future.exception() is None:
                store.save(name, future.result())


def _loss(error: BrokenExecutor | CancelledError) -> str:
    if isinstance(error, BrokenProcessPool):
        return "a worker process died"
    return str(error) or "the work was cancelled"

"""Long runs in pieces: each result is kept as soon as it is there, and a new start goes on.

A run is a folder. ``settings.json`` says what is being computed; every finished piece is one
safetensors file beside it, written under another name first and then renamed. So the folder holds
whole pieces only, whenever the process was killed, and no piece is computed twice.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Executor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lowland.errors import UserError

Tensors = dict[str, Tensor]


class JobError(UserError):
    """A folder that holds another run, or a worker that died."""


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
                _require_same(json.loads(path.read_text()), json.loads(wanted), folder)
            else:
                _write(path, wanted.encode())
        except OSError as error:
            raise JobError(f"cannot write to {str(folder)!r}: {error.strerror}") from None
        except json.JSONDecodeError:
            raise JobError(
                f"{str(path)!r} is not a run's settings; choose another folder"
            ) from None
        return cls(folder)

    def path(self, piece: str) -> Path:
        """The file of a piece."""
        return self.folder / f"{piece}.safetensors"

    def __contains__(self, piece: str) -> bool:
        return self.path(piece).exists()

    def load(self, piece: str) -> Tensors:
        """The tensors of a finished piece."""
        return load_file(self.path(piece))

    def save(self, piece: str, tensors: Tensors) -> None:
        """Keep a finished piece: all of it or nothing."""
        path = self.path(piece)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.draft")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft)
        draft.replace(path)


def _require_same(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    names = [name for name in wanted | found if found.get(name) != wanted.get(name)]
    if names:
        changes = ", ".join(f"{n} is {found.get(n)!r} there, {wanted.get(n)!r} now" for n in names)
        raise JobError(
            f"{str(folder)!r} holds a run with other settings ({changes}); choose another folder, "
            "or remove that one"
        )


def _write(path: Path, content: bytes) -> None:
    handle, draft = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    Path(draft).replace(path)


def run_pieces(
    function: Callable[..., Tensors],
    pieces: Mapping[str, tuple[Any, ...]],
    store: Store,
    *,
    executor: Executor | None = None,
    on_done: Callable[[int], None] | None = None,
) -> None:
    """Compute the pieces that are missing from a store.

    Args:
        function: Computes one piece; for an executor of processes it must be importable.
        pieces: The arguments of each piece, by name.
        store: Where results go, piece by piece as they come.
        executor: Any :class:`concurrent.futures.Executor`; without one, this process computes.
        on_done: Called with the number of finished pieces, first with those already there.

    Raises:
        JobError: If a worker process died.
    """
    missing = {name: arguments for name, arguments in pieces.items() if name not in store}
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
        for name, arguments in missing.items():
            keep(name, function(*arguments))
        return
    futures = {executor.submit(function, *args): name for name, args in missing.items()}
    try:
        for future in as_completed(futures):
            keep(futures[future], future.result())
    except BrokenExecutor as error:
        raise JobError(
            "a worker process died; what was finished is kept, and the same command goes on from "
            "there"
        ) from error
    finally:
        for future in futures:
            future.cancel()

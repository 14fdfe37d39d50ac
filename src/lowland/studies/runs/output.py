"""Writing results: all of them or none."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from lowland.errors import UserError


class OutputError(UserError, OSError):
    """A folder that cannot be written to."""


def check_writable(folder: Path) -> None:
    """Find out before the work starts whether results can be written; leaves no trace.

    Raises:
        OutputError: If the folder is a file, or cannot be made or written to.
    """
    try:
        _remove(_stage(folder))
    except OSError as error:
        raise _explain(folder, error) from None


def publish(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files into a folder, which is made if need be; older files of these names go.

    Everything is written beside its destination first and then moved. An error or an interruption
    at any point leaves the folder as it was.

    Args:
        files: Contents by file name; the last one appears last.
        folder: Where to.

    Raises:
        OutputError: If the folder cannot be written to.
    """
    try:
        with ExitStack() as cleanup:
            stage = _stage(folder)
            cleanup.callback(_remove, stage)
            older = stage / "older"
            older.mkdir()
            for name, content in files.items():
                (stage / name).write_bytes(content)
            with ExitStack() as undo:
                _make(folder, undo)
                for name in files:
                    _replace(stage / name, folder / name, older / name, undo)
                undo.pop_all()
    except OSError as error:
        raise _explain(folder, error) from error


def _make(folder: Path, undo: ExitStack) -> None:
    """Make a folder and its missing parents."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir()
        undo.callback(path.rmdir)


def _replace(new: Path, place: Path, older: Path, undo: ExitStack) -> None:
    """Move a file to its place, and what was there to ``older``.

    Each way back is prepared before the step that it undoes, since an interruption may fall
    between any two; going back without having gone does nothing.
    """
    if place.is_dir():
        raise IsADirectoryError(0, f"{place.name!r} in it is a folder; remove it")
    undo.callback(_move_if_there, older, place)
    _move_if_there(place, older)
    undo.callback(place.unlink, missing_ok=True)
    new.replace(place)


def _move_if_there(source: Path, target: Path) -> None:
    if source.exists():
        source.replace(target)


def _stage(folder: Path) -> Path:
    """A fresh folder in the nearest existing one, thus on the same file system."""
    nearest = folder.absolute()
    while not (nearest.exists() or nearest.is_symlink()):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise NotADirectoryError(0, f"{str(nearest)!r} is not a folder; name another one")
    return Path(tempfile.mkdtemp(prefix=".lowland-", dir=nearest))


def _explain(folder: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"cannot write to the folder {str(folder)!r}: {reason}")


def _remove(stage: Path) -> None:
    shutil.rmtree(stage, ignore_errors=True)

"""Writing results: all of them or none."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path


class OutputError(OSError):
    """A folder that cannot be written to."""


def check_writable(folder: Path) -> None:
    """Find out before the work starts whether results can be written; leaves no trace.

    Raises:
        OutputError: If the folder is a file, or cannot be made or written to.
    """
    _remove(_stage(folder))


def publish(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files into a folder, which is made if need be; older files of these names go.

    Everything is written beside its destination first and then moved, so that an interruption
    leaves no half-written file.

    Args:
        files: Contents by file name; the last one appears last.
        folder: Where to.

    Raises:
        OutputError: If the folder cannot be written to.
    """
    stage = _stage(folder)
    try:
        for name, content in files.items():
            (stage / name).write_bytes(content)
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            (stage / name).replace(folder / name)
    except OSError as error:
        raise OutputError(f"cannot write to {str(folder)!r}: {error.strerror}") from error
    finally:
        _remove(stage)


def _stage(folder: Path) -> Path:
    """A fresh folder in the nearest existing one, thus on the same file system."""
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    try:
        return Path(tempfile.mkdtemp(prefix=".lowland-", dir=nearest))
    except OSError as error:
        raise OutputError(f"cannot write to {str(folder)!r}: {error.strerror}") from None


def _remove(stage: Path) -> None:
    shutil.rmtree(stage, ignore_errors=True)

"""The entry point of the ``lowland`` command."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line, or say which extra it needs."""
    # A program started in the background may have been told to ignore Ctrl-C; so it stays.
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, _stop)
    for stream in (sys.stdout, sys.stderr):
        # λ and ± where the terminal or the file has no such letters: "?", not an error.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        from lowland.cli.app import app  # noqa: PLC0415 - the library itself must not need the extra
    except ModuleNotFoundError as error:
        sys.exit(
            f"Error: lowland's command line needs the package {error.name!r}; install it with "
            "pip install 'lowland[cli]'"
        )
    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app()
    finally:
        # All is said and written; the interpreter's own end must not be interrupted noisily.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    """End at once: while modules load, an exception could be taken for a failure of theirs."""
    os.write(2, b"Stopped; nothing was written.\n")
    os._exit(130)


if __name__ == "__main__":
    main()

"""The entry point of the ``lowland`` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say which extra it needs."""
    try:
        from lowland.cli import app  # noqa: PLC0415 - the library itself must not need the extra
    except ModuleNotFoundError as error:
        sys.exit(
            f"lowland's command line needs the package {error.name!r}; install it with "
            "pip install 'lowland[cli]'"
        )
    app()


if __name__ == "__main__":
    main()

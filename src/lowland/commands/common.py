"""What every command does alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from lowland.errors import UserError
from lowland.training import DivergenceError


@contextmanager
def one_line_errors(state: str) -> Iterator[None]:
    """Turn whatever a user can cause into one line and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Stopped; {state}.", err=True)
        raise typer.Exit(130) from None
    except DivergenceError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None


def require(met: bool, option: str, expected: str, got: float) -> None:  # noqa: FBT001
    """Refuse an option's value.

    Raises:
        UserError: Unless ``met``.
    """
    if not met:
        raise UserError(f"{option} must be {expected}; got {got}")

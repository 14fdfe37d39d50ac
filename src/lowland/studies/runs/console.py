"""What every command does alike: progress, refusals, and errors in one line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from lowland.errors import UserError


@contextmanager
def one_line_errors(state: str) -> Iterator[None]:
    """Turn whatever a user can cause into one line and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Stopped; {state}.", err=True)
        raise typer.Exit(130) from None
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        # What was asked for was in order where only the numbers left their range.
        raise typer.Exit(1 if isinstance(error, ArithmeticError) else 2) from None


def require(met: bool, option: str, expected: str, got: float) -> None:  # noqa: FBT001
    """Refuse an option's value.

    Raises:
        UserError: Unless ``met``.
    """
    if not met:
        raise UserError(f"{option} must be {expected}; got {got}")


def check_own_folder(out: Path) -> None:
    """Refuse the folder where the user happens to stand, which an empty name means too.

    Raises:
        UserError: If ``out`` is nothing but dots.
    """
    if not str(out).strip("."):
        raise UserError(f"--out must name a folder of its own; got {str(out)!r}")


@contextmanager
def stage_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left for each stage; a line when one ends where there is no terminal."""
    console = Console(stderr=True, highlight=False)
    begin = time.monotonic()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=3600,  # pieces may take minutes
    ) as progress:
        tasks: dict[str, TaskID] = {}

        def on_progress(title: str, done: int, total: int) -> None:
            description = title[0].upper() + title[1:]
            if title not in tasks:  # what an earlier run has done says nothing about speed
                tasks[title] = progress.add_task(description, total=total, completed=done)
            progress.update(tasks[title], completed=done)
            if done == total and not console.is_terminal:
                seconds = time.monotonic() - begin
                console.print(f"{description}: {total} of {total}, {seconds:.0f} s after the start")

        yield on_progress

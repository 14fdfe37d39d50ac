"""The command line: its commands, and how misuse of them is answered."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from inspect import getdoc
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lowland.cli.reproduce import REPRODUCE, help_text, reproduction_of
from lowland.studies.registry import STUDIES, Study


class _OneLineGroup(TyperGroup):
    """Commands whose misuse is answered like any other bad input: by one line."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run, and exit with a code; no arguments ask for help."""
        words = list(sys.argv[1:] if args is None else args) or ["--help"]
        try:
            code = super().main(words, *rest, **extra | {"standalone_mode": False})
        except Exception as error:
            # Where the parser's exceptions live depends on the version of typer.
            if not hasattr(error, "format_message"):
                raise
            reason = " ".join(error.format_message().split()).rstrip(".")
            if not reason:  # a group without a command has shown its help
                return sys.exit(0)
            context = getattr(error, "ctx", None)
            path = context.command_path if context else "lowland"
            typer.echo(f"Error: {reason}; see {path} --help", err=True)
            code = 2
        return sys.exit(code)


def _show_version(wanted: bool) -> bool:  # noqa: FBT001 - typer's callbacks take a value
    if wanted:
        typer.echo(f"lowland {version('lowland')}")
        raise typer.Exit
    return wanted


def main(
    *,
    _: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """Measure and control the curvature of neural-network losses."""


def commands(studies: Iterable[Study]) -> typer.Typer:
    """The command line of some studies."""
    app = typer.Typer(
        cls=_OneLineGroup,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
        callback=main,
    )
    reproduce = typer.Typer(no_args_is_help=True, help=REPRODUCE)
    for study in studies:
        if study.own_options:
            command = study.command()
            app.command(study.name, help=f"{study.help}\n\n{getdoc(command)}")(command)
        else:
            reproduce.command(study.name, help=help_text(study))(reproduction_of(study))
    app.add_typer(reproduce, name="reproduce")
    return app


app = commands(STUDIES)

"""``lowland reproduce``: a paper's study from scratch, and a page that holds it against ours."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lowland.errors import UserError
from lowland.studies.registry import Study
from lowland.studies.runs.console import check_own_folder, one_line_errors, require, stage_progress
from lowland.studies.runs.output import check_writable, publish

if TYPE_CHECKING:
    from lowland.studies.reporting.reproduction import Claim

MOST_JOBS = 8  # by default: more processes than that rather fill the memory

REPRODUCE = "Run a paper's study from scratch, and hold its claims against what comes out."

Preset = Annotated[
    str, typer.Option(metavar="NAME", help="quick, paper, or a TOML file with the same settings.")
]
Figures = Annotated[
    list[int] | None,
    typer.Option(
        metavar="N", help="Run what this figure needs, and draw it alone; may be repeated."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder for results, figures and page; lowland-results/STUDY-NAME if left out.",
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(metavar="N", help=f"Processes; one per core, at most {MOST_JOBS}, if left out."),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", help=r"Of a Dask cluster that computes instead (lowland\[cluster])."
    ),
]


def help_text(study: Study) -> str:
    """What ``lowland reproduce STUDY --help`` says of the study."""
    resumes = (
        "Stopped at any point, the same command goes on from there; once finished, it draws again."
    )
    if study.files:
        resumes = f"{study.files} are read from the folder that LOWLAND_DATA names. {resumes}"
    return f"{study.help}\n\n{resumes}"


def reproduction_of(study: Study) -> Callable[..., None]:
    """The command that runs a study, with the options that all of them share."""

    def command(
        preset: Preset = "quick",
        figure: Figures = None,
        out: Out = None,
        jobs: Jobs = None,
        scheduler: Scheduler = None,
    ) -> None:
        _reproduce(study, preset, figure=figure, out=out, jobs=jobs, scheduler=scheduler)

    return command


def _reproduce(
    study: Study,
    preset: str,
    *,
    figure: list[int] | None,
    out: Path | None,
    jobs: int | None,
    scheduler: str | None,
) -> None:
    """Run a study and write what comes of it."""
    folder = Path("lowland-results") / f"{study.name}-{Path(preset).stem}" if out is None else out
    kept = f"what was finished is in {folder}, and the same command goes on from there"
    with one_line_errors(kept):
        check_own_folder(folder)
        if jobs is not None:
            require(jobs >= 1, "--jobs", "at least 1", jobs)
            if scheduler is not None:
                raise UserError("--jobs and --scheduler: give one; a cluster has its own workers")
        check_writable(folder)

        # Imported late, as in compare.
        from lowland.studies.reporting.reproduction import drawing  # noqa: PLC0415
        from lowland.studies.runs.jobs import Store  # noqa: PLC0415
        from lowland.studies.runs.presets import preset_text  # noqa: PLC0415
        from lowland.studies.runs.workers import workers  # noqa: PLC0415

        experiment = study.experiment()
        settings = experiment.load(preset)
        numbers = list(dict.fromkeys(figure or experiment.figures))
        expected = f"{min(experiment.figures)} to {max(experiment.figures)}"
        for number in numbers:
            require(number in experiment.figures, "--figure", expected, number)
        with workers(jobs or _cores(scheduler), scheduler) as executor, stage_progress() as tell:
            store = Store.open(
                folder / "pieces",
                {"study": study.name, "lowland": version("lowland"), **settings.to_dict()},
            )
            results = experiment.run(
                settings,
                store,
                stages=experiment.needed(numbers) if figure else experiment.stages,
                executor=executor,
                on_progress=tell,
            )
        for task, reason in getattr(results, "skipped", {}).items():
            typer.echo(f"Left out: {task}: {reason}", err=True)
        if figure:
            drawings = [drawing(experiment.figures[number], results) for number in numbers]
            files = {drawn.file: drawn.svg for drawn in drawings}
        else:
            command = ["lowland", "reproduce", study.name, "--preset", preset, "--out", str(folder)]
            text = preset_text(study.package, preset)
            result = experiment.report(results, settings=text, command=shlex.join(command))
            files = result.files()
        publish(files, folder)
    with one_line_errors(f"the results are in {folder}"):
        if figure:
            for name in files:
                typer.echo(folder / name)
        else:
            _show(result.claims)
            typer.echo(f"The page with all of it: {folder / 'index.html'}")


def _cores(scheduler: str | None) -> int:
    """Processes to take where the user names no number."""
    if scheduler is not None:
        return 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(usable or 1, MOST_JOBS)


def _show(claims: Sequence[Claim]) -> None:
    """The claims and what became of them, in the terminal."""
    view = Table(box=SIMPLE_HEAD, pad_edge=False)
    view.add_column("where", no_wrap=True)
    view.add_column("claim")
    view.add_column("here")
    view.add_column("", no_wrap=True)
    for claim in claims:
        view.add_row(claim.where, claim.text, claim.found, claim.verdict)
    console = Console(highlight=False)
    Console(width=max(console.width, 100), highlight=False).print(view, markup=False)

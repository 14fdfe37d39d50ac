"""``lowland compare``: train on real data with and without curvature control."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lowland.activations import ACTIVATIONS
from lowland.commands.common import one_line_errors, require
from lowland.errors import UserError
from lowland.output import check_writable, publish
from lowland.training import METHODS, Method, Schedule

if TYPE_CHECKING:
    from lowland.datasets import Dataset
    from lowland.experiments.compare import Comparison, Settings

_PENALTY_COST = 2  # of a step with penalties beyond one without; only the time left depends on it


def compare(  # noqa: PLR0917 - typer fills in every one by name
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA.CSV",
            help="A CSV file with a header line and numeric features; "
            "Breast Cancer Wisconsin if left out.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="What to predict in the CSV file: two classes."),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(metavar="A,B", help="Which to compare; the baseline is always among them."),
    ] = ",".join(METHODS),
    hidden: Annotated[int, typer.Option(metavar="N", help="Hidden units.")] = 4,
    activation: Annotated[
        str,
        typer.Option(metavar="NAME", help=f"Of the hidden layer: {', '.join(ACTIVATIONS)}."),
    ] = "sigmoid",
    seeds: Annotated[
        int,
        typer.Option(metavar="N", help="Networks per method, each with its own split and start."),
    ] = 30,
    first_seed: Annotated[
        int, typer.Option(metavar="N", help="The first of these consecutive seeds.")
    ] = 0,
    steps: Annotated[
        int, typer.Option(metavar="N", help="Most steps of training.")
    ] = Schedule.steps,
    learning_rate: Annotated[
        float, typer.Option(metavar="RATE", help="Of the loss and the penalty alike.")
    ] = Schedule.learning_rate,
    active: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Of the steps, in which penalties act: the first ones."),
    ] = Schedule.active,
    weight: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD=VALUE", help="Weight of a penalty; may be repeated."),
    ] = None,
    test_size: Annotated[
        float, typer.Option(metavar="SHARE", help="Of the samples, to test on.")
    ] = 0.25,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the page, tables and figures.")
    ] = Path("lowland-results/compare"),
) -> None:
    """Train on real data with and without curvature control, and compare.

    Writes a page (index.html), tables (CSV) and figures (PNG, SVG).
    """
    with one_line_errors("nothing was written"):
        chosen = _parse_methods(methods, weight or [])
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"unknown activation {activation!r}; expected one of {known}")
        require(hidden >= 1, "--hidden", "at least 1", hidden)
        # One network has no standard error; more than this fill the memory.
        require(2 <= seeds <= 10_000, "--seeds", "between 2 and 10000", seeds)
        require(0 <= first_seed < 2**32 - seeds, "--first-seed", "between 0 and 2^32", first_seed)
        require(steps >= 1, "--steps", "at least 1", steps)
        require(0 < learning_rate < math.inf, "--learning-rate", "positive", learning_rate)
        require(0 <= active <= 1, "--active", "between 0 and 1", active)
        require(0 < test_size < 1, "--test-size", "between 0 and 1", test_size)
        if data is None and target is not None:
            raise UserError("--target needs a CSV file: lowland compare DATA.CSV --target COLUMN")
        if data is not None and target is None:
            raise UserError(f"which column of {str(data)!r} to predict? add --target COLUMN")
        check_writable(out)

        # Imported late: neither --help nor a mistyped option should wait for scikit-learn.
        from lowland.experiments import compare as experiment  # noqa: PLC0415

        dataset = _load(data, target)
        settings = experiment.Settings(
            chosen,
            hidden,
            activation,
            seeds,
            first_seed,
            test_size,
            Schedule(steps=steps, learning_rate=learning_rate, active=active),
        )
        with _progress(settings) as on_step:
            comparison = experiment.compare(dataset, settings, on_step=on_step)
        publish(_files(comparison, spell_out(settings, data, target, out)), out)
    with one_line_errors(f"the results are in {out}"):
        _show(comparison)
        typer.echo(f"The page with all of it: {out / 'index.html'}")


def _parse_methods(names: str, weights: Sequence[str]) -> tuple[Method, ...]:
    """The methods named, with the weights given."""
    known = ", ".join(METHODS)
    chosen: dict[str, Method] = {}
    for name in map(str.strip, names.split(",")):
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}; expected some of {known}")
        if name in chosen:
            raise UserError(f"method {name!r} is named twice in --methods; name it once")
        chosen[name] = METHODS[name]
    weighted = set()
    for entry in weights:
        name, _, value = entry.partition("=")
        if name not in chosen or chosen[name].penalty_gradient is None:
            raise UserError(
                f"--weight {entry}: expected METHOD=VALUE with a penalty that is compared; "
                f"got {name!r}"
            )
        if name in weighted:
            raise UserError(f"--weight {entry}: {name!r} already has a weight; give one")
        weighted.add(name)
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            raise UserError(
                f"--weight {entry}: expected METHOD=VALUE with a number of at least 0; "
                f"got {value!r}"
            )
        chosen[name] = replace(chosen[name], weight=number)
    return tuple(chosen.values())


def _load(data: Path | None, target: str | None) -> Dataset:
    from lowland.datasets import breast_cancer, read_csv  # noqa: PLC0415 - as in compare

    if data is None or target is None:
        return breast_cancer()
    return read_csv(data, target)


@contextmanager
def _progress(settings: Settings) -> Iterator[Callable[[int], None]]:
    """A bar with the time left, on terminals only."""
    schedule, methods = settings.schedule, settings.methods
    heavy = schedule.active_steps * any(method.penalty_gradient is not None for method in methods)
    console = Console(stderr=True)
    with Progress(
        TextColumn("Training {task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        # Counted in plain steps, or the dear ones at the start would make it promise too much.
        task = progress.add_task(
            f"{len(methods)} x {settings.seeds} networks",
            total=heavy * _PENALTY_COST + schedule.steps,
        )
        yield lambda done: progress.update(task, completed=min(done, heavy) * _PENALTY_COST + done)


def spell_out(settings: Settings, data: Path | None, target: str | None, out: Path) -> str:
    """The command that repeats a comparison, every setting written down."""
    schedule = settings.schedule
    words = ["lowland", "compare"]
    if data is not None and target is not None:
        words += [str(data), "--target", target]
    words += ["--methods", ",".join(method.name for method in settings.methods)]
    words += ["--hidden", str(settings.hidden), "--activation", settings.activation]
    words += ["--seeds", str(settings.seeds), "--first-seed", str(settings.first_seed)]
    words += ["--steps", str(schedule.steps), "--learning-rate", f"{schedule.learning_rate!r}"]
    words += ["--active", f"{schedule.active!r}", "--test-size", f"{settings.test_size!r}"]
    for method in settings.methods:
        if method.penalty_gradient is not None:
            words += ["--weight", f"{method.name}={method.weight!r}"]
    return shlex.join([*words, "--out", str(out)])


def _files(comparison: Comparison, command: str) -> dict[str, bytes]:
    """Everything to write, by file name; the page last."""
    from lowland import plots, report  # noqa: PLC0415 - as in compare

    networks, history = comparison.networks, comparison.history
    active_steps = comparison.settings.schedule.active_steps
    figures = {
        "curves": plots.training_curves(history, active_steps=active_steps),
        "spectrum": plots.spectrum_boxes(networks),
        "bound": plots.bound_against_eigenvalue(networks),
    }
    vectors = {name: plots.render(figure, "svg") for name, figure in figures.items()}
    page = report.render_page(comparison, vectors, command=command)
    return {
        "summary.csv": comparison.to_frame().to_csv(index=False).encode(),
        "networks.csv": networks.to_csv(index=False).encode(),
        "history.csv": history.to_csv(index=False).encode(),
        **{f"{name}.svg": content for name, content in vectors.items()},
        **{f"{name}.png": plots.render(figure, "png") for name, figure in figures.items()},
        "index.html": page.encode(),
    }


def _show(comparison: Comparison) -> None:
    """The table and what it says, in the terminal."""
    from lowland import report  # noqa: PLC0415 - as in compare

    view = Table(box=SIMPLE_HEAD, title=comparison.dataset.name, pad_edge=False)
    view.add_column("", no_wrap=True)
    for method in comparison.settings.methods:
        view.add_column(method.title, no_wrap=True)
    for title, cells in report.table(comparison):
        view.add_row(title, *("\n".join(filter(None, cell)) for cell in cells))
    console = Console(highlight=False)
    # Too narrow a terminal may wrap the lines; cut numbers would be lost.
    needed = Console(width=1000).measure(view).maximum
    Console(width=max(console.width, needed), highlight=False).print(view)
    for sentence in report.findings(comparison):
        console.print(sentence, markup=False, soft_wrap=not console.is_terminal)

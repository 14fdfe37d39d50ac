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
from lowland.errors import UserError
from lowland.studies.compare.settings import DEFAULT_DATA, DEFAULTS, Settings
from lowland.studies.data.carried import CARRIED
from lowland.studies.ensembles.training import METHODS, Method, Schedule
from lowland.studies.runs.console import check_own_folder, one_line_errors, require
from lowland.studies.runs.output import check_writable, publish

if TYPE_CHECKING:
    from lowland.studies.compare.comparison import Comparison

_PENALTY_COST = 2  # of a step with penalties beyond one without; only the time left depends on it


def _widths(hidden: Sequence[int]) -> str:
    """Hidden layers as on the command line."""
    return ",".join(map(str, hidden))


def _weights(settings: Settings) -> str:
    """The penalties' weights, for the help."""
    penalties = [method for method in settings.methods if method.penalty_gradient is not None]
    return ", ".join(f"{method.name}={method.weight:g}" for method in penalties)


def _defaults(show: Callable[[Settings], object]) -> str:
    """What the help says about a default that depends on the data."""
    first, *others = DEFAULTS
    values = {name: str(show(DEFAULTS[name])) for name in DEFAULTS}
    own = [f"{name}: {values[name]}" for name in others if values[name] != values[first]]
    return "; ".join([values[first], *own])


def command(  # noqa: PLR0917 - typer fills in every one by name
    table: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA.CSV",
            help="A CSV file with a header line and numeric features; true and false count as "
            "1 and 0.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="What to predict in the CSV file: two classes or more."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Without a CSV file: breast-cancer (two classes; a minute on two cores) or digits "
            "(ten classes; three minutes).",
            show_default=DEFAULT_DATA,
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(metavar="A,B", help="Which to compare; the baseline is always among them."),
    ] = ",".join(METHODS),
    hidden: Annotated[
        str | None,
        typer.Option(
            metavar="N,M",
            help="Units of each hidden layer, as 32 or 32,16.",
            show_default=_defaults(lambda settings: _widths(settings.hidden)),
        ),
    ] = None,
    activation: Annotated[
        str,
        typer.Option(metavar="NAME", help=f"Of the hidden layers: {', '.join(ACTIVATIONS)}."),
    ] = "sigmoid",
    seeds: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Networks per method, each with its own split and start.",
            show_default=_defaults(lambda settings: settings.seeds),
        ),
    ] = None,
    first_seed: Annotated[
        int, typer.Option(metavar="N", help="The first of these consecutive seeds.")
    ] = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Most steps of training.",
            show_default=_defaults(lambda settings: settings.schedule.steps),
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            help="Of the loss and the penalty alike.",
            show_default=_defaults(lambda settings: settings.schedule.learning_rate),
        ),
    ] = None,
    active: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Of the steps, in which penalties act: the first ones."),
    ] = Schedule.active,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD=VALUE",
            help="Weight of a penalty; may be repeated.",
            show_default=_defaults(_weights),
        ),
    ] = None,
    test_size: Annotated[
        float, typer.Option(metavar="SHARE", help="Of the samples, to test on.")
    ] = Settings.test_size,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the page, tables and figures.")
    ] = Path("lowland-results/compare"),
) -> None:
    """Writes a page (index.html), tables (CSV) and figures (PNG, SVG)."""
    with one_line_errors("nothing was written"):
        if data is not None and data not in CARRIED:
            raise UserError(
                f"unknown data {data!r}; expected one of {', '.join(CARRIED)}, or a file: "
                "lowland compare DATA.CSV --target COLUMN"
            )
        if table is None and target is not None:
            raise UserError("--target needs a CSV file: lowland compare DATA.CSV --target COLUMN")
        if table is not None and data is not None:
            raise UserError(f"--data {data} and {str(table)!r}: give one")
        if table is not None and target is None:
            raise UserError(f"which column of {str(table)!r} to predict? add --target COLUMN")
        default = DEFAULTS.get(data or DEFAULT_DATA, DEFAULTS[DEFAULT_DATA])
        settings = Settings(
            _parse_methods(methods, weight or [], default),
            default.hidden if hidden is None else _parse_widths(hidden),
            activation,
            default.seeds if seeds is None else seeds,
            first_seed,
            test_size,
            replace(
                default.schedule,
                steps=default.schedule.steps if steps is None else steps,
                learning_rate=(
                    default.schedule.learning_rate if learning_rate is None else learning_rate
                ),
                active=active,
            ),
        )
        _check(settings)
        check_own_folder(out)
        check_writable(out)

        # Imported late: neither --help nor a mistyped option should wait for scikit-learn.
        from lowland.studies.compare.comparison import compare  # noqa: PLC0415
        from lowland.studies.data.tables import read_csv  # noqa: PLC0415

        if table is not None and target is not None:
            source = [str(table), "--target", target]
            dataset = read_csv(table, target)
        else:
            source = ["--data", data or DEFAULT_DATA]
            dataset = CARRIED[data or DEFAULT_DATA]()
        with _progress(settings) as on_step:
            comparison = compare(dataset, settings, on_step=on_step)
        publish(_files(comparison, spell_out(settings, source, out)), out)
    with one_line_errors(f"the results are in {out}"):
        _show(comparison)
        typer.echo(f"The page with all of it: {out / 'index.html'}")


def _parse_widths(text: str) -> tuple[int, ...]:
    """The units of each hidden layer."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise UserError(
            f"--hidden must be the units of each hidden layer, from 1, as 32 or 32,16; got {text!r}"
        )
    return tuple(map(int, words))


def _parse_methods(names: str, weights: Sequence[str], default: Settings) -> tuple[Method, ...]:
    """The methods named, with the weights given."""
    offered = {method.name: method for method in default.methods}
    known = ", ".join(offered)
    chosen: dict[str, Method] = {}
    for name in map(str.strip, names.split(",")):
        if name not in offered:
            raise UserError(f"unknown method {name!r}; expected some of {known}")
        if name in chosen:
            raise UserError(f"method {name!r} is named twice in --methods; name it once")
        chosen[name] = offered[name]
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


def _check(settings: Settings) -> None:
    """Refuse what cannot be run.

    Raises:
        UserError: With the option and what it takes.
    """
    if settings.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"unknown activation {settings.activation!r}; expected one of {known}")
    seeds, first, schedule = settings.seeds, settings.first_seed, settings.schedule
    # One network has no standard error; more than this fill the memory.
    require(2 <= seeds <= 10_000, "--seeds", "between 2 and 10000", seeds)
    require(0 <= first < 2**32 - seeds, "--first-seed", "between 0 and 2^32", first)
    require(schedule.steps >= 1, "--steps", "at least 1", schedule.steps)
    rate = schedule.learning_rate
    require(0 < rate < math.inf, "--learning-rate", "positive", rate)
    require(0 <= schedule.active <= 1, "--active", "between 0 and 1", schedule.active)
    require(0 < settings.test_size < 1, "--test-size", "between 0 and 1", settings.test_size)


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


def spell_out(settings: Settings, source: Sequence[str], out: Path) -> str:
    """The command that repeats a comparison, every setting written down."""
    schedule = settings.schedule
    words = ["lowland", "compare", *source]
    words += ["--methods", ",".join(method.name for method in settings.methods)]
    words += ["--hidden", _widths(settings.hidden), "--activation", settings.activation]
    words += ["--seeds", str(settings.seeds), "--first-seed", str(settings.first_seed)]
    words += ["--steps", str(schedule.steps), "--learning-rate", f"{schedule.learning_rate!r}"]
    words += ["--active", f"{schedule.active!r}", "--test-size", f"{settings.test_size!r}"]
    for method in settings.methods:
        if method.penalty_gradient is not None:
            words += ["--weight", f"{method.name}={method.weight!r}"]
    return shlex.join([*words, "--out", str(out)])


def _files(comparison: Comparison, command: str) -> dict[str, bytes]:
    """Everything to write, by file name; the page last."""
    from lowland.studies.compare import figures, report  # noqa: PLC0415 - as in command
    from lowland.studies.reporting import look  # noqa: PLC0415 - as in command

    networks, history = comparison.networks, comparison.history
    active_steps = comparison.settings.schedule.active_steps
    drawn = {
        "curves": figures.training_curves(history, active_steps=active_steps),
        "spectrum": figures.spectrum_boxes(networks),
        "bound": figures.bound_against_eigenvalue(networks),
    }
    vectors = {name: look.render(figure, "svg") for name, figure in drawn.items()}
    page = report.render_page(comparison, vectors, command=command)
    return {
        "summary.csv": comparison.to_frame().to_csv(index=False).encode(),
        "networks.csv": networks.to_csv(index=False).encode(),
        "history.csv": history.to_csv(index=False).encode(),
        **{f"{name}.svg": content for name, content in vectors.items()},
        **{f"{name}.png": look.render(figure, "png") for name, figure in drawn.items()},
        "index.html": page.encode(),
    }


def _show(comparison: Comparison) -> None:
    """The table and what it says, in the terminal."""
    from lowland.studies.compare import report  # noqa: PLC0415 - as in command

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

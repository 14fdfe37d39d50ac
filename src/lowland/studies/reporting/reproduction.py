"""What a paper's reproduction consists of, and its page."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pandas as pd
from matplotlib.figure import Figure

from lowland.studies.reporting import look
from lowland.studies.reporting.pages import data_uri, render
from lowland.studies.runs.jobs import Store
from lowland.studies.runs.stages import Progress
from lowland.threads import threads


@dataclass(frozen=True)
class Claim:
    """One claim and what became of it here.

    Attributes:
        figure: The figure that shows it; None if there is none.
        text: The claim, in our words.
        published: The paper's number, if it gives one.
        found: Ours, with the test that decides.
        holds: Whether it holds here.
        place: Where in the paper it stands, unless it is in a figure of the same number.
    """

    figure: int | None
    text: str
    published: str
    found: str
    holds: bool
    place: str = ""

    @property
    def where(self) -> str:
        """Where in the paper the claim stands."""
        return self.place or ("text" if self.figure is None else f"figure {self.figure}")

    @property
    def verdict(self) -> str:
        """The decision in words."""
        return "holds" if self.holds else "not found"


@dataclass(frozen=True)
class Drawing:
    """A figure as it appears on the page.

    Attributes:
        number: As in the paper.
        title: A few words.
        caption: What is drawn, in one or two sentences.
        svg: The figure itself.
    """

    number: int
    title: str
    caption: str
    svg: bytes

    @property
    def file(self) -> str:
        """The name of the figure's file beside the page."""
        return f"figure-{self.number:02d}.svg"


@dataclass(frozen=True)
class Listing:
    """A table as it appears on the page.

    Attributes:
        title: A few words.
        caption: What the columns are, in one or two sentences.
        header: The names of the columns.
        rows: What they hold, ready to be read; the first entry names the row.
    """

    title: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """A section with the table."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        table = "\n".join(_row(*line) for line in lines)
        return f"## {self.title}\n\n{table}\n\n{self.caption}\n"


def _row(*cells: str) -> str:
    """A row of a table in Markdown; bars within a cell are escaped."""
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


@dataclass(frozen=True)
class Reproduction:
    """Everything that a reproduction shows.

    Attributes:
        title: Of the page.
        lead: What was run, in a sentence or two.
        drawings: The figures, in their order.
        claims: What the paper claims, and what became of it.
        tables: Results by file name without its ending.
        settings: The preset with its reasons, as TOML.
        command: What repeats it.
        listings: Tables that the page shows.
    """

    title: str
    lead: str
    drawings: Sequence[Drawing]
    claims: Sequence[Claim]
    tables: Mapping[str, pd.DataFrame]
    settings: str
    command: str
    listings: Sequence[Listing] = ()

    def files(self) -> dict[str, bytes]:
        """Everything to write, by file name; the page last."""
        tables = {"claims": claims_table(self.claims), **self.tables}
        return {
            **{f"{name}.csv": table.to_csv(index=False).encode() for name, table in tables.items()},
            **{drawing.file: drawing.svg for drawing in self.drawings},
            "summary.md": self.summary().encode(),
            "index.html": self.page().encode(),
        }

    def summary(self) -> str:
        """The claims and the figures in Markdown, to be shown beside the figures' files."""
        rows = [
            _row(
                claim.where,
                claim.text,
                claim.published,
                claim.found,
                f"**{claim.verdict}**" if claim.holds else claim.verdict,
            )
            for claim in self.claims
        ]
        figures = [
            f"## Figure {drawing.number}. {drawing.title}\n\n![{drawing.title}]({drawing.file})\n\n"
            f"{drawing.caption}\n"
            for drawing in self.drawings
        ]
        table = "\n".join(
            ["| where | claim | published | here | |", "| --- | --- | --- | --- | --- |", *rows]
        )
        return "\n".join(
            [
                f"# {self.title}\n",
                f"{self.lead} {self.verdict}\n",
                f"```sh\n{self.command}\n```\n",
                f"{table}\n",
                *(listing.markdown() for listing in self.listings),
                *figures,
            ]
        )

    @property
    def verdict(self) -> str:
        """How many claims hold, in a sentence."""
        holding = sum(claim.holds for claim in self.claims)
        return (
            f"{holding} of {len(self.claims)} claims hold here, each decided by the test that "
            f"stands beside it; {len(self.claims) - holding} did not come out."
        )

    def page(self) -> str:
        """One HTML page, which needs no other file."""
        return render(
            "reporting/templates/reproduction.html",
            command=self.command,
            reproduction=self,
            images={drawing.number: data_uri(drawing.svg) for drawing in self.drawings},
        )


def claims_table(claims: Sequence[Claim]) -> pd.DataFrame:
    """One row a claim: where, claim, published, found, holds."""
    return pd.DataFrame(
        [
            {
                "where": claim.where,
                "claim": claim.text,
                "published": claim.published,
                "found": claim.found,
                "holds": claim.holds,
            }
            for claim in claims
        ],
        columns=["where", "claim", "published", "found", "holds"],
    )


@dataclass(frozen=True)
class StudyFigure:
    """A figure of a study.

    Attributes:
        number: As in the paper, or its place on the page.
        title: A few words.
        caption: What is drawn, in one or two sentences.
        draw: Makes the figure from the study's results.
        stage: What has to be run for it: the names of stages, separated by spaces.
    """

    number: int
    title: str
    caption: str
    draw: Callable[[Any], Figure]
    stage: str = ""


@runtime_checkable
class Runner(Protocol):
    """A function that runs the stages that a store lacks, and loads them all."""

    def __call__(  # noqa: D102
        self,
        preset: Any,
        store: Store,
        *,
        stages: Collection[str],
        executor: Executor | None,
        on_progress: Progress | None,
    ) -> Any: ...


@runtime_checkable
class Report(Protocol):
    """A function that makes a reproduction of the results of all stages."""

    def __call__(self, results: Any, *, settings: str, command: str) -> Reproduction: ...  # noqa: D102


@dataclass(frozen=True)
class Experiment:
    """How a study runs, and what it shows.

    Attributes:
        load: A preset by name or path; it has a ``to_dict()`` of what decides the results.
        stages: Everything that can be run.
        run: Runs them. Where its results have a dictionary ``skipped``, these are tasks that could
            not be run, and why.
        figures: By number.
        report: Makes a run of all stages a reproduction.
    """

    load: Callable[[str], Any]
    stages: Collection[str]
    run: Runner
    figures: Mapping[int, StudyFigure]
    report: Report

    def needed(self, numbers: Iterable[int]) -> set[str]:
        """The stages that some figures need."""
        return {stage for number in numbers for stage in self.figures[number].stage.split()}


def drawing(figure: StudyFigure, results: object) -> Drawing:
    """A figure of a study's results, drawn."""
    with threads(1):
        svg = look.render(figure.draw(results), "svg")
    return Drawing(figure.number, figure.title, figure.caption, svg)

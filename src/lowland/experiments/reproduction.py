"""What a paper's reproduction consists of, and its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lowland.pages import data_uri, render


@dataclass(frozen=True)
class Claim:
    """One claim and what became of it here.

    Attributes:
        figure: The figure that shows it; None for a number in the text.
        text: The claim, in our words.
        published: The paper's number, if it gives one.
        found: Ours, with the test that decides.
        holds: Whether it holds here.
    """

    figure: int | None
    text: str
    published: str
    found: str
    holds: bool

    @property
    def where(self) -> str:
        """Where in the paper it stands."""
        return "text" if self.figure is None else f"figure {self.figure}"

    @property
    def verdict(self) -> str:
        """For people."""
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
        """Its name beside the page."""
        return f"figure-{self.number:02d}.svg"


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
    """

    title: str
    lead: str
    drawings: Sequence[Drawing]
    claims: Sequence[Claim]
    tables: Mapping[str, pd.DataFrame]
    settings: str
    command: str

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
            f"| {claim.where} | {claim.text} | {claim.published} | {claim.found} | "
            f"{f'**{claim.verdict}**' if claim.holds else claim.verdict} |"
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
            "reproduction.html",
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

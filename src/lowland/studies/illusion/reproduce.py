"""The study as a reproduction: its figures drawn, its claims judged, its numbers in tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from lowland.studies.illusion.claims import judge
from lowland.studies.illusion.figures import FIGURES, NothingToDrawError
from lowland.studies.illusion.listings import listings
from lowland.studies.illusion.preset import load_preset
from lowland.studies.illusion.run import STAGES, Results, run_study
from lowland.studies.illusion.tables import tables
from lowland.studies.reporting.reproduction import Drawing, Experiment, Reproduction, drawing


def reproduction(results: Results, *, settings: str, command: str) -> Reproduction:
    """A run of the study as a page, with its figures, claims and tables.

    Args:
        results: Of every stage.
        settings: The preset's text.
        command: What repeats the run.
    """
    count = sum(task.seeds * len(results.preset.regimes(task)) for task in results.tasks())
    left_out = (
        f" Left out for want of files: {', '.join(results.skipped)}." if results.skipped else ""
    )
    theirs = sum(len(part["seed"]) for part in results.hsr.values())
    joined = f", and {theirs} of the HSR study" if theirs else ""
    return Reproduction(
        "Are flat minima an illusion? Reproduced",
        f"Sharpness against weakness as what tells which network is right on new points: {count:,} "
        f"networks on {'; '.join(dict.fromkeys(results.titles.values()))}{joined}. The claims are "
        f"those of arXiv:2605.05209.{left_out}",
        list(_drawings(results)),
        judge(results),
        tables(results),
        settings,
        command,
        listings(results),
    )


def _drawings(results: Results) -> Iterator[Drawing]:
    """The figures of whose networks the run has some."""
    for figure in FIGURES.values():
        with suppress(NothingToDrawError):
            yield drawing(figure, results)


EXPERIMENT = Experiment(load_preset, STAGES, run_study, FIGURES, reproduction)

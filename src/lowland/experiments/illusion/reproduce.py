"""The study as a reproduction: its figures drawn, its claims judged, its numbers in tables."""

from __future__ import annotations

from lowland.experiments.illusion.claims import judge
from lowland.experiments.illusion.figures import FIGURES
from lowland.experiments.illusion.listings import listings
from lowland.experiments.illusion.preset import PACKAGE, load_preset
from lowland.experiments.illusion.run import STAGES, Study, run_study
from lowland.experiments.illusion.tables import tables
from lowland.experiments.reproduction import Paper, Reproduction, drawing


def reproduction(study: Study, *, settings: str, command: str) -> Reproduction:
    """All of it.

    Args:
        study: With every stage.
        settings: The preset's text.
        command: What repeats the run.
    """
    count = sum(task.seeds * len(study.preset.regimes(task)) for task in study.tasks())
    left_out = f" Left out for want of files: {', '.join(study.skipped)}." if study.skipped else ""
    theirs = sum(len(part["seed"]) for part in study.hsr.values())
    joined = f", and {theirs} of the HSR study" if theirs else ""
    return Reproduction(
        "Are flat minima an illusion? Reproduced",
        f"Sharpness against weakness as what tells which network is right on new points: {count:,} "
        f"networks on {'; '.join(dict.fromkeys(study.titles.values()))}{joined}. The claims are "
        f"those of arXiv:2605.05209.{left_out}",
        [drawing(figure, study) for figure in FIGURES.values()],
        judge(study),
        tables(study),
        settings,
        command,
        listings(study),
    )


PAPER = Paper("illusion", PACKAGE, load_preset, STAGES, run_study, FIGURES, reproduction)

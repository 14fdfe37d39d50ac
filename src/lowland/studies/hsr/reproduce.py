"""The study as a reproduction: its figures drawn, its claims judged, its numbers in tables."""

from __future__ import annotations

from lowland.studies.hsr.claims import judge
from lowland.studies.hsr.figures import FIGURES
from lowland.studies.hsr.preset import PACKAGE, load_preset
from lowland.studies.hsr.run import STAGES, Study, run_study
from lowland.studies.hsr.tables import tables
from lowland.studies.reporting.reproduction import Paper, Reproduction, drawing
from lowland.threads import threads


def reproduction(study: Study, *, settings: str, command: str) -> Reproduction:
    """All of it.

    Args:
        study: With every stage.
        settings: The preset's text.
        command: What repeats the run.
    """
    preset, selection = study.preset, study.selection
    with threads(1):
        claims = judge(study)
    controlled = len(selection.sharp) + len(selection.flat)
    return Reproduction(
        "HSR regularization, reproduced",
        f"The numerical study of arXiv:2606.28662 run from scratch: {preset.seeds:,} networks "
        f"searched for critical points, of which {len(selection.converged):,} converged and "
        f"{len(selection.distinct):,} were distinct; the sharpest and the flattest, {controlled} "
        "in all, trained again by four methods.",
        [drawing(figure, study) for figure in FIGURES.values()],
        claims,
        tables(study),
        settings,
        command,
    )


PAPER = Paper("hsr", PACKAGE, load_preset, STAGES, run_study, FIGURES, reproduction)

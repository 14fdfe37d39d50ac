"""The study as a reproduction: its figures drawn, its claims judged, its numbers in tables."""

from __future__ import annotations

from lowland.studies.hsr.claims import judge
from lowland.studies.hsr.figures import FIGURES
from lowland.studies.hsr.preset import load_preset
from lowland.studies.hsr.run import STAGES, Results, run_study
from lowland.studies.hsr.tables import tables
from lowland.studies.reporting.reproduction import Experiment, Reproduction, drawing
from lowland.threads import threads


def reproduction(results: Results, *, settings: str, command: str) -> Reproduction:
    """A run of the study as a page, with its figures, claims and tables.

    Args:
        results: Of every stage.
        settings: The preset's text.
        command: What repeats the run.
    """
    preset, selection = results.preset, results.selection
    with threads(1):
        claims = judge(results)
    controlled = len(selection.sharp) + len(selection.flat)
    return Reproduction(
        "HSR regularization, reproduced",
        f"The numerical study of arXiv:2606.28662 run from scratch: {preset.seeds:,} networks "
        f"searched for critical points, of which {len(selection.converged):,} converged and "
        f"{len(selection.distinct):,} were distinct; the sharpest and the flattest, {controlled} "
        "in all, trained again by the paper's four methods and, ours, by descent on λ_max itself.",
        [drawing(figure, results) for figure in FIGURES.values()],
        claims,
        tables(results),
        settings,
        command,
    )


EXPERIMENT = Experiment(load_preset, STAGES, run_study, FIGURES, reproduction)

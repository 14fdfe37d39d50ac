"""The study as a reproduction: its figures drawn, its claims judged, its numbers in tables."""

from __future__ import annotations

from lowland.studies.flatness.claims import judge
from lowland.studies.flatness.figures import FIGURES
from lowland.studies.flatness.preset import load_preset
from lowland.studies.flatness.run import STAGES, Results, run_study
from lowland.studies.flatness.tables import listings, tables
from lowland.studies.reporting.reproduction import Experiment, Reproduction, drawing


def reproduction(results: Results, *, settings: str, command: str) -> Reproduction:
    """A run of the study as a page, with its figures, claims and tables.

    Args:
        results: Of every stage.
        settings: The preset's text.
        command: What repeats the run.
    """
    count = sum(task.seeds * len(results.preset.ways(task)) for task in results.tasks)
    left_out = "".join(
        f" Left out: {name}, since {reason}." for name, reason in results.skipped.items()
    )
    return Reproduction(
        "Flatness-aware regularization, reproduced",
        f"Training with the penalty λ Tr(H²)/B from scratch: {count:,} networks on "
        f"{'; '.join(results.titles.values())}; the same beside it with HSR, the Hessian trace, "
        f"SAM and adaptive SAM.{left_out}",
        [drawing(figure, results) for figure in FIGURES.values()],
        judge(results),
        tables(results),
        settings,
        command,
        listings(results),
    )


EXPERIMENT = Experiment(load_preset, STAGES, run_study, FIGURES, reproduction)

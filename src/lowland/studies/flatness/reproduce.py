"""The study as a reproduction: its figures drawn, its claims judged, its numbers in tables."""

from __future__ import annotations

from lowland.studies.flatness.claims import judge
from lowland.studies.flatness.figures import FIGURES
from lowland.studies.flatness.preset import PACKAGE, load_preset
from lowland.studies.flatness.run import STAGES, Study, run_study
from lowland.studies.flatness.tables import listings, tables
from lowland.studies.reporting.reproduction import Paper, Reproduction, drawing


def reproduction(study: Study, *, settings: str, command: str) -> Reproduction:
    """All of it.

    Args:
        study: With every stage.
        settings: The preset's text.
        command: What repeats the run.
    """
    count = sum(task.seeds * len(study.preset.ways(task)) for task in study.tasks)
    left_out = "".join(
        f" Left out: {name}, since {reason}." for name, reason in study.skipped.items()
    )
    return Reproduction(
        "Flatness-aware regularization, reproduced",
        f"Training with the penalty λ Tr(H²)/B from scratch: {count:,} networks on "
        f"{'; '.join(study.titles.values())}; the same beside it with HSR, the Hessian trace, SAM "
        f"and adaptive SAM.{left_out}",
        [drawing(figure, study) for figure in FIGURES.values()],
        judge(study),
        tables(study),
        settings,
        command,
        listings(study),
    )


PAPER = Paper("flatness-aware", PACKAGE, load_preset, STAGES, run_study, FIGURES, reproduction)

"""The study as a reproduction: its figures drawn, its claims judged, its numbers in tables."""

from __future__ import annotations

from collections.abc import Iterable

from lowland.experiments.hsr.claims import judge
from lowland.experiments.hsr.figures import FIGURES
from lowland.experiments.hsr.run import Study
from lowland.experiments.hsr.tables import tables
from lowland.experiments.reproduction import Drawing, Reproduction
from lowland.plots import render
from lowland.threads import threads


def draw(study: Study, number: int) -> Drawing:
    """One figure, from the results of its stages."""
    figure = FIGURES[number]
    with threads(1):
        return Drawing(number, figure.title, figure.caption, render(figure.draw(study), "svg"))


def stages(numbers: Iterable[int]) -> set[str]:
    """What has to be run for some figures."""
    return {FIGURES[number].stage for number in numbers} - {""}


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
        [draw(study, number) for number in FIGURES],
        claims,
        tables(study),
        settings,
        command,
    )

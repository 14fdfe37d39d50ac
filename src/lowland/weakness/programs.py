"""Pairs settled by linear programs, one for each."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from lowland.weakness.cone import Cone, Layer, difference_rows
from lowland.weakness.findings import Findings, Pair
from lowland.weakness.solver import Program

Points = Int[np.ndarray, " rows"]


def find_layer(findings: Findings) -> Layer | None:
    """A layer that certainly classifies all training points, or none and perhaps the proof."""
    return _settle(findings, None, *findings.cone.inequalities())


def refute(findings: Findings, pair: Pair, point: Points, against: Points) -> None:
    """Prove a pair infeasible by some of the inequalities, if these are enough.

    Args:
        findings: Where the proof goes.
        pair: The pair.
        point: Index of the training point of each inequality; -1 is the unseen point.
        against: The class that should lose.
    """
    program, _ = _program(findings.cone, pair, point, against)
    if program.run() and program.objective < 0.5:
        findings.refute(pair, point, against, program.values()[1:])


def decide(findings: Findings, pair: Pair) -> bool:
    """Settle a pair by all inequalities, if the solver can; whether it did."""
    _settle(findings, pair, *findings.cone.inequalities(pair[1]))
    return not findings.open[pair]


def _settle(findings: Findings, pair: Pair | None, point: Points, against: Points) -> Layer | None:
    program, rows = _program(findings.cone, pair, point, against)
    for run in (program.run, program.run_again):
        if not run():
            continue
        if program.objective > 0.5:
            duals = program.multipliers()[:-1]
            toward = duals if (rows @ duals).sum() > 0 else -duals
            last = np.zeros(findings.cone.coordinates)
            layer = np.append(toward, last).reshape(findings.cone.classes, -1)
            if findings.note_exactly(layer, pair):
                return layer
        if findings.refute(pair, point, against, program.values()[1:]):
            return None
    return None


def _program(
    cone: Cone, pair: Pair | None, point: Points, against: Points
) -> tuple[Program, Float[np.ndarray, "rows unknowns"]]:
    r"""The dual of ``max t``, ``(W_y - W_k) z >= t``, ``t <= 1``, and its rows.

    It is ``min tau`` over ``lambda >= 0`` with ``sum lambda (e_y - e_k) z = 0`` and
    ``sum lambda + tau = 1``: 1 where there is a layer, else 0. Only classes that occur are in it.
    """
    own, points = cone.labels[point], cone.train[point]
    if pair is not None:
        own = np.where(point < 0, pair[1], own)
        points = np.where((point < 0)[:, None], cone.unseen[pair[0]], points)
    classes, place = np.unique(np.concatenate([own, against]), return_inverse=True)
    count = len(point)
    rows = difference_rows(points, place[:count], place[count:], len(classes))
    unknowns = rows.shape[1]
    program = Program(
        np.vstack([np.eye(1, unknowns + 1, unknowns), np.column_stack([rows, np.ones(count)])]),
        np.append(1.0, np.zeros(count)),
        np.append(np.zeros(unknowns), 1.0),
    )
    return program, rows

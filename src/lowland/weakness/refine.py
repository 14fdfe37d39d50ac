r"""The steps of :mod:`lowland.weakness.barrier` toward one pair, as exactly as floats allow.

Where an unseen point all but coincides with what keeps it from a class, slacks differ by more
orders of magnitude than their squares may. Here each direction is a problem of least squares,

.. math::
    \min_d \sum_i (a_i d / s_i)^2 + \sum_k ((r_k d - 1) / s_k)^2,

``a`` the inequalities of the training points and ``r`` those of the pair, solved by a QR
decomposition; its residuals, each over its slack, are weights under which the inequalities add up
to zero. Coordinates start at the unseen point, so that small differences from it are exact.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from lowland.weakness.cone import Cone, Layer, difference_rows
from lowland.weakness.findings import Findings, Pair

_STEPS = 30
_DEFICIT = 1.01  # the first one, in multiples of what is missing
_REACH = 0.99  # of the way to the boundary, where the next step begins
_DOUBT = 0.01  # share of negative weights below which the others may be a proof
_FEW = 200  # inequalities: with more, rational numbers would take too long
_RANK = 1e-15  # of the largest pivot: below is rounding
_TINY = 1e-12  # a rate that counts as none


def refine(findings: Findings, pair: Pair, start: Layer) -> bool:
    """Settle a pair, if floating point can; whether it did."""
    cone, (unseen, label) = findings.cone, pair
    point, against = cone.inequalities(label)
    new = point < 0
    rows = _from_the_point(cone, pair, point, against)
    origin = cone.unseen[unseen, :-1]
    here = start - start[-1]
    here[:, -1] += here[:, :-1] @ origin
    unknowns = here[:-1].ravel()
    deficit = -_DEFICIT * float((rows @ unknowns)[new].min())
    likely = None
    for _ in range(_STEPS):
        slack = rows @ unknowns + np.where(new, deficit, 0.0)
        if not (slack > 0).all():
            break
        direction, residual = _least_squares(rows / slack[:, None], np.where(new, 1 / slack, 0.0))
        fall = (new - rows @ direction) / slack
        steepest = max(float(fall[~new].max()), _TINY)
        at = np.append(unknowns + _REACH / steepest * direction, np.zeros(cone.coordinates))
        layer = at.reshape(cone.classes, -1)
        layer[:, -1] -= layer[:, :-1] @ origin
        if findings.note_exactly(layer, pair):
            return True
        weights = residual / slack
        kept = weights > 0
        if -weights[~kept].sum() < _DOUBT * weights[kept].sum():
            likely = point[kept], against[kept], weights[kept]
            if findings.refute(pair, *likely, exactly=False):
                return True
        length = _REACH / max(steepest, float(fall[new].max()))
        unknowns = unknowns + length * direction
        deficit -= length
    return likely is not None and len(point) < _FEW and findings.refute(pair, *likely)


def _from_the_point(
    cone: Cone, pair: Pair, point: Int[np.ndarray, " rows"], against: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, "rows unknowns"]:
    """The inequalities in coordinates that start at the unseen point."""
    new = point < 0
    away = (cone.raw_train - cone.raw_unseen[pair[0]])[:, :-1] / cone.scale
    away = np.where(new[:, None], 0.0, away[point])
    own = np.where(new, pair[1], cone.labels[point])
    points = np.column_stack([away, np.ones(len(own))])
    return difference_rows(points, own, against, cone.classes)


def _least_squares(
    matrix: Float[np.ndarray, "rows unknowns"], right: Float[np.ndarray, " rows"]
) -> tuple[Float[np.ndarray, " unknowns"], Float[np.ndarray, " rows"]]:
    """A solution and its residual."""
    from scipy.linalg import qr, solve_triangular  # noqa: PLC0415 - optional

    order = np.argsort(-np.abs(matrix).max(axis=1))  # else small rows drown in large ones
    q, r, pivots = qr(matrix[order], mode="economic", pivoting=True)
    rank = int((np.abs(np.diag(r)) > _RANK * abs(r[0, 0])).sum())
    solution = np.zeros(matrix.shape[1])
    solution[pivots[:rank]] = solve_triangular(r[:rank, :rank], q[:, :rank].T @ right[order])
    return solution, right - matrix @ solution

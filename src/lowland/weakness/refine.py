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

from lowland.weakness.cone import Layer, difference_rows
from lowland.weakness.findings import Findings, Pair

_STEPS = 30
_DEFICIT = 1.01  # the first one, in multiples of what is missing
_REACH = 0.99  # of the way to the boundary, where the next step begins
_DOUBT = 0.01  # share of negative weights below which the others may be a proof
_RANK = 1e-15  # of the largest pivot: below is rounding
_TINY = 1e-12  # a rate that counts as none


def refine(findings: Findings, pair: Pair, start: Layer) -> bool:
    """Settle a pair, if floating point can; whether it did."""
    from scipy.linalg import qr, solve_triangular  # noqa: PLC0415 - optional

    cone, (unseen, label) = findings.cone, pair
    point, against = cone.inequalities(label)
    new = point < 0
    own = np.where(new, label, cone.labels[point])
    away = (cone.raw_train - cone.raw_unseen[unseen])[:, :-1] / cone.scale
    away = np.where(new[:, None], 0.0, away[point])
    rows = difference_rows(np.column_stack([away, np.ones(len(own))]), own, against, cone.classes)
    origin = cone.unseen[unseen, :-1]
    here = start - start[-1]
    here[:, -1] += here[:, :-1] @ origin
    unknowns = here[:-1].ravel()
    deficit = -_DEFICIT * float((rows @ unknowns)[new].min())
    for _ in range(_STEPS):
        slack = rows @ unknowns + np.where(new, deficit, 0.0)
        if not (slack > 0).all():
            return False
        scaled, right = rows / slack[:, None], np.where(new, 1 / slack, 0.0)
        order = np.argsort(-np.abs(scaled).max(axis=1))  # else small rows drown in large ones
        q, r, pivots = qr(scaled[order], mode="economic", pivoting=True)
        rank = int((np.abs(np.diag(r)) > _RANK * abs(r[0, 0])).sum())
        direction = np.zeros(len(unknowns))
        direction[pivots[:rank]] = solve_triangular(r[:rank, :rank], q[:, :rank].T @ right[order])
        weights = (right - scaled @ direction) / slack
        fall = (new - rows @ direction) / slack
        steepest = max(float(fall[~new].max()), _TINY)
        at = np.append(unknowns + _REACH / steepest * direction, np.zeros(cone.coordinates))
        layer = at.reshape(cone.classes, -1)
        layer[:, -1] -= layer[:, :-1] @ origin
        if findings.note_exactly(layer, pair):
            return True
        kept = weights > 0
        if -weights[~kept].sum() < _DOUBT * weights[kept].sum() and findings.refute(
            pair, point[kept], against[kept], weights[kept], exactly=False
        ):
            return True
        length = _REACH / max(steepest, float(fall[new].max()))
        unknowns = unknowns + length * direction
        deficit -= length
    return False

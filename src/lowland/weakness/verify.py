r"""What a solver says, proved or refused without it.

A last layer is a witness if its scores are far enough apart that no rounding could have swapped
them; where they are not, they are computed again in rational numbers. A Farkas certificate,
nonnegative weights under which inequalities add up to ``0 > 0``, is never exact in floating point.
It proves infeasibility if an exact one is close by; that one exists if a linear system is regular
and its solution stays positive, which norms decide (S. M. Rump, Acta Numerica 19 (2010), section
10). Where the inequalities are too few for their dimensions to give a square system, rational
numbers decide again.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Float, Int

from lowland.weakness.cone import Cone, Layer, Points

Layers = Float[np.ndarray, "layers classes coordinates"]

UNIT = 2.0**-53
"""Half the distance from 1 to the next float: what one rounding may change, relatively."""

SMALLEST = 2.0**-1022
"""The smallest float of full precision. Roundings below change as much as roundings of it."""

_PRIME = 2**31 - 1  # products of two residues fit into 64 bits


def sure_classes(layers: Layers, points: Points) -> Int[np.ndarray, "layers points"]:
    """Each layer's class of the largest score at each point; -1 where rounding could change it.

    Args:
        layers: Taken to be exact.
        points: Coordinates, each right to two roundings, or to the smallest float.
    """
    scores = points @ layers.transpose(0, 2, 1)
    # Two roundings of a coordinate, one a product, one a sum; generously.
    error = (np.abs(points) + SMALLEST) @ np.abs(layers).transpose(0, 2, 1) + SMALLEST
    error *= 2 * (points.shape[1] + 4) * UNIT
    best = scores.argmax(axis=2)[:, :, None]
    others = scores + error
    np.put_along_axis(others, best, -np.inf, axis=2)
    least = np.take_along_axis(scores - error, best, axis=2)[:, :, 0]
    return np.where(least > others.max(axis=2), best[:, :, 0], -1)


def exact_classes(
    layer: Layer,
    raw: Points,
    center: Float[np.ndarray, " features"],
    scale: Float[np.ndarray, " f"],
) -> Int[np.ndarray, " points"]:
    """Each point's class by a layer, in rational numbers; -1 where the best scores are equal."""
    rows = [[Fraction(float(v)) for v in row] for row in layer]
    shift = [Fraction(float(v)) for v in center]
    size = [Fraction(float(v)) for v in scale]
    classes = np.full(len(raw), -1)
    for index, point in enumerate(raw):
        z = [
            (Fraction(float(v)) - m) / s for v, m, s in zip(point[:-1], shift, size, strict=True)
        ] + [Fraction(1)]
        scores = [sum((a * b for a, b in zip(row, z, strict=True)), Fraction(0)) for row in rows]
        best = max(scores)
        if scores.count(best) == 1:
            classes[index] = scores.index(best)
    return classes


def classifies_training(cone: Cone, layers: Layers) -> Bool[np.ndarray, " layers"]:
    """Of each layer whether it certainly classifies every training point correctly."""
    classes = sure_classes(layers, cone.train)
    right: Bool[np.ndarray, " layers"] = ((classes == cone.labels) | (classes < 0)).all(axis=1)
    for index in np.flatnonzero(right & (classes < 0).any(axis=1)):
        open_ = classes[index] < 0
        exact = exact_classes(layers[index], cone.raw_train[open_], cone.center, cone.scale)
        right[index] = bool((exact == cone.labels[open_]).all())
    return right


def certifies(
    points: Points,
    raw: Points,
    own: Int[np.ndarray, " rows"],
    against: Int[np.ndarray, " rows"],
    weights: Float[np.ndarray, " rows"],
    *,
    exactly: bool,
) -> bool:
    r"""Whether ``(W_own - W_against) z > 0`` for all rows certainly has no solution.

    Args:
        points: ``z`` of each inequality, each coordinate right to two roundings, or to the
            smallest float.
        raw: The features themselves, with the one behind them, exact.
        own: The class that should win.
        against: The class that should lose.
        weights: Positive, close to ones under which the inequalities add up to zero.
        exactly: Whether to go on in rational numbers where norms do not decide.
    """
    if not len(weights) or not (np.isfinite(weights).all() and (weights > 0).all()):
        return False
    equations = _independent_equations(raw, own, against)
    if len(equations) < len(weights) and _regular(points, own, against, weights, equations):
        return True
    return exactly and _certifies_exactly(raw, own, against, weights, equations)


@np.errstate(over="ignore", invalid="ignore")  # what overflows proves nothing
def _regular(
    points: Points,
    own: Int[np.ndarray, " rows"],
    against: Int[np.ndarray, " rows"],
    weights: Float[np.ndarray, " rows"],
    equations: list[tuple[int, int]],
) -> bool:
    """Whether some of the weights certainly solve the equations, near by, the others unchanged."""
    from scipy.linalg import qr  # noqa: PLC0415 - optional

    # Column j holds inequality j times its weight: all factors 1 solve the system approximately.
    terms = np.zeros((len(equations), len(weights)))
    sizes = np.zeros_like(terms)
    for row, (label, coordinate) in enumerate(equations):
        sign = (own == label).astype(float) - (against == label)
        terms[row] = sign * points[:, coordinate] * weights
        sizes[row] = np.abs(sign) * (
            (np.abs(points[:, coordinate]) + SMALLEST) * weights + SMALLEST
        )
    _, _, order = qr(terms, mode="economic", pivoting=True)
    chosen = order[: len(equations)]
    square = terms[:, chosen]
    try:
        inverse = np.linalg.inv(square)
    except np.linalg.LinAlgError:
        return False
    size = len(weights) + 8  # roundings on the way of any number below
    product = np.abs(inverse) @ sizes[:, chosen]
    defect = np.abs(np.eye(len(square)) - inverse @ square) + 2 * size * UNIT * product
    residual = np.abs(terms.sum(axis=1)) + 2 * size * UNIT * sizes.sum(axis=1)
    contraction = 1.01 * float(defect.sum(axis=1).max())
    change = 1.01 * float((np.abs(inverse) @ residual).max())
    # Then the contraction is below 1, so that the system is regular whatever the inverse was; and
    # the exact factors differ from 1 by less than 1.
    return change < 1 - contraction


def _independent_equations(
    raw: Points, own: Int[np.ndarray, " rows"], against: Int[np.ndarray, " rows"]
) -> list[tuple[int, int]]:
    """The pairs (class, coordinate) in which the sum must vanish, less those that follow.

    What an inequality adds to one class it takes from another, so of classes that a coordinate's
    nonzero entries join, all but one are enough; and features of rectified units are often zero.
    In shifted coordinates the same holds, since those of the bias are all there.
    """
    equations = []
    found: dict[bytes, list[int]] = {}
    for coordinate in range(raw.shape[1]):
        present = raw[:, coordinate] != 0
        key = present.tobytes()
        if key not in found:
            joined = zip(own[present].tolist(), against[present].tolist(), strict=True)
            found[key] = _all_but_one(set(joined))
        equations += [(label, coordinate) for label in found[key]]
    return equations


def _all_but_one(joined: set[tuple[int, int]]) -> list[int]:
    """Of each set of joined classes all but one."""
    parent = {label: label for two in joined for label in two}

    def root(label: int) -> int:
        while parent[label] != label:
            label = parent[label]
        return label

    for a, b in joined:
        parent[root(a)] = root(b)
    return [label for label in parent if parent[label] != label]


def _certifies_exactly(
    raw: Points,
    own: Int[np.ndarray, " rows"],
    against: Int[np.ndarray, " rows"],
    weights: Float[np.ndarray, " rows"],
    equations: list[tuple[int, int]],
) -> bool:
    """Whether a certificate holds in rational numbers: free weights stay, the others follow."""
    if _independent(raw, own, against, equations):
        return False
    count = len(weights)
    left, right = own.tolist(), against.tolist()
    rows = []
    for label, coordinate in equations:
        values = raw[:, coordinate].tolist()
        rows.append(
            [Fraction(v) * ((left[j] == label) - (right[j] == label)) for j, v in enumerate(values)]
        )
    # Small weights first: they follow from the large ones, which absorb what rounding left.
    solved: list[tuple[int, list[Fraction]]] = []
    for column in np.argsort(weights).tolist():
        pivot = next((row for row in rows if row[column]), None)
        if pivot is None:
            continue
        rows.remove(pivot)
        head = pivot[column]
        pivot = [value / head for value in pivot]
        rows = [_less(row, pivot, row[column]) for row in rows]
        solved = [(index, _less(row, pivot, row[column])) for index, row in solved]
        solved.append((column, pivot))
    bound = {index for index, _ in solved}
    free = {j: Fraction(float(weights[j])) for j in range(count) if j not in bound}
    return all(
        -sum((row[j] * value for j, value in free.items()), Fraction(0)) > 0 for _, row in solved
    )


def _independent(
    raw: Points,
    own: Int[np.ndarray, " rows"],
    against: Int[np.ndarray, " rows"],
    equations: list[tuple[int, int]],
) -> bool:
    """Whether only zeros solve the equations, which is so if it is so modulo a prime.

    Most systems that come here have no other solution, and whole numbers show it faster.
    """
    residues = np.array([[_residue(value) for value in row] for row in raw.tolist()])
    matrix = np.array(
        [((own == k).astype(int) - (against == k)) * residues[:, j] for k, j in equations]
    ).reshape(len(equations), len(own))
    for column in range(len(own)):
        rows = np.flatnonzero(matrix[column:, column]) + column
        if not len(rows):
            return False
        matrix[[column, rows[0]]] = matrix[[rows[0], column]]
        inverse = pow(int(matrix[column, column]), -1, _PRIME)
        factor = matrix[column + 1 :, column] % _PRIME * inverse % _PRIME
        matrix[column + 1 :] -= factor[:, None] * matrix[column] % _PRIME
        matrix %= _PRIME
    return True


def _residue(value: float) -> int:
    """A float, exactly, modulo the prime."""
    numerator, denominator = value.as_integer_ratio()
    return numerator * pow(denominator, -1, _PRIME) % _PRIME


def _less(row: list[Fraction], pivot: list[Fraction], factor: Fraction) -> list[Fraction]:
    if not factor:
        return row
    return [a - factor * b if b else a for a, b in zip(row, pivot, strict=True)]

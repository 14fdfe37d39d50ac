"""Where on a line or a plane the loss is looked at, and the look itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lowland.spectra.surface import NamedVector

Interval = tuple[float, float]
Extent = float | Sequence[float] | Sequence[Sequence[float]]

_MARGIN = 0.15  # beyond the path, as a fraction of its length or, if that is more, of its width


def intervals(extent: Extent, dimensions: int) -> list[Interval]:
    """From where to where each coordinate goes.

    Raises:
        TypeError: If the extent is neither a number, nor pairs of numbers.
        ValueError: If it is not finite, an interval has no length, or there are not as many of
            them as directions.
    """
    if isinstance(extent, Real):
        if not 0 < float(extent) < math.inf:
            raise ValueError(f"extent must be positive and finite; got {extent}")
        return [(-float(extent), float(extent))] * dimensions
    if not isinstance(extent, Sequence) or isinstance(extent, str):
        raise TypeError(
            "extent must be a number r, for coordinates from -r to r, a pair (low, high), or such "
            f"a pair for each direction; got {extent!r}"
        )
    if all(isinstance(part, Real) for part in extent):
        pairs = [extent] * dimensions
    else:
        pairs = list(extent)  # type: ignore[arg-type]
    if len(pairs) != dimensions:
        raise ValueError(
            f"extent must be a pair (low, high), or one for each of {dimensions} direction"
            f"{'s' * (dimensions > 1)}; got {len(pairs)} pairs"
        )
    found = []
    for pair in pairs:
        if not (
            isinstance(pair, Sequence)
            and len(pair) == 2
            and all(isinstance(end, Real) for end in pair)
        ):
            raise TypeError(f"each pair of extent must be two numbers (low, high); got {pair!r}")
        low, high = (float(end) for end in pair)  # type: ignore[arg-type]
        if not -math.inf < low < high < math.inf:
            raise ValueError(
                f"each pair (low, high) of extent must be finite with low < high; got {pair!r}"
            )
        found.append((low, high))
    return found


def around(points: Float[Tensor, "points directions"], least: float) -> list[Interval]:
    """Intervals that hold the center and all points, with some margin.

    Args:
        points: Coordinates.
        least: How far to go to either side of the center at least.
    """
    low = points.amin(0).clamp_max(0)
    high = points.amax(0).clamp_min(0)
    span = high - low
    margin = _MARGIN * span.max()
    ends = zip((low - margin).tolist(), (high + margin).tolist(), strict=True)
    return [(min(one, -least), max(other, least)) for one, other in ends]


def coordinates_of(
    bounds: Sequence[Interval], points: int | Sequence[int]
) -> tuple[Float[Tensor, " _"], ...]:
    """Equidistant coordinates along each direction.

    Raises:
        TypeError: If a number of points is not whole.
        ValueError: If it is less than 2, or there are not as many numbers as directions.
    """
    counts: Any = [points] * len(bounds) if isinstance(points, Integral) else points
    if not isinstance(counts, Sequence) or not all(isinstance(n, Integral) for n in counts):
        raise TypeError(f"points must be a whole number, or one for each direction; got {points!r}")
    if len(counts) != len(bounds):
        raise ValueError(
            f"points must be one number, or one for each of {len(bounds)} directions; got "
            f"{len(counts)}"
        )
    if min(counts) < 2:
        raise ValueError(f"points must be at least 2 along each direction; got {points}")
    axes = []
    for (low, high), count in zip(bounds, counts, strict=True):
        axis = torch.linspace(low, high, int(count), dtype=torch.float64)
        # The center is a point of most grids, and rounding should not move it.
        axes.append(torch.where(axis.abs() < 1e-12 * (high - low), 0.0, axis))
    return tuple(axes)


@torch.no_grad()
def evaluate(
    loss: Callable[[NamedVector], float],
    center: NamedVector,
    vectors: Sequence[NamedVector],
    coordinates: Sequence[Float[Tensor, " _"]],
    tell: Callable[[str, int, int], None],
) -> Float[Tensor, "*grid"]:
    """The loss at ``center + sum_i coordinates[i] vectors[i]``, all combinations of coordinates."""
    shape = [len(axis) for axis in coordinates]
    found = torch.empty(math.prod(shape), dtype=torch.float64)
    for index, steps in enumerate(product(*(axis.tolist() for axis in coordinates))):
        point = {
            name: sum((a * v[name] for a, v in zip(steps, vectors, strict=True)), start=part)
            for name, part in center.items()
        }
        found[index] = loss(point)
        tell("loss surface", index + 1, len(found))
    return found.view(shape)

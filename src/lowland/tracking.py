r"""The top eigenvector of a matrix that changes slowly, followed by one product a step.

From the product :math:`Hv` with a vector of length 1, :math:`\theta = v^T H v` and the residual
:math:`r = Hv - \theta v`, a step goes to

.. math:: v \leftarrow \frac{v + r / d}{\lVert v + r / d \rVert}, \qquad
    d = \max\left(\theta, \frac{1.2 a + \theta}{2}\right),

which is power iteration on :math:`H + (d - \theta) I`. Without a shift it goes to the eigenvalue of
largest magnitude. With ``a`` not below the magnitude of the most negative eigenvalue, the shift
makes the largest eigenvalue the one of largest magnitude, and it is zero where ``a`` is small. ``a``
is what a few Lanczos products have shown, or the residual's length, where that is more: an
eigenvalue below :math:`-\theta` shows there before it takes the vector over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowland.products import Vector, dot, norm, plus, times

_MARGIN = 1.2  # of what Lanczos has seen of the lower end, which is less than what there is


@dataclass(frozen=True)
class Tracked:
    """What is known of the top of a spectrum.

    Attributes:
        vector: Of length 1, one tensor a parameter.
        depth: How far the spectrum reaches below zero, a scalar of at least 0.
        steps: Since it was started.
    """

    vector: Vector
    depth: Tensor
    steps: int = 0


@dataclass(frozen=True)
class Pair:
    """An approximate eigenvalue and what is wrong with it.

    Attributes:
        eigenvalue: ``v' H v``, at most the largest eigenvalue.
        residual: The length of ``H v - (v' H v) v``: an eigenvalue lies as near as that.
    """

    eigenvalue: Tensor
    residual: Tensor


@torch.no_grad()
def begun(multiply: Callable[[Vector], Vector], start: Vector, count: int) -> Tracked:
    """The top of a spectrum by so many Lanczos products, from any vector that is not zero."""
    vector, values = lanczos(multiply, start, count)
    return Tracked(vector, (-values[0]).clamp(min=0))


@torch.no_grad()
def looked_around(
    tracked: Tracked, multiply: Callable[[Vector], Vector], start: Vector, count: int
) -> Tracked:
    """The same after Lanczos products from a random vector.

    A tenth of the Ritz vector goes into the tracked one, which costs it a hundredth of its value at
    most, so that an eigenvector it had no part of is found within a few steps.
    """
    other, values = lanczos(multiply, start, count)
    side = torch.where(dot(tracked.vector, other) < 0, -0.1, 0.1)
    return Tracked(
        _normalized(plus(tracked.vector, other, side)), (-values[0]).clamp(min=0), tracked.steps
    )


@torch.no_grad()
def followed(tracked: Tracked, product: Vector) -> tuple[Tracked, Pair]:
    """One step on, by the product with the tracked vector; what is not finite changes nothing."""
    vector = tracked.vector
    value = dot(vector, product)
    residual = plus(product, vector, -value)
    length = norm(residual)
    depth = torch.maximum(torch.maximum(tracked.depth, -value), length)
    divisor = torch.maximum(value, (_MARGIN * depth + value) / 2)
    least = torch.finfo(divisor.dtype).tiny ** 0.5
    usable = value.isfinite() & length.isfinite() & (divisor > least)
    pair = Pair(value, length)
    if value.device.type == "cpu" and not usable:
        return tracked, pair
    new = _normalized(plus(vector, residual, torch.where(usable, 1 / divisor, 0)))
    if value.device.type != "cpu":  # no number is waited for
        new = [torch.where(usable, a, b) for a, b in zip(new, vector, strict=True)]
    return Tracked(new, tracked.depth, tracked.steps + 1), pair


def lanczos(
    multiply: Callable[[Vector], Vector], start: Vector, count: int
) -> tuple[Vector, Tensor]:
    """The top Ritz vector of so many products, and all Ritz values in ascending order.

    Each new vector is made orthogonal to all before it, which are kept: as many as products.

    References:
        C. Lanczos, An iteration method for the solution of the eigenvalue problem (1950).
    """
    basis, size = [_normalized(start)], min(count, sum(p.numel() for p in start))
    columns: list[Tensor] = []
    for index in range(size):
        new = multiply(basis[-1])
        along = torch.stack([dot(each, new) for each in basis])
        length = norm(new)
        for _ in range(2):  # once leaves rounding behind
            for each in basis:
                new = plus(new, each, -dot(each, new))
        rest = norm(new)
        columns.append(along)
        # Where the space is exhausted, what is left is rounding.
        if index + 1 == size or rest <= 1e-5 * length or not rest.isfinite():
            break
        basis.append(times(new, 1 / rest))
    matrix = torch.zeros(len(columns), len(columns), dtype=columns[0].dtype)
    for index, column in enumerate(columns):
        matrix[: index + 1, index] = column.cpu()
    matrix = matrix.triu() + matrix.triu(1).T
    if not matrix.isfinite().all():
        return basis[0], matrix.new_zeros(1).to(basis[0][0].device)
    values, vectors = torch.linalg.eigh(matrix)
    weights = vectors[:, -1].to(basis[0][0].device)
    top = times(basis[0], weights[0])
    for each, weight in zip(basis[1:], weights[1:], strict=False):
        top = plus(top, each, weight)
    return _normalized(top), values.to(basis[0][0].device)


def _normalized(parts: Vector) -> Vector:
    return times(parts, 1 / norm(parts))

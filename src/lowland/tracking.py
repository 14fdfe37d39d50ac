r"""The top eigenvector of a matrix that changes slowly, followed by one product a step.

From the product :math:`Hv` with a vector of length 1 come :math:`\theta = v^T H v` and the residual
:math:`r = Hv - \theta v`, of length :math:`\rho`. In the plane of ``v`` and ``r`` the matrix is

.. math:: \begin{pmatrix} \theta & \rho \\ \rho & \kappa \end{pmatrix}, \qquad
    \kappa = r^T H r / \rho^2,

and the step goes to its top eigenvector, :math:`v + r / (\lambda - \kappa)` with its larger
eigenvalue :math:`\lambda`. Only :math:`\kappa` would take a second product. It is taken from the
last residual instead, which the present product shows, since the present vector holds a part of
it: the lagged steps of Barzilai and Borwein. That needs no shift against negative eigenvalues.
Where one is about to take over, it is most of the residual, :math:`\kappa` is near it, and the
step is as short as removes it. Beside power iteration with a shift this halves what is missed along
training on all samples, and does about as well where each product is of another mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowland.products import Vector, dot, norm, plus, times

_BELOW = 0.2  # how much lower the curvature along the residual is taken at least, relative
_DEEPEST = 2.0  # and how low at most, in what has been seen below zero
_LONGEST = 1.0  # of the residual's part in a new vector, relative to the old one's


@dataclass(frozen=True)
class Tracked:
    """What is known of the top of a spectrum.

    Attributes:
        vector: Of length 1, one tensor a parameter.
        depth: How far the spectrum reaches below zero, a scalar of at least 0.
        steps: Since it was started.
        last: The last residual, its length, and its part in the vector relative to the rest; None
            where the vector comes from elsewhere.
    """

    vector: Vector
    depth: Tensor
    steps: int = 0
    last: tuple[Vector, Tensor, Tensor] | None = None

    def like(self, other: Tensor) -> Tracked:
        """The same on the device of another tensor and in its precision."""
        vector, last = [part.to(other) for part in self.vector], None
        if self.last is not None:
            residual, *numbers = self.last
            length, part = (number.to(other) for number in numbers)
            last = [each.to(other) for each in residual], length, part
        return Tracked(vector, self.depth.to(other), self.steps, last)


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
def followed(tracked: Tracked, value: Tensor, product: Vector) -> tuple[Tracked, Pair]:
    """One step on, by ``v' H v`` and ``H v``; what is not finite changes nothing."""
    vector, value = tracked.vector, value.detach()
    residual = plus(product, vector, -value)
    length = norm(residual)
    curvature = _curvature(tracked, product)
    deepest = torch.maximum(torch.maximum(tracked.depth, value.abs()), length)
    curvature = torch.maximum(curvature, -_DEEPEST * deepest)
    curvature = torch.minimum(curvature, value - _BELOW * value.abs())
    apart = value - curvature
    # lambda - kappa, without a difference of near numbers
    divisor = (apart + (apart.square() + 4 * length.square()).sqrt()) / 2
    part = (length / divisor).clamp(max=_LONGEST)
    usable = part.isfinite() & (part > 0)
    pair = Pair(value, length)
    on_host = value.device.type == "cpu"
    if on_host and not usable:
        return tracked, pair
    new = plus(vector, residual, part / length)
    # By its own norm: that of an orthogonal sum would let rounding grow from step to step.
    torch._foreach_mul_(new, 1 / norm(new))
    if not on_host:  # no number is waited for
        new = [torch.where(usable, a, b) for a, b in zip(new, vector, strict=True)]
        residual = [torch.where(usable, part, 0) for part in residual]
        part, length = torch.where(usable, part, 0), torch.where(usable, length, 0)
    return Tracked(new, tracked.depth, tracked.steps + 1, (residual, length, part)), pair


def _curvature(tracked: Tracked, product: Vector) -> Tensor:
    """``r' H r / |r|^2`` along the last residual, of which the vector has a part."""
    unknown = -tracked.depth / 2
    if tracked.last is None:
        return unknown
    residual, length, part = tracked.last
    whole = (1 + part.square()).sqrt() * dot(residual, product) / length
    found = (whole - length) / part
    return torch.where(found.isfinite(), found, unknown)


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

"""The largest eigenvalues by a Lanczos iteration that stops with the product that was enough."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lowland.spectra.solve import product

# Basis vectors beyond the eigenvalues that are wanted; when these are used up, the best half of
# the basis is kept.
_ROOM = 24


@dataclass(frozen=True)
class Top:
    """The ``k`` largest eigenvalues, descending, in float64 on the CPU, and what belongs to each.

    Attributes:
        values: The eigenvalues.
        vectors: Of the operator's type and on its device.
        residuals: ``|H v - lambda v|``, by products that were taken anyway.
        scale: The largest magnitude of an eigenvalue that was met.
        products: How many were taken.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "parameters k"]
    residuals: Float[Tensor, " k"]
    scale: float
    products: int


def largest(
    operator: Any,
    k: int,
    start: Float[Tensor, " parameters"],
    *,
    tolerance: float,
    limit: int,
    generator: torch.Generator,
) -> Top:
    r"""The ``k`` largest eigenvalues, from the Krylov space of a start vector.

    .. math:: Q^T H Q = S \Theta S^T, \qquad
        \lVert H y - \theta y \rVert = \lVert (I - Q Q^T) H q_m \rVert \, |s_m|, \quad y = Q s

    The basis is kept orthogonal to rounding. When it is full, the Ritz vectors of the best half
    become the basis (the thick restart), and the iteration goes on from the same residual.

    Args:
        operator: A symmetric matrix, of which products are taken.
        k: How many eigenvalues; at most as many as the matrix has rows.
        start: Where to begin. An eigenvector to which it is orthogonal is found by rounding only.
        tolerance: Largest norm of a residual, as a fraction of the largest magnitude met.
        limit: Products at most.
        generator: Of what goes on where the Krylov space ends early.

    Raises:
        RuntimeError: If the residuals are larger after so many products.
        ValueError: As :func:`lowland.spectra.solve.product`.

    References:
        K. Wu and H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems,
        SIAM Journal on Matrix Analysis and Applications 22 (2000).
    """
    dim = operator.shape[0]
    most = min(dim, 2 * k + _ROOM)
    rounding = 10 * torch.finfo(operator.dtype).eps
    basis = torch.empty(dim, most + 1, dtype=operator.dtype, device=operator.device)
    images = torch.empty(dim, most, dtype=operator.dtype, device=operator.device)
    small = torch.zeros(most, most, dtype=torch.float64)
    basis[:, 0] = start / torch.linalg.vector_norm(start)
    before: Tensor | None = None  # where the space ended the last time
    size, scale = 0, 0.0
    for taken in range(1, limit + 1):
        image = product(operator, basis[:, size])
        images[:, size] = image
        size += 1
        known = basis[:, :size]
        row = (known.T @ image).double().cpu()
        small[size - 1, :size] = small[:size, size - 1] = row
        values, vectors = (part.flip(-1) for part in torch.linalg.eigh(small[:size, :size]))
        scale = max(scale, float(values.abs().max()))
        rest = _orthogonal(image, known)
        length = float(torch.linalg.vector_norm(rest))
        ended = length <= rounding * scale
        estimates = length * vectors[-1, :k].abs()
        room = tolerance * scale
        settled = ended and _same(values[:k], before, room)
        if size >= k and (size == dim or settled or (not ended and _within(estimates, room))):
            weights = vectors[:, :k].to(known.device, known.dtype)
            found = known @ weights
            residuals = images[:, :size] @ weights - found * values[:k].to(found)
            norms = torch.linalg.vector_norm(residuals, dim=0).double().cpu()
            return Top(values[:k], found, norms, scale, taken)
        if ended:  # the space that the start leads to, which has one copy of each eigenvalue
            before = values[:k]
            rest = torch.randn(dim, generator=generator, dtype=torch.float64).to(basis)
            rest = _orthogonal(rest, known)
            length = float(torch.linalg.vector_norm(rest))
        if size == most:
            size = k + _ROOM // 2
            weights = vectors[:, :size].to(known.device, known.dtype)
            basis[:, :size], images[:, :size] = known @ weights, images @ weights
            small.zero_()
            small[range(size), range(size)] = values[:size]
        basis[:, size] = rest / length
    worst = float(estimates.max()) if len(estimates) else math.inf
    raise RuntimeError(
        f"the {k} largest eigenvalues have residuals of up to {worst:.2g} after {limit} products "
        f"with the Hessian, where {tolerance:g} * {scale:.3g} was asked for: use a larger "
        "tolerance, or allow more products"
    )


def _orthogonal(
    vector: Float[Tensor, " parameters"], basis: Float[Tensor, "parameters m"]
) -> Float[Tensor, " parameters"]:
    """What is left of a vector; twice, since once leaves rounding of what is taken away."""
    for _ in range(2):
        vector = vector - basis @ (basis.T @ vector)
    return vector


def _same(values: Tensor, before: Tensor | None, room: float) -> bool:
    """Whether going on elsewhere has found no larger ones."""
    return before is not None and len(before) == len(values) and _within(values - before, room)


def _within(errors: Tensor, room: float) -> bool:
    return bool((errors.abs() <= room).all())

"""The ends of a spectrum by a Lanczos iteration that stops with the product that was enough."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowland.spectra.solve import Pairs, Space, Which, asymmetry, inner, product, random_start

# Basis vectors beyond twice the eigenvalues that are wanted; when these are used up, the best half
# of the basis is kept. The smallest eigenvalues crowd at zero, where few vectors stagnate.
_ROOM = 24
_ROOM_BELOW = 60

# Until the basis was full once, larger residuals do not tell an eigenvalue from its neighbours.
_SURE = 1e-3
# Products with a second random vector and what follows from it.
_MORE = 8
_ASYMMETRIC = 0.05  # single precision alone leaves some percent where a network has converged


@dataclass(frozen=True)
class Top:
    """Eigenvalues, descending, in float64 on the CPU, and what belongs to each.

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


class NotConvergedError(RuntimeError):
    """Some eigenvalues have residuals that are too large yet.

    Args:
        text: What to say.
        missing: How many, of the largest and of the smallest.
    """

    def __init__(self, text: str, missing: tuple[int, int]) -> None:
        super().__init__(text)
        self.missing = missing


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

    Args:
        operator: A symmetric matrix, of which products are taken.
        k: How many eigenvalues; at most as many as the matrix has rows.
        start: Where to begin. An eigenvector to which it is orthogonal is found by rounding only.
        tolerance: Largest norm of a residual, as a fraction of the largest magnitude met.
        limit: Products at most.
        generator: Of what goes on where the Krylov space ends early.

    Raises:
        NotConvergedError: If the residuals are larger after so many products.
        ValueError: As :func:`lowland.spectra.solve.product`.
    """
    krylov = _Krylov(operator, (k, 0), start, generator)
    before: Tensor | None = None  # where the space ended the last time
    while krylov.taken < limit:
        krylov.grow()
        near = max(tolerance, krylov.precision) * krylov.scale
        if krylov.holds_all or (krylov.is_within(near) and not krylov.ended):
            return krylov.found()
        if krylov.ended and krylov.is_within(near):
            if krylov.is_same(before, near):
                return krylov.found()
            before = krylov.wanted_values
        krylov.go_on(elsewhere=krylov.ended)
    raise krylov.failure(tolerance * krylov.scale)


def ends(
    operator: Any,
    counts: tuple[int, int],
    start: Float[Tensor, " parameters"],
    *,
    tolerance: float,
    restarts: int,
    generator: torch.Generator,
    check: bool = True,
) -> tuple[Top, Space]:
    """The largest and the smallest eigenvalues, from one Krylov space.

    Where several are asked for at one end, the iteration goes on with a second random vector once
    they have converged, until nothing has changed: a Krylov space has one copy of each eigenvalue.

    Args:
        operator: A symmetric matrix, of which products are taken.
        counts: How many of the largest and of the smallest; fewer together than the matrix has
            rows.
        start: Where to begin.
        tolerance: Largest norm of a residual, as a fraction of the largest magnitude met.
        restarts: At most.
        generator: Of the second vector.
        check: Whether to require a symmetric matrix: each product is compared with those before.

    Returns:
        The eigenvalues, descending, and the space that they were found in.

    Raises:
        NotConvergedError: If the residuals are larger after so many restarts.
        RuntimeError: If the matrix is not symmetric.
        ValueError: As :func:`lowland.spectra.solve.product`.
    """
    krylov = _Krylov(operator, counts, start, generator)
    more = _MORE if max(counts) > 1 else 0
    # What is left where the iteration goes on elsewhere stays, and is not to add up to more.
    share = 0.7 if more else 1.0
    before: Tensor | None = None
    since = 0
    while krylov.restarts <= restarts:
        krylov.grow(check=check)
        since += 1
        sure = min(tolerance, 2 * _ASYMMETRIC if krylov.restarts else _SURE)
        elsewhere = krylov.ended
        if krylov.holds_all:
            return krylov.found(anew=True), krylov.space()
        near = share * max(sure, krylov.precision) * krylov.scale
        if krylov.is_within(near):
            same = krylov.is_same(before, tolerance * krylov.scale)
            alone = not more and not krylov.ended
            if krylov.scale == 0 or alone or (same and since >= more):
                return krylov.found(anew=True), krylov.space()
            if not same:
                before, since, elsewhere = krylov.wanted_values, 0, True
        krylov.go_on(elsewhere=elsewhere, near=near)
    raise krylov.failure(share * tolerance * krylov.scale)


class _Krylov:
    r"""An orthonormal basis, and what a matrix is in it.

    .. math:: Q^T H Q = S \Theta S^T, \qquad
        \lVert H y - \theta y \rVert = \lVert (I - Q Q^T) H q_m \rVert \, |s_m|, \quad y = Q s

    The basis is kept orthogonal to rounding. When it is full, the Ritz vectors of the best half
    become the basis (the thick restart), and the iteration goes on from the same residual.

    Args:
        operator: A symmetric matrix, of which products are taken.
        counts: How many of the largest and of the smallest eigenvalues are wanted.
        start: Where to begin.
        generator: Of other places to go on.

    Attributes:
        taken: Products.
        restarts: How many there were.
        scale: The largest magnitude of an eigenvalue that was met.
        ended: Whether the last product lies in the space.

    References:
        K. Wu and H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems,
        SIAM Journal on Matrix Analysis and Applications 22 (2000).
    """

    values: Tensor
    vectors: Tensor
    rest: Tensor
    length = 0.0
    taken, restarts, scale, ended = 0, 0, 0.0, False

    def __init__(
        self,
        operator: Any,
        counts: tuple[int, int],
        start: Float[Tensor, " parameters"],
        generator: torch.Generator,
    ) -> None:
        self.operator, self.generator = operator, generator
        (top, bottom), dim = counts, operator.shape[0]
        self.counts, self.dim = counts, dim
        self.wanted = [*range(top), *range(-bottom, 0)]
        room = _ROOM_BELOW if bottom else _ROOM
        self.most = min(dim, 2 * (top + bottom) + room)
        sides = 1 if 0 in counts else 2
        above, below = (each and each + room // (2 * sides) for each in counts)
        self.kept = [*range(above), *range(-below, 0)]
        self.precision = torch.finfo(operator.dtype).eps
        # In rows, of which those that are never reached take no memory.
        self.basis = torch.empty(self.most + 1, dim, dtype=operator.dtype, device=operator.device)
        self.basis[0] = start / _norm(start)
        self.size = 0
        self.small = torch.zeros(self.most, self.most, dtype=torch.float64)
        # The products' parts that it leaves out: by vectors left behind, and along the newest one.
        self.beside = torch.zeros(0, self.most, dtype=torch.float64)
        self.ahead = torch.zeros(0, dtype=torch.float64)

    def grow(self, *, check: bool = False) -> None:
        """Take one more product."""
        image = product(self.operator, self.basis[self.size])
        self.taken += 1
        self.size += 1
        size, known = self.size, self.basis[: self.size]
        row = inner(known, image).cpu()
        self.small[size - 1, :size] = self.small[:size, size - 1] = row
        self._leave(self.ahead - row[:-1])
        values, vectors = torch.linalg.eigh(self.small[:size, :size])
        self.values, self.vectors = values.flip(-1), vectors.flip(-1)
        self.scale = max(self.scale, float(values.abs().max()))
        if check and float(self.beside[-1].norm()) > _ASYMMETRIC * self.scale:
            worst = int(self.beside[-1].abs().argmax())
            raise asymmetry(float(row[worst]), float(self.ahead[worst]))
        self.rest = _orthogonal(image, known)
        self.length = _norm(self.rest)
        self.ended = self.length <= 10 * self.precision * self.scale
        self.ahead = torch.zeros(size, dtype=torch.float64)
        self.ahead[-1] = self.length

    def go_on(self, *, elsewhere: bool, near: float = math.inf) -> None:
        """Add the next vector: what is left of the last product, or a random one.

        In the place of a random one what is left is lost: of Ritz vectors that keeps those alone of
        which it is no longer than ``near``.
        """
        settled = (self.length * self.vectors[-1]).abs() <= near
        if self.size == self.most:
            self.restarts += 1
            self._keep([i for i in self.kept if settled[i]] if elsewhere else self.kept)
        elif elsewhere and not self.ended:
            self._keep(settled.nonzero().flatten().tolist())
        if elsewhere:
            self._leave(self.ahead)
            self.ahead = torch.zeros_like(self.ahead)
            rest = torch.randn(self.dim, generator=self.generator, dtype=torch.float64)
            self.rest = _orthogonal(rest.to(self.basis), self.basis[: self.size])
            self.length = _norm(self.rest)
        self.basis[self.size] = self.rest / self.length

    def _keep(self, kept: list[int]) -> None:
        """Of the whole space, keep some Ritz vectors alone."""
        weights = self.vectors[:, kept]
        known = self.basis[: self.size]
        self.size = len(kept)
        self.basis[: self.size] = weights.T.to(known) @ known
        self.small = torch.zeros_like(self.small)
        self.small[range(self.size), range(self.size)] = self.values[kept]
        self.ahead = self.ahead @ weights
        left = torch.linalg.qr(self.beside[:, : len(weights)] @ weights).R  # as long, in fewer rows
        self.beside = self.beside[:0]
        self._leave(left)

    @property
    def holds_all(self) -> bool:
        """Whether the space is the whole one."""
        return bool(self.size == self.dim)

    @property
    def wanted_values(self) -> Float[Tensor, " k"]:
        """Of the ends."""
        return self.values[self.wanted]

    def is_within(self, near: float) -> bool:
        """Whether all that is wanted is there, with residuals that are no larger."""
        return self.size >= len(self.wanted) and float(self._residuals().max()) <= near

    def is_same(self, before: Tensor | None, near: float) -> bool:
        """Whether the eigenvalues are those that were found before."""
        return before is not None and bool(((self.wanted_values - before).abs() <= near).all())

    def found(self, *, anew: bool = False) -> Top:
        """What is wanted, with residuals from the products that there were, or from new ones.

        Rounding of the products that the space is made of is seen by new ones alone.
        """
        weights, values = self.vectors[:, self.wanted], self.wanted_values
        vectors = weights.T.to(self.basis) @ self.basis[: self.size]
        if anew:
            pairs = zip(vectors, values.tolist(), strict=True)
            norms = [_norm(product(self.operator, v) - value * v) for v, value in pairs]
            residuals = torch.tensor(norms, dtype=torch.float64)
            self.taken += len(norms)
        else:
            left = torch.cat([self.beside[:, : self.size] @ weights, self._residuals()[None]])
            residuals = torch.linalg.vector_norm(left, dim=0)
        return Top(values, vectors.T, residuals, self.scale, self.taken)

    def space(self) -> Space:
        """Where it was found."""
        return Space(self.basis[: self.size], float(self.values.sum()))

    def failure(self, near: float) -> NotConvergedError:
        """What to say where products do not suffice."""
        count = len(self.wanted)
        off = self._residuals() if self.size >= count else torch.full((count,), torch.inf)
        top = self.counts[0]
        return NotConvergedError(
            f"residuals reach {float(off.max()):.2g} after {self.taken} products with the Hessian, "
            f"where {near:.2g} was asked for: use a larger tolerance, or allow more products",
            (int((off[:top] > near).sum()), int((off[top:] > near).sum())),
        )

    def _residuals(self) -> Float[Tensor, " k"]:
        return (self.length * self.vectors[-1, self.wanted]).abs()

    def _leave(self, parts: Tensor) -> None:
        rows = torch.atleast_2d(parts)
        rows = nn.functional.pad(rows, (0, self.most - rows.shape[1]))
        self.beside = torch.cat([self.beside, rows])


def _norm(vector: Float[Tensor, " parameters"]) -> float:
    return math.sqrt(float(inner(vector[None], vector)))


def _orthogonal(
    vector: Float[Tensor, " parameters"], basis: Float[Tensor, "m parameters"]
) -> Float[Tensor, " parameters"]:
    """What is left of a vector; twice, since once leaves rounding of what is taken away."""
    for _ in range(2):
        vector = vector - inner(basis, vector).to(basis) @ basis
    return vector


def lanczos_pairs(
    operator: Any,
    k: int,
    which: Which,
    *,
    tolerance: float,
    restarts: int,
    seed: int,
    check: bool = True,
) -> tuple[Pairs, Space]:
    """Eigenvalues at the ends of the spectrum, and the space that they were found in.

    Raises:
        RuntimeError: If they do not converge; or as :func:`ends`.
    """
    dim = operator.shape[0]
    counts = (0 if which == "SA" else k), (0 if which == "LA" else k)
    try:
        found, space = ends(
            operator,
            counts,
            random_start(operator, seed),
            tolerance=tolerance,
            restarts=restarts,
            generator=torch.Generator().manual_seed(seed),
            check=check,
        )
    except NotConvergedError as error:
        end, missing = max(zip(("LA", "SA"), error.missing, strict=True), key=lambda each: each[1])
        raise RuntimeError(
            f"{k - missing} of {k} eigenvalues ({end!r}) converged to the tolerance {tolerance:g} "
            f"within {restarts} restarts; ask for fewer, or use a larger tolerance or more restarts"
        ) from error
    ranks = torch.cat([torch.arange(1, counts[0] + 1), torch.arange(dim - counts[1], dim) + 1])
    pairs = Pairs(found.values, found.vectors, ranks, found.residuals, tolerance * found.scale)
    if bool((pairs.residuals > pairs.tolerance).any()):
        warnings.warn(
            f"residual norms reach {float(pairs.residuals.max()):.2g}, beyond the tolerance of "
            f"{tolerance:g} * {found.scale:.3g}, since products in "
            f"{str(operator.dtype).removeprefix('torch.')} are no more exact: use model.double() "
            "or a larger tolerance",
            RuntimeWarning,
            stacklevel=3,
        )
    return pairs, space

r"""What a trace asks of the loss: its curvature ``Q`` in the logits, times factors of few columns.

A trace needs of :math:`\sum_k (J Q J^T)_{kk}` products of ``Q`` with the rows of ``J`` alone, and
for its gradient the derivative of :math:`\langle S, Q \rangle` in the logits, with an ``S`` that is
never asked for as a whole unless the loss is one of your own. Cross-entropy has
:math:`Q = \mathrm{diag}(p) - p p^T`, which is not formed: of ``K`` logits that takes ``K`` numbers
a sample in the place of ``K^2``.

Logits come first here, samples last: ``(networks, K, samples)``, or without the first dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lowland.exact.terms import Data
from lowland.losses import LOSSES, Loss, Separable, read_derivatives

# As in lowland.exact.terms, and of a single network without the first dimension.
Vectors = Float[Tensor, "*#networks _ samples"]
Matrices = Float[Tensor, "*networks _ _ samples"]


class LogitCurvature(ABC):
    """``r`` and ``Q`` of some samples, weighed as these are in the loss.

    With the rows ``J`` that :meth:`columns` gives, and a core ``C`` that :meth:`times` multiplies
    by, ``V Q V^T = J C J^T``.
    """

    @abstractmethod
    def residual(self) -> Vectors:
        """``r``, the first derivatives."""

    @abstractmethod
    def trace(self) -> Vectors:
        """``Tr Q``, with a single row."""

    @abstractmethod
    def columns(self, outgoing: Tensor) -> Matrices:
        """``J`` of ``V``: rows ``(networks, M, K)`` for each sample."""

    @abstractmethod
    def in_outgoing(self, rows: Matrices) -> Tensor:
        """The adjoint of ``V`` from that of its ``J``."""

    @abstractmethod
    def times(self, rows: Matrices) -> Matrices:
        """``rows C``, of such rows."""

    def quadratic(self, rows: Matrices) -> Vectors:
        """The diagonal of ``rows C rows^T``, ``(networks, M, samples)``."""
        return (rows * self.times(rows)).sum(-2)

    @abstractmethod
    def squares(self, outgoing: Tensor) -> Vectors:
        """The diagonal of ``V Q V^T``, for ``V`` of shape ``(networks, M, K)``."""

    @abstractmethod
    def weigh(self, outgoing: Tensor, weights: Vectors) -> tuple[Tensor, Any]:
        """Of ``sum weights * squares`` half the adjoint of ``V``, and that of ``Q``.

        The latter, ``S = V^T diag(weights) V``, in the form in which :meth:`chain` takes it, like
        what :meth:`between` gives. Called behind :meth:`squares`.
        """

    @abstractmethod
    def between(self, left: Matrices, right: Matrices) -> Any:
        """The adjoint of ``Q`` where ``left^T right`` is that of ``C``, which is symmetric."""

    @abstractmethod
    def chain(self, residual: Vectors | None, alone: Vectors, inner: Any) -> Vectors:
        """The adjoint of the logits from those of ``r`` and of ``Q``.

        Args:
            residual: That of ``r``, if there is one.
            alone: That of ``Q`` is ``alone I + S``; one row.
            inner: ``S``, as :meth:`weigh` or :meth:`between` gives it; None for zero.
        """


def at_logits(loss: Loss, logits: Vectors, data: Data) -> LogitCurvature:
    """The curvature of a loss at some logits, which it does not keep."""
    target, scale = data.y.to(logits.dtype), data.scale
    if loss is LOSSES["ce"]:
        return _Softmax(logits, target.mT, scale.mT if isinstance(scale, Tensor) else scale)
    # A loss of one's own may hand back what it is given.
    ours = LOSSES.get(loss.name) is loss
    found = read_derivatives(loss, logits.mT if ours else logits.mT.clone(), target)
    if isinstance(found, Separable):
        return _Separable(*((part * scale).mT for part in found))
    weights = scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale
    return _Coupled(
        (found.residual * scale).mT,
        found.curvature * weights,
        lambda adjoint: (found.third(adjoint) * scale).mT,
    )


def add_product(
    total: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """``beta total + alpha left @ right``, of matrices or of as many networks' in all three."""
    function = torch.addmm if total.ndim == 2 else torch.baddbmm
    return function(total, left, right, beta=beta, alpha=alpha)


class _InP(NamedTuple):
    """The adjoint of ``p``, up to a constant of each sample, or that times ``p``."""

    plain: Tensor | None = None
    times_p: Tensor | None = None


class _Softmax(LogitCurvature):
    r"""Cross-entropy, from what the probabilities ``p`` are away from the likeliest class ``e``.

    These differences are small where a sample is fitted, and nothing would be left of
    ``1 - p`` of the likeliest. With them :math:`p_j p_k` is avoided, too: of :math:`d = p - e`

    .. math:: v^T Q v = \sum_k p_k (v_k - v \cdot p)^2 = v^2 \cdot d - (v \cdot d)(v \cdot (p + e))

    The middle one says that ``J`` of the columns :math:`\sqrt{p_k} (v_k - v \cdot p)` has the core
    ``I``; and the derivative in the logits takes that in ``p`` times ``p``, the square of a column.
    """

    def __init__(self, logits: Vectors, target: Vectors, scale: float | Tensor) -> None:
        # The fast way round for each of the two.
        self.top = logits.mT.argmax(-1, keepdim=True).mT
        self.p = torch.softmax(logits.contiguous(), -2)
        others = self.p.scatter(-2, self.top, 0)
        self.rest = others.sum(-2, keepdim=True)  # of the likeliest class 1 - p
        self.d = others.scatter_(-2, self.top, -self.rest)
        self.minus = torch.add(self.d, self.p, alpha=-2)  # - (p + e)
        self.target, self.scale = target, scale
        # The target need not sum to one: class weights are in it.
        self.total = target.sum(-2, keepdim=True)
        self.weight = self.total * scale
        self.weighed = self.d * self.weight

    def residual(self) -> Vectors:
        rest = (1 - self.p).scatter_(-2, self.top, self.rest)
        # sum_j (p_k target_j - p_j target_k): a fitted sample's terms vanish one by one.
        return (self.p * (self.total - self.target) - self.target * rest) * self.scale

    def trace(self) -> Vectors:
        return (self.weighed * self.minus).sum(-2, keepdim=True)

    def columns(self, outgoing: Tensor) -> Matrices:
        self._root = (self.weight * self.p).sqrt_().unsqueeze(-3)
        likeliest = outgoing.gather(-1, self.top.expand(*outgoing.shape[:-1], -1))
        # In two steps: the likeliest class's own column is what the second one subtracts.
        rows = outgoing.unsqueeze(-1) - likeliest.unsqueeze(-2)
        return rows.sub_((outgoing @ self.d).unsqueeze(-2)).mul_(self._root)

    def in_outgoing(self, rows: Matrices) -> Tensor:
        # The mean over columns is zero, so that its own derivative adds nothing.
        return (rows * self._root).sum(-1)

    def times(self, rows: Matrices) -> Matrices:
        return rows

    def quadratic(self, rows: Matrices) -> Vectors:
        return rows.square().sum(-2)

    def squares(self, outgoing: Tensor) -> Vectors:
        # Each of two terms has one factor d.
        self._square = outgoing.square()
        self._left, self._right = outgoing @ self.weighed, outgoing @ self.minus
        return torch.addcmul(self._square @ self.weighed, self._left, self._right)

    def weigh(self, outgoing: Tensor, weights: Vectors) -> tuple[Tensor, _InP]:
        left, right = weights * self._left, weights * self._right
        half = outgoing * (weights @ self.weighed.mT)
        half = add_product(half, right, self.weighed.mT, alpha=0.5)
        half = add_product(half, left, self.minus.mT, alpha=0.5)
        inner = add_product(self._square.mT @ weights, outgoing.mT, right).mul_(self.weight)
        return half, _InP(add_product(inner, outgoing.mT, left, alpha=-1))

    def between(self, left: Matrices, right: Matrices) -> _InP:
        return _InP(times_p=(left * right).sum(-3))

    def chain(self, residual: Vectors | None, alone: Vectors, inner: Any) -> Vectors:
        # Of Tr Q = sum p (1 - p).
        alone = self.weight * alone
        if inner is not None and inner.plain is not None:
            along = torch.addcmul(inner.plain, self.p, alone, value=-2)
        else:
            along = self.p * (-2 * alone)
        if residual is not None:
            along = torch.addcmul(along, self.weight, residual)
        # Measured from the likeliest class, for which the difference is small, nothing cancels.
        along = (along - along.gather(-2, self.top)).mul_(self.p)
        if inner is not None and inner.times_p is not None:
            along += inner.times_p
        return torch.addcmul(along, self.p, along.sum(-2, keepdim=True), value=-1)


class _Separable(LogitCurvature):
    """A sum over logits: ``Q`` is diagonal."""

    def __init__(self, first: Vectors, second: Vectors, third: Vectors) -> None:
        self.first, self.second, self.third = first, second, third

    def residual(self) -> Vectors:
        return self.first

    def trace(self) -> Vectors:
        return self.second.sum(-2, keepdim=True)

    def columns(self, outgoing: Tensor) -> Matrices:
        return outgoing.unsqueeze(-1).expand(*outgoing.shape, self.second.shape[-1])

    def in_outgoing(self, rows: Matrices) -> Tensor:
        return rows.sum(-1)

    def times(self, rows: Matrices) -> Matrices:
        return rows * self.second.unsqueeze(-3)

    def squares(self, outgoing: Tensor) -> Vectors:
        return outgoing.square() @ self.second

    def weigh(self, outgoing: Tensor, weights: Vectors) -> tuple[Tensor, Tensor]:
        return outgoing * (weights @ self.second.mT), outgoing.square().mT @ weights

    def between(self, left: Matrices, right: Matrices) -> Tensor:
        return (left * right).sum(-3)  # the diagonal

    def chain(self, residual: Vectors | None, alone: Vectors, inner: Tensor | None) -> Vectors:
        result = self.third * (alone if inner is None else alone + inner)
        return result if residual is None else torch.addcmul(result, self.second, residual)


class _Coupled(LogitCurvature):
    """A loss of one's own, by the whole ``Q``: ``(networks, samples, K, K)``."""

    def __init__(self, first: Vectors, second: Tensor, third: Callable[[Tensor], Vectors]) -> None:
        self.first, self.second, self.third = first, second, third

    def residual(self) -> Vectors:
        return self.first

    def trace(self) -> Vectors:
        return self.second.diagonal(dim1=-2, dim2=-1).sum(-1).unsqueeze(-2)

    def columns(self, outgoing: Tensor) -> Matrices:
        return outgoing.unsqueeze(-1).expand(*outgoing.shape, self.second.shape[-3])

    def in_outgoing(self, rows: Matrices) -> Tensor:
        return rows.sum(-1)

    def times(self, rows: Matrices) -> Matrices:
        return (rows.movedim(-1, -3) @ self.second).movedim(-3, -1)

    def squares(self, outgoing: Tensor) -> Vectors:
        rows = self.columns(outgoing)
        return self.quadratic(rows)

    def weigh(self, outgoing: Tensor, weights: Vectors) -> tuple[Tensor, Tensor]:
        rows = self.columns(outgoing)
        weighed = rows * weights.unsqueeze(-2)
        return self.times(weighed).sum(-1), self.between(rows, weighed)

    def between(self, left: Matrices, right: Matrices) -> Tensor:
        matrices = left.movedim(-1, -3).mT @ right.movedim(-1, -3)
        return 0.5 * (matrices + matrices.mT)  # symmetric but for rounding

    def chain(self, residual: Vectors | None, alone: Vectors, inner: Tensor | None) -> Vectors:
        eye = torch.eye(self.second.shape[-1], dtype=alone.dtype, device=alone.device)
        adjoint = alone.mT.unsqueeze(-1) * eye
        adjoint = (adjoint if inner is None else adjoint + inner).expand_as(self.second)
        result = self.third(adjoint)
        if residual is not None:
            result = result + (self.second @ residual.mT.unsqueeze(-1)).squeeze(-1).mT
        return result

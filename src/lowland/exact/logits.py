r"""What a trace asks of the loss: its curvature ``Q`` in the logits, times factors of few columns.

A trace needs of :math:`\sum_k (J Q J^T)_{kk}` products of ``Q`` with the rows of ``J`` alone, and
for its gradient the derivative of :math:`\langle S, Q \rangle` in the logits, with an ``S`` that is
never asked for as a whole unless the loss is one of your own. Cross-entropy has
:math:`Q = \mathrm{diag}(p) - p p^T`, which is not formed: of ``K`` logits that takes ``K`` numbers
a sample in the place of ``K^2``.

Logits come first here, samples last: ``(networks, K, samples)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lowland.exact.terms import Data, Matrices, Vectors
from lowland.losses import LOSSES, Loss, Separable, read_derivatives


class LogitCurvature(ABC):
    """``r`` and ``Q`` of some samples, weighed as these are in the loss."""

    @abstractmethod
    def residual(self) -> Vectors:
        """``r``, the first derivatives."""

    @abstractmethod
    def trace(self) -> Vectors:
        """``Tr Q``, with a single row."""

    @abstractmethod
    def columns(self, outgoing: Tensor) -> Matrices:
        """Rows ``(networks, M, K)`` for each sample, up to what ``Q`` maps to zero."""

    @abstractmethod
    def times(self, rows: Matrices) -> Matrices:
        """``rows Q``, of such rows."""

    def quadratic(self, rows: Matrices) -> Vectors:
        """The diagonal of ``rows Q rows^T``, ``(networks, M, samples)``."""
        return (rows * self.times(rows)).sum(2)

    @abstractmethod
    def squares(self, outgoing: Tensor) -> Vectors:
        """The diagonal of ``V Q V^T``, for ``V`` of shape ``(networks, M, K)``."""

    @abstractmethod
    def weigh(self, outgoing: Tensor, weights: Vectors) -> tuple[Tensor, Tensor]:
        """Of ``sum weights * squares`` the adjoint of ``V``, and ``S = V^T diag(weights) V``.

        ``S`` in the form in which :meth:`chain` takes it, like what :meth:`between` gives.
        """

    @abstractmethod
    def between(self, left: Matrices, right: Matrices) -> Tensor:
        """``S = left^T right``, symmetric, of rows as :meth:`columns` gives them."""

    @abstractmethod
    def chain(self, residual: Vectors | None, alone: Vectors, inner: Tensor | None) -> Vectors:
        """The adjoint of the logits from those of ``r`` and of ``Q``.

        Args:
            residual: That of ``r``, if there is one.
            alone: That of ``Q`` is ``alone I + S``; one row.
            inner: ``S``, as :meth:`weigh` or :meth:`between` gives it.
        """


def at_logits(loss: Loss, logits: Vectors, data: Data) -> LogitCurvature:
    """The curvature of a loss at some logits."""
    target, scale = data.y.to(logits.dtype), data.scale
    if loss is LOSSES["ce"]:
        return _Softmax(logits, target.mT, scale.mT if isinstance(scale, Tensor) else scale)
    found = read_derivatives(loss, logits.mT, target)
    if isinstance(found, Separable):
        return _Separable(*((part * scale).mT for part in found))
    weights = scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale
    return _Coupled(
        (found.residual * scale).mT,
        found.curvature * weights,
        lambda adjoint: (found.third(adjoint) * scale).mT,
    )


class _Softmax(LogitCurvature):
    """Cross-entropy, from the probabilities of all classes but each sample's likeliest.

    These are small where a sample is fitted, and nothing is left of ``1 - p`` of the likeliest.
    Since ``Q`` maps equal entries to zero, rows are measured from the likeliest class's, whose own
    entry is zero then.
    """

    def __init__(self, logits: Vectors, target: Vectors, scale: float | Tensor) -> None:
        self.p = torch.softmax(logits, 1)
        self.top = logits.argmax(1, keepdim=True)
        self.others = self.p.scatter(1, self.top, 0)
        self.rest = self.others.sum(1, keepdim=True)  # of the likeliest class 1 - p
        self.target, self.scale = target, scale
        # The target need not sum to one: class weights are in it.
        self.total = target.sum(1, keepdim=True)
        self.weight = self.total * scale
        self.weighed = self.weight * self.p

    def residual(self) -> Vectors:
        rest = (1 - self.p).scatter(1, self.top, self.rest)
        # sum_j (p_k target_j - p_j target_k): a fitted sample's terms vanish one by one.
        return (self.p * (self.total - self.target) - self.target * rest) * self.scale

    def trace(self) -> Vectors:
        rest = (1 - self.p).scatter_(1, self.top, self.rest)
        return (self.weighed * rest).sum(1, keepdim=True)

    def columns(self, outgoing: Tensor) -> Matrices:
        shape = outgoing.shape[0], outgoing.shape[1], self.top.shape[2]
        likeliest = outgoing.gather(2, self.top.expand(shape))
        return outgoing.unsqueeze(3) - likeliest.unsqueeze(2)

    def times(self, rows: Matrices) -> Matrices:
        mean = (rows * self.others.unsqueeze(1)).sum(2, keepdim=True)
        return (rows - mean).mul_(self.weighed.unsqueeze(1))

    def quadratic(self, rows: Matrices) -> Vectors:
        weighed = rows * self.others.unsqueeze(1)
        mean = weighed.sum(2)
        return torch.addcmul(weighed.mul_(rows).sum(2), mean, mean, value=-1) * self.weight

    def squares(self, outgoing: Tensor) -> Vectors:
        others, rest = self.others, self.rest
        shape = outgoing.shape[0], outgoing.shape[1], self.top.shape[2]
        # Of the likeliest class, and the mean over all classes from there.
        self._likeliest = likeliest = outgoing.gather(2, self.top.expand(shape))
        self._away = away = torch.addcmul(outgoing @ others, likeliest, rest, value=-1)
        total = torch.addcmul(outgoing.square() @ others, away, away, value=-1)
        return total.sub_(likeliest * torch.addcmul(2 * away, likeliest, rest)).mul_(self.weight)

    def weigh(self, outgoing: Tensor, weights: Vectors) -> tuple[Tensor, Tensor]:
        likeliest, away = self._likeliest, self._away
        weighed, others = self.weight * weights, self.others.mT
        # p_k (V_k - mean), for the likeliest class from what it is away from the mean.
        adjoint = outgoing * (weighed @ others)
        adjoint -= (weighed * likeliest) @ others
        adjoint -= (weighed * away) @ self.p.mT
        inner = outgoing.square().mT @ weights
        inner -= outgoing.mT @ (2 * weights * (likeliest + away))
        return 2 * adjoint, inner

    def between(self, left: Matrices, right: Matrices) -> Tensor:
        mean = (right * self.others.unsqueeze(1)).sum(2, keepdim=True)
        return (left * (right - 2 * mean)).sum(1)

    def chain(self, residual: Vectors | None, alone: Vectors, inner: Tensor | None) -> Vectors:
        # <S, Q> = diag(S) . p - p S p, then through the softmax: inner is diag(S) - 2 S p.
        along = alone * (1 - 2 * self.p)
        if inner is not None:
            along = along + inner
        if residual is not None:
            along = along + residual
        # Measured from the likeliest class, for which the difference is small, nothing cancels.
        along = along - along.gather(1, self.top)
        return self.weighed * (along - (self.others * along).sum(1, keepdim=True))


class _Separable(LogitCurvature):
    """A sum over logits: ``Q`` is diagonal."""

    def __init__(self, first: Vectors, second: Vectors, third: Vectors) -> None:
        self.first, self.second, self.third = first, second, third

    def residual(self) -> Vectors:
        return self.first

    def trace(self) -> Vectors:
        return self.second.sum(1, keepdim=True)

    def columns(self, outgoing: Tensor) -> Matrices:
        return outgoing.unsqueeze(3).expand(*outgoing.shape, self.second.shape[2])

    def times(self, rows: Matrices) -> Matrices:
        return rows * self.second.unsqueeze(1)

    def squares(self, outgoing: Tensor) -> Vectors:
        return outgoing.square() @ self.second

    def weigh(self, outgoing: Tensor, weights: Vectors) -> tuple[Tensor, Tensor]:
        adjoint = 2 * outgoing * (weights @ self.second.mT)
        return adjoint, outgoing.square().mT @ weights

    def between(self, left: Matrices, right: Matrices) -> Tensor:
        return (left * right).sum(1)  # the diagonal

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
        return self.second.diagonal(dim1=2, dim2=3).sum(2).unsqueeze(1)

    def columns(self, outgoing: Tensor) -> Matrices:
        return outgoing.unsqueeze(3).expand(*outgoing.shape, self.second.shape[1])

    def times(self, rows: Matrices) -> Matrices:
        return (rows.permute(0, 3, 1, 2) @ self.second).permute(0, 2, 3, 1)

    def squares(self, outgoing: Tensor) -> Vectors:
        rows = self.columns(outgoing)
        return (rows * self.times(rows)).sum(2)

    def weigh(self, outgoing: Tensor, weights: Vectors) -> tuple[Tensor, Tensor]:
        rows = self.columns(outgoing)
        weighed = rows * weights.unsqueeze(2)
        return 2 * self.times(weighed).sum(3), self.between(rows, weighed)

    def between(self, left: Matrices, right: Matrices) -> Tensor:
        matrices = left.permute(0, 3, 2, 1) @ right.permute(0, 3, 1, 2)
        return 0.5 * (matrices + matrices.mT)  # symmetric but for rounding

    def chain(self, residual: Vectors | None, alone: Vectors, inner: Tensor | None) -> Vectors:
        eye = torch.eye(self.second.shape[2], dtype=alone.dtype, device=alone.device)
        adjoint = alone.mT.unsqueeze(3) * eye
        adjoint = (adjoint if inner is None else adjoint + inner).expand_as(self.second)
        result = self.third(adjoint)
        if residual is not None:
            result = result + (self.second @ residual.mT.unsqueeze(3)).squeeze(3).mT
        return result

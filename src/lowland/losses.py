"""Per-sample losses, and their first three derivatives in the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

TargetKind = Literal["binary", "probabilities", "real", "classes"]


class Separable(NamedTuple):
    """Derivatives of a sum of functions of one logit each; each field has the logits' shape.

    Example:
        >>> import torch
        >>> from lowland.losses import Separable
        >>> def derivatives(s, y):  # of (s - y)^4
        ...     return Separable(4 * (s - y) ** 3, 12 * (s - y) ** 2, 24 * (s - y))
        >>> derivatives(torch.tensor([2.0]), torch.tensor([1.0])).curvature
        tensor([12.])
    """

    residual: Tensor
    curvature: Tensor
    third: Tensor


class Coupled(NamedTuple):
    """Derivatives of a function of all ``K`` logits of a sample.

    Attributes:
        residual: First derivatives ``r``, ``(..., samples, K)``.
        curvature: Second derivatives ``Q``, ``(..., samples, K, K)``, symmetric.
        third: Maps a symmetric ``A`` of ``Q``'s shape to the gradient of ``<A, Q>`` in the logits,
            ``(..., samples, K)``.

    Example:
        >>> import torch
        >>> from lowland.losses import Coupled
        >>> def derivatives(s, y):  # of (sum of s - y)^2 / 2
        ...     ones = torch.ones_like(s)
        ...     residual = ones * (s - y).sum(-1, keepdim=True)
        ...     curvature = ones.unsqueeze(-1) * ones.unsqueeze(-2)
        ...     return Coupled(residual, curvature, lambda A: torch.zeros_like(s))
        >>> derivatives(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)).residual
        tensor([[3., 3.]])
    """

    residual: Tensor
    curvature: Tensor
    third: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss of the logits ``s`` and the targets ``y`` of each sample, twice differentiable.

    A loss of your own needs its logit derivatives and nothing else; the engine does the rest.

    Attributes:
        name: The name used in ``loss="..."`` arguments.
        value: The loss itself, PyTorch's ``reduction="none"``: of the logits' shape where it is a
            sum over outputs, ``(..., samples)`` where it couples them.
        derivatives: Maps logits and targets, ``(..., samples, K)`` both, to :class:`Separable` or
            :class:`Coupled`. At its first use a loss's derivatives are compared with its value.
        targets: ``"binary"`` if they must be 0 or 1, ``"probabilities"`` if between 0 and 1,
            ``"real"`` if any number will do; all of these have one target per logit.
            ``"classes"`` for labels from 0 to ``K - 1``, of which ``derivatives`` gets a
            distribution over classes.

    Raises:
        TypeError: If a part is not what it must be.
        ValueError: If there are no such targets.

    Example:
        >>> import torch
        >>> from lowland import exact
        >>> from lowland.losses import Loss, Separable
        >>> def derivatives(s, y):  # Poisson regression, l = exp(s) - y s
        ...     rate = s.exp()
        ...     return Separable(rate - y, rate, rate)
        >>> poisson = Loss("poisson", lambda s, y: s.exp() - y * s, derivatives)
        >>> weights, x, counts = [torch.zeros(2, 1)], torch.ones(4, 1), torch.arange(4.0)
        >>> exact.trace(weights, x, counts, activation="identity", loss=poisson)
        tensor(2.)
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    derivatives: Callable[[Tensor, Tensor], Separable | Coupled]
    targets: TargetKind = "real"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"the name of a loss must be a string; got {self.name!r}")
        for part in ("value", "derivatives"):
            if not callable(getattr(self, part)):
                raise TypeError(
                    f"{part} of the loss {self.name!r} must be a function of logits and targets; "
                    f"got {getattr(self, part)!r}"
                )
        if self.targets not in get_args(TargetKind):
            known = ", ".join(map(repr, get_args(TargetKind)))
            raise ValueError(
                f"targets of the loss {self.name!r} must be one of {known}; got {self.targets!r}"
            )

    @property
    def per_output(self) -> bool:
        """Whether the mean over a data set is one over samples and outputs, as in PyTorch."""
        return self.targets != "classes"


class _SeparableFunction(Function):
    """``(r, q)`` as functions of the logits: the chain rule by ``dr/ds = q`` and ``dq/ds = t``."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, derivatives: Separable) -> tuple[Tensor, Tensor]:
        residual, curvature, third = derivatives
        ctx.save_for_backward(curvature, third)
        return residual, curvature

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        curvature, third = ctx.saved_tensors
        return torch.addcmul(grads[0] * curvature, grads[1], third), None


class _CoupledFunction(Function):
    """``(r, Q)`` as functions of the logits: ``dr/ds = Q``, and ``third`` is ``d<A, Q>/ds``."""

    @staticmethod
    def forward(
        ctx: Any, _: Tensor, derivatives: Coupled, scale: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        residual, curvature, ctx.third = derivatives
        ctx.scale = scale
        residual, curvature = residual * scale, curvature * _last(scale)
        ctx.save_for_backward(curvature)
        return residual, curvature

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (curvature,) = ctx.saved_tensors
        adjoint = 0.5 * (grads[1] + grads[1].mT)  # Q is symmetric: only this part of it counts
        chained = (curvature @ grads[0].unsqueeze(-1)).squeeze(-1)
        return chained + ctx.third(adjoint) * ctx.scale, None, None


def _last(scale: float | Tensor) -> float | Tensor:
    """Weights ``(..., samples, 1)`` of samples in a shape that multiplies their matrices."""
    return scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale


def logit_derivatives(
    loss: Loss, logits: Tensor, targets: Tensor, scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    """A loss's first and second derivatives in the logits, with a backward pass by its third.

    Args:
        loss: The loss.
        logits: ``(..., samples, K)``.
        targets: ``(..., samples, K)``.
        scale: Weight of each sample or of each of its outputs.

    Returns:
        ``(..., samples, K)``, and ``(..., samples, K)`` again for a separable loss, the diagonal of
        its curvature, or ``(..., samples, K, K)`` for a coupled one.
    """
    with torch.no_grad():
        found = read_derivatives(loss, logits, targets)
        if isinstance(found, Separable):
            found = Separable(*(part * scale for part in found))
    result: tuple[Tensor, Tensor]
    if isinstance(found, Separable):
        result = _SeparableFunction.apply(logits, found)  # type: ignore[no-untyped-call]
    else:
        result = _CoupledFunction.apply(logits, found, scale)  # type: ignore[no-untyped-call]
    return result


def read_derivatives(loss: Loss, logits: Tensor, targets: Tensor) -> Separable | Coupled:
    """A loss's derivatives at some logits, checked for the types and shapes that it promises.

    Raises:
        TypeError: If it is no :class:`Separable` or :class:`Coupled`.
        ValueError: If a part of it has another shape or type.
    """
    found = loss.derivatives(logits, targets)
    shape, dtype = tuple(logits.shape), logits.dtype

    def require(part: object, name: str, *more: int) -> Tensor:
        expected = (*shape, *more)
        if isinstance(part, Tensor) and part.shape == expected and part.dtype == dtype:
            return part
        raise ValueError(
            f"{name} of the loss {loss.name!r} must be {_describe(expected, dtype)} for logits of "
            f"shape {shape}; got {_describe_value(part)}"
        )

    if isinstance(found, Separable):
        parts = zip(found._fields, found, strict=True)
        return Separable(*(require(part, name) for name, part in parts))
    if isinstance(found, Coupled):
        third = found.third
        return Coupled(
            require(found.residual, "residual"),
            require(found.curvature, "curvature", shape[-1]),
            lambda adjoint: require(third(adjoint), "third(A)"),
        )
    raise TypeError(
        f"the derivatives of the loss {loss.name!r} must be a lowland.losses.Separable or Coupled; "
        f"got {_describe_value(found)}"
    )


def _describe(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"a {str(dtype).removeprefix('torch.')} tensor of shape {tuple(shape)}"


def _describe_value(value: object) -> str:
    if isinstance(value, Tensor):
        return _describe(value.shape, value.dtype)
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"{type(value).__name__}"


def _bce_value(logit: Tensor, target: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logit, target, reduction="none")


def _bce_derivatives(logit: Tensor, target: Tensor) -> Separable:
    # Of both probabilities a fitted sample's residual underflows gracefully, where p - y would
    # round to zero as soon as p rounds to one.
    high, low = torch.sigmoid(logit), torch.sigmoid(-logit)
    curvature = high * low
    residual = (1 - target) * high - target * low
    return Separable(residual, curvature, curvature * torch.tanh(-0.5 * logit))


def _mse_value(logit: Tensor, target: Tensor) -> Tensor:
    return (logit - target).square()


def _mse_derivatives(logit: Tensor, target: Tensor) -> Separable:
    return Separable(2 * (logit - target), torch.full_like(logit, 2), torch.zeros_like(logit))


def _ce_value(logits: Tensor, target: Tensor) -> Tensor:
    log_p = functional.log_softmax(logits, -1)
    if target.ndim == logits.ndim:
        return -(target * log_p).sum(-1)
    labels = target.long().expand(log_p.shape[:-1]).unsqueeze(-1)
    return -log_p.gather(-1, labels).squeeze(-1)


def _ce_derivatives(logits: Tensor, target: Tensor) -> Coupled:
    p = torch.softmax(logits, -1)
    top = functional.one_hot(logits.argmax(-1), logits.shape[-1]).bool()
    # 1 - p without cancellation: where p is the largest, the sum of the others.
    others = torch.where(top, 0, p)
    rest = torch.where(top, others.sum(-1, keepdim=True), 1 - p)
    # The target need not sum to one: class weights are in it.
    total = target.sum(-1, keepdim=True)
    # sum_j (p_k target_j - p_j target_k): a fitted sample's terms vanish one by one.
    residual = p * (total - target) - target * rest
    outer = p.unsqueeze(-1) * p.unsqueeze(-2)
    curvature = -outer
    curvature.diagonal(dim1=-2, dim2=-1).copy_(p * rest)
    curvature = curvature * total.unsqueeze(-1)

    def third(adjoint: Tensor) -> Tensor:
        # <A, Q> = total (diag(A) . p - p A p), then through the softmax: p (h - p . h). Measured
        # from the largest class, for which the difference is small, nothing cancels.
        along = adjoint.diagonal(dim1=-2, dim2=-1) - 2 * (adjoint @ p.unsqueeze(-1)).squeeze(-1)
        along = along - torch.where(top, along, 0).sum(-1, keepdim=True)
        return total * p * (along - (others * along).sum(-1, keepdim=True))

    return Coupled(residual, curvature, third)


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("bce", _bce_value, _bce_derivatives, "probabilities"),
        Loss("ce", _ce_value, _ce_derivatives, "classes"),
        Loss("mse", _mse_value, _mse_derivatives),
    )
}


def get_loss(loss: str | Loss) -> Loss:
    """Look a loss up by name; a :class:`Loss` passes through.

    ``"bce"`` is binary cross-entropy on each logit, ``"ce"`` cross-entropy of the softmax over
    logits, ``"mse"`` the squared error ``(s - y)^2`` (PyTorch's convention: without a factor one
    half).

    Raises:
        ValueError: If the name is not one of ``LOSSES``.

    Example:
        >>> import torch
        >>> from lowland.losses import get_loss
        >>> get_loss("mse").value(torch.tensor([3.0]), torch.tensor([1.0]))
        tensor([4.])
    """
    if isinstance(loss, Loss):
        return loss
    if not isinstance(loss, str) or loss not in LOSSES:
        known = ", ".join(LOSSES)
        raise ValueError(
            f"unknown loss {loss!r}: expected one of {known}, or a lowland.losses.Loss"
        )
    return LOSSES[loss]

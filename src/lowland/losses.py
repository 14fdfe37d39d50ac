"""Per-sample losses of one logit, and their first three derivatives with respect to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LogitDerivatives = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss ``l(s, y)`` of one logit ``s`` and one target ``y`` per sample.

    Attributes:
        name: The name used in ``loss="..."`` arguments.
        value: Maps logits and targets of one shape to the per-sample loss, PyTorch's
            ``reduction="none"``.
        derivatives: Maps them to ``(r, q, t)``, the residual dl/ds, the curvature d2l/ds2 and the
            third derivative d3l/ds3.
        binary: True if targets must be 0 or 1.
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    derivatives: Callable[[Tensor, Tensor], LogitDerivatives]
    binary: bool


def _bce_value(logit: Tensor, target: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logit, target, reduction="none")


def _bce_derivatives(logit: Tensor, target: Tensor) -> LogitDerivatives:
    # In terms of the signed logit a fitted sample's residual underflows gracefully, where p - y
    # would round to zero as soon as p rounds to one.
    sign = 1 - 2 * target
    signed = sign * logit
    wrong, right = torch.sigmoid(signed), torch.sigmoid(-signed)
    curvature = wrong * right
    return sign * wrong, curvature, curvature * torch.tanh(-0.5 * logit)


def _mse_value(logit: Tensor, target: Tensor) -> Tensor:
    return (logit - target).square()


def _mse_derivatives(logit: Tensor, target: Tensor) -> LogitDerivatives:
    return 2 * (logit - target), torch.full_like(logit, 2), torch.zeros_like(logit)


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("bce", _bce_value, _bce_derivatives, binary=True),
        Loss("mse", _mse_value, _mse_derivatives, binary=False),
    )
}


def get_loss(loss: str | Loss) -> Loss:
    """Look a loss up by name; a :class:`Loss` passes through.

    ``"bce"`` is binary cross-entropy on the logit, ``"mse"`` the squared error ``(s - y)^2``
    (PyTorch's convention: without a factor one half).

    Raises:
        ValueError: If the name is not one of ``LOSSES``.
    """
    if isinstance(loss, Loss):
        return loss
    if loss not in LOSSES:
        known = ", ".join(LOSSES)
        raise ValueError(f"unknown loss {loss!r}: expected one of {known}")
    return LOSSES[loss]

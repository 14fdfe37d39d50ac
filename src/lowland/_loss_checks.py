"""Whether a loss of one's own is what it says: its derivatives, and the criterion it stands for."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn import functional

from lowland.losses import LOSSES, Loss, Separable, read_derivatives

Orders = tuple[Tensor, Tensor, Tensor]

_matched: deque[Loss] = deque(maxlen=64)

_FEW = 3  # samples
_CLOSE = 1e-3  # apart by a mistake, not by rounding or by an epsilon in a logarithm


def check_loss(loss: Loss, targets: Tensor, *, like: Tensor) -> None:
    """Require that derivatives are those of the value, when a loss is first seen.

    They are compared at random logits, where automatic differentiation goes through the value.

    Args:
        loss: One of the library's own is taken as it is.
        targets: ``(..., samples, K)``, of which a few are used.
        like: Of the type that the logits will have.

    Raises:
        TypeError: If the derivatives are no ``Separable`` or ``Coupled``.
        ValueError: If a shape is wrong, or a derivative is not that of the value.
    """
    if LOSSES.get(loss.name) is loss or loss in _matched:
        return
    targets = targets.detach().reshape(-1, targets.shape[-1])[:_FEW].to(like.dtype)
    random = torch.randn(2, *targets.shape, generator=torch.Generator().manual_seed(0))
    logits, along = random.to(targets)
    with torch.no_grad(), torch.autocast(targets.device.type, enabled=False):
        told = _told(loss, logits, targets, along)
        try:
            true = _true(loss, logits, targets, along)
        except RuntimeError:  # PyTorch cannot differentiate it, so there is nothing to compare with
            true = told
    for name, mine, theirs in zip(("residual", "curvature", "third"), told, true, strict=True):
        _require_close(loss, name, mine, theirs, rounding=_rounding(true))
    _matched.append(loss)


def check_criterion(
    criterion: nn.Module, loss: Loss, targets: Tensor, outputs: int, *, like: Tensor
) -> None:
    """Require that a criterion is the mean or the sum of the loss that was registered for it.

    Their gradients are compared at random logits, so that a term without logits may differ.

    Args:
        criterion: Of reduction ``"mean"`` or ``"sum"``.
        loss: What the closed form takes it for.
        targets: ``(samples, K)``, or ``(samples, 1)`` labels of classes.
        outputs: ``K``.
        like: Of the type that the logits will have.

    Raises:
        ValueError: If it is another function of the logits.
    """
    targets = targets.detach()
    if loss.targets == "classes" and targets.shape[1] < outputs:
        targets = targets.squeeze(1)
        encoded = functional.one_hot(targets.long(), outputs).to(like.dtype)
    else:
        targets = encoded = targets.to(like.dtype)
    random = torch.randn(len(targets), outputs, generator=torch.Generator().manual_seed(0))
    logits = random.to(encoded).requires_grad_()
    with torch.enable_grad(), torch.autocast(like.device.type, enabled=False):
        (theirs,) = torch.autograd.grad(criterion(logits, targets), logits)
    with torch.no_grad():
        mine = read_derivatives(loss, logits, encoded).residual
    terms = logits.numel() if loss.per_output else len(logits)
    mine = mine / terms if getattr(criterion, "reduction", "mean") == "mean" else mine
    apart, size = float((mine - theirs).abs().max()), float(theirs.abs().max())
    if not apart <= _CLOSE * size + 1e3 * torch.finfo(mine.dtype).eps * max(size, 1.0):
        raise ValueError(
            f"{criterion} is not the {getattr(criterion, 'reduction', 'mean')} of the loss "
            f"{loss.name!r} that register_criterion was given for it: at random logits their "
            f"gradients differ by {apart:.3g}, where they are up to {size:.3g}. Register a "
            f"function of the criterion's settings that returns the loss they mean, or use "
            "method='probes', which takes the criterion itself"
        )


def _told(loss: Loss, logits: Tensor, targets: Tensor, along: Tensor) -> Orders:
    """The gradient, ``Q v`` and the gradient of ``v Q v`` for a random ``v``, as the loss says."""
    found = read_derivatives(loss, logits, targets)
    if isinstance(found, Separable):
        return found.residual, found.curvature * along, found.third * along.square()
    column = along.unsqueeze(-1)
    return found.residual, (found.curvature @ column).squeeze(-1), found.third(column * column.mT)


def _true(loss: Loss, logits: Tensor, targets: Tensor, along: Tensor) -> Orders:
    """What :func:`_told` asks of the loss, by automatic differentiation of its value."""

    def total(s: Tensor) -> Tensor:
        value = loss.value(s, targets)
        if value.shape not in (s.shape, s.shape[:-1]):
            raise ValueError(
                f"the value of the loss {loss.name!r} must be one number for each logit, of shape "
                f"{tuple(s.shape)} here, or one for each sample, {tuple(s.shape[:-1])}; got "
                f"{tuple(value.shape)}"
            )
        return value.sum()

    def slope(s: Tensor) -> Tensor:
        return torch.sum(grad(total)(s) * along)

    def bend(s: Tensor) -> Tensor:
        return torch.sum(grad(slope)(s) * along)

    return grad(total)(logits), grad(slope)(logits), grad(bend)(logits)


def _rounding(true: Orders) -> float:
    """What rounding may leave of a zero."""
    return 1e3 * torch.finfo(true[0].dtype).eps * max(_largest(part) for part in true)


def _largest(values: Tensor) -> float:
    return float(torch.where(values.isfinite(), values, 0).abs().max())


def _require_close(loss: Loss, name: str, mine: Tensor, theirs: Tensor, *, rounding: float) -> None:
    apart = torch.where(mine.isfinite() & theirs.isfinite(), mine - theirs, 0).abs().flatten()
    worst = int(apart.argmax())
    if float(apart[worst]) > _CLOSE * _largest(theirs) + rounding:
        raise ValueError(
            f"{name!r} of the loss {loss.name!r} is not the derivative of its value: at random "
            f"logits an entry along a random direction is {float(mine.flatten()[worst]):.6g}, by "
            f"automatic differentiation {float(theirs.flatten()[worst]):.6g}; correct one of them"
        )

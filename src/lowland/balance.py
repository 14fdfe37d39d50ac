r"""What a penalty's gradient is beside the loss's: how it is limited, and what a strength means.

With the gradients ``g`` of the loss and ``h`` of the penalized quantity on the same samples, a step
of training goes along :math:`g + c h`. The factor ``c`` is the penalty's weight ``w``, made smaller
where :math:`w \lVert h \rVert` would exceed ``limit`` times the running mean of
:math:`\lVert g \rVert`. At sharp points the gradient of a curvature estimated from one direction
has a heavy tail, its length thousands of times the loss's, and one such step undoes a training; so
does each step where the weight is too large. With a limit below 1 the step goes down the loss on
average whatever the weight is, while weights whose gradients stay below the limit act as they are.

A strength ``s`` stands for the weight :math:`w = s \, \overline{\lVert g \rVert} /
\overline{\lVert h \rVert}` of running means: the penalty's gradient is on average ``s`` times as
long as the loss's. Neither the loss's own scale nor that of its inputs, nor what is penalized,
changes what that means.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lowland.gradients import Gradients, Number
from lowland.validation import is_number

LIMIT = 0.5
"""How long a penalty's gradient may be if nothing else is said, relative to the loss's."""

_MEMORY = 0.95  # of the running means: what a step keeps of them
_LAST = 100  # ratios of which a report has the median and the largest
_ENOUGH = 100  # steps, to tell how often the limit acts
_SCALE, _LARGEST = 2.0**10, 2.0**16  # of gradients in half precision, to begin with and at most


@dataclass(frozen=True)
class PenaltyReport:
    """What a penalty has done, for choosing its strength.

    Attributes:
        loss: Of the last call in which the penalty was applied, on the samples that it looked at.
        penalty: Its value there: the weight times the quantity.
        quantity: What is penalized there, before its weight.
        weight: What the quantity was multiplied by there, before any limit.
        ratio: The length of the penalty's gradient, before any limit, over that of the loss's on
            average: the median of the last 100 times.
        largest_ratio: The largest of the last 100.
        limited: The share of all calls with the penalty in which the limit acted.
        applied: How many calls had the penalty.
        loss_gradient: The running mean of the length of the loss's gradient.
        quantity_gradient: That of the quantity's, before its weight.
    """

    loss: float
    penalty: float
    quantity: float
    weight: float
    ratio: float
    largest_ratio: float
    limited: float
    applied: int
    loss_gradient: float
    quantity_gradient: float

    def __str__(self) -> str:
        if not self.applied:
            return (
                "no penalty has been compared with its loss: there was no call in training mode "
                "with gradients in which it is applied, or it has a weight and limit=None"
            )
        return (
            f"loss {self.loss:.4g}, penalty {self.penalty:.4g} = {self.weight:.4g} * "
            f"{self.quantity:.4g}; gradients' ratio {self.ratio:.2g} (largest "
            f"{self.largest_ratio:.2g}), limited in {self.limited:.0%} of {self.applied} calls"
        )


class Balance:
    """The running means of both gradients' lengths, and what follows from them."""

    def __init__(self) -> None:
        self.loss_length: Number = 0.0
        self.length: Number = 0.0
        self.seen: Number = 0.0  # an average that starts at zero is too small by what it lacks
        self.limited: Number = 0.0
        self.applied = 0
        self.steps, self.times = 0, 1  # that the calls have stood for, and the last of them
        self.scale: Number = _SCALE
        self.ratios: deque[Number] = deque(maxlen=_LAST)
        self.last: tuple[Number, ...] = (math.nan,) * 4

    def weigh(
        self,
        found: Gradients,
        times: int,
        *,
        weight: Number | None,
        strength: float | None,
        limit: float | None,
    ) -> tuple[Number, Number]:
        """The quantity's weight in this step, and what its gradient is multiplied by.

        Args:
            found: The gradients of the loss and of the quantity.
            times: How many steps this one stands for.
            weight: Of the quantity, where there is no strength.
            strength: How long the penalty's gradient is to be on average, relative to the loss's.
            limit: How long it may be.
        """
        here, length = _numbers(found.lengths())
        self._remember(here, length)
        average = _over(self.loss_length, self.seen)
        if strength is not None:
            weight = self.weight_of(strength)
        assert weight is not None  # noqa: S101 - there is one or the other
        factor = times * weight
        size = factor * length
        self.applied, self.steps, self.times = self.applied + 1, self.steps + times, times
        self.last = (*_numbers(torch.stack([found.loss, found.quantity])), weight, average)
        self.ratios.append(_over(size, average, math.inf))
        if limit is not None:
            allowed = limit * average
            self.limited = self.limited + _exceeds(size, allowed)
            factor = factor * _smaller(1.0, _over(allowed, size))
        return weight, factor

    def weight_of(self, strength: float) -> Number:
        """The weight that a strength stands for now."""
        return strength * _over(self.loss_length, self.length)

    def rescale(self, finite: Tensor) -> None:
        """Halve the scale of half precision where a gradient overflowed; else raise it slowly."""
        if finite.device.type == "cpu":
            self.scale = self.scale * 1.0007 if finite else self.scale / 2
            self.scale = min(max(self.scale, 1.0), _LARGEST)
            return
        now = torch.as_tensor(self.scale, device=finite.device)
        self.scale = torch.where(finite, now * 1.0007, now / 2).clamp(1.0, _LARGEST)

    @property
    def ratio(self) -> float:
        """The median of the last ratios of the lengths; NaN before the first."""
        return median(map(float, self.ratios)) if self.ratios else math.nan

    @property
    def is_limited_often(self) -> bool:
        """Whether the limit has acted in more than half of the calls, of enough to tell.

        Where the host would have to wait for the number it is looked at twice in a training.
        """
        before = self.steps - self.times
        seldom = any(before < count <= self.steps for count in (_ENOUGH, 20 * _ENOUGH))
        if self.steps < _ENOUGH or (isinstance(self.limited, Tensor) and not seldom):
            return False
        return float(self.limited) > self.applied / 2

    def report(self) -> PenaltyReport:
        """Everything as plain numbers, for which the host waits."""
        loss, quantity, weight, average = map(float, self.last)
        seen = float(self.seen) or math.nan
        return PenaltyReport(
            loss=loss,
            penalty=weight * quantity,
            quantity=quantity,
            weight=weight,
            ratio=self.ratio,
            largest_ratio=max(map(float, self.ratios), default=math.nan),
            limited=float(self.limited) / self.applied if self.applied else math.nan,
            applied=self.applied,
            loss_gradient=average,
            quantity_gradient=float(self.length) / seen,
        )

    def state(self) -> dict[str, Any]:
        """What goes on in another process as it does here."""
        return {
            "lengths": tuple(map(float, (self.loss_length, self.length, self.seen))),
            "limited": float(self.limited),
            "applied": self.applied,
            "steps": self.steps,
            "scale": float(self.scale),
            "ratios": [float(each) for each in self.ratios],
            "last": tuple(map(float, self.last)),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state` gave."""
        self.loss_length, self.length, self.seen = state["lengths"]
        self.limited, self.applied, self.scale = state["limited"], state["applied"], state["scale"]
        self.steps = state["steps"]
        self.ratios, self.last = deque(state["ratios"], maxlen=_LAST), state["last"]

    def _remember(self, here: Number, length: Number) -> None:
        """Take both lengths into the running means, unless one is no number."""
        news = here, length, 1.0
        olds = self.loss_length, self.length, self.seen
        found = [_MEMORY * old + (1 - _MEMORY) * new for old, new in zip(olds, news, strict=True)]
        if isinstance(here, Tensor) and isinstance(length, Tensor):
            usable = (here + length).isfinite()
            found = [torch.where(usable, a, b) for a, b in zip(found, olds, strict=True)]
        elif not math.isfinite(here + length):
            return
        self.loss_length, self.length, self.seen = found


def _numbers(values: Tensor) -> tuple[Number, ...]:
    return tuple(values.tolist() if values.device.type == "cpu" else values.unbind())


def _over(above: Number, below: Number, otherwise: float = 0.0) -> Number:
    """A quotient, of lengths; something else where it would be one by zero."""
    if isinstance(below, Tensor):
        return torch.where(below > 0, above / below, otherwise)
    return above / below if below else otherwise


def _exceeds(one: Number, other: Number) -> Number:
    """1 where it does, or is no number."""
    if isinstance(one, Tensor):
        return 1.0 - (one <= other).to(one.dtype)
    return float(not one <= other)


def _smaller(one: float, other: Number) -> Number:
    return other.clamp(max=one) if isinstance(other, Tensor) else min(one, other)


def check_balance(weight: object, strength: object, limit: object) -> None:
    """Require a weight or a strength, and a limit or none.

    Raises:
        TypeError: If there are both or neither, or one is no number.
        ValueError: If one is negative or not finite, or the strength or the limit is zero.
    """
    if (weight is None) == (strength is None):
        raise TypeError(
            "a penalty takes a weight=, the factor of what is penalized, or a strength=, how long "
            f"its gradient is relative to the loss's; got weight={weight!r}, strength={strength!r}"
        )
    for name, value, least in (
        ("weight", weight, "of at least"),
        ("strength", strength, "above"),
        ("limit", limit, "above"),
    ):
        if value is None:
            continue
        what = f"{name} must be a finite number {least} 0; got {value!r}"
        if isinstance(value, bool) or not (is_number(value) or _is_scalar(value)):
            raise TypeError(what)
        if not (math.isfinite(value) and (value > 0 or (least == "of at least" and value == 0))):
            raise ValueError(what)


def _is_scalar(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim == 0 and not value.requires_grad

"""What all penalties have in common: a weighted quantity of a loss, to be added to that loss."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowland._active import window
from lowland._batches import one_batch, rows
from lowland._call import call
from lowland._carried import carried
from lowland._sampling import WHOLE, Part, Window, check_samples
from lowland.balance import LIMIT, Balance, PenaltyReport, check_balance
from lowland.criteria import Criterion, scalar_loss
from lowland.gradients import Gradients, both_gradients
from lowland.objective import Objective, half_autocast, objective


class Penalty(nn.Module, ABC):
    """A weighted quantity of ``criterion(model(x), y)``, in some calls or in all of them.

    In training mode a call takes the gradients of the loss and of the quantity by itself, compares
    their lengths, and limits the latter's (:mod:`lowland.balance`). What it returns holds the
    gradient that is left and no graph: ``backward()`` is cheap, and there is no second derivative.
    With ``limit=None`` and a weight it holds the graph, and nothing is compared.

    Args:
        criterion: The loss whose curvature is penalized.
        weight: Factor of the penalty, at least zero. Or none, with a ``strength``.
        strength: How long the penalty's gradient is to be on average, relative to the loss's.
        limit: How long it may be at most, relative to the running mean of the loss's; None for any
            length.
        samples: In training mode, how many samples of each batch the penalty looks at, a whole
            number or a share below 1: the next ones in each call, so that all take part alike.
        parameters: Penalize the curvature in these alone.
        every: In training mode, apply the penalty in each so many-th call, times as much, and
            nothing in between.
        active: The first call in which the penalty is applied, and the first in which it no longer
            is; counted from 0 in training mode. With ``total_steps`` they are shares of these.
        total_steps: How many calls in training mode there will be.

    Raises:
        TypeError: If the criterion cannot be called, there is neither a weight nor a strength, or
            a number is none.
        ValueError: If the weight is negative or not finite, or another setting makes no sense.
    """

    used: str | None = None

    def __init__(
        self,
        criterion: Criterion,
        weight: float | None = None,
        *,
        strength: float | None = None,
        limit: float | None = LIMIT,
        samples: float | None = None,
        parameters: Iterable[Tensor] | None = None,
        every: int = 1,
        active: tuple[float, float] = (0, math.inf),
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(criterion, type) or not callable(criterion):
            raise TypeError(
                f"expected a criterion, such as nn.BCEWithLogitsLoss(), then its penalty's weight; "
                f"got {criterion!r} for the criterion"
            )
        settings = {
            "weight": weight,
            "strength": strength,
            "limit": limit,
            "samples": samples,
            "every": every,
            "active": active,
            "total_steps": total_steps,
        }
        _check(settings)
        subset = None if parameters is None else tuple(parameters)
        if subset == ():
            raise ValueError("parameters= must name at least one parameter; got none")
        self.criterion = criterion
        self.weight, self.strength, self.limit, self.samples = weight, strength, limit, samples
        # Not in a list of nn.Module's own: they are the model's to move and to save.
        self._subset = subset
        self.every, self.active, self.total_steps = every, active, total_steps
        self.calls = 0
        self._balance, self._window = Balance(), Window()
        self._warned = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Settings may change from step to step, and are looked at as when they came first."""
        if name in _CHANGEABLE and "_warned" in self.__dict__:
            _check({each: getattr(self, each) for each in _CHANGEABLE} | {name: value})
        super().__setattr__(name, value)

    def forward(self, model: nn.Module, x: Any, y: Any = None) -> Tensor:
        """The penalty, a scalar tensor with a gradient in the model's trainable parameters.

        Without ``y`` the batch is a pair of both, or one mapping or object that holds both, with
        which the criterion is called as it is: ``criterion(model(**x), x)``.
        """
        times = self._times()
        if times is None:
            return _nothing(model)
        with _outside_inference_mode():
            target = self._target(model, x, y)
            if self._is_plain:
                weighted: Tensor = times * self._weight() * self._quantity(target)
                return weighted
            with target.state_kept()():
                return self._alone(target, times)

    def loss(self, model: nn.Module, x: Any, y: Any = None) -> Tensor:
        """``criterion(model(x), y)`` and the penalty, from one forward pass where that is possible.

        Running statistics of normalizations are updated once, and dropout draws one mask for both.
        """
        times = self._times()
        if times is None:
            x, y = one_batch(x, y)
            return scalar_loss(self.criterion, call(model, x), y)
        with _outside_inference_mode():
            target = self._target(model, x, y)
            if self._is_plain:
                loss, quantity = self._loss_and_quantity(target)
                total: Tensor = loss + times * self._weight() * quantity
                return total
            if self.samples is None:
                return self._together(target, times)
            again = target.state_kept()
            loss = target.step_loss()
            with again():
                return loss + self._alone(target, times)

    def measure(self, model: nn.Module, x: Any, y: Any = None) -> Tensor:
        """The quantity that is penalized, before its weight, of all samples of a batch."""
        with _outside_inference_mode():
            return self._quantity(self._target(model, x, y))

    def report(self) -> PenaltyReport:
        """What the penalty has done in training mode, for choosing its strength.

        Without comparing gradients, with ``limit=None`` and a weight, there is nothing to report.

        Example:
            >>> import torch, lowland
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
            >>> x, y = torch.randn(50, 3), torch.ones(50, dtype=torch.long)
            >>> penalty = lowland.HSR(nn.CrossEntropyLoss(), strength=0.1)
            >>> penalty.loss(model, x, y).backward()
            >>> round(penalty.report().ratio, 4)
            0.1
        """
        return self._balance.report()

    @abstractmethod
    def _quantity(self, target: Objective) -> Tensor:
        """What is penalized, of one loss; the model's state stays as it is."""

    @abstractmethod
    def _loss_and_quantity(self, target: Objective, part: Part = WHOLE) -> tuple[Tensor, Tensor]:
        """The loss, as a step of training has it, and what is penalized.

        Args:
            target: The loss. If it is ``apart`` any pass of the model will do, and leaves no trace.
            part: Which part of a batch it is of.
        """

    def _together(self, target: Objective, times: int) -> Tensor:
        """The loss of a step of training and the penalty, from one forward pass."""
        found = self._gradients(replace(target, once=True), WHOLE)
        weight, factor = self._factor(found, times)
        total = found.loss + times * weight * found.quantity
        return carried(total, *found.sum(factor))

    def _alone(self, target: Objective, times: int) -> Tensor:
        """The penalty, of passes that leave no trace, on the samples whose turn it is."""
        if self.samples is None:
            return self._of_part(target, WHOLE, times)
        whole = target
        taken = self._window.next(target, self.samples, self._multiple)
        if taken is None:
            return _nothing(target.model)
        target, part = taken
        try:
            return self._of_part(target, part, times)
        except (ValueError, RuntimeError) as error:
            if part == WHOLE:
                raise
            raise type(error)(
                f"samples={self.samples} looked at {rows(*target.batch)} of "
                f"{rows(*whole.batch)} samples, and of these alone: {error}"
            ) from error

    def _of_part(self, target: Objective, part: Part, times: int) -> Tensor:
        if not self._compares:
            _, quantity = self._loss_and_quantity(replace(target, apart=True), part)
            weighted: Tensor = times * self._weight() * quantity
            return weighted
        found = self._gradients(replace(target, once=True, apart=True), part)
        weight, factor = self._factor(found, times)
        return carried(times * weight * found.quantity, *found.times(factor))

    def _gradients(self, target: Objective, part: Part) -> Gradients:
        half = half_autocast(target.device)
        scale = self._balance.scale if half else 1.0
        loss, quantity = self._loss_and_quantity(replace(target, half_scale=scale), part)
        found = both_gradients(target, loss * part.scale, quantity, scale)
        if half:
            found, finite = found.without_overflows()
            self._balance.rescale(finite)
        elif isinstance(part.scale, Tensor):  # zero where all targets are ignored, and no number
            found, _ = found.without_overflows()
        return found

    def _factor(self, found: Gradients, times: int) -> tuple[Any, Any]:
        """The weight, and what the quantity's gradient is multiplied by."""
        weight, factor = self._balance.weigh(
            found, times, weight=self.weight, strength=self.strength, limit=self.limit
        )
        if not self._warned and self._balance.is_limited_often:
            self._warned = True
            warnings.warn(
                f"the limit of {type(self).__name__} has acted in more than half of "
                f"{self._balance.applied} calls: its gradient would be {self._balance.ratio:.1g} "
                f"times as long as the loss's, and {self.limit:g} times is allowed. A smaller "
                "weight= acts as it is, on average also a strength= of at most a half of limit=; "
                "divide either by every=, if that is above 1: rarer steps are stronger ones",
                stacklevel=4,
            )
        return weight, factor

    def extra_repr(self) -> str:
        """The settings, for ``print(penalty)``."""
        settings = {
            "weight": (self.weight, None),
            "strength": (self.strength, None),
            **self._settings(),
            "limit": (self.limit, LIMIT),
            "samples": (self.samples, None),
            "every": (self.every, 1),
            "active": (self.active, (0, math.inf)),
            "total_steps": (self.total_steps, None),
        }
        return ", ".join(
            f"{name}={now}" if name == "weight" else f"{name}={now!r}"
            for name, (now, usual) in settings.items()
            if now is not usual and now != usual
        )

    def _settings(self) -> dict[str, tuple[Any, Any]]:
        """What each setting of a kind of penalty is, and what it usually is."""
        return {}

    def get_extra_state(self) -> dict[str, Any]:
        """What :meth:`state_dict` holds beyond tensors."""
        return {
            "calls": self.calls,
            "start": self._window.start,
            "balance": self._balance.state(),
            "warned": self._warned,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`get_extra_state` gave."""
        self.calls, self._window.start = state["calls"], state.get("start", 0)
        self._warned = state.get("warned", False)
        if "balance" in state:
            self._balance.restore(state["balance"])

    def _target(self, model: nn.Module, x: Any, y: Any) -> Objective:
        return objective(model, self.criterion, x, y, self._subset)

    @property
    def _is_plain(self) -> bool:
        """Whether the whole batch is looked at, and no gradient."""
        return not self._compares and (self.samples is None or not self.training)

    @property
    def _multiple(self) -> int:
        """Of how many samples a part of a batch is to consist of a multiple."""
        return 1

    @property
    def _compares(self) -> bool:
        """Whether gradients are taken here, and compared."""
        wanted = self.limit is not None or self.strength is not None
        return self.training and wanted and torch.is_grad_enabled()

    def _weight(self) -> Any:
        """The factor of the quantity, where no gradient is looked at."""
        if self.strength is None:
            return self.weight
        if not self._balance.applied:
            raise RuntimeError(
                "strength= finds the penalty's weight by comparing gradients in training mode, and "
                "there has been no call in it yet: call penalty.loss(model, x, y) with gradients "
                "first, or penalty.measure(model, x, y) for the quantity before its weight"
            )
        return self._balance.weight_of(self.strength)

    def _times(self) -> int | None:
        """How many steps this call stands for; None if it applies nothing."""
        if not self.training:
            return 1
        call = self.calls
        self.calls += 1
        first, last = window(self.active, self.total_steps)
        if first <= call < last and (call - first) % self.every == 0:
            return self.every
        return None


_CHANGEABLE = ("weight", "strength", "limit", "samples", "every", "active", "total_steps")


def _check(settings: dict[str, Any]) -> None:
    """Refuse settings that make no sense, together."""
    check_balance(settings["weight"], settings["strength"], settings["limit"])
    check_samples(settings["samples"])
    every = settings["every"]
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every must be a whole number of at least 1; got {every!r}")
    window(settings["active"], settings["total_steps"])


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """Where a value can be found by derivatives, without a graph, though a caller forbids these."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


def _nothing(model: nn.Module) -> Tensor:
    """Zero, which can be added to a loss or go backward alone."""
    floating = (p for p in model.parameters() if p.is_floating_point() and not is_lazy(p))
    like = next(floating, torch.empty(0))
    return like.new_zeros((), requires_grad=torch.is_grad_enabled())

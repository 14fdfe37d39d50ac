"""Penalties on the curvature of a loss, as functions of the Hessian's two moments."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed
from torch import Generator, Tensor, nn
from torch.autograd import grad

from lowland._batches import one_batch, rows
from lowland._call import call
from lowland._limits import DEFAULT_MEMORY_BUDGET
from lowland.criteria import Criterion, scalar_loss
from lowland.engines import Engine, Method, check_method, check_prune, choose
from lowland.errors import UnsupportedModelError
from lowland.estimation import Estimation, Products
from lowland.moments import HessianMoments
from lowland.objective import Objective, objective
from lowland.validation import is_number


class Penalty(nn.Module, ABC):
    """A weighted quantity of ``criterion(model(x), y)``, in some calls or in all of them.

    Args:
        criterion: The loss whose curvature is penalized.
        weight: Factor of the penalty, at least zero.
        parameters: Penalize the curvature in these alone.
        every: In training mode, apply the penalty in each so many-th call, times as much, and
            nothing in between.
        active: The first call in which the penalty is applied, and the first in which it no longer
            is; counted from 0 in training mode.

    Raises:
        TypeError: If the criterion cannot be called, or the weight is no number.
        ValueError: If the weight is negative or not finite, or another setting makes no sense.
    """

    used: str | None = None

    def __init__(
        self,
        criterion: Criterion,
        weight: float,
        *,
        parameters: Iterable[Tensor] | None = None,
        every: int = 1,
        active: tuple[float, float] = (0, math.inf),
    ) -> None:
        super().__init__()
        if isinstance(criterion, type) or not callable(criterion):
            raise TypeError(
                f"expected a criterion, such as nn.BCEWithLogitsLoss(), then its penalty's weight; "
                f"got {criterion!r} for the criterion"
            )
        if not (is_number(weight) or isinstance(weight, Tensor)):
            raise TypeError(f"weight must be a finite number of at least 0; got {weight!r}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be a finite number of at least 0; got {weight}")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number of at least 1; got {every!r}")
        subset = None if parameters is None else tuple(parameters)
        if subset == ():
            raise ValueError("parameters= must name at least one parameter; got none")
        if not (isinstance(active, tuple) and len(active) == 2 and 0 <= active[0] < active[1]):
            raise ValueError(
                f"active must be (start, stop), the first call with the penalty and the first "
                f"without it again, 0 <= start < stop; got {active!r}"
            )
        self.criterion = criterion
        self.weight = weight
        # Not in a list of nn.Module's own: they are the model's to move and to save.
        self._subset = subset
        self.every, self.active = every, active
        self.calls = 0

    def forward(self, model: nn.Module, x: Any, y: Any = None) -> Tensor:
        """The penalty, a scalar tensor with a graph to the model's trainable parameters.

        Without ``y`` the batch is a pair of both, or one mapping or object that holds both, with
        which the criterion is called as it is: ``criterion(model(**x), x)``.
        """
        factor = self._factor()
        if factor is None:
            return _nothing(model)
        return factor * self.measure(model, x, y)

    def loss(self, model: nn.Module, x: Any, y: Any = None) -> Tensor:
        """``criterion(model(x), y)`` and the penalty, from one forward pass where that is possible.

        Running statistics of normalizations are updated once, and dropout draws one mask for both.
        """
        factor = self._factor()
        if factor is None:
            x, y = one_batch(x, y)
            return scalar_loss(self.criterion, call(model, x), y)
        with _outside_inference_mode():
            loss, quantity = self._loss_and_quantity(self._target(model, x, y))
            return loss + factor * quantity

    def measure(self, model: nn.Module, x: Any, y: Any = None) -> Tensor:
        """The quantity that is penalized, before its weight."""
        with _outside_inference_mode():
            return self._quantity(self._target(model, x, y))

    @abstractmethod
    def _quantity(self, target: Objective) -> Tensor:
        """What is penalized, of one loss; the model's state stays as it is."""

    @abstractmethod
    def _loss_and_quantity(self, target: Objective) -> tuple[Tensor, Tensor]:
        """The loss, as a step of training has it, and what is penalized."""

    def extra_repr(self) -> str:
        """The settings, for ``print(penalty)``."""
        changed = [
            f", {name}={now!r}" for name, (now, usual) in self._settings().items() if now != usual
        ]
        return f"weight={self.weight}" + "".join(changed)

    def _settings(self) -> dict[str, tuple[Any, Any]]:
        """What each setting is, and what it usually is."""
        return {"every": (self.every, 1), "active": (self.active, (0, math.inf))}

    def get_extra_state(self) -> dict[str, Any]:
        """What :meth:`state_dict` holds beyond tensors."""
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`get_extra_state` gave."""
        self.calls = state["calls"]

    def _target(self, model: nn.Module, x: Any, y: Any) -> Objective:
        return objective(model, self.criterion, x, y, self._subset)

    def _factor(self) -> float | None:
        """What the quantity is multiplied by in this call; None for nothing."""
        if not self.training:
            return self.weight
        call, (start, stop) = self.calls, self.active
        self.calls += 1
        if start <= call < stop and (call - start) % self.every == 0:
            return self.weight * self.every
        return None


class CurvaturePenalty(Penalty):
    """A weighted function of the Hessian of ``criterion(model(x), y)``.

    Add it to the loss and call ``backward()`` once::

        loss = criterion(model(x), y) + penalty(model, x, y)

    or let it compute both, which saves a gradient where the moments are estimated::

        loss = penalty.loss(model, x, y)

    Args:
        criterion: The loss whose curvature is penalized.
        weight: Factor of the penalty, at least zero.
        method: The engine: ``"exact"``, ``"probes"``, ``"dense"``, or ``"auto"``, the closed form
            where it covers the model at the price of some probes, and probes elsewhere. Which it
            was last is :attr:`used`. Or what makes an engine of your own, see
            :class:`lowland.engines.Engine`.
        probes: Random directions in a step, for ``"probes"``. One is enough in training: the
            gradients of both traces are right on average.
        products: ``"auto"``, ``"autograd"`` or ``"differences"``, see
            :func:`lowland.probes.probe_moments`.
        generator: Of the probes' signs; without one PyTorch's own is used.
        unbiased: For training by mini-batches: penalize an unbiased estimate of the data set's
            ``Tr H^2`` rather than the batch's own, see :func:`lowland.hessian_moments`. Where the
            estimate is too low for any spectrum, even negative, what is left of HSR is the mean; a
            flatness-aware penalty may be negative.
        parameters: Penalize the curvature in these alone, for example
            ``model.head.parameters()``. Its gradient reaches the layers below, too, unless it is
            one of differences. Of the last layer alone it is nearly free, and does not regularize.
        every: In training mode, apply the penalty in each so many-th call, times as much, and
            nothing in between: nearly the same effect at a fraction of the cost.
        active: The first call in which the penalty is applied, and the first in which it no longer
            is; counted from 0 in training mode.
        memory_budget: Bytes of temporaries of the closed form.
        prune: With ``method="exact"``, a relative tolerance up to which samples that are fitted are
            left out of both moments and their gradients, see :func:`lowland.exact.moments`. For
            large batches late in training.

    Raises:
        TypeError: If the criterion cannot be called, the weight or the budget is no number, or the
            generator is none.
        UnsupportedModelError: If four moments are to be estimated; or samples left out of other
            moments than the first two of the closed form.
        ValueError: If the weight is negative or not finite, or another setting makes no sense.

    Notes:
        ``penalty.eval()`` gives the weighted value at every call, and counts none. The count, and
        what HSR remembers, are part of ``penalty.state_dict()``.
    """

    count: int = 2
    """How many moments :meth:`value` reads: 1 for ``Tr H`` alone, 2, or 4."""
    per_sample: bool = True
    """Whether :meth:`value` reads the number of samples; otherwise it is given 0 for it."""

    def __init__(
        self,
        criterion: Criterion,
        weight: float,
        *,
        method: Method = "auto",
        probes: int = 1,
        products: Products = "auto",
        generator: Generator | None = None,
        unbiased: bool = False,
        parameters: Iterable[Tensor] | None = None,
        every: int = 1,
        active: tuple[float, float] = (0, math.inf),
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        prune: float | None = None,
    ) -> None:
        super().__init__(criterion, weight, parameters=parameters, every=every, active=active)
        if self.count not in (1, 2, 4):
            raise ValueError(
                f"count of {type(self).__name__} must be 1, 2 or 4, how many moments its value "
                f"reads; got {self.count!r}"
            )
        check_method(method)
        if self.count > 2 and method == "probes":
            raise UnsupportedModelError(
                f"{type(self).__name__} is a function of four moments here, of which probes "
                "estimate two: use method='exact' or method='dense'"
            )
        if self.count > 2 and unbiased:
            raise UnsupportedModelError(
                f"{type(self).__name__} is a function of four moments here, of which unbiased=True "
                "estimates two: leave it out"
            )
        check_prune(prune, method)
        if prune is not None and (self.count != 2 or unbiased):
            raise UnsupportedModelError(
                f"prune= certifies Tr H and Tr H^2 of a batch, and {type(self).__name__} is a "
                "function of other moments here: leave it out"
            )
        self.method: Method = method
        self.estimation = Estimation(
            probes, products, generator, unbiased, memory_budget, prune=prune
        )

    @abstractmethod
    def value(self, moments: HessianMoments, samples: int) -> Tensor:
        """The quantity that is penalized, a function of the moments of so many samples."""

    def moments(self, model: nn.Module, x: Any, y: Any = None) -> HessianMoments:
        """What the penalty is a function of."""
        return self._engine(self._target(model, x, y)).moments(self.count)

    def _quantity(self, target: Objective) -> Tensor:
        return self.value(self._engine(target).moments(self.count), self._samples(target))

    def _loss_and_quantity(self, target: Objective) -> tuple[Tensor, Tensor]:
        loss, moments = self._engine(target).loss_and_moments(self.count)
        return loss, self.value(moments, self._samples(target))

    def _settings(self) -> dict[str, tuple[Any, Any]]:
        return {
            "method": (self.method, None),
            "probes": (self.estimation.probes, 1),
            "products": (self.estimation.products, "auto"),
            "unbiased": (self.estimation.unbiased, False),
            "prune": (self.estimation.prune, None),
            **super()._settings(),
        }

    def _samples(self, target: Objective) -> int:
        """Those of the batch, in all processes in which the model is trained side by side."""
        if not self.per_sample:
            return 0
        parallel = target.parallel
        processes = torch.distributed.get_world_size(parallel.process_group) if parallel else 1
        return rows(*target.batch) * processes

    def _engine(self, target: Objective) -> Engine:
        method = self.method
        if self.count > 2 and method == "auto":  # probes know nothing of four moments
            try:
                return self._chosen(target, "exact")
            except UnsupportedModelError:
                method = "dense"
        return self._chosen(target, method)

    def _chosen(self, target: Objective, method: Method) -> Engine:
        # Of two moments brute force is never worth its price.
        engine = choose(
            target,
            method,
            self.estimation,
            count=self.count,
            dense_limit=0,
            order=3 if torch.is_grad_enabled() else 2,
        )
        self.used = engine.name
        return engine


class HSR(CurvaturePenalty):
    r"""``weight * U``: the Wolkowicz-Styan upper bound on the largest eigenvalue.

    :math:`U = m + s \sqrt{P - 1}` with the mean ``m`` and the standard deviation ``s`` of the
    eigenvalues. Descending it narrows the whole spectrum: the lower bound on the smallest
    eigenvalue rises at the same time.

    Args:
        criterion: The loss whose curvature is penalized.
        weight: Factor of the penalty, at least zero.
        memory: Where the moments are estimates, the part of the running average of both that a
            call keeps, below 1. ``U`` is no linear function of them: from one probe its slopes
            would be off on average, from the averages they are not.
        bound: ``"two-moment"``, or ``"four-moment"`` for the sharper bound from ``Tr H^3`` and
            ``Tr H^4`` too, :attr:`lowland.HessianMoments.four_moment_upper`. That squares the
            matrix of all parameters: for networks that the closed form covers, or brute force.
        **settings: Those of :class:`CurvaturePenalty`.

    Raises:
        UnsupportedModelError: If four moments are to be estimated.
        ValueError: If the memory is not between 0 and 1, or the bound is unknown; and as
            :class:`CurvaturePenalty`.

    References:
        arXiv:2606.28662, theorem 1.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> x, y = torch.randn(50, 3), torch.ones(50, dtype=torch.long)
        >>> penalty = lowland.HSR(nn.CrossEntropyLoss(), weight=0.01)
        >>> penalty.loss(model, x, y).backward()  # the criterion's loss and the penalty
        >>> penalty.used
        'exact'
    """

    per_sample = False
    average: Tensor

    def __init__(
        self,
        criterion: Criterion,
        weight: float,
        *,
        memory: float = 0.95,
        bound: Literal["two-moment", "four-moment"] = "two-moment",
        **settings: Any,
    ) -> None:
        if bound not in ("two-moment", "four-moment"):
            raise ValueError(
                f"unknown bound {bound!r}: expected 'two-moment' or 'four-moment', how many "
                "moments of the spectrum it is made of"
            )
        if bound == "four-moment":
            self.count = 4
        super().__init__(criterion, weight, **settings)
        if not 0 <= memory < 1:
            raise ValueError(f"memory must be at least 0 and below 1; got {memory!r}")
        self.memory, self.bound = memory, bound
        # Of both moments, and of as many ones: an average that starts at zero is too small by what
        # it has not seen yet.
        self.register_buffer("average", torch.zeros(3, dtype=torch.float64))

    def _settings(self) -> dict[str, tuple[Any, Any]]:
        return {**super()._settings(), "bound": (self.bound, "two-moment")}

    def value(self, moments: HessianMoments, samples: int) -> Tensor:  # noqa: ARG002
        """``U``; of estimates its linear part around their running average."""
        if self.bound == "four-moment":
            return moments.four_moment_upper
        if moments.stderr is None:
            return moments.upper
        now = torch.stack([moments.trace, moments.trace_sq])
        with torch.enable_grad():
            mean = self._remember(now.detach()).requires_grad_()
            upper = replace(moments, trace=mean[0], trace_sq=mean[1]).upper
        (slopes,) = grad(upper, mean)
        change = (slopes * now).sum()
        return upper.detach() + (change - change.detach())

    @torch.no_grad()
    def _remember(self, now: Tensor) -> Tensor:
        dtype = torch.promote_types(now.dtype, torch.float32)
        average = self.average.to(now.device, dtype, non_blocking=True)
        if self.training:
            seen = torch.cat([now.to(dtype), torch.ones_like(average[:1])])
            new = torch.lerp(seen, average, self.memory)
            # What a scaler of gradients skips is not to be remembered.
            self.average = average = torch.where(now.isfinite().all(), new, average)
        count = average[2]
        return torch.where(count > 0, average[:2] / count, now.to(dtype)).to(now.dtype)


class HessianTrace(CurvaturePenalty):
    """``weight * Tr H``.

    The closed form takes it beside the loss from one forward pass: with one hidden layer and ten
    classes the two and their gradient cost about two to four gradients of the loss, the more the
    smaller the batch is. :func:`lowland.exact.trace` says how that grows with depth and outputs.

    Arguments and errors are those of :class:`CurvaturePenalty`.

    References:
        Liu et al. (2023), who estimate it; here it is exact where the closed form covers the model.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model, criterion = nn.Linear(3, 2), nn.CrossEntropyLoss()
        >>> x, y = torch.randn(50, 3), torch.ones(50, dtype=torch.long)
        >>> loss = criterion(model(x), y) + lowland.HessianTrace(criterion, 0.01)(model, x, y)
        >>> loss.backward()
    """

    count = 1
    per_sample = False

    def value(self, moments: HessianMoments, samples: int) -> Tensor:  # noqa: ARG002
        """``Tr H``."""
        return moments.trace


class FlatnessAware(CurvaturePenalty):
    """``weight * Tr H^2 / B`` with the batch size ``B``: the sum of the squared eigenvalues.

    ``B`` is that of the call, of all processes together: where gradients of smaller batches are
    accumulated, or the last batch of an epoch is small, the penalty is as much larger.

    Arguments and errors are those of :class:`CurvaturePenalty`.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model, x, y = nn.Linear(3, 1), torch.randn(50, 3), torch.randn(50)
        >>> penalty = lowland.FlatnessAware(nn.MSELoss(), weight=0.01, method="probes", probes=4)
        >>> penalty(model, x, y).backward()
    """

    def value(self, moments: HessianMoments, samples: int) -> Tensor:
        """``Tr H^2 / B``."""
        return moments.trace_sq / samples


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
    parameter = next(model.parameters())
    return parameter.new_zeros((), requires_grad=torch.is_grad_enabled())

"""Penalties on the curvature of a loss, as functions of the Hessian's two moments."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor, nn

from lowland.engines import Method, check_method, hessian_moments, hessian_trace
from lowland.exact.plan import DEFAULT_MEMORY_BUDGET
from lowland.moments import HessianMoments
from lowland.validation import check_budget, is_number


class CurvaturePenalty(nn.Module, ABC):
    """A weighted function of the Hessian of ``criterion(model(x), y)``.

    Add it to the loss and call ``backward()`` once::

        loss = criterion(model(x), y) + penalty(model, x, y)

    Args:
        criterion: The loss whose curvature is penalized.
        weight: Factor of the penalty, at least zero.
        method: The engine, see :func:`lowland.hessian_moments`.
        unbiased: For training by mini-batches: penalize an unbiased estimate of the data set's
            ``Tr H^2`` rather than the batch's own, see :func:`lowland.hessian_moments`. Needs the
            closed form. Where the estimate is too low for any spectrum, even negative, what is left
            of HSR is the mean; a flatness-aware penalty may be negative.
        memory_budget: Bytes of temporaries, see :func:`lowland.hessian_moments`.

    Raises:
        TypeError: If the criterion cannot be called, or the weight or the budget is no number.
        ValueError: If the weight is negative or not finite, or the method unknown.
    """

    def __init__(
        self,
        criterion: nn.Module,
        weight: float,
        *,
        method: Method = "auto",
        unbiased: bool = False,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
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
        check_method(method)
        self.criterion = criterion
        self.weight = weight
        self.method: Method = method
        self.unbiased = unbiased
        self.memory_budget = check_budget(memory_budget)

    def forward(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The penalty, a scalar tensor with a graph to the model's trainable parameters."""
        return self.weight * self.measure(model, x, y)

    @abstractmethod
    def measure(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The quantity that is penalized, before its weight."""

    def moments(self, model: nn.Module, x: Tensor, y: Tensor) -> HessianMoments:
        """What most penalties are functions of."""
        return hessian_moments(
            model,
            self.criterion,
            x,
            y,
            self.method,
            unbiased=self.unbiased,
            memory_budget=self.memory_budget,
        )

    def extra_repr(self) -> str:
        """The settings, for ``print(penalty)``."""
        unbiased = ", unbiased=True" if self.unbiased else ""
        return f"weight={self.weight}, method={self.method!r}{unbiased}"


class HSR(CurvaturePenalty):
    r"""``weight * U``: the Wolkowicz-Styan upper bound on the largest eigenvalue.

    :math:`U = m + s \sqrt{P - 1}` with the mean ``m`` and the standard deviation ``s`` of the
    eigenvalues. Descending it narrows the whole spectrum: the lower bound on the smallest
    eigenvalue rises at the same time.

    Args:
        criterion: The loss whose curvature is penalized.
        weight: Factor of the penalty, at least zero.
        method: The engine, see :func:`lowland.hessian_moments`.
        unbiased: For training by mini-batches, see :class:`CurvaturePenalty`.
        memory_budget: Bytes of temporaries, see :func:`lowland.hessian_moments`.

    References:
        arXiv:2606.28662, theorem 1.
    """

    def measure(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """``U``."""
        return self.moments(model, x, y).upper


class HessianTrace(CurvaturePenalty):
    """``weight * Tr H``, in time linear in the samples and the parameters.

    Args:
        criterion: The loss whose curvature is penalized.
        weight: Factor of the penalty, at least zero.
        method: The engine, see :func:`lowland.hessian_moments`.

    References:
        Liu et al. (2023), who estimate it; here it is exact where the closed form covers the model.
    """

    def measure(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """``Tr H``."""
        return hessian_trace(
            model, self.criterion, x, y, self.method, memory_budget=self.memory_budget
        )


class FlatnessAware(CurvaturePenalty):
    """``weight * Tr H^2 / B`` with the batch size ``B``: the sum of the squared eigenvalues.

    Args:
        criterion: The loss whose curvature is penalized.
        weight: Factor of the penalty, at least zero.
        method: The engine, see :func:`lowland.hessian_moments`.
        unbiased: For training by mini-batches, see :class:`CurvaturePenalty`.
        memory_budget: Bytes of temporaries, see :func:`lowland.hessian_moments`.
    """

    def measure(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """``Tr H^2 / B``."""
        return self.moments(model, x, y).trace_sq / len(x)

"""The closed form as an engine: a model is read once, then asked for its moments."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowland.criteria import name_of, scalar_loss
from lowland.errors import ANY_MODULE, UnsupportedModelError
from lowland.estimation import Estimation
from lowland.exact.modules import read
from lowland.exact.setup import Setup
from lowland.likelihoods import likelihood
from lowland.moments import HessianMoments
from lowland.objective import Objective


@dataclass(frozen=True, eq=False)
class ExactEngine:
    """The closed form of a model, a criterion and data that it covers.

    Attributes:
        target: The loss.
        setup: What has been read of it.
        settings: The memory budget, and whether the samples are a batch of more.
    """

    target: Objective
    setup: Setup
    settings: Estimation
    name: ClassVar[Literal["exact"]] = "exact"

    @classmethod
    def read(cls, target: Objective, settings: Estimation) -> ExactEngine:
        """Read a model.

        Raises:
            UnsupportedModelError, TypeError, ValueError: As :func:`lowland.exact.modules.read`.
        """
        x, y = target.batch
        with target.others_frozen():
            setup = read(target.model, target.criterion, x, y)
        if target.matrix != "fisher":
            return cls(target, setup.of(target.matrix), settings)
        if likelihood(target.criterion, y) is not target.criterion:
            raise UnsupportedModelError(
                "the closed form gives the Fisher matrix of criteria of natural parameters, where "
                f"it is the Gauss-Newton matrix; for {name_of(target.criterion)} {ANY_MODULE}"
            )
        return cls(target, setup.of("ggn"), settings)

    def relative_cost(self, count: int) -> float:
        """What so many moments and their gradient are predicted to cost, in gradients."""
        return self.setup.relative_cost(count)

    def moments(self, count: int = 2) -> HessianMoments:
        """The moments; for ``count=1`` the trace alone, and NaN for the other one."""
        budget, unbiased = self.settings.memory_budget, self.settings.unbiased
        if count == 1:
            return self._of_trace(self.setup.trace(budget))
        found = self.setup.moments(memory_budget=budget, unbiased=unbiased, moments=count)
        return replace(found, method=self.name, matrix=self.target.matrix)

    def loss_and_moments(self, count: int = 2) -> tuple[Tensor, HessianMoments]:
        """The model's own loss beside them; ``Tr H`` alone leaves the logits for it too."""
        if count == 1 and self._is_the_step:
            found = self.setup.logits_and_trace(self.settings.memory_budget)
            if found is not None:
                logits, trace = found
                y = self.target.batch[1]
                return scalar_loss(self.target.criterion, logits[0], y), self._of_trace(trace[0])
        return self.target.step_loss(), self.moments(count)

    @property
    def _is_the_step(self) -> bool:
        """Whether the logits here are those of a step of training.

        In a wrapper something may happen on the way, autocast rounds them, and parameters that are
        constants of the Hessian are none of the loss.
        """
        target = self.target
        return (
            target.outer is target.model
            and not target.others
            and not torch.is_autocast_enabled(target.device.type)
        )

    def _of_trace(self, trace: Tensor) -> HessianMoments:
        unknown = torch.full_like(trace, math.nan)
        return HessianMoments(
            self.setup.size.dim, trace, unknown, method=self.name, matrix=self.target.matrix
        )

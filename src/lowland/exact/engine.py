"""The closed form as an engine: a model is read once, then asked for its moments."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lowland.criteria import name_of, read_loss, scalar_loss
from lowland.errors import ANY_MODULE, UnsupportedModelError
from lowland.estimation import Estimation
from lowland.exact.modules import read_checked
from lowland.exact.pruning import pruned_moments
from lowland.exact.setup import Setup
from lowland.exact.tail import find, holds_all
from lowland.likelihoods import likelihood
from lowland.moments import HessianMoments
from lowland.objective import Objective
from lowland.passes import unsteady
from lowland.verification import is_random


@dataclass(frozen=True, eq=False)
class ExactEngine:
    """The closed form of a model, a criterion and data that it covers.

    Attributes:
        target: The loss.
        setup: What has been read of it.
        settings: The memory budget, and whether the samples are a batch of more.
        output: What the model gave, where it had to run.
    """

    target: Objective
    setup: Setup
    settings: Estimation
    output: Tensor | None = None
    name: ClassVar[Literal["exact"]] = "exact"

    @classmethod
    def read(cls, target: Objective, settings: Estimation) -> ExactEngine:
        """Read a model.

        Raises:
            UnsupportedModelError, TypeError, ValueError: As :func:`lowland.exact.modules.read`.
        """
        _, y = target.batch
        setup, output = _read(target)
        if target.matrix != "fisher":
            return cls(target, setup.of(target.matrix), settings, output)
        if likelihood(target.criterion, y) is not target.criterion:
            raise UnsupportedModelError(
                "the closed form gives the Fisher matrix of criteria of natural parameters, where "
                f"it is the Gauss-Newton matrix; for {name_of(target.criterion)} {ANY_MODULE}"
            )
        return cls(target, setup.of("ggn"), settings, output)

    @property
    def part(self) -> float:
        """How much of the model's parameters the closed form is given, of those each sample uses.

        An embedding's rows are used one at a time.
        """
        embeddings = (nn.Embedding, nn.EmbeddingBag)
        held = [m for m in self.target.model.modules() if not isinstance(m, embeddings)]
        whole = sum(p.numel() for m in held for p in m.parameters(recurse=False))
        # Not of the weights themselves, which are put together for who computes with them.
        given = sum((one + 1) * other for one, other in pairwise(self.setup.size.widths))
        return min(1.0, given / max(1, whole))

    def relative_cost(self, count: int) -> float:
        """What so many moments and their gradient are predicted to cost, in gradients.

        Of the last layers of a model the gradient is dearer than theirs.
        """
        return self.setup.relative_cost(count) * self.part

    def moments(self, count: int = 2) -> HessianMoments:
        """The moments; for ``count=1`` the trace alone, and NaN for the other one."""
        budget, unbiased = self.settings.memory_budget, self.settings.unbiased
        if count == 1:
            return self._of_trace(self.setup.trace(budget))
        if self.settings.prune is not None:
            found = pruned_moments(
                self.setup, self.settings.prune, "auto", budget, unbiased=unbiased, moments=count
            )
        else:
            found = self.setup.moments(memory_budget=budget, unbiased=unbiased, moments=count)
        return replace(found, method=self.name, matrix=self.target.matrix)

    def loss_and_moments(self, count: int = 2) -> tuple[Tensor, HessianMoments]:
        """The model's own loss beside them, from one pass where that leaves no trace."""
        if count == 1 and self._is_the_step:
            found = self.setup.logits_and_trace(self.settings.memory_budget)
            if found is not None:
                logits, trace = found
                y = self.target.batch[1]
                return scalar_loss(self.target.criterion, logits, y), self._of_trace(trace)
        target = self.target
        if self.output is None or _leaves_traces(target):
            return target.step_loss(), self.moments(count)
        _, y = target.batch
        return scalar_loss(target.criterion, self.output, y), self.moments(count)

    @property
    def _is_the_step(self) -> bool:
        """Whether the logits here are those of a step of training.

        In a wrapper something may happen on the way, autocast rounds them, and parameters that are
        constants of the Hessian are none of the loss.
        """
        target = self.target
        return (
            self.output is None
            and target.outer is target.model
            and not target.others
            and not torch.is_autocast_enabled(target.device.type)
        )

    def _of_trace(self, trace: Tensor) -> HessianMoments:
        unknown = torch.full_like(trace, math.nan)
        return HessianMoments(
            self.setup.size.dim, trace, unknown, method=self.name, matrix=self.target.matrix
        )


def _leaves_traces(target: Objective) -> bool:
    """Whether a pass of the model draws random numbers, or may write to what the model keeps."""
    for module in target.model.modules():
        ours = type(module).__module__.startswith("torch.nn.")
        if unsteady(module) or (not ours and next(module.buffers(recurse=False), None) is not None):
            return True
    return is_random(target)


def _read(target: Objective) -> tuple[Setup, Tensor | None]:
    """The whole model; or, of parameters at its end, the last layers above all others."""
    x, y = target.batch
    try:
        return read_checked(target.model, target.criterion, x, y, target.parameters), None
    except UnsupportedModelError:
        if not holds_all(target):
            raise
    read_loss(target.criterion)  # before the model runs
    tail = find(target)
    # Autocast below gives half precision; the closed form is in that of the parameters.
    inputs = tail.inputs.to(target.parameters[0].dtype)
    setup = read_checked(tail.layers, target.criterion, inputs, y, target.parameters)
    tail.check()
    return setup, tail.output

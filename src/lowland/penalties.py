"""Penalties on the curvature of a loss, as functions of the Hessian's two moments."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed
from torch import Generator, Tensor, nn

from lowland._batches import rows
from lowland._limits import DEFAULT_MEMORY_BUDGET
from lowland._sampling import WHOLE, Part
from lowland.balance import LIMIT
from lowland.criteria import Criterion
from lowland.engines import Engine, Method, check_method, check_prune, choose
from lowland.errors import UnsupportedModelError
from lowland.estimation import Estimation, Products
from lowland.moments import HessianMoments
from lowland.objective import Objective
from lowland.penalty import Penalty


class CurvaturePenalty(Penalty):
    """A weighted function of the Hessian of ``criterion(model(x), y)``.

    Add it to the loss and call ``backward()`` once::

        loss = criterion(model(x), y) + penalty(model, x, y)

    or let it compute both, which saves a gradient where the moments are estimated::

        loss = penalty.loss(model, x, y)

    Args:
        criterion: The loss whose curvature is penalized.
        weight: Factor of the penalty, at least zero; or none, with a ``strength``.
        strength: How long the penalty's gradient is to be on average, relative to the loss's: the
            weight is then found as training goes. One strength does about the same for other
            losses, other scales of the inputs and other models, where weights differ by orders of
            magnitude. Start at 0.1, look at :meth:`report`, then go up and down by factors of 3.
        limit: How long the penalty's gradient may be at most, relative to the running mean of the
            loss's: it is made shorter where it would be longer, which keeps a training stable at
            any weight (:mod:`lowland.balance`). Where that happens the penalty's gradient is no
            longer right on average. None for no limit, as for full batches and L-BFGS.
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
        samples: In training mode, how many samples of each batch the penalty looks at, a whole
            number or a share such as 0.25: the next ones in each call, so that all take part alike.
            ``Tr H`` is right on average then; ``Tr H^2`` of fewer samples is larger, unless it is
            ``unbiased``.
        every: In training mode, apply the penalty in each so many-th call, times as much, and
            nothing in between. The limit is the same, so that a strong penalty is weaker then:
            rather take fewer ``samples``.
        active: The first call in which the penalty is applied, and the first in which it no longer
            is; counted from 0 in training mode. With ``total_steps`` they are shares of these:
            ``active=(0, 0.5), total_steps=1000`` for the first half.
        total_steps: How many calls in training mode there will be.
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
        what HSR remembers, are part of ``penalty.state_dict()``. Settings may be changed between
        calls, a weight for example by a schedule.

        Gradients of embeddings with ``sparse=True`` are dense with a penalty, which
        ``torch.optim.SparseAdam`` does not take.
    """

    count: int = 2
    """How many moments :meth:`value` reads: 1 for ``Tr H`` alone, 2, or 4."""
    per_sample: bool = True
    """Whether :meth:`value` reads the number of samples; otherwise it is given 0 for it."""

    def __init__(
        self,
        criterion: Criterion,
        weight: float | None = None,
        *,
        strength: float | None = None,
        limit: float | None = LIMIT,
        samples: float | None = None,
        method: Method = "auto",
        probes: int = 1,
        products: Products = "auto",
        generator: Generator | None = None,
        unbiased: bool = False,
        parameters: Iterable[Tensor] | None = None,
        every: int = 1,
        active: tuple[float, float] = (0, math.inf),
        total_steps: int | None = None,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        prune: float | None = None,
    ) -> None:
        super().__init__(
            criterion,
            weight,
            strength=strength,
            limit=limit,
            samples=samples,
            parameters=parameters,
            every=every,
            active=active,
            total_steps=total_steps,
        )
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

    def _loss_and_quantity(self, target: Objective, part: Part = WHOLE) -> tuple[Tensor, Tensor]:
        loss, moments = self._engine(target).loss_and_moments(self.count)
        samples = round(self._samples(target) / part.share)
        return loss, self.value(moments.scaled(part.scale), samples)

    def _settings(self) -> dict[str, tuple[Any, Any]]:
        return {
            "method": (self.method, None),
            "probes": (self.estimation.probes, 1),
            "products": (self.estimation.products, "auto"),
            "unbiased": (self.estimation.unbiased, False),
            "prune": (self.estimation.prune, None),
        }

    @property
    def _multiple(self) -> int:
        return 2 if self.estimation.unbiased else 1  # halves meet each other

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
        weight: Factor of the penalty, at least zero; or none, with a ``strength``.
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
        weight: float | None = None,
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
        return super()._settings() | {"bound": (self.bound, "two-moment")}

    def value(self, moments: HessianMoments, samples: int) -> Tensor:  # noqa: ARG002
        """``U``; of estimates its linear part around their running average."""
        if self.bound == "four-moment":
            return moments.four_moment_upper
        if moments.stderr is None:
            return moments.upper
        now = torch.stack([moments.trace, moments.trace_sq])
        with torch.no_grad():
            trace, trace_sq = self._remember(now.detach()).unbind()
            mean = replace(moments, trace=trace, trace_sq=trace_sq)
            upper, slopes = mean.upper, torch.stack(mean.slopes_of_upper)
        change = (slopes * now).sum()
        return upper + (change - change.detach())

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
    classes the two and their gradient cost about two to three gradients of the loss, the more the
    smaller the batch is, and three to five with a limit, which takes both gradients apart.
    :func:`lowland.exact.trace` says how that grows with depth and outputs.

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

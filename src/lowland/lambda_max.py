"""The penalty on the largest eigenvalue of the Hessian, whose eigenvector is tracked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Generator, Tensor, nn

from lowland._sampling import WHOLE, Part
from lowland.criteria import Criterion
from lowland.estimation import Estimation, Products
from lowland.objective import Objective
from lowland.penalty import Penalty
from lowland.probes import average_over_processes, rademacher, reachable
from lowland.products import Vector, form_along, products_here, warn_of_kinks
from lowland.tracking import Pair, Tracked, begun, followed, looked_around
from lowland.verification import routed, verify_backward

_FIRST, _LATER = 8, 6  # Lanczos products to begin with, and to look around


class LambdaMax(Penalty):
    r"""``weight * v' H v`` with the tracked top eigenvector ``v``: the largest eigenvalue.

    The value is the Rayleigh quotient of the vector as the calls before have left it, never above
    :math:`\lambda_{\max}` of the batch's Hessian, and equal to it where ``v`` is its eigenvector.
    The gradient is that of :math:`v^T H(\theta) v` with ``v`` held fixed, which is the gradient of
    :math:`\lambda_{\max}` there. The same product ``H v`` then takes ``v`` one step on, to the top
    of the plane of ``v`` and its residual (:mod:`lowland.tracking`), so that it follows the
    parameters.

    With mini-batches ``v`` comes from other batches than the one that it meets: the value is then
    an unbiased estimate of ``v' H v`` of the data set, at most its :math:`\lambda_{\max}`, where
    the largest eigenvalue of a small batch alone is much too large. ``v`` is then a blend of the
    batches' eigenvectors, which may miss much: on average over a training, 0.7 to 0.9 of the data
    set's largest eigenvalue was seen with 32 and 64 samples a batch, 0.96 to 0.99 with all of them.

    Args:
        criterion: The loss whose curvature is penalized.
        weight: Factor of the penalty, at least zero; or none, with a ``strength``.
        products: ``"autograd"`` differentiates the product; ``"differences"`` has the value and the
            gradient from three gradients, at the parameters and on both sides along ``v``;
            ``"auto"`` takes the former where PyTorch's derivatives are right, which is looked at
            once, and the latter elsewhere, unless the model has kinks, where gradients jump.
        generator: Of the random vectors; without one PyTorch's own is used.
        refresh: After so many steps the penalty looks around by 6 Lanczos products from a random
            vector, for an eigenvalue that has risen unseen and for how far the spectrum reaches
            below zero.
        **settings: ``strength``, ``limit``, ``samples``, ``parameters``, ``every``, ``active`` and
            ``total_steps``, as of :class:`~lowland.penalties.CurvaturePenalty`.

    Attributes:
        used: Which products the last call took, ``"autograd"`` or ``"differences"``.

    Raises:
        TypeError: If the criterion cannot be called, the weight is no number, or the generator is
            none.
        ValueError: If the weight is negative or not finite, or another setting makes no sense.

    Notes:
        A call of :meth:`loss` costs three gradients by differences and some passes over all
        parameters; by automatic differentiation about three plain steps of convolutional or wide
        sequences of PyTorch's own layers (:mod:`lowland.jets`), five of other networks, and ten of
        deep ones with batch normalization; of small networks and batches more, where a pass over
        the parameters is as dear as a gradient. The first call takes 8 products more, and one of
        ``refresh`` steps 6, each of one to two gradients. From call to call there are two vectors
        of the parameters' size, and during these products as many as there are.

        Tracking starts anew, with these products, where the model is another object or the
        parameters that are looked at have other names or shapes; the vector goes with the model to
        another device or precision. It is part of ``penalty.state_dict()`` along with the counts,
        and goes to the first model that has such parameters after that is loaded, on every process
        of several. ``penalty.eval()`` gives the weighted value at every call and changes nothing.

        The processes of a ``DistributedDataParallel`` model track one vector, and the value is that
        of all of their samples.

    References:
        J. Kuczynski and H. Wozniakowski, Estimating the largest eigenvalue by the power and Lanczos
        algorithms with a random start (1992); J. Barzilai and J. M. Borwein, Two-point step size
        gradient methods (1988), for the steps; T. Kato, On the upper and lower bounds of
        eigenvalues (1949), for the residual.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> x, y = torch.randn(50, 3), torch.ones(50, dtype=torch.long)
        >>> penalty = lowland.LambdaMax(nn.CrossEntropyLoss(), weight=0.01)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     penalty.loss(model, x, y).backward()  # the criterion's loss and the penalty
        ...     optimizer.step()
        >>> penalty.used, bool(penalty.known.residual < penalty.known.eigenvalue)
        ('autograd', True)
    """

    known: Pair | None = None
    """What the last call has found, without a graph: ``known.eigenvalue``, the Rayleigh quotient,
    and ``known.residual``, the length of ``H v - (v' H v) v``, within which of it an eigenvalue of
    the batch's Hessian lies. None before the first call."""

    def __init__(
        self,
        criterion: Criterion,
        weight: float | None = None,
        *,
        products: Products = "auto",
        generator: Generator | None = None,
        refresh: int = 100,
        **settings: Any,
    ) -> None:
        super().__init__(criterion, weight, **settings)
        if not isinstance(refresh, int) or refresh < 1:
            raise ValueError(f"refresh must be a whole number of at least 1; got {refresh!r}")
        self.estimation = Estimation(products=products, generator=generator)
        self.refresh = refresh
        self._tracked: Tracked | None = None
        self._names: list[str] = []
        # The model that it was tracked in: None until one has taken up what was loaded.
        self._model: ReferenceType[nn.Module] | None = None

    def get_extra_state(self) -> dict[str, Any]:
        """The counts, and the vector that is tracked."""
        state, tracked = super().get_extra_state(), self._tracked
        if tracked is not None:
            state["tracked"] = {
                "names": list(self._names),
                "vector": list(tracked.vector),
                "depth": tracked.depth,
                "steps": tracked.steps,
                "last": tracked.last,
            }
        return state

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`get_extra_state` gave."""
        super().set_extra_state(state)
        self._tracked, self._names, self._model = None, [], None
        if held := state.get("tracked"):
            self._names = list(held["names"])
            # Tensors are replaced and never written to, so the penalty that they come from goes on.
            self._tracked = Tracked(*(held[name] for name in ("vector", "depth", "steps", "last")))

    def __getstate__(self) -> dict[str, Any]:
        """All but the model, which a copy does not know."""
        return {**self.__dict__, "_model": None}

    def _settings(self) -> dict[str, tuple[Any, Any]]:
        return {
            "products": (self.estimation.products, "auto"),
            "refresh": (self.refresh, 100),
        }

    def _quantity(self, target: Objective) -> Tensor:
        target = reachable(target, self.estimation)
        # What the model draws, and what it writes to its state, is put back.
        with target.unnoticed(), target.others_frozen():
            return self._forms(target)[1]

    def _loss_and_quantity(self, target: Objective, part: Part = WHOLE) -> tuple[Tensor, Tensor]:
        target = reachable(target, self.estimation)
        if target.apart:
            with target.unnoticed(), target.others_frozen():
                loss, value = self._forms(target)
                if self.known is not None:  # as what is penalized
                    self.known = Pair(*(part.scale * each for each in vars(self.known).values()))
                return loss, part.scale * value
        if target.others or target.parallel:  # where the loss that is looked at is another one
            again = target.state_kept()
            loss = target.step_loss()
            with again():
                return loss, self._quantity(target)
        return self._forms(target)

    def _forms(self, target: Objective) -> tuple[Tensor, Tensor]:
        """The loss and ``v' H v``; in training mode ``v`` goes on."""
        settings = routed(target, self.estimation, 3 if torch.is_grad_enabled() else 2)
        if settings.products == "differences":
            warn_of_kinks(target.model)
        self.used = settings.products
        average = average_over_processes(target.outer)
        tracked = self._now(target, settings)
        loss, value, product = form_along(
            target, tracked.vector, settings.products, average, step=settings.step or 1.0
        )
        if settings.products == "autograd":
            verify_backward(target, value)
        new, self.known = followed(tracked, value, product)
        if self.training:
            self._tracked, self._names, self._model = new, target.names, ref(target.model)
        return loss, value

    def _now(self, target: Objective, settings: Estimation) -> Tracked:
        """What is tracked, for this model and where it is; begun or refreshed where it is due."""
        tracked = self._held(target)
        if tracked is None:
            with self._multiplying(target, settings) as multiply:
                return begun(multiply, self._random(target), _FIRST)
        if self.training and tracked.steps and tracked.steps % self.refresh == 0:
            with self._multiplying(target, settings) as multiply:
                return looked_around(tracked, multiply, self._random(target), _LATER)
        return tracked

    def _held(self, target: Objective) -> Tracked | None:
        tracked = self._tracked
        shapes = [p.shape for p in target.parameters]
        if (
            tracked is None
            or (self._model is not None and self._model() is not target.model)
            or self._names != target.names
            or [part.shape for part in tracked.vector] != shapes
        ):
            return None
        return tracked.like(target.parameters[0])

    def _random(self, target: Objective) -> Vector:
        signs = rademacher(target.parameters, self.estimation.generator, target.outer)
        return target.free(signs)

    @contextmanager
    def _multiplying(
        self, target: Objective, settings: Estimation
    ) -> Iterator[Callable[[Vector], Vector]]:
        average = average_over_processes(target.outer)
        with products_here(target, settings.products, settings.step or 1.0) as multiply:

            def averaged(vector: Vector) -> Vector:
                product = [part.clone() for part in multiply(vector)]
                if average:
                    average(product)
                return product

            yield averaged

r"""The moments of any module, estimated from a few products with its Hessian.

With a random direction ``v`` of independent signs, :math:`E[v^T H v] = \mathrm{Tr} H` and
:math:`E \lVert Hv \rVert^2 = \mathrm{Tr} H^2` (Hutchinson 1990); so are their gradients on average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed
from torch import Generator, Tensor, nn

from lowland._batches import as_batches, checked, to_device
from lowland._weights import Count, Weights
from lowland.criteria import Criterion
from lowland.errors import UnsupportedModelError
from lowland.estimation import Estimation, Products
from lowland.jets import covers
from lowland.moments import HessianMoments
from lowland.objective import Objective, data_parallel, objective
from lowland.products import (
    Average,
    Vector,
    dot,
    hessian_products,
    quadratic_forms,
    traces_along,
    warn_of_kinks,
)
from lowland.verification import routed, verify_backward


@dataclass(frozen=True, eq=False)
class Estimate:
    """The engine for any module: moments from a few products with the Hessian.

    Attributes:
        target: The loss.
        settings: How many products, and of which kind.
        name: What the moments say that they are found by.
    """

    target: Objective
    settings: Estimation
    name: str = "probes"

    def moments(self, count: int = 2) -> HessianMoments:
        """Estimates with standard errors; running statistics stay as they are.

        Raises:
            UnsupportedModelError: If more than two moments are asked for.
        """
        if count > 2:
            raise UnsupportedModelError(
                "moments=4 needs the closed form or brute force: probes estimate two moments; use "
                "method='exact' or method='dense'"
            )
        return self._apart(count)[1]

    def loss_and_moments(self, count: int = 2) -> tuple[Tensor, HessianMoments]:
        """Both from one forward pass, which counts as that of a step of training.

        From two where that would be another loss: of parameters that are constants of differences,
        of two halves of a batch, whose statistics are not the batch's, or of a data-parallel
        module, which averages the gradients of its own forward passes alone.
        """
        target = reachable(self.target, self.settings)
        if target.apart:
            return self._apart(count)
        if target.others or target.parallel or self.settings.unbiased:
            again = target.state_kept()
            loss = target.step_loss()
            with again():
                return loss, self.moments(count)
        return self._estimate(target, _draw(target, self.settings), count)

    def _apart(self, count: int) -> tuple[Tensor, HessianMoments]:
        """Both, of passes that leave no trace."""
        target = reachable(self.target, self.settings)
        directions = _draw(target, self.settings)
        # What the model draws, and what it writes to its state, is put back; not so the directions.
        with target.unnoticed(), target.others_frozen():
            return self._estimate(target, directions, count)

    def _estimate(
        self, target: Objective, directions: list[Vector], count: int
    ) -> tuple[Tensor, HessianMoments]:
        settings = routed(self.target, self.settings)
        if settings.products == "differences":
            warn_of_kinks(target.model)
        parts = target.halves() if settings.unbiased else [target]
        average = average_over_processes(target.outer)
        if count == 1 and settings.products == "autograd" and len(parts) == 1 and covers(target):
            loss, traces = traces_along(target, directions, average)
            verify_backward(target, traces)
            unknown = torch.full_like(traces.detach(), math.nan)
            return loss, replace(_moments(target, traces, unknown), method=self.name)
        loss, traces, squares = quadratic_forms(
            parts,
            directions,
            settings.products,
            average,
            disposable=True,
            step=settings.step or 1.0,
        )
        if settings.products == "autograd":
            verify_backward(target, traces, squares)
        return loss, replace(_moments(target, traces, squares), method=self.name)


def reachable(target: Objective, settings: Estimation) -> Objective:
    """The loss, with all others that gradients of quadratic forms lead to: exact ones alone do."""
    exact = target.others and routed(target, settings).products == "autograd"
    return target.with_others() if exact and torch.is_grad_enabled() else target


def probe_moments(
    model: nn.Module,
    criterion: Criterion,
    x: Any,
    y: Any,
    *,
    probes: int = 1,
    products: Products = "auto",
    generator: Generator | None = None,
    unbiased: bool = False,
    parameters: Iterable[Tensor] | None = None,
) -> HessianMoments:
    """Estimates of ``Tr H`` and ``Tr H^2`` of ``criterion(model(x), y)``, with standard errors.

    Args:
        model: Any module. Running statistics of normalizations stay as they are; dropout draws one
            mask. Of a ``DistributedDataParallel`` module the estimate is that of all processes'
            samples together, and its gradient is to be averaged over them as the loss's is.
        criterion: Maps the model's output and ``y`` to a scalar; a mean over the samples if several
            processes or halves take part.
        x: Whatever the model takes.
        y: Whatever the criterion takes.
        probes: How many directions, at least 1.
        products: ``"autograd"`` differentiates the gradient, and ``"auto"`` does so where PyTorch
            has its derivatives right, which is looked at once; ``"differences"``, to which it goes
            elsewhere, takes differences of it, in less memory and through anything that has a
            gradient, activation checkpointing included (:mod:`lowland.products`). With smooth
            activations and pooling the gradient of ``Tr H^2`` from one probe is then within some
            percent of the exact one in single
            precision, 0.1 % in double; across the kinks of ReLU or max pooling the gradient jumps,
            and what differences make of it may be a thousand times too large. Parameters of 16
            bits are too coarse.
        generator: Of the directions' signs; without one PyTorch's own is used.
        unbiased: Take the samples for a batch of a larger data set, whose ``Tr H^2`` is to be
            estimated: two halves of the batch, each with a Hessian of its own, meet in
            ``(H_1 v) . (H_2 v)``.
        parameters: Those whose Hessian is meant, if not all that are trainable.

    Returns:
        Scalar moments with ``stderr``, NaN for a single probe; differentiable in the parameters.

    Raises:
        ValueError: For bad input, and where the loss has no graph or is not finite.
        RuntimeError: If the loss cannot be differentiated twice.

    Notes:
        For one probe with ``"autograd"``, loss, moments and gradient together cost four to six
        plain steps of training for networks of two or three layers, and nine to eleven for deep
        ones (ResNet-18, GPT-2): each bilinear operation of a forward pass becomes 27, where a
        plain step has 3. With ``"differences"`` they cost ``1 + 3 probes`` gradients and some
        passes over all parameters. benchmarks/README.md has the figures.

    References:
        M. F. Hutchinson, A stochastic estimator of the trace of the influence matrix for Laplacian
        smoothing splines (1990).
    """
    settings = Estimation(probes, products, generator, unbiased)
    return Estimate(objective(model, criterion, x, y, parameters), settings).moments()


def loader_moments(
    target: Objective, loader: object, settings: Estimation, count: Count | None = None
) -> HessianMoments:
    """:func:`probe_moments` of all batches together, without gradients.

    One pass over the loader, in the memory of one batch and of two vectors a probe. Batches move to
    the parameters' device. With a criterion whose reduction is ``"sum"`` the loss is the sum over
    the batches, else the mean over their samples; of ``nn.CrossEntropyLoss`` and ``nn.NLLLoss`` by
    class weights, and without ignored targets; of others what they turn out to be. Put the model in
    evaluation mode where batch normalization should not depend on the batches. Each process of a
    ``DistributedDataParallel`` module brings its own batches; sums are divided by the number of
    processes, as gradients are.

    Args:
        target: The loss, whose own batch is not looked at.
        loader: What gives the batches.
        settings: How many products, and of which kind.
        count: As for :func:`lowland.hessian_moments`.

    Raises:
        TypeError: If the data have another form.
        ValueError: As :func:`probe_moments`, or if the loader is empty, or what a batch counts is
            not known and cannot be measured.
    """
    directions = _draw(target, settings)
    totals = [[torch.zeros_like(p) for p in target.parameters] for _ in directions]
    weigh, looked_at = Weights(target, count), False
    with target.others_frozen():
        for x, y in checked(as_batches(loader, again=False)):
            weight = weigh(x, y)
            if not weight:  # all of its targets are ignored
                continue
            part = target.on((to_device(x, target.device), to_device(y, target.device)))
            if not looked_at:
                settings, looked_at = routed(part, settings), True
            found = hessian_products(part, directions, settings.products)
            for total, product in zip(totals, found, strict=True):
                torch._foreach_add_(total, product, alpha=weight)
    average = average_over_processes(target.outer)
    if average:  # each process has seen its share of the samples
        counted = torch.tensor([weigh.sum], dtype=totals[0][0].dtype, device=target.device)
        average([counted, *(each for total in totals for each in total)])
        weigh.sum = float(counted)
    scale = 1 / weigh.total
    values = [torch.stack(each) for each in zip(*map(_forms, totals, directions), strict=True)]
    return _moments(target, values[0] * scale, values[1] * scale**2)


def _draw(target: Objective, settings: Estimation) -> list[Vector]:
    """As many directions of random signs as there are probes."""
    return [
        rademacher(target.parameters, settings.generator, target.outer)
        for _ in range(settings.probes)
    ]


def _forms(product: Vector, direction: Vector) -> tuple[Tensor, Tensor]:
    return dot(product, direction), dot(product, product)


def _moments(target: Objective, traces: Tensor, squares: Tensor) -> HessianMoments:
    return HessianMoments(
        target.dim,
        traces.mean(),
        squares.mean(),
        stderr=(_standard_error(traces), _standard_error(squares)),
        method="probes",
        matrix=target.matrix,
    )


def _standard_error(values: Tensor) -> Tensor:
    values = values.detach()
    if len(values) == 1:
        return torch.full_like(values[0], float("nan"))
    error: Tensor = values.std() / len(values) ** 0.5
    return error


def rademacher(
    parameters: Iterable[Tensor], generator: Generator | None, model: nn.Module | None = None
) -> Vector:
    """Random signs in the parameters' shapes, the same ones in all processes of a model."""
    parameters = list(parameters)
    device, total = parameters[0].device, sum(p.numel() for p in parameters)
    home = device if generator is None else generator.device
    # Thirty-two signs a random number: drawing them is the dear part.
    drawn = torch.empty(-(-total // 32), dtype=torch.int32, device=home)
    drawn = drawn.random_(-(1 << 31), 1 << 31, generator=generator)
    drawn = drawn.to(device, non_blocking=True)
    if model is not None and (parallel := data_parallel(model)):
        torch.distributed.broadcast(drawn, group_src=0, group=parallel.process_group)
    bytes_ = drawn.view(torch.uint8).to(torch.int32)
    signs = _table(device, parameters[0].dtype).index_select(0, bytes_).view(-1)[:total]
    parts = signs.split([p.numel() for p in parameters])
    return [part.view(p.shape).to(p.dtype) for part, p in zip(parts, parameters, strict=True)]


@lru_cache(8)
def _table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The eight signs that each byte stands for."""
    bytes_, bits = torch.arange(256, device=device), torch.arange(8, device=device)
    return (bytes_[:, None].bitwise_right_shift(bits) & 1).to(dtype).mul_(2).sub_(1)


def average_over_processes(model: nn.Module) -> Average | None:
    """What averages tensors over the processes of a data-parallel model; None for any other."""
    parallel = data_parallel(model)
    if parallel is None:
        return None
    group = parallel.process_group

    def average(parts: Vector) -> None:
        flat = torch.cat([part.reshape(-1) for part in parts])
        torch.distributed.all_reduce(flat, group=group)
        flat /= torch.distributed.get_world_size(group)
        for part, mean in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
            part.copy_(mean.view_as(part))

    return average

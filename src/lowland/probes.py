r"""The moments of any module, estimated from a few products with its Hessian.

With a random direction ``v`` of independent signs, :math:`E[v^T H v] = \mathrm{Tr} H` and
:math:`E \lVert Hv \rVert^2 = \mathrm{Tr} H^2` (Hutchinson 1990); so are their gradients on average.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed
from torch import Generator, Tensor, nn

from lowland.criteria import Criterion, is_sum, mass
from lowland.moments import HessianMoments
from lowland.objective import Objective, data_parallel, objective
from lowland.passes import frozen_statistics
from lowland.products import Average, Parts, Products, dot, measure, products_with, warn_of_kinks


def probe_moments(
    model: nn.Module,
    criterion: Criterion,
    x: Any,
    y: Any,
    *,
    probes: int = 1,
    products: Products = "exact",
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
        products: ``"exact"`` differentiates the gradient; ``"finite"`` takes differences of it, in
            less memory and through anything that has a gradient, activation checkpointing included
            (:mod:`lowland.products`). With smooth activations and pooling the gradient of
            ``Tr H^2`` from one probe is then within some percent of the exact one in single
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
        For one probe with exact products, loss, moments and gradient together cost four to six
        plain steps of training (seven for convolutions with GELU); with finite ones
        ``1 + 3 probes`` gradients and some passes over all parameters. benchmarks/README.md has
        the figures.

    References:
        M. F. Hutchinson, A stochastic estimator of the trace of the influence matrix for Laplacian
        smoothing splines (1990).
    """
    target = objective(model, criterion, x, y, parameters)
    with frozen_statistics(target.model):
        return _estimate(model, target, probes, products, generator, unbiased=unbiased)[1]


def loss_and_moments(  # as above, for a step of training
    model: nn.Module,
    criterion: Criterion,
    x: Any,
    y: Any,
    *,
    probes: int = 1,
    products: Products = "exact",
    generator: Generator | None = None,
    parameters: Iterable[Tensor] | None = None,
) -> tuple[Tensor, HessianMoments]:
    """The loss and :func:`probe_moments` from one forward pass, which counts as that of the step.

    Arguments and errors are those of :func:`probe_moments`. Running statistics of normalizations
    are updated as by the loss alone.
    """
    target = objective(model, criterion, x, y, parameters)
    return _estimate(model, target, probes, products, generator, unbiased=False)


def loader_moments(
    model: nn.Module,
    criterion: Criterion,
    loader: Iterable[tuple[Any, Any]],
    *,
    probes: int = 1,
    products: Products = "exact",
    generator: Generator | None = None,
    parameters: Iterable[Tensor] | None = None,
) -> HessianMoments:
    """:func:`probe_moments` of all batches ``(x, y)`` together, without gradients.

    One pass over the loader, in the memory of one batch and of two vectors a probe. Batches move to
    the parameters' device. With a criterion whose reduction is ``"sum"`` the loss is the sum over
    the batches, else the mean over their samples; of ``nn.CrossEntropyLoss`` and ``nn.NLLLoss`` by
    class weights, and without ignored targets. Put the model in evaluation mode where batch
    normalization should not depend on the batches. Each process of a ``DistributedDataParallel``
    module brings its own batches; sums are divided by the number of processes, as gradients are.

    Raises:
        ValueError: As :func:`probe_moments`, or if the loader is empty.
    """
    check_settings(probes, products)
    parameters = None if parameters is None else list(parameters)
    target = objective(model, criterion, None, None, parameters)
    directions = [rademacher(target.parameters, generator, model) for _ in range(probes)]
    totals = [[torch.zeros_like(p) for p in target.parameters] for _ in directions]
    samples = 0.0
    device = target.parameters[0].device
    if isinstance(loader, Tensor):
        raise TypeError(
            "without targets y, a loader of batches (x, y) is expected; got a tensor of shape "
            f"{tuple(loader.shape)}"
        )
    with frozen_statistics(target.model):
        for x, y in loader:
            count = float(mass(criterion, y) if isinstance(y, Tensor) else len(y))
            samples += count
            if not count:  # all of its targets are ignored
                continue
            part = replace(target, x=_to(x, device), y=_to(y, device))
            for total, product in zip(
                totals, products_with(part, directions, products), strict=True
            ):
                torch._foreach_add_(total, product, alpha=count)
    average = _average_over_processes(model)
    if average:  # each process has seen its share of the samples
        counted = torch.tensor([samples], dtype=totals[0][0].dtype, device=device)
        average([counted, *(each for total in totals for each in total)])
        samples = float(counted)
    if not samples:
        raise ValueError(
            "the data loader is empty: it gave no batch (x, y); an iterator, which can be gone "
            "through once, may be used up"
        )
    scale = 1 if is_sum(criterion) else 1 / samples
    values = [torch.stack(each) for each in zip(*map(_forms, totals, directions), strict=True)]
    return _moments(target.dim, values[0] * scale, values[1] * scale**2)


def _forms(product: Parts, direction: Parts) -> tuple[Tensor, Tensor]:
    return dot(product, direction), dot(product, product)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if hasattr(value, "to") else value


def _estimate(
    model: nn.Module,
    target: Objective,
    probes: int,
    products: Products,
    generator: Generator | None,
    *,
    unbiased: bool,
) -> tuple[Tensor, HessianMoments]:
    check_settings(probes, products)
    if products == "finite":
        warn_of_kinks(target.model)
    average = _average_over_processes(model)
    directions = [rademacher(target.parameters, generator, model) for _ in range(probes)]
    parts = target.halves() if unbiased else [target]
    loss, traces, squares = measure(parts, directions, products, average, disposable=True)
    return loss, _moments(target.dim, traces, squares)


def _moments(dim: int, traces: Tensor, squares: Tensor) -> HessianMoments:
    errors = (_standard_error(traces), _standard_error(squares))
    return HessianMoments(dim, traces.mean(), squares.mean(), stderr=errors)


def check_settings(probes: int, products: str) -> None:
    """Refuse what cannot be estimated with.

    Raises:
        ValueError: If there is no probe, or no such way to a product.
    """
    if not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes must be a whole number of at least 1; got {probes!r}")
    if products not in ("exact", "finite"):
        raise ValueError(f"unknown products {products!r}: expected 'exact' or 'finite'")


def _standard_error(values: Tensor) -> Tensor:
    values = values.detach()
    if len(values) == 1:
        return torch.full_like(values[0], float("nan"))
    error: Tensor = values.std() / len(values) ** 0.5
    return error


def rademacher(
    parameters: Iterable[Tensor], generator: Generator | None, model: nn.Module | None = None
) -> Parts:
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


def _average_over_processes(model: nn.Module) -> Average | None:
    parallel = data_parallel(model)
    if parallel is None:
        return None
    group = parallel.process_group

    def average(parts: Parts) -> None:
        flat = torch.cat([part.reshape(-1) for part in parts])
        torch.distributed.all_reduce(flat, group=group)
        flat /= torch.distributed.get_world_size(group)
        for part, mean in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
            part.copy_(mean.view_as(part))

    return average

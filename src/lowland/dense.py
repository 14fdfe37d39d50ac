"""Moments of any module by brute force: form the Hessian, take its traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from lowland.criteria import Criterion, scalar_loss
from lowland.moments import HessianMoments, check_number
from lowland.objective import objective
from lowland.passes import frozen_statistics, remember_randomness
from lowland.torch_fixes import differentiable_operations
from lowland.validation import check_initialized, check_values

DEFAULT_MEMORY_LIMIT = 4 << 30


def dense_hessian(
    model: nn.Module,
    criterion: Criterion,
    x: Tensor,
    y: Tensor,
    *,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
) -> Tensor:
    """The Hessian of ``criterion(model(x), y)`` in the trainable parameters, with its graph.

    Args:
        model: Any module whose loss can be differentiated twice.
        criterion: Maps the model's output and ``y`` to a scalar.
        x: Whatever the model takes.
        y: Whatever the criterion takes.
        memory_limit: Bytes that the matrix itself may take.

    Returns:
        ``(P, P)``, parameters in the order of ``model.parameters()``, flattened. It can be
        differentiated in the parameters if gradients are enabled.

    Raises:
        ValueError: If there is no trainable parameter, a lazy layer has seen no data, ``x`` or
            ``y`` is empty or not finite, the loss is not a scalar, or the matrix would exceed the
            limit.
        RuntimeError: If PyTorch cannot differentiate the model twice, with what may help.
    """
    for label, data in (("x", x), ("y", y)):
        if isinstance(data, Tensor):  # other inputs are the model's and the criterion's own affair
            check_values(data, label)
    check_initialized(model)
    target = objective(model, criterion, x, y)
    model, named = target.model, dict(zip(target.names, target.parameters, strict=True))
    sizes = [p.numel() for p in named.values()]
    dim, itemsize = sum(sizes), next(iter(named.values())).element_size()
    if dim * dim * itemsize > memory_limit:
        raise ValueError(
            f"the Hessian of {dim} parameters takes {dim * dim * itemsize / 2**30:.3g} GiB, more "
            f"than the limit of {memory_limit / 2**30:.3g} GiB; leave parameters out of it by "
            "requires_grad_(False), or call lowland.dense.dense_moments or dense_hessian with a "
            "larger memory_limit"
        )

    # Once as users call it: what is wrong then is said by PyTorch itself, or by us, without a word
    # of derivatives; and a loss without a graph would have a Hessian of zeros.
    again = remember_randomness({p.device for p in target.parameters})
    with torch.enable_grad(), frozen_statistics(model), again():
        target.loss()

    def loss_of(flat: Tensor) -> Tensor:
        parts = {
            name: part.view_as(p)
            for (name, p), part in zip(named.items(), flat.split(sizes), strict=True)
        }
        return scalar_loss(criterion, torch.func.functional_call(model, parts, (x,)), y)

    flat = torch.cat([p.reshape(-1) for p in named.values()])
    with untouched(model), differentiable_operations(model):
        return _differentiate_twice(loss_of, flat)


def _differentiate_twice(loss_of: Callable[[Tensor], Tensor], flat: Tensor) -> Tensor:
    try:
        matrix: Tensor = torch.func.hessian(loss_of)(flat)
    except RuntimeError as error:  # NotImplementedError is one
        raise RuntimeError(
            f"brute force cannot differentiate this model and loss twice: {error}\n"
            "Layers that draw random numbers or update running statistics must be in evaluation "
            "mode: call model.eval() first. Layers without forward-mode derivatives are not "
            "supported"
        ) from error
    return matrix


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put the parameters back: a functional call leaves its own in a module that occurs twice."""
    before = [(module, dict(module._parameters)) for module in model.modules()]  # noqa: SLF001
    try:
        yield
    finally:
        for module, parameters in before:
            module._parameters.update(parameters)  # noqa: SLF001


def dense_moments(
    model: nn.Module,
    criterion: Criterion,
    x: Tensor,
    y: Tensor,
    *,
    moments: Literal[2, 4] = 2,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
) -> HessianMoments:
    """Moments of :func:`dense_hessian`; arguments and errors are the same.

    ``moments=4`` adds ``Tr H^3`` and ``Tr H^4``, at the cost of one product of matrices.

    Raises:
        ValueError: Also if ``moments`` is neither 2 nor 4.

    Notes:
        Time and memory grow with ``P^2``, and differentiating through it takes several times that.
        It is the reference for the other engines and the fallback for small models.
    """
    check_number(moments)
    matrix = dense_hessian(model, criterion, x, y, memory_limit=memory_limit)
    higher = None
    if moments == 4:
        square = matrix @ matrix
        higher = (square * matrix).sum(), square.square().sum()
    dim = math.isqrt(matrix.numel())
    return HessianMoments(dim, matrix.trace(), matrix.square().sum(), higher=higher)

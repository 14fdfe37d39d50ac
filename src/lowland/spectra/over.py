"""One call for the largest eigenvalues over training, each checkpoint's from the last one's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from lowland._checkpoints import Checkpoint, read_all
from lowland._holding import holding
from lowland._weights import Count
from lowland.objective import unwrap
from lowland.passes import frozen_statistics
from lowland.spectra.history import EigenvalueHistory
from lowland.spectra.lanczos import Top, largest
from lowland.spectra.solve import check_products
from lowland.spectra.surface import Surface, own_randomness, survey


def eigenvalues_over(
    model: nn.Module,
    criterion: Callable[..., Any],
    data: Any,
    checkpoints: Iterable[Checkpoint],
    k: int = 1,
    *,
    steps: Sequence[float] | None = None,
    tolerance: float = 1e-3,
    limit: int = 1000,
    count: Count | None = None,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> EigenvalueHistory:
    r"""The largest eigenvalues of the Hessian at checkpoints of training.

    The iteration at each checkpoint starts from the eigenvectors at the one before, with a random
    vector of the same length added.

    Args:
        model: Any module, as for :func:`lowland.spectrum`, in evaluation mode where that matters.
        criterion: As for :func:`lowland.spectrum`.
        data: As for :func:`lowland.spectrum`; it is gone through once for each product.
        checkpoints: Of the same model, in the order of training: state dicts, modules, files that
            ``torch.save`` or safetensors wrote, or functions that give one of these. Of anything
            but a list one is read at a time. Buffers, such as running statistics, are taken from
            them too.
        k: How many eigenvalues.
        steps: Where in training each checkpoint was, for table and figure; by default 0, 1, 2, ...
        tolerance: Largest norm of a residual ``H v - lambda v``, as a fraction of the largest
            magnitude met. The error of an eigenvalue is the residual's square over its distance
            from the others: at 1e-3 some 1e-6 of it.
        limit: Products with the Hessian at a checkpoint, at most.
        count: What the criterion's mean over a batch divides by, as for :func:`lowland.spectrum`.
        seed: Of the random vectors. No global generator is touched.
        on_progress: Called with a title and how many checkpoints are done and in all.

    Returns:
        Eigenvalues with residuals, losses and the number of products, for each checkpoint.

    Raises:
        TypeError: If a checkpoint is none, ``k`` is no whole number, or the data has another form.
        ValueError: If an argument is out of range, a checkpoint is of another model, two of a list
            are the same tensors; or as :func:`lowland.spectrum`.
        RuntimeError: If eigenvalues do not converge; or as :func:`lowland.spectrum`.

    Notes:
        Of a multilayer perceptron and a convolutional network of 50,000 parameters on 500 digits,
        20 steps of training between checkpoints, the largest eigenvalue takes 5 to 6 products at
        each, 10 from random starts, and 36 to 39 by :func:`lowland.spectrum` to the same tolerance;
        the five largest 11 to 12, 16 to 19, and 40 to 48 (``benchmarks/eigenvalues_over.py``).

        The random vector makes sure that an eigenvalue is found which overtakes the others while
        its eigenvector was nearly orthogonal to theirs. The iteration keeps at most ``2 k + 24``
        vectors of the length of all parameters, twice. As with every Lanczos iteration, a copy of
        an eigenvalue that occurs several times can be missed.

        The model itself does not change: other tensors stand in the places of its parameters
        meanwhile, whatever ends this.

    References:
        J. Cohen et al., Gradient descent on neural networks typically occurs at the edge of
        stability, ICLR 2021 (arXiv:2103.00065).

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> x, y = torch.randn(50, 3), torch.ones(50, dtype=torch.long)
        >>> criterion, states = nn.CrossEntropyLoss(), []
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> for _ in range(4):
        ...     states.append({n: part.clone() for n, part in model.state_dict().items()})
        ...     criterion(model(x), y).backward()
        ...     optimizer.step()
        >>> history = lowland.eigenvalues_over(model, criterion, (x, y), states, k=2)
        >>> history.eigenvalues.shape
        torch.Size([4, 2])
    """
    if not isinstance(k, Integral):
        raise TypeError(f"k must be a whole number; got {k!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    if not 0 < tolerance < 1:
        raise ValueError(
            "tolerance must be between 0 and 1, a fraction of the largest eigenvalue's magnitude; "
            f"got {tolerance}"
        )
    if limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    total = len(checkpoints) if isinstance(checkpoints, Sequence) else 0
    if steps is not None and total and len(steps) != total:
        raise ValueError(f"steps must be one for each of {total} checkpoints; got {len(steps)}")
    inside = unwrap(model)
    tops: list[Top | None] = []
    losses: list[float] = []
    with frozen_statistics(inside):
        surface = survey(model, criterion, data, count)
        if k > surface.dim:
            raise ValueError(
                f"k must be at most {surface.dim}, the number of trainable parameters; got {k}"
            )
        with own_randomness(surface.device, seed):
            points = (_at(surface, values) for values in read_all(checkpoints, inside))
            walk = _walk(points, k, tolerance=tolerance, limit=limit, seed=seed)
            for loss, top in walk:
                losses.append(loss)
                tops.append(top)
                if on_progress is not None:
                    on_progress("checkpoints", len(tops), max(total, len(tops)))
    if steps is not None and len(steps) != len(tops):
        raise ValueError(f"steps must be one for each of {len(tops)} checkpoints; got {len(steps)}")
    nothing = torch.full((k,), torch.nan, dtype=torch.float64)
    return EigenvalueHistory(
        eigenvalues=torch.stack([nothing if top is None else top.values for top in tops]),
        residuals=torch.stack([nothing if top is None else top.residuals for top in tops]),
        losses=torch.tensor(losses, dtype=torch.float64),
        products=torch.tensor([0 if top is None else top.products for top in tops]),
        steps=torch.tensor(list(range(len(tops)) if steps is None else steps), dtype=torch.float64),
        tolerance=tolerance,
    )


def _walk(
    points: Iterable[Surface], k: int, *, tolerance: float, limit: int, seed: int
) -> Iterator[tuple[float, Top | None]]:
    """The loss at each point and the largest eigenvalues, None where the loss is not finite."""
    generator = torch.Generator().manual_seed(seed)
    before: Top | None = None
    for point in points:
        loss = _loss(point)
        if not math.isfinite(loss):
            yield loss, None
            continue
        with _there(point) as surface:
            operator = surface.operator()
            if before is None:
                check_products(operator, seed)
            before = largest(
                operator,
                k,
                _start(operator, before, generator),
                tolerance=tolerance,
                limit=limit,
                generator=generator,
            )
        _check_residuals(before, tolerance, operator.dtype)
        yield loss, replace(before, vectors=before.vectors[:0])


def _check_residuals(top: Top, tolerance: float, dtype: torch.dtype) -> None:
    worst = float(top.residuals.max())
    if worst > tolerance * top.scale:
        warnings.warn(
            f"residual norms reach {worst:.2g}, beyond the tolerance of {tolerance:g} * "
            f"{top.scale:.3g}, since products in {str(dtype).removeprefix('torch.')} are no more "
            "exact: use model.double() or a larger tolerance",
            RuntimeWarning,
            stacklevel=4,
        )


def _at(surface: Surface, values: Mapping[str, Tensor]) -> Surface:
    """The surface around other parameters, with the buffers that belong to them."""
    # Copies, since layers may write to their buffers, and parameters will ask for gradients.
    return replace(
        surface, state={**surface.state, **{name: part.clone() for name, part in values.items()}}
    )


def _loss(point: Surface) -> float:
    """The loss; NaN where a parameter is not finite, of which some criteria take no output."""
    if all(bool(torch.isfinite(part).all()) for part in point.parameters.values()):
        return point.loss({})
    return math.nan


@contextmanager
def _there(point: Surface) -> Iterator[Surface]:
    """The surface's parameters and buffers in the places of the model's own."""
    for part in point.parameters.values():
        part.requires_grad_()
    objective = replace(point.objective, parameters=list(point.parameters.values()))
    with holding(objective.model, point.state):
        yield replace(point, objective=objective)


def _start(operator: Any, before: Top | None, generator: torch.Generator) -> Tensor:
    """The eigenvectors before, each of length 1, and as much at random."""
    drawn = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64)
    start: Tensor = drawn.to(operator.device, operator.dtype)
    if before is None:
        return start
    start /= torch.linalg.vector_norm(start)
    start += before.vectors.sum(1)
    return start

r"""The shares of two batches in the loss of both together: measured where nothing tells them.

Of a mean over samples, targets or labels that are not ignored, or of a weighted one,

.. math:: \nabla \ell_{12} = r_1 \nabla \ell_1 + r_2 \nabla \ell_2, \qquad r_1 + r_2 = 1,

in whatever the losses are functions of; of a sum :math:`r_1 = r_2 = 1`. Gradients are compared
rather than losses, as these are one equation for two unknowns, and as gradients also tell what is
neither a mean nor a sum: a root of a mean, or a loss of pairs of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad

from lowland._batches import Batch, CannotJoinError, join, mapped, numbers
from lowland.criteria import Criterion, scalar_loss


class Shares(NamedTuple):
    """``r_1`` and ``r_2``."""

    first: float
    second: float

    @property
    def is_sum(self) -> bool:
        """Whether the losses add up, rather than their shares."""
        return self.first + self.second > 1.5


class UnevenError(ValueError):
    """The loss of two batches is no sum of shares of theirs, or gradients do not tell which."""


def shares_by_outputs(criterion: Criterion, first: Batch, second: Batch) -> Shares:
    """By gradients in the model's outputs, whatever the model does to samples of one batch.

    Args:
        criterion: The loss.
        first: The model's output, and what the criterion takes beside it; its loss is finite.
        second: The same of another batch. If its loss is no number and adds nothing to the first,
            its share is zero: all of its targets are ignored.

    Raises:
        CannotJoinError: If the batches cannot be made one, as of samples of other lengths.
        UnevenError: If the loss of both is no mean and no sum of theirs.
    """
    outputs = [_leaves_of(output) for output, _ in (first, second)]
    joint = [_leaves_of(join(first[0], second[0]))]
    y = join(first[1], second[1])
    (start, one), (value, two), (whole, both) = (
        _gradient(criterion, *output, targets)
        for output, targets in zip([*outputs, *joint], [first[1], second[1], y], strict=True)
    )
    if any(part.ndim == 0 and bool(part != 0) for part in (*one, *two)):
        raise CannotJoinError("the model returns a number of the whole batch, such as its loss")
    one, two, both = ([part for part in each if part.ndim] for each in (one, two, both))
    starts = _flat([part[: len(first)] for part, first in zip(both, one, strict=True)])
    ends = _flat([part[len(first) :] for part, first in zip(both, one, strict=True)])
    if not value.isfinite() and whole.isfinite() and torch.equal(starts, _flat(one)):
        return Shares(1.0, 0.0)
    r = [_share(_flat(one), starts), _share(_flat(two), ends)]
    if r.count(None) == 1:  # one loss is flat, and says nothing but by what it takes from the other
        known = next(each for each in r if each is not None)
        r = [1 - known if each is None else each for each in r]
        if abs(1 - known) < _tolerance(starts):
            raise UnevenError("the gradient of one batch's loss is zero, which does not tell")
    if None in r:
        raise UnevenError("the gradients of the batches' losses are zero, which does not tell")
    shares = _as_shares(r[0], r[1], _tolerance(starts))  # type: ignore[arg-type]
    # What the loss adds to a function of the outputs, such as a norm of weights, adds up in a sum.
    size = shares.first * abs(start) + shares.second * abs(value)
    if not abs(whole - shares.first * start - shares.second * value) <= _tolerance(starts) * size:
        raise UnevenError(_NEITHER)
    if shares.is_sum:
        check_no_numbers(first)
    return shares


def check_no_numbers(batch: object) -> None:
    """Refuse to see a sum where the loss may be divided by a number that the batch holds.

    Two batches together are given the first one's.

    Raises:
        UnevenError: If it holds one.
    """
    if numbers(batch):
        raise UnevenError(
            "the batches hold numbers, which the sum of their losses may be divided by"
        )


def shares_by_gradients(
    both: Sequence[Tensor], one: Sequence[Tensor], two: Sequence[Tensor]
) -> Shares:
    """By gradients in the model's parameters: of the loss of both batches, and of each.

    Raises:
        UnevenError: As :func:`shares_by_outputs`; also where samples of a batch see each other.
    """
    whole, first, second = (_flat(parts) for parts in (both, one, two))
    tolerance = _tolerance(whole)
    if (whole - first - second).norm() <= tolerance * whole.norm() and whole.any():
        return Shares(1.0, 1.0)
    apart = first - second
    if not apart.norm() > tolerance * first.norm():
        raise UnevenError("the batches have one gradient, which does not tell")
    r = float((whole - second).double() @ apart.double() / apart.double().square().sum())
    if (whole - second - r * apart).norm() > tolerance * whole.norm():
        raise UnevenError(_NEITHER)
    return _as_shares(r, 1 - r, tolerance)


_NEITHER = "the loss of two batches together is neither the mean of theirs nor the sum"


def _as_shares(first: float, second: float, tolerance: float) -> Shares:
    if abs(first - 1) < tolerance and abs(second - 1) < tolerance:
        return Shares(1.0, 1.0)
    if abs(first + second - 1) > tolerance or first <= 0 or second <= 0:
        raise UnevenError(_NEITHER)
    return Shares(first, second)


def _share(alone: Tensor, together: Tensor) -> float | None:
    """``r`` of ``together = r alone``; None where both are zero."""
    if not alone.any():
        if together.any():
            raise UnevenError(_NEITHER)
        return None
    r = together.double() @ alone.double() / alone.double().square().sum()
    # Written so that NaN is refused too.
    if not (together - r * alone).norm() <= _tolerance(alone) * (r * alone).norm():
        raise UnevenError(_NEITHER)
    return float(r)


def _tolerance(values: Tensor) -> float:
    return float(torch.finfo(values.dtype).eps ** 0.5)


def _leaves_of(output: Any) -> tuple[Any, list[Tensor]]:
    """An output apart from its graph, and the tensors in it that a loss is a function of."""
    leaves: list[Tensor] = []

    def apart(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        wide = torch.promote_types(value.dtype, torch.float32)
        leaves.append(value.detach().to(wide, copy=True).requires_grad_())
        return leaves[-1]

    return mapped(output, apart), leaves


def _gradient(
    criterion: Criterion, output: Any, leaves: list[Tensor], y: Any
) -> tuple[Tensor, list[Tensor]]:
    with torch.enable_grad():
        loss = scalar_loss(criterion, output, y)
        if loss.ndim or not loss.requires_grad:
            raise CannotJoinError("the criterion gives no scalar with a graph to the outputs")
        found = grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), list(found)


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def check_even(criterion: Criterion, first: Batch, second: Batch) -> None:
    """Require that a loss is the plain mean of what it is on two halves of a batch.

    Raises:
        ValueError: If it is not, as far as can be told.
    """
    try:
        shares = shares_by_outputs(criterion, first, second)
    except CannotJoinError:
        return
    except UnevenError as error:
        raise ValueError(f"unbiased=True splits the batch in two halves, and {error}") from error
    if abs(shares.first - 0.5) + abs(shares.second - 0.5) > 1e-3:
        raise ValueError(
            "unbiased=True estimates the moments of a mean over samples; the criterion is a sum, "
            "or a mean whose denominator depends on the batch: its halves' shares in the loss are "
            f"{shares.first:.4g} and {shares.second:.4g}"
        )

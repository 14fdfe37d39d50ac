"""What each batch counts in a loss over several, found as the batches come.

What a known criterion's mean divides by is in its targets (:func:`lowland.criteria.mass`). Of all
others it is said by ``count=``, or measured against the first batch (:mod:`lowland._shares`), and
never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lowland._batches import Batch, CannotJoinError, join, mapped, rows, to_device
from lowland._call import call
from lowland._shares import (
    Shares,
    UnevenError,
    check_no_numbers,
    shares_by_gradients,
    shares_by_outputs,
)
from lowland.criteria import (
    check_two_tensors,
    is_known,
    is_sum,
    mass,
    name_of,
    scalar_loss,
)
from lowland.errors import UnsupportedModelError
from lowland.objective import Objective
from lowland.passes import unsteady

Word = Literal["samples", "batches", "sum"]
Count = Word | Callable[[Any, Any], Any]
"""What a batch's loss is a mean over: a function of ``(x, y)``, or a word for it."""


def check_count(count: object) -> None:
    """Refuse what does not say what a batch counts.

    Raises:
        TypeError: If it is no function.
        ValueError: If it is no word that is known.
    """
    if isinstance(count, str) and count not in get_args(Word):
        raise ValueError(
            f"unknown count {count!r}: expected a function of a batch's x and y, 'samples', "
            "'batches' or 'sum'"
        )
    if not (count is None or callable(count) or isinstance(count, str)):
        raise TypeError(f"count must be a function of a batch's x and y; got {count!r}")


class Weights:
    """How much a batch counts.

    Args:
        target: The loss, whose own batch is not looked at.
        count: What the caller says of it, None for nothing.

    Raises:
        TypeError, ValueError: As :func:`check_count`.
    """

    def __init__(self, target: Objective, count: Count | None = None) -> None:
        check_count(count)
        self.target, self.count = target, count
        self.measures = count is None and not is_known(target.criterion)
        self.is_sum = count == "sum" or (count is None and is_sum(target.criterion))
        self.sum = 0.0
        self._reference: tuple[Batch, Any] | None = None
        self._unplaced: list[tuple[Batch, Any]] = []
        self._is_placed = False

    @property
    def total(self) -> float:
        """What the weighted losses are divided by.

        Raises:
            ValueError: If no batch counts.
        """
        if not self.sum and self._unplaced:
            raise ValueError(_NOT_FINITE)
        if not self.sum:
            raise ValueError(
                "every sample has weight zero, by the criterion's class weights, ignore_index or "
                "count=, so the mean loss does not exist"
            )
        return 1.0 if self.is_sum else self.sum

    def __call__(self, x: Any, y: Any) -> float:
        """The weight of a batch, in units that all batches share.

        Raises:
            TypeError: If the criterion does not take such targets.
            ValueError: If it is not known and cannot be measured, or ``count=`` gives no number.
        """
        if self.measures:
            with self.target.remember()():
                weight = self._measured(x, y)
        else:
            weight = self._said(x, y)
        self.sum += weight
        return weight

    def _said(self, x: Any, y: Any) -> float:
        if self.count is None:
            if not isinstance(y, Tensor):
                check_two_tensors(self.target.criterion, torch.empty(0), y)
            return float(mass(self.target.criterion, y))
        if not callable(self.count):
            return float(rows(x, y)) if self.count == "samples" else 1.0
        said = self.count(x, y)
        try:
            weight = float(said)
        except (TypeError, ValueError, RuntimeError):
            weight = math.nan
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                "count= must give a finite number of at least 0 for each batch, what its mean loss "
                f"divides by; got {said!r}"
            )
        return weight

    def _measured(self, x: Any, y: Any) -> float:
        target = self.target
        if target.parallel:
            raise self._refusal("the batches are several processes', which see none of the others'")
        batch = to_device(x, target.device), to_device(y, target.device)
        output, loss = self._run(batch)
        if loss.ndim:  # it is refused for that
            return 1.0
        if self._reference is None:
            if not loss.isfinite():  # all targets ignored, or something is wrong
                self._unplaced.append((batch, output))
                return 0.0
            # Kept apart, as some loaders write the next batch into the same memory.
            self._reference = mapped(Tensor.clone, batch), mapped(Tensor.clone, output)
            for other in self._unplaced:
                if self._shares(*other).second:
                    raise ValueError(_NOT_FINITE)
            return 1.0
        shares = self._shares(batch, output)
        if shares.second:
            if self._is_placed and shares.is_sum != self.is_sum:
                raise self._refusal("with some batches it is a sum, with others a mean")
            self._is_placed, self.is_sum = True, shares.is_sum
        return shares.second / shares.first

    def _run(self, batch: Batch) -> tuple[Any, Tensor]:
        target = self.target
        with torch.no_grad():
            output = call(target.model, batch[0])
            return output, scalar_loss(target.criterion, output, batch[1]).detach()

    def _shares(self, batch: Batch, output: Any) -> Shares:
        if self._reference is None:
            raise RuntimeError("there is no batch to compare with")
        (x, y), first = self._reference
        try:
            return shares_by_outputs(self.target.criterion, (first, y), (output, batch[1]))
        except CannotJoinError as error:
            reason = str(error)
        except UnevenError as error:
            raise self._refusal(str(error)) from error
        try:
            return self._by_gradients((x, y), batch)
        except (CannotJoinError, UnevenError) as error:
            raise self._refusal(f"{reason}; {error}" if reason != str(error) else reason) from error

    def _by_gradients(self, first: Batch, second: Batch) -> Shares:
        """Of what the model makes of both batches together, where it keeps samples apart."""
        target = self.target
        if any(map(unsteady, target.model.modules())):
            raise UnevenError("layers in training mode let samples of a batch see each other")
        both = join(first, second)
        with target.others_frozen():
            _, loss = self._run(second)
            if not loss.isfinite():
                raise UnevenError("the loss of a batch is not finite")
            try:
                found = [target.on(each).gradient()[1] for each in (both, first, second)]
            except UnsupportedModelError:
                raise
            except (RuntimeError, TypeError, ValueError, LookupError) as error:
                raise UnevenError(
                    f"the model does not take both batches as one: {error}"
                ) from error
        shares = shares_by_gradients(*found)
        if shares.is_sum:
            check_no_numbers(first)
        return shares

    def _refusal(self, why: str) -> ValueError:
        return ValueError(
            f"what the mean of {name_of(self.target.criterion)} over a batch divides by is not "
            f"known, and could not be measured on two batches ({why}): say it by count=, a "
            "function of a batch's x and y, such as count=lambda x, y: len(y) for a mean over "
            "samples, or count=lambda x, y: (y != -100).sum() for labels of which some are "
            "ignored; or by one of the words 'samples', 'batches' (the mean of the batches' "
            "losses) and 'sum'"
        )


_NOT_FINITE = (
    "the loss is not finite on some batch: look for NaN or infinity in the data and the "
    "parameters, or leave out batches of which every target is ignored"
)

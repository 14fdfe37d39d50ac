"""A part of each batch, another one in each call, so that all samples are looked at alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowland._batches import Batch, join, part_of, rows
from lowland._weights import Weights
from lowland.criteria import is_known, is_sum, mass
from lowland.objective import Objective
from lowland.validation import is_number


class Part(NamedTuple):
    """A part of a batch: how large it is, and by what its loss is multiplied for all of it."""

    share: float = 1.0
    scale: float | Tensor = 1.0


WHOLE = Part()

_ADVICE = "leave samples= out, or give a batch whose loss is a mean or a sum over its samples"


def check_samples(samples: object) -> None:
    """Refuse what says no number of samples.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is neither a whole number of at least 1 nor a share between 0 and 1.
    """
    if samples is None:
        return
    if isinstance(samples, bool) or not is_number(samples):
        raise TypeError(f"samples must be a number of samples or a share; got {samples!r}")
    if not (samples >= 1 and samples == int(samples)) and not 0 < samples < 1:
        raise ValueError(
            "samples must be a whole number of samples in a batch, at least 1, or a share of them "
            f"between 0 and 1; got {samples!r}"
        )


class Window:
    """Where in the batches the next part begins.

    Attributes:
        start: Its first sample.
        is_sum: Whether the loss of a batch is the sum of its samples'; None until that is known.
    """

    def __init__(self) -> None:
        self.start = 0
        self.is_sum: bool | None = None

    def next(
        self, target: Objective, samples: float, multiple: int = 1
    ) -> tuple[Objective, Part] | None:
        """The loss on the next part of a batch, and which part that is.

        Args:
            target: The loss on the whole batch.
            samples: How many, or which share.
            multiple: Of how many samples the part is to consist of a multiple.

        Returns:
            None where every target of the part is ignored, so that it adds nothing.

        Raises:
            TypeError: If the samples of the batch cannot be counted or taken apart.
            ValueError: If the loss is neither a mean nor a sum over samples.
        """
        x, y = target.batch
        try:
            count = rows(x, y)
        except TypeError as error:
            raise TypeError(
                f"samples= takes a part of each batch, and {error}; {_ADVICE}"
            ) from error
        # A share is of two samples at least: of one there are no statistics.
        wanted = max(2, round(samples * count)) if samples < 1 else int(samples)
        wanted = min(count, -(-wanted // multiple) * multiple)
        if wanted == count:
            return target, WHOLE
        start = self.start % count
        self.start = (start + wanted) % count
        part = _rows((x, y), count, start, wanted)
        if self.is_sum is None:
            rest = _rows((x, y), count, (start + wanted) % count, count - wanted)
            self.is_sum = _is_sum(target, part, rest)
        share = wanted / count
        if self.is_sum:
            return target.on(part), Part(share, 1 / share)
        scale = _mass_of(target, part, (x, y)) / share
        if isinstance(scale, float) and not scale:
            return None
        return target.on(part), Part(share, scale)


def _rows(batch: Batch, count: int, start: int, wanted: int) -> Batch:
    """So many samples from one on, and from the first one again after the last."""

    def some(value: Any) -> Any:
        stop = start + wanted
        found = part_of(value, count, start, min(stop, count))
        return found if stop <= count else join(found, part_of(value, count, 0, stop - count))

    x, y = batch
    part = some(x)
    return part, part if y is x else some(y)  # one that holds both stays one


def _mass_of(target: Objective, part: Batch, whole: Batch) -> float | Tensor:
    """What the mean over a part divides by, relative to that over the whole batch.

    With class weights, or ignored targets, that is not how many samples it has.
    """
    one, all_ = part[1], whole[1]
    if not (is_known(target.criterion) and isinstance(one, Tensor) and isinstance(all_, Tensor)):
        return rows(*part) / rows(*whole)
    ratio = mass(target.criterion, one) / mass(target.criterion, all_)
    if isinstance(ratio, Tensor) and ratio.device.type == "cpu":
        return float(ratio)
    return ratio


def _is_sum(target: Objective, *parts: Batch) -> bool:
    """Whether the loss of a batch is the sum of those of its parts, rather than their mean.

    Raises:
        ValueError: If it is neither, or cannot be measured.
    """
    if is_known(target.criterion):
        return is_sum(target.criterion)
    weights = Weights(target)
    try:
        # In evaluation mode, where samples of a batch do not see each other.
        with torch.no_grad(), evaluating(target.model):
            for x, y in parts:
                weights(x, y)
    except ValueError as error:
        raise ValueError(
            "samples= takes a part of each batch, for which the loss must be a mean or a sum over "
            f"samples, and that could not be seen: {error.__cause__ or error}; leave samples= out"
        ) from error
    return weights.is_sum


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, each part of which goes back to the mode that it was in."""
    trained = [module for module in model.modules() if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True

"""The points of each task: trained on, tested on, in one order for all networks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowland.studies.data.sources import Source, parts
from lowland.studies.ensembles.networks import Weights, initial_weights
from lowland.studies.illusion.preset import Regime, Task
from lowland.studies.runs.presets import PresetError
from lowland.studies.runs.streams import stream

# Streams of random numbers, so that what one draws changes nothing in another.
_ORDER, BATCHES, JOINT = range(3)


@dataclass(frozen=True)
class Points:
    """What networks are trained and tested on: pixels from 0 to 1 in float32, labels in int64.

    Attributes:
        x_train, y_train: The training points, shared by all networks: a leading dimension of 1.
        x_test, y_test: The same of the test points.
        classes: ``K``.
    """

    x_train: Float[Tensor, "1 train inputs"]
    y_train: Int[Tensor, "1 train"]
    x_test: Float[Tensor, "1 test inputs"]
    y_test: Int[Tensor, "1 test"]
    classes: int

    def double(self) -> Points:
        """These points in double precision."""
        return replace(self, x_train=self.x_train.double(), x_test=self.x_test.double())


def points(task: Task, size: int, source: Source) -> Points:
    """The first ``size`` training points of a task, and all of its test points.

    Where the data has no test part, the last samples of the order are tested on.

    Raises:
        PresetError: If there are fewer samples than that, or only two classes.
        DataError: If the data cannot be had.
    """
    train, test = parts(task.data, source)
    if len(train.classes) < 3:
        raise PresetError(
            f"task {task.name!r}: {train.name} has two classes; expected data of three or more"
        )
    order = torch.randperm(len(train.y), generator=stream(task.data_seed, _ORDER))
    left = len(order) - task.test
    if size > left:
        raise PresetError(
            f"task {task.name!r}: {train.name} has {len(order):,} samples, too few to train on "
            f"{size:,} and test on {task.test:,} others; set smaller sizes or a smaller test"
        )
    unit = train.x.max()
    held = train if test is None else test
    chosen = order[left:] if test is None else torch.arange(len(test.y))
    return Points(
        (train.x[order[:size]] / unit).float()[None],
        train.y[order[:size]][None],
        (held.x[chosen] / unit).float()[None],
        held.y[chosen][None],
        len(train.classes),
    )


def title(task: Task, source: Source) -> str:
    """The data, for people."""
    return parts(task.data, source)[0].name


def start(task: Task, regime: Regime, data: Points, first: int, stop: int) -> Weights:
    """Networks ``first`` to ``stop - 1`` of a regime where they start, as PyTorch's layers do."""
    sizes = [data.x_train.shape[2], *task.hidden, data.classes]
    seeds = range(regime.first + first, regime.first + stop)
    return tuple(layer.float() for layer in initial_weights(seeds, sizes))

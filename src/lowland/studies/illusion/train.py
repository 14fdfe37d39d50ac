"""Stochastic gradient descent of a whole ensemble, each network on batches of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowland.studies.ensembles.networks import (
    Inputs,
    Targets,
    Weights,
    logits,
    one_by_one,
    pick,
    select,
)

ACTIVATION, LOSS = "relu", "ce"
"""Of all networks of the study."""


@dataclass(frozen=True)
class Descent:
    """How networks are trained.

    Attributes:
        batch: Samples in a step; the last batch of an epoch is what is left.
        learning_rate: Of plain stochastic gradient descent.
        epochs: Most passes through the training points.
        every: Epochs between two looks at the training accuracy.
        enough: A network stops when its training accuracy is at least this.
        drop: Fraction of the epochs after which the rate falls tenfold; 1 for never.
    """

    batch: int
    learning_rate: float
    epochs: int
    every: int
    enough: float
    drop: float = 1.0


@dataclass(frozen=True)
class Ensemble:
    """Networks after training.

    Attributes:
        weights: Of each.
        epochs: Passes that each took.
        accuracy: On its training points.
    """

    weights: Weights
    epochs: Int[Tensor, " networks"]
    accuracy: Float[Tensor, " networks"]


def descend(
    start: Weights, x: Inputs, y: Targets, how: Descent, generators: Sequence[torch.Generator]
) -> Ensemble:
    """Train an ensemble; networks that have learnt their points leave it.

    Args:
        start: Where each network starts.
        x: ``(networks, samples, inputs)``; a leading dimension of 1 is shared by all.
        y: ``(networks, samples)``, labels; the same.
        how: Batches, rate and end.
        generators: Each network's own, for the order of its samples.
    """
    count = x.shape[1]
    weights = [layer.clone() for layer in start]
    running = torch.arange(len(weights[0]))
    epochs = torch.zeros_like(running)
    reached = torch.zeros(len(running), dtype=torch.float64)
    moving, own_x, own_y = select(start, running), x, y
    for epoch in range(how.epochs):
        rate = how.learning_rate * (0.1 if epoch >= how.drop * how.epochs else 1.0)
        order = torch.stack(
            [torch.randperm(count, generator=generators[index]) for index in running.tolist()]
        )
        for chosen in order.split(how.batch, dim=1):
            # A batch of all samples needs no order.
            data = (own_x, own_y) if chosen.shape[1] == count else _batch(own_x, own_y, chosen)
            _step(moving, *data, rate)
        if (epoch + 1) % how.every and epoch + 1 < how.epochs:
            continue
        learnt = accuracy(moving, own_x, own_y)
        for whole, layer in zip(weights, moving, strict=True):
            whole[running] = layer
        epochs[running], reached[running] = epoch + 1, learnt
        going = learnt < how.enough
        if not bool(going.all()):
            running, moving = running[going], select(moving, going)
            own_x, own_y = pick(x, running), pick(y, running)
        if not len(running):
            break
    return Ensemble(tuple(weights), epochs, reached)


def accuracy(weights: Weights, x: Inputs, y: Targets) -> Float[Tensor, " networks"]:
    """The share of samples that each network classifies right."""
    return (predictions(weights, x) == y).double().mean(1)


def predictions(weights: Weights, x: Inputs) -> Int[Tensor, "networks samples"]:
    """Each network's class of each sample."""
    with torch.no_grad():
        each = [
            logits(network, own, ACTIVATION).argmax(2)
            for network, own, _ in one_by_one(weights, x, x)
        ]
        return torch.cat(each)


def _step(
    weights: Weights,
    x: Float[Tensor, "#networks batch inputs"],
    y: Int[Tensor, "#networks batch"],
    rate: float,
) -> None:
    """One step down the mean cross-entropy of a batch, in place.

    By hand, since autograd would fill and add several tensors of the size of all weights.
    """
    values = [x.expand(len(weights[0]), -1, -1)]
    for layer in weights[:-1]:
        values.append(torch.baddbmm(layer[:, :1], values[-1], layer[:, 1:]).relu_())
    scores = torch.baddbmm(weights[-1][:, :1], values[-1], weights[-1][:, 1:])
    slope = scores.softmax(2)
    own = y.expand(len(slope), -1)[..., None]
    slope.scatter_add_(2, own, slope.new_full((), -1.0).expand(own.shape))
    slope /= x.shape[1]
    for depth in reversed(range(len(weights))):
        layer, below = weights[depth], values[depth]
        passed = slope @ layer[:, 1:].mT * (below > 0) if depth else slope
        layer[:, 1:].baddbmm_(below.mT, slope, alpha=-rate)
        layer[:, 0].sub_(slope.sum(1), alpha=rate)
        slope = passed


def _batch(
    x: Float[Tensor, "#networks samples inputs"],
    y: Int[Tensor, "#networks samples"],
    chosen: Int[Tensor, "networks batch"],
) -> tuple[Float[Tensor, "networks batch inputs"], Int[Tensor, "networks batch"]]:
    """Some samples of each network, in its own order."""
    if len(x) == 1:
        return x[0, chosen], y[0, chosen]
    row = torch.arange(len(x))[:, None]
    return x[row, chosen], y[row, chosen]

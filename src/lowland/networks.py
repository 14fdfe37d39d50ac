"""Ensembles of three-layer networks as plain tensors: how they start, and what they compute."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lowland.activations import get_activation
from lowland.losses import get_loss

Weights = tuple[Float[Tensor, "networks inputs1 hidden"], Float[Tensor, "networks hidden1 1"]]
SomeWeights = tuple[Float[Tensor, "some inputs1 hidden"], Float[Tensor, "some hidden1 1"]]
# A leading dimension of 1 is shared by all networks.
Inputs = Float[Tensor, "#networks samples inputs"]
Targets = Float[Tensor, "#networks samples"]
Samples = Float[Tensor, "networks samples"]
PerNetwork = Float[Tensor, " networks"]


def initial_weights(seeds: range, *, inputs: int, hidden: int) -> Weights:
    """Starting points, one per seed, distributed as those of :class:`torch.nn.Linear`.

    Each seed has a random generator of its own, so a network starts at the same point whatever
    else is in the ensemble.

    Args:
        seeds: One seed per network.
        inputs: Number of features.
        hidden: Number of hidden units.

    Returns:
        ``(W, v)`` in float64, of shapes ``(networks, inputs + 1, hidden)`` and
        ``(networks, hidden + 1, 1)``, biases in row 0.
    """

    def layer(generator: torch.Generator, rows: int, columns: int) -> Tensor:
        unit = torch.rand(rows + 1, columns, generator=generator, dtype=torch.float64)
        return (2 * unit - 1) / math.sqrt(rows)

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return (
        torch.stack([layer(generator, inputs, hidden) for generator in generators]),
        torch.stack([layer(generator, hidden, 1) for generator in generators]),
    )


def logits(weights: Weights, x: Inputs, activation: str) -> Samples:
    """The logit ``s`` of each sample."""
    first, second = weights
    x = x.expand(len(first), -1, -1)
    hidden = get_activation(activation)(torch.baddbmm(first[:, :1], x, first[:, 1:]))[0]
    return torch.baddbmm(second[:, :1], hidden, second[:, 1:]).squeeze(2)


def mean_loss(weights: Weights, x: Inputs, y: Targets, *, activation: str, loss: str) -> PerNetwork:
    """The loss ``L`` of each network, a mean over its samples."""
    s = logits(weights, x, activation)
    return get_loss(loss).value(s, y.expand_as(s)).mean(1)


def select(weights: Weights, networks: Tensor | slice) -> SomeWeights:
    """The weights of some of the networks."""
    return weights[0][networks], weights[1][networks]


def pick(data: Tensor, networks: Tensor | slice) -> Tensor:
    """The data of some of the networks, or what all of them share."""
    return data if len(data) == 1 else data[networks]


def one_by_one(
    weights: Weights, x: Inputs, y: Targets
) -> Iterator[tuple[SomeWeights, Inputs, Targets]]:
    """Each network of an ensemble by itself, as an ensemble of one.

    PyTorch's products over a whole ensemble are not the same to the last bit for another number of
    networks, or at another place in memory. What must not depend on a network's company is computed
    one by one, from copies.
    """
    for index in range(len(weights[0])):
        one = slice(index, index + 1)
        first, second = select(weights, one)
        yield (first.clone(), second.clone()), pick(x, one).clone(), pick(y, one).clone()

"""Ensembles of three-layer networks as plain tensors: how they start, and what they compute."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import grad

from lowland.activations import get_activation
from lowland.losses import get_loss

Weights = tuple[Float[Tensor, "networks inputs1 hidden"], Float[Tensor, "networks hidden1 1"]]
SomeWeights = tuple[Float[Tensor, "some inputs1 hidden"], Float[Tensor, "some hidden1 1"]]
Inputs = Float[Tensor, "networks samples inputs"]
Targets = Float[Tensor, "networks samples"]
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
    hidden = get_activation(activation)(torch.baddbmm(first[:, :1], x, first[:, 1:]))[0]
    return torch.baddbmm(second[:, :1], hidden, second[:, 1:]).squeeze(2)


def mean_loss(weights: Weights, x: Inputs, y: Targets, *, activation: str, loss: str) -> PerNetwork:
    """The loss ``L`` of each network, a mean over its samples."""
    return get_loss(loss).value(logits(weights, x, activation), y).mean(1)


def loss_gradient(
    weights: Weights, x: Inputs, y: Targets, *, activation: str, loss: str
) -> Weights:
    """The gradient of each network's own loss in its own weights."""
    leaves = (weights[0].detach().requires_grad_(), weights[1].detach().requires_grad_())
    # Networks do not touch each other, so the gradient of the sum holds one gradient per network.
    first, second = grad(mean_loss(leaves, x, y, activation=activation, loss=loss).sum(), leaves)
    return first, second


def select(weights: Weights, networks: Tensor | slice) -> SomeWeights:
    """The weights of some of the networks."""
    return weights[0][networks], weights[1][networks]

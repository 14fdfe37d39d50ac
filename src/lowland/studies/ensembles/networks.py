"""Ensembles of fully connected networks as plain tensors: how they start, and what they compute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from lowland.activations import get_activation
from lowland.losses import get_loss

# One tensor a layer, of inputs + 1 rows and as many columns as outputs, biases in row 0; one
# activation after each but the last.
Weights = tuple[Float[Tensor, "networks _ _"], ...]
SomeWeights = tuple[Float[Tensor, "some _ _"], ...]
# A leading dimension of 1 is shared by all networks.
Inputs = Float[Tensor, "#networks samples inputs"]
# One number or label a sample, or one number an output.
Targets = Num[Tensor, "#networks samples *outputs"]
PerNetwork = Float[Tensor, " networks"]


def initial_weights(seeds: range, sizes: Sequence[int]) -> Weights:
    """Starting points, one per seed, distributed as those of :class:`torch.nn.Linear`.

    Each seed has a random generator of its own, so a network starts at the same point whatever
    else is in the ensemble.

    Args:
        seeds: One seed per network.
        sizes: Units of each layer, from the inputs to the outputs.

    Returns:
        One tensor in float64 for each two neighbours in ``sizes``, of shape
        ``(networks, inputs + 1, outputs)``, biases in row 0.
    """

    def layer(generator: torch.Generator, rows: int, columns: int) -> Tensor:
        unit = torch.rand(rows + 1, columns, generator=generator, dtype=torch.float64)
        return (2 * unit - 1) / math.sqrt(rows)

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return tuple(
        torch.stack([layer(generator, rows, columns) for generator in generators])
        for rows, columns in pairwise(sizes)
    )


def parameter_count(sizes: Sequence[int]) -> int:
    """``P``, the number of weights and biases of a network with layers of these sizes."""
    return sum((rows + 1) * columns for rows, columns in pairwise(sizes))


def logits(
    weights: Weights, x: Inputs, activation: str
) -> Float[Tensor, "networks samples outputs"]:
    """What each network computes for each sample, ``(networks, samples, outputs)``."""
    *hidden, last = weights
    values = x.expand(len(last), -1, -1)
    for layer in hidden:
        values = get_activation(activation)(_affine(layer, values))[0]
    return _affine(last, values)


def _affine(layer: Tensor, values: Tensor) -> Tensor:
    return torch.baddbmm(layer[:, :1], values, layer[:, 1:])


def mean_loss(weights: Weights, x: Inputs, y: Targets, *, activation: str, loss: str) -> PerNetwork:
    """The loss ``L`` of each network, a mean as PyTorch takes it.

    Args:
        weights: The networks.
        x: ``(networks, samples, inputs)``.
        y: ``(networks, samples)``: labels of classes, or targets of a single logit; or one target a
            logit, ``(networks, samples, outputs)``.
        activation: Of the hidden layers.
        loss: ``"bce"``, ``"ce"`` or ``"mse"``.
    """
    return mean_loss_of(logits(weights, x, activation), y, loss)


def mean_loss_of(s: Float[Tensor, "networks samples outputs"], y: Targets, loss: str) -> PerNetwork:
    """:func:`mean_loss` of networks that have computed the logits ``s``."""
    if y.ndim == 2 and s.shape[2] == 1:
        s = s.squeeze(2)
    y = y.expand(len(s), *y.shape[1:])
    return get_loss(loss).value(s, y).flatten(1).mean(1)


def select(weights: Weights, networks: Tensor | slice) -> SomeWeights:
    """The weights of some of the networks."""
    return tuple(layer[networks] for layer in weights)


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
        own = tuple(layer.clone() for layer in select(weights, one))
        yield own, pick(x, one).clone(), pick(y, one).clone()


def as_module(network: SomeWeights, activation: type[nn.Module]) -> nn.Sequential:
    """One network of an ensemble, as layers of PyTorch's."""
    modules: list[nn.Module] = []
    for (weights,) in network:
        layer = nn.Linear(len(weights) - 1, weights.shape[1], dtype=weights.dtype)
        with torch.no_grad():
            layer.weight.copy_(weights[1:].T)
            layer.bias.copy_(weights[0])
        modules += [layer, activation()]
    return nn.Sequential(*modules[:-1])


def as_weights(model: nn.Sequential) -> SomeWeights:
    """The other way round: an ensemble of one."""
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    return tuple(
        torch.cat([layer.bias.detach()[None], layer.weight.detach().T])[None] for layer in layers
    )

"""Networks of an ensemble as anyone would write them in PyTorch."""

from itertools import pairwise

import torch
from torch import nn


def module(weights, index, activation=nn.Tanh):
    """Linear layers with an activation after each but the last."""
    layers = []
    for part in (layer[index] for layer in weights):
        linear = nn.Linear(part.shape[0] - 1, part.shape[1], dtype=torch.float64)
        with torch.no_grad():
            linear.bias.copy_(part[0])
            linear.weight.copy_(part[1:].T)
        layers += [activation(), linear]
    return nn.Sequential(*layers[1:])


def weights_of(model):
    """Of each linear layer, biases in row 0."""
    return tuple(
        torch.cat([layer.bias[None], layer.weight.T]).detach()
        for layer in model
        if isinstance(layer, nn.Linear)
    )


def loss_of(output, y, loss):
    """The mean loss of a module's ``(samples, outputs)``."""
    if loss == "ce":
        return nn.functional.cross_entropy(output, y)
    return nn.functional.binary_cross_entropy_with_logits(output, y.view_as(output))


def problem(sizes, loss, *, networks=3, samples=12, seed=0):
    """Weights, and data of each network's own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = tuple(
        normal(networks, rows + 1, columns) / rows**0.5 for rows, columns in pairwise(sizes)
    )
    scores = normal(networks, samples, sizes[-1])
    if loss == "ce":
        y = scores.argmax(2)
    else:
        y = (scores > 0).double()
        y = y.squeeze(2) if sizes[-1] == 1 else y
    return weights, normal(networks, samples, sizes[0]), y

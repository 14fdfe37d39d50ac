"""What is measured of trained networks: sharpness, norms, patterns, and what they get right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

import lowland
from lowland import exact
from lowland.studies.ensembles.networks import (
    SomeWeights,
    Weights,
    as_module,
    as_weights,
    one_by_one,
)
from lowland.studies.illusion.tasks import Points
from lowland.studies.illusion.train import ACTIVATION, LOSS, predictions
from lowland.studies.runs.jobs import Tensors
from lowland.weakness import count_patterns, free_parameters, free_regions, weight_norm


def evaluate(weights: Weights, data: Points, *, bound: bool) -> Tensors:
    """Everything but pair proxies, one value a network.

    Args:
        weights: The networks.
        data: What they were trained and are tested on.
        bound: Whether the bound on the largest eigenvalue is wanted, which needs Tr H^2 too.
    """
    rows = [
        _of_one(network, x, y, data, bound=bound)
        for network, x, y in one_by_one(weights, data.x_train, data.y_train)
    ]
    found = predictions(weights, data.x_test)
    return {
        **columns(rows),
        "accuracy": (found == data.y_test).double().mean(1),
        "predictions": found.to(torch.uint8),
    }


def columns(rows: Sequence[Mapping[str, float]]) -> Tensors:
    """One tensor a measure, of what was found of each network."""
    names = rows[0]
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in names}


def _of_one(
    network: SomeWeights, x: Tensor, y: Tensor, data: Points, *, bound: bool
) -> dict[str, float]:
    values = {}
    if bound:
        moments = exact.moments(network, x, y, activation=ACTIVATION, loss=LOSS)
        values["trace"], values["bound"] = moments.trace.item(), moments.upper.item()
    else:
        values["trace"] = exact.trace(network, x, y, activation=ACTIVATION, loss=LOSS).item()
    train, unseen = hidden(network, x[0]), hidden(network, data.x_test[0])
    for place, layer in enumerate(unseen, start=1):
        values[f"patterns_{place}"] = count_patterns(layer)
    return values | {
        "l2_norm": weight_norm(network),
        "l1_norm": weight_norm(network, 1),
        "free_regions": free_regions(train[-1], unseen[-1]),
        "free_parameters": free_parameters(train[-1], data.classes),
    }


def hidden(network: SomeWeights, x: Float[Tensor, "points inputs"]) -> list[Tensor]:
    """The outputs of each hidden layer of one network."""
    layers = []
    for layer in network[:-1]:
        x = torch.addmm(layer[0, :1], x, layer[0, 1:]).relu()
        layers.append(x)
    return layers


def rescaled(network: SomeWeights, data: Points, layer: int, factor: float) -> dict[str, float]:
    """Trace, accuracy and patterns of a network of which one hidden layer has been rescaled.

    Args:
        network: One network, in double precision.
        data: In double precision as well.
        layer: Which hidden layer, from 0.
        factor: Its weights and biases are multiplied by it, the next layer's weights divided.
    """
    model = lowland.rescale(as_module(network, nn.ReLU), layer, factor)
    other = as_weights(model)
    found = predictions(other, data.x_test)
    return {
        "trace": exact.trace(
            other, data.x_train, data.y_train, activation=ACTIVATION, loss=LOSS
        ).item(),
        "accuracy": (found == data.y_test).double().mean().item(),
        "changed": (found != predictions(network, data.x_test)).sum().item(),
        **{
            f"patterns_{place}": count_patterns(values)
            for place, values in enumerate(hidden(other, data.x_test[0]), start=1)
        },
    }

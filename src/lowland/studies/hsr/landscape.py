"""The training loss around a network, along a line."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lowland.studies.ensembles.networks import mean_loss
from lowland.studies.hsr.preset import Preset
from lowland.studies.hsr.search import ACTIVATION, LOSS
from lowland.studies.hsr.task import samples, unflatten

REACH = 1.0
"""How far the loss is followed along an eigenvector, which has length 1."""


def rise(
    preset: Preset,
    parameters: Float[Tensor, "networks parameters"],
    directions: Float[Tensor, "networks parameters"],
    distances: Sequence[float],
) -> Float[Tensor, "distances networks"]:
    """How much the training loss rises from each network at some distances along its direction."""
    x, y = samples(preset, preset.train_size)

    def value(moved: Tensor) -> Tensor:
        return mean_loss(unflatten(preset, moved), x, y, activation=ACTIVATION, loss=LOSS)

    base = value(parameters)
    return torch.stack([value(parameters + float(d) * directions) - base for d in distances])

"""Where a network draws the line between the classes, and how long that line is."""

from __future__ import annotations

import contourpy
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from lowland.studies.ensembles.networks import logits
from lowland.studies.hsr.preset import Preset
from lowland.studies.hsr.search import ACTIVATION
from lowland.studies.hsr.task import samples, unflatten

Array = NDArray[np.float64]


def window(preset: Preset, points: int) -> Float[Tensor, " points"]:
    """Either axis of the square around the training samples, all but the outermost."""
    x, _ = samples(preset, preset.train_size)
    half = float(x.abs().quantile(0.999))
    return torch.linspace(-half, half, points, dtype=torch.float64)


def chances(
    preset: Preset,
    parameters: Float[Tensor, "networks parameters"],
    axis: Float[Tensor, " points"],
) -> Float[Tensor, "networks points points"]:
    """The probability of class 1 over the plane: first along ``x_1``, then along ``x_2``."""
    grid = torch.cartesian_prod(axis, axis)[None]
    chance = torch.sigmoid(logits(unflatten(preset, parameters), grid, ACTIVATION).squeeze(2))
    whole: Tensor = chance.unflatten(1, (len(axis), -1))
    return whole


def boundary_length(
    preset: Preset, parameters: Float[Tensor, "networks parameters"], points: int = 121
) -> Array:
    """The length of each network's decision boundary within the window.

    In units of the window's diagonal, the length of the best boundary. Bends, and islands of one
    class within the other, make it longer.
    """
    axis = window(preset, points)
    lengths = []
    for values in chances(preset, parameters, axis).numpy():
        lines = contourpy.contour_generator(axis.numpy(), axis.numpy(), values.T).lines(0.5)
        pieces = [np.linalg.norm(np.diff(np.asarray(line), axis=0), axis=1).sum() for line in lines]
        lengths.append(float(sum(pieces)))
    return np.array(lengths) / float((axis[-1] - axis[0]) * 2**0.5)

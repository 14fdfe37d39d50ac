"""The task of the study: two Gaussians in the plane."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lowland.studies.ensembles.networks import Inputs, Targets, Weights
from lowland.studies.hsr.preset import Preset


def samples(preset: Preset, count: int, *, test: bool = False) -> tuple[Inputs, Targets]:
    """Samples in equal parts from both classes, as ``(1, count, 2)`` and ``(1, count)``."""
    generator = torch.Generator().manual_seed(2 * preset.data_seed + test)
    y = (torch.arange(count) % 2).to(torch.float64)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    x = preset.variance**0.5 * noise + preset.mean * (2 * y - 1)[:, None]
    return x[None], y[None]


def start(preset: Preset, seeds: list[int]) -> Weights:
    """Where each seed's network starts: uniform weights from a generator of its own."""

    def layer(generator: torch.Generator, rows: int, columns: int) -> Tensor:
        unit = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
        return (2 * unit - 1) * preset.initial_range

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return (
        torch.stack([layer(generator, 3, preset.hidden) for generator in generators]),
        torch.stack([layer(generator, preset.hidden + 1, 1) for generator in generators]),
    )


def flatten(weights: Weights) -> Float[Tensor, "networks parameters"]:
    """Each network's parameter vector: ``W`` row by row, then ``v``."""
    return torch.cat([part.flatten(1) for part in weights], 1)


def unflatten(preset: Preset, parameters: Float[Tensor, "networks parameters"]) -> Weights:
    """Networks from their parameter vectors."""
    split = 3 * preset.hidden
    return parameters[:, :split].unflatten(1, (3, -1)), parameters[:, split:].unsqueeze(2)

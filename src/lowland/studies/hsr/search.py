"""Critical points: plain gradient descent from many seeds, and which of them are sharp or flat.

Source: arXiv:2606.28662, section VI-A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lowland.studies.ensembles.training import BASELINE, Schedule, train
from lowland.studies.hsr.preset import Preset
from lowland.studies.hsr.task import flatten, samples, start
from lowland.studies.runs.jobs import Tensors
from lowland.studies.runs.presets import PresetError
from lowland.threads import threads

ACTIVATION = "sigmoid"
LOSS = "bce"


def search(preset: Preset, first: int, stop: int) -> Tensors:
    """Descend from the seeds ``first`` to ``stop - 1``; one piece of the search."""
    seeds = list(range(first, stop))
    x, y = samples(preset, preset.train_size)
    schedule = Schedule(preset.steps, preset.learning_rate, 0.0, preset.tolerance, checkpoints=2)
    with threads(1):  # so that no number depends on the machine's cores
        (trained,) = train(
            [BASELINE],
            start(preset, seeds),
            x,
            y,
            schedule=schedule,
            activation=ACTIVATION,
            loss=LOSS,
        )
    return {
        "seed": torch.tensor(seeds),
        "parameters": flatten(trained.weights),
        "converged": trained.converged,
        "steps": trained.steps,
        **{name: curve[-1] for name, curve in trained.curves.items()},
    }


@dataclass(frozen=True)
class Selection:
    """Which networks of a search are what; all index into its seeds.

    Attributes:
        converged: Those that met the stopping rule.
        threshold: Distance below which two of them are duplicates.
        distinct: One of each set of duplicates, the one with the smallest seed.
        low, high: The bound below which a distinct point is flat, and above which it is sharp.
        flat, sharp: The distinct points so called.
    """

    converged: Int[Tensor, " converged"]
    threshold: float
    distinct: Int[Tensor, " distinct"]
    low: float
    high: float
    flat: Int[Tensor, " flat"]
    sharp: Int[Tensor, " sharp"]


_NONE = torch.tensor([], dtype=torch.int64)
NOTHING = Selection(_NONE, 0.0, _NONE, 0.0, 0.0, _NONE, _NONE)
"""Of a search that was not run."""


def select(preset: Preset, found: Tensors) -> Selection:
    """Drop what did not converge and what is there twice; take the ends by the bound.

    Raises:
        PresetError: If no network converged.
    """
    converged = found["converged"].nonzero().flatten()
    if not len(converged):
        raise PresetError(
            f"no network converged within {preset.steps} steps; set more steps, a larger "
            "learning_rate or a larger tolerance in the preset"
        )
    keep, threshold = distinct_points(found["parameters"][converged], preset.distinct)
    distinct = converged[keep]
    bound = found["upper_bound"][distinct]
    sharp = sharpest(bound, preset.share)
    flat = bound.argsort(stable=True)[: len(sharp)]
    return Selection(
        converged,
        threshold,
        distinct,
        float(bound[flat].max()),
        float(bound[sharp].min()),
        distinct[flat],
        distinct[sharp],
    )


def sharpest(bound: Float[Tensor, " networks"], share: float) -> Int[Tensor, " sharp"]:
    """The networks with the largest bounds, at least one, from the least of them to the most."""
    count = max(1, round(share * len(bound)))
    return bound.argsort(stable=True)[-count:]


def distinct_points(
    points: Float[Tensor, "points parameters"], multiple: float
) -> tuple[Bool[Tensor, " points"], float]:
    """One of each set of points closer than ``mu - multiple * sigma`` of all pairwise distances.

    Points are taken in their order; each stays unless one that stays is too close.
    """
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    row, column = torch.triu_indices(len(points), len(points), offset=1)
    pairs = distance[row, column]
    threshold = float(pairs.mean() - multiple * pairs.std()) if len(pairs) > 1 else 0.0
    close = distance < threshold
    keep = torch.zeros(len(points), dtype=torch.bool)
    for index in range(len(points)):
        keep[index] = not bool((close[index] & keep).any())
    return keep, threshold

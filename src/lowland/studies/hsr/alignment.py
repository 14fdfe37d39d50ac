"""Where closed-form directions point, beside the direction in which ``lambda_max`` falls fastest.

Ours, not the paper's, which takes the gradient of the bound for want of that of ``lambda_max``. By
how much a short step along a direction lowers ``lambda_max``, as a fraction of the most that a step
of this length can, is the cosine between the two.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lowland import exact
from lowland.exact.api import prepare
from lowland.studies.ensembles.networks import PerNetwork, Weights
from lowland.studies.ensembles.training import (
    BASELINE,
    Schedule,
    hsr_gradient,
    lambda_max_gradient,
    trace_gradient,
    train,
)
from lowland.studies.hsr.preset import Preset
from lowland.studies.hsr.search import ACTIVATION, LOSS
from lowland.studies.hsr.task import flatten, samples, start, unflatten
from lowland.studies.runs.jobs import Tensors
from lowland.threads import threads

STEPS = (0, 1, 3, 10, 30, 100, 300, 1000)
"""Of plain descent, after which directions are compared; as far as the study goes."""

RANDOM = 10  # parameter vectors for each of the preset's draws, as in figure 6


def alignment(preset: Preset, critical: Float[Tensor, "points parameters"]) -> Tensors:
    """Figure 17: cosines with the steepest descent of ``lambda_max``, ours.

    Args:
        preset: The settings.
        critical: The distinct critical points.

    Returns:
        The cosines of ``bound`` and ``trace`` and the ``gap``, each as ``random_*``, ``(draws,)``,
        ``critical_*``, ``(points,)``, and ``training_*``, ``(steps, networks)`` after each of
        ``steps``.
    """
    with threads(1):
        random = _compared(preset, start(preset, list(range(RANDOM * preset.draws))))
        steps, found = zip(*_along_descent(preset), strict=True)
        training = {name: torch.stack([each[name] for each in found]) for name in found[0]}
        places = {
            "random": random,
            "training": training,
            "critical": _compared(preset, unflatten(preset, critical)),
        }
    return {
        "steps": torch.tensor(steps),
        **{f"{place}_{name}": v for place, part in places.items() for name, v in part.items()},
    }


def _along_descent(preset: Preset) -> Iterator[tuple[int, Tensors]]:
    """What there is after so many steps of plain descent from the seeds of the first draws."""
    x, y = samples(preset, preset.train_size)
    weights, done = start(preset, list(range(preset.draws))), 0
    for step in STEPS:
        if step > preset.steps:
            return
        if step > done:
            # Without a tolerance: all go on, and converged ones hardly move.
            schedule = Schedule(step - done, preset.learning_rate, 0.0, 0.0, checkpoints=2)
            (trained,) = train(
                [BASELINE], weights, x, y, schedule=schedule, activation=ACTIVATION, loss=LOSS
            )
            weights, done = trained.weights, step
        yield step, _compared(preset, weights)


def _compared(preset: Preset, weights: Weights) -> Tensors:
    """``bound`` and ``trace``: cosines with the gradient of ``lambda_max``; ``gap``.

    The gap is the ratio of the two largest eigenvalues, infinite where only one is positive.
    """
    x, y = samples(preset, preset.train_size)
    setup = prepare(weights, x, y, ACTIVATION, LOSS, "mean")
    steepest = flatten(lambda_max_gradient(setup))
    first, second = (
        torch.linalg.eigvalsh(exact.hessian(weights, x, y, activation=ACTIVATION, loss=LOSS))
        .flip(1)[:, :2]
        .unbind(1)
    )
    return {
        "bound": _cosine(flatten(hsr_gradient(setup)), steepest),
        "trace": _cosine(flatten(trace_gradient(setup)), steepest),
        "gap": torch.where(second > 0, first / second, torch.inf),
    }


def _cosine(left: Tensor, right: Tensor) -> PerNetwork:
    """Row by row; NaN where a gradient vanishes, which has no direction."""
    cosine: Tensor = (left * right).sum(1) / (left.norm(dim=1) * right.norm(dim=1))
    return cosine

"""Control of the spectrum: training again from sharp and flat seeds, by each method.

Source: arXiv:2606.28662, section VI-B; and beside its methods one of ours.
"""

from __future__ import annotations

import torch

from lowland import exact
from lowland.studies.ensembles.networks import one_by_one
from lowland.studies.ensembles.training import train
from lowland.studies.hsr.performance import macro_f1
from lowland.studies.hsr.preset import Preset
from lowland.studies.hsr.search import ACTIVATION, LOSS
from lowland.studies.hsr.task import flatten, samples, start
from lowland.studies.runs.jobs import Tensors
from lowland.threads import threads


def control(preset: Preset, method: str, seeds: list[int]) -> Tensors:
    """Train the networks of some seeds by one method; one piece of the control experiment."""
    x, y = samples(preset, preset.train_size)
    with threads(1):
        (trained,) = train(
            [(preset.methods | preset.ours)[method]],
            start(preset, seeds),
            x,
            y,
            schedule=preset.schedule,
            activation=ACTIVATION,
            loss=LOSS,
        )
        values, vectors = [], []
        for weights, *data in one_by_one(trained.weights, x, y):
            matrix = exact.hessian(weights, *data, activation=ACTIVATION, loss=LOSS)
            value, vector = torch.linalg.eigh(matrix)
            values.append(value)
            vectors.append(vector)
        scores = macro_f1(preset, trained.weights)
    eigenvectors = torch.cat(vectors)
    return {
        "seed": torch.tensor(seeds),
        "parameters": flatten(trained.weights),
        "converged": trained.converged,
        "steps": trained.steps,
        "eigenvalues": torch.cat(values),
        "bottom": eigenvectors[..., 0].contiguous(),
        "top": eigenvectors[..., -1].contiguous(),
        "macro_f1": scores,
        **{f"curve_{name}": curve.T for name, curve in trained.curves.items()},
    }

"""Control of the spectrum: training again from sharp and flat seeds, by each method.

Source: arXiv:2606.28662, section VI-B.
"""

from __future__ import annotations

import torch
from sklearn.metrics import f1_score

from lowland import exact
from lowland.experiments.hsr.preset import Preset
from lowland.experiments.hsr.problem import flatten, samples, start
from lowland.experiments.hsr.search import ACTIVATION
from lowland.jobs import Tensors
from lowland.networks import logits, one_by_one
from lowland.threads import threads
from lowland.training import LOSS, train


def control(preset: Preset, method: str, seeds: list[int]) -> Tensors:
    """Train the networks of some seeds by one method; one piece of the control experiment."""
    x, y = samples(preset, preset.train_size)
    with threads(1):
        (trained,) = train(
            [preset.methods[method]],
            start(preset, seeds),
            x,
            y,
            schedule=preset.schedule,
            activation=ACTIVATION,
        )
        x_test, y_test = samples(preset, preset.test_size, test=True)
        values, vectors, predicted = [], [], []
        for weights, *data in one_by_one(trained.weights, x, y):
            matrix = exact.hessian(weights, *data, activation=ACTIVATION, loss=LOSS)
            value, vector = torch.linalg.eigh(matrix)
            values.append(value)
            vectors.append(vector)
            predicted.append(logits(weights, x_test, ACTIVATION)[0] > 0)
    eigenvectors = torch.cat(vectors)
    return {
        "seed": torch.tensor(seeds),
        "parameters": flatten(trained.weights),
        "converged": trained.converged,
        "steps": trained.steps,
        "eigenvalues": torch.cat(values),
        "bottom": eigenvectors[..., 0].contiguous(),
        "top": eigenvectors[..., -1].contiguous(),
        "macro_f1": torch.tensor(
            [f1_score(y_test[0] > 0, row, average="macro") for row in predicted],
            dtype=torch.float64,
        ),
        **{f"curve_{name}": curve.T for name, curve in trained.curves.items()},
    }

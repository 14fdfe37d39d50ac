"""How well networks classify what they were not trained on."""

from __future__ import annotations

import torch
from sklearn.metrics import f1_score

from lowland.studies.ensembles.networks import PerNetwork, Weights, logits, one_by_one
from lowland.studies.hsr.preset import Preset
from lowland.studies.hsr.search import ACTIVATION
from lowland.studies.hsr.task import samples


def macro_f1(preset: Preset, weights: Weights) -> PerNetwork:
    """The mean over both classes of the F1 score on the test samples, one value a network."""
    x, y = samples(preset, preset.test_size, test=True)
    scores = [
        f1_score(y[0] > 0, logits(network, x, ACTIVATION)[0, :, 0] > 0, average="macro")
        for network, _, _ in one_by_one(weights, x, y)
    ]
    return torch.tensor(scores, dtype=torch.float64)

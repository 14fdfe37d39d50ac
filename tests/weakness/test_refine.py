"""Pairs of points that all but coincide with training points."""

import numpy as np
import pytest
import torch
from rational import contradictory, difference, exactly

from lowland.weakness.cone import build_cone
from lowland.weakness.findings import Findings
from lowland.weakness.programs import find_layer
from lowland.weakness.refine import refine


@pytest.mark.parametrize("bits", [20, 26, 32])
def test_next_to_training_points_nearly_all_pairs_are_settled_and_rightly(bits):
    rng = np.random.default_rng(bits)
    train = np.round(8 * rng.standard_normal((8, 2)))
    labels = (train @ rng.standard_normal((2, 3))).argmax(axis=1)
    unseen = train + 2.0**-bits * rng.integers(-2, 3, train.shape)
    cone = build_cone(*map(torch.from_numpy, (train, labels, unseen)), 3)
    findings = Findings(cone)
    start = find_layer(findings)
    point, against = cone.inequalities()
    fixed = [
        difference(exactly(cone.raw_train)[i], cone.labels[i], k, 3)
        for i, k in zip(point.tolist(), against.tolist(), strict=True)
    ]
    settled = []
    for x, c in np.ndindex(findings.open.shape):
        before = findings.open[x, c]
        if before and refine(findings, (x, c), start):
            z = exactly(cone.raw_unseen)[x]
            own = [difference(z, c, k, 3) for k in range(3) if k != c]
            settled.append(bool(findings.witness[x, c] >= 0))
            assert settled[-1] != contradictory(fixed + own)
    assert findings.open.mean() < 0.1  # lie within rounding of a border
    assert any(settled)
    assert not all(settled)
    assert findings.hold()

"""Coordinates of points and the inequalities of the cone."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from rational import exactly

from lowland.weakness.cone import build_cone


def make(train, unseen, labels=None):
    labels = torch.zeros(len(train), dtype=torch.long) if labels is None else labels
    return build_cone(torch.as_tensor(train).double(), labels, torch.as_tensor(unseen).double(), 3)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-8, 1.0, 3.7, 1e8]), st.floats(-1e4, 1e4))
def test_coordinates_are_right_to_one_rounding_of_themselves(seed, scale, offset):
    rng = np.random.default_rng(seed)
    train, unseen = (scale * rng.standard_normal((n, 2)) + offset for n in (6, 3))
    cone = make(train, unseen)
    center, size = exactly(cone.center), exactly(cone.scale)
    for raw, found in ((train, cone.train), (unseen, cone.unseen)):
        for point, row in zip(exactly(raw), exactly(found), strict=True):
            for v, m, s, z in zip(point, center, size, row[:-1], strict=True):
                assert abs((v - m) / s - z) <= abs(z) / 2**53
    assert (np.abs(cone.train) <= 1).all()
    assert (np.abs(cone.train[:, :-1]).max(axis=0) >= 0.4).all()


def test_scales_are_powers_of_two():
    cone = make([[0.0, 1.0], [3.0, 7.0]], [[0.0, 0.0]])
    assert set(np.frexp(cone.scale)[0]) == {0.5}


def test_a_feature_without_spread_in_training_takes_that_of_unseen_points():
    cone = make([[5.0, 0.0], [5.0, 1.0]], [[5.0 + 1e8, 0.0], [5.0, 0.5]])
    assert (np.abs(cone.unseen) <= 1).all()
    constant = make([[5.0], [5.0]], [[5.0]])
    assert constant.unseen.tolist() == [[0.0, 1.0]]


def test_every_point_is_set_against_every_other_class():
    cone = make([[0.0], [1.0]], [[2.0]], torch.tensor([2, 0]))
    point, against = cone.inequalities(1)
    found = sorted(zip(point.tolist(), against.tolist(), strict=True))
    assert found == [(-1, 0), (-1, 2), (0, 0), (0, 1), (1, 1), (1, 2)]

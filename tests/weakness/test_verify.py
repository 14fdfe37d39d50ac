"""Whatever the verifier accepts is true in rational numbers, on the brink as well."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rational import contradictory, difference, dot, exactly

from lowland.weakness import pair_proxy
from lowland.weakness.cone import build_cone
from lowland.weakness.verify import certifies, classifies_training, exact_classes, sure_classes

ROUNDING = Fraction(1, 2**53)
seeds = st.integers(0, 2**32 - 1)
# How far from a border, relatively: on both sides of what rounding may move.
brinks = st.sampled_from([0.0, 1e-17, 1e-16, 3e-16, 1e-15, 1e-14, 1e-13, 1e-12, 1e-3])
scales = st.lists(st.sampled_from([1e-8, 1e-3, 1.0, 1e3, 1e8]), min_size=4, max_size=4)
offsets = st.sampled_from([0.0, 0.1, 1e3])


def never_loses(layer, point, label):
    """Whether a class wins wherever the point is within two roundings of each coordinate."""
    layer, point = exactly(layer), exactly(point)
    for other, row in enumerate(layer):
        apart = [a - b for a, b in zip(layer[label], row, strict=True)]
        least = dot(apart, point) - 2 * ROUNDING * dot(map(abs, apart), map(abs, point))
        if other != label and least <= 0:
            return False
    return True


@settings(max_examples=300)
@given(seeds, st.integers(1, 30), st.floats(0, 30), scales)
def test_a_sure_class_wins_wherever_roundings_may_have_moved_the_point(seed, size, gap, scales):
    rng = np.random.default_rng(seed)
    scale = np.resize(scales, size)
    point = rng.standard_normal(size) * scale
    layer = rng.standard_normal((2, size)) / scale
    layer[0] = np.abs(layer[0]) * np.sign(point)
    layer[1] = -layer[0] * rng.choice([1.0, -1.0, 0.5], size)
    # The last coordinate makes up for what the others set the scores apart, but for so many units.
    apart, unit = point @ (layer[0] - layer[1]), 2.0**-53 * np.abs(point) @ np.abs(layer).sum(0)
    points, layers = np.append(point, 1.0)[None], np.column_stack([layer, [-apart, gap * unit]])
    (found,) = sure_classes(layers[None], points)[0]
    assert found < 0 or never_loses(layers, points[0], found)


def test_a_lead_that_the_roundings_of_coordinates_take_back_makes_no_class_sure():
    point = np.array([1.0, 1.0])
    for units in range(2, 200, 2):
        layer = np.array([[1.0, 0.0], [-1.0, 2.0 - units * 2.0**-53]])
        (found,) = sure_classes(layer[None], point[None])[0]
        assert found < 0 or never_loses(layer, point, found)
    assert found == 0


def test_a_sum_that_is_rounded_up_at_each_step_makes_no_class_sure():
    # Each addition to 1 rounds by nearly half of the last bit, always in the same direction.
    size = 40
    point = np.append(1.0, np.full(size, 2.0**-53 * 1.01))
    layer = np.zeros((2, size + 1))
    layer[0] = 1.0
    for gap in range(1, size):
        layer[1, 0] = 1 + (size + gap) * 2.0**-53
        (found,) = sure_classes(layer[None], point[None])[0]
        assert found < 0 or never_loses(layer, point, found)


def test_of_clear_scores_every_class_is_sure(generator):
    layers = torch.randn(5, 4, 3, generator=generator, dtype=torch.float64).numpy()
    points = torch.randn(50, 3, generator=generator, dtype=torch.float64).numpy()
    expected = (layers @ points.T).argmax(axis=1)
    assert np.array_equal(sure_classes(layers, points), expected)
    # A lead of some hundred roundings is enough.
    layer = np.array([[1.0, 0.0], [1.0 + 2.0**-45, 0.0]])
    assert sure_classes(layer[None], np.array([[1.0, 1.0]])).tolist() == [[1]]


@given(seeds, st.integers(1, 4), brinks, scales, offsets)
def test_exact_classes_are_those_of_rational_scores(seed, size, brink, scales, offset):
    rng = np.random.default_rng(seed)
    raw = np.append(np.round(rng.standard_normal((6, size)), 1) + offset, np.ones((6, 1)), axis=1)
    layer = np.round(rng.standard_normal((3, size + 1)), 1)
    layer[1] = layer[0] * (1 + brink)
    center, scale = rng.standard_normal(size), np.array(scales[:size])
    found = exact_classes(layer, raw, center, scale)
    for point, label in zip(exactly(raw), found, strict=True):
        moved = [
            (v - m) / s for v, m, s in zip(point, exactly(center), exactly(scale), strict=False)
        ]
        scores = [dot(row, [*moved, Fraction(1)]) for row in exactly(layer)]
        winners = [k for k, score in enumerate(scores) if score == max(scores)]
        assert [label] == (winners if len(winners) == 1 else [-1])


@given(seeds, st.integers(1, 3), brinks, scales, offsets)
def test_what_classifies_the_training_points_does_so_exactly(seed, size, brink, scales, offset):
    rng = np.random.default_rng(seed)
    train = (rng.standard_normal((5, size)) + offset) * scales[:size]
    # Layers whose borders go through the first training point, or pass by it closely.
    layers = rng.standard_normal((8, 3, size + 1))
    cone = build_cone(*map(torch.from_numpy, (train, rng.integers(3, size=5), train)), 3)
    for layer in layers:
        first, second = rng.permutation(3)[:2]
        lead = float((layer[first] - layer[second]) @ cone.train[0])
        layer[second, -1] += lead + brink * rng.choice([-1, 1])
    layers[4:] = layers[0] * (1 + rng.choice([-1, 0, 1], (4, 3, size + 1)) * 2.0**-52)
    # Labels that some layer gives, so that there is something to accept.
    labels = (cone.train @ layers[0].T).argmax(axis=1)
    cone = build_cone(*map(torch.from_numpy, (train, labels, train)), 3)
    center, scale = exactly(cone.center), exactly(cone.scale)
    for layer, right in zip(layers, classifies_training(cone, layers), strict=True):
        wins = []
        for point, label in zip(exactly(train), cone.labels, strict=True):
            moved = [(v - m) / s for v, m, s in zip(point, center, scale, strict=True)]
            scores = [dot(row, [*moved, Fraction(1)]) for row in exactly(layer)]
            wins.append(all(scores[label] > s for k, s in enumerate(scores) if k != label))
        assert right == all(wins)


def hull(corners, point):
    """The cone in which the corners are class 0, and the point is asked to be class 1."""
    labels = torch.zeros(len(corners), dtype=torch.long)
    return build_cone(torch.from_numpy(corners), labels, torch.from_numpy(point[None]), 2)


def near_a_face(seed, size, brink, scales, offset, twin):
    """A simplex and a point about so far from one of its faces.

    And weights under which the inequalities of the corners and of the point all but add up to zero.
    """
    rng = np.random.default_rng(seed)
    corners = np.round(rng.standard_normal((size + 1, size)), rng.integers(1, 17))
    share = rng.dirichlet(np.ones(size + 1))
    share[0] = brink
    share /= share.sum()
    point = share @ corners + rng.choice([-1, 0, 1], size) * 2.0**-53
    corners, point = ((part + offset) * scales[:size] for part in (corners, point))
    if twin:  # a feature twice, or one that is zero
        corners, point = (
            np.append(part, part[..., :1] * (twin - 1), -1) for part in (corners, point)
        )
    share[0] = max(share[0], 1e-17)
    return hull(corners, point), np.append(share, 1.0)


def ask_certifies(cone, weights, *, exactly):
    count = len(weights)
    return certifies(
        np.concatenate([cone.train, cone.unseen]),
        np.concatenate([cone.raw_train, cone.raw_unseen]),
        np.append(np.zeros(count - 1, int), 1),
        np.append(np.ones(count - 1, int), 0),
        weights,
        exactly=exactly,
    )


def in_the_hull(cone):
    """Whether no layer tells the unseen point from the training points, in rational numbers."""
    rows = [difference(point, 0, 1, 2) for point in exactly(cone.raw_train)]
    return contradictory([*rows, difference(exactly(cone.raw_unseen)[0], 1, 0, 2)])


drawn_faces = (seeds, st.integers(1, 4), brinks, scales, offsets, st.integers(0, 2))


@pytest.mark.slow
@settings(max_examples=200)
@given(*drawn_faces, st.booleans())
def test_what_is_certified_has_no_solution(seed, size, brink, scales, offset, twin, exactly):
    cone, weights = near_a_face(seed, size, brink, scales, offset, twin)
    assert not ask_certifies(cone, weights, exactly=exactly) or in_the_hull(cone)


@given(*drawn_faces, st.floats(0, 1), st.floats(0, 2))
def test_a_wrong_inverse_proves_nothing_false(seed, size, brink, scales, offset, twin, part, pull):
    cone, weights = near_a_face(seed, size, brink, scales, offset, twin)
    # Out of the hull, away from the first corner.
    cone.unseen[0, :-1] += pull * (cone.unseen - cone.train[0])[0, :-1]
    cone.raw_unseen[0, :-1] = cone.unseen[0, :-1] * cone.scale + cone.center
    inverse = np.linalg.inv
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.linalg, "inv", lambda square: part * inverse(square))
        accepted = ask_certifies(cone, weights, exactly=False)
    assert not accepted or in_the_hull(cone)


def test_a_point_that_rounding_moves_onto_a_corner_is_not_certified():
    cone = hull(np.array([[-4.0], [1.0]]), np.array([1.0 + 2.0**-52]))
    assert cone.unseen[0, 0] == cone.train[1, 0]
    assert not in_the_hull(cone)
    for exactly_ in (False, True):
        assert not ask_certifies(cone, np.array([2.0**-60, 1.0, 1.0]), exactly=exactly_)


@given(seeds, st.integers(1, 4), scales, offsets)
def test_well_inside_the_hull_floating_point_is_enough(seed, size, scales, offset):
    rng = np.random.default_rng(seed)
    corners = np.vstack([np.zeros(size), np.eye(size)]) + 0.1 * rng.standard_normal(
        (size + 1, size)
    )
    share = rng.dirichlet(np.full(size + 1, 9.0)) + 0.01
    share /= share.sum()
    corners, point = ((part + offset) * scales[:size] for part in (corners, share @ corners))
    cone = hull(corners, point)
    assert ask_certifies(cone, np.append(share, 1.0), exactly=False)


@given(seeds, st.integers(1, 4), st.sampled_from([0.0, 1e-16, 1e-12, 1e-3]))
def test_inside_the_hull_rational_numbers_decide(seed, size, brink):
    cone, weights = near_a_face(seed, size, brink, [1.0] * 4, 0.0, 0)
    corners, point = exactly(cone.raw_train), exactly(cone.raw_unseen)[0]
    # On a face of a simplex it is not certified by all corners, as the weight of one is zero.
    inside = in_the_hull(cone) and not any(
        contradictory(
            [difference(z, 0, 1, 2) for z in corners[:k] + corners[k + 1 :]]
            + [difference(point, 1, 0, 2)]
        )
        for k in range(len(corners))
    )
    assert ask_certifies(cone, weights, exactly=True) == inside


def test_scores_that_underflow_make_no_class_sure():
    tiny = 2.0**-537  # of its square only one bit is left
    layer = np.array([[1.5 * tiny, 1.5 * tiny, 0.0], [3.4 * tiny, 0.0, 0.0]])
    point = np.array([[tiny, tiny, 1.0]])
    assert (layer @ point[0]).argmax() == 0
    assert exact_classes(layer, point, np.zeros(2), np.ones(2)).tolist() == [1]
    assert sure_classes(layer[None], point).tolist() == [[-1]]


def test_coordinates_that_underflow_prove_nothing_false(monkeypatch):
    # Whole multiples of the smallest float are left of a small triangle, and a point outside it
    # comes to lie inside.
    raw = 2.0**-74 * np.array([[0.0, 0.0], [2.6, 0.0], [0.0, 2.6], [1.4, 1.4]])
    raw, points = (np.column_stack([x, np.ones(4)]) for x in (raw, raw / 2.0**1000))
    own, against = np.array([0, 0, 0, 1]), np.array([1, 1, 1, 0])
    rows = [difference(z, a, b, 2) for z, a, b in zip(exactly(raw), own, against, strict=True)]
    assert not contradictory(rows)
    weights = np.array([1.0, 1.0, 1.0, 3.0]) * 2.0**1000
    inverse = np.linalg.inv

    def by_scaled_rows(square):  # as some libraries do, which then overflow less
        scale = 1 / np.abs(square).max(axis=1)
        return inverse(scale[:, None] * square) * scale

    monkeypatch.setattr(np.linalg, "inv", by_scaled_rows)
    assert not certifies(points, raw, own, against, weights, exactly=False)


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
def test_weights_that_are_not_positive_numbers_certify_nothing(wrong):
    cone, weights = near_a_face(0, 2, 1.0, [1.0] * 4, 0.0, 0)
    assert ask_certifies(cone, weights, exactly=True)
    for index in range(len(weights)):
        changed = weights.copy()
        changed[index] = wrong
        assert not ask_certifies(cone, changed, exactly=True)
    assert not ask_certifies(cone, -weights, exactly=True)


@pytest.mark.slow
@settings(max_examples=25)
@given(seeds, st.integers(2, 3), st.integers(1, 2), brinks, scales, offsets)
def test_every_answer_is_true_in_rational_numbers(seed, classes, size, brink, scales, offset):
    rng = np.random.default_rng(seed)
    train = np.round(2 * rng.standard_normal((7, size)))
    labels = (train @ rng.standard_normal((size, classes))).argmax(axis=1)
    # Between two training points, or at one, and a little off.
    unseen = (train[:3] + train[3:6]) / 2 + brink * rng.choice([-1, 0, 1], (3, size))
    train, unseen = ((part + offset) * scales[:size] for part in (train, unseen))
    proxy = pair_proxy(*map(torch.from_numpy, (train, labels, unseen)), classes)
    assert proxy.verify()

    def rows(points, own):
        ones = np.append(points, np.ones((len(points), 1)), axis=1)
        return [
            difference(point, label, k, classes)
            for point, label in zip(exactly(ones), own, strict=True)
            for k in range(classes)
            if k != label
        ]

    fixed = rows(train, labels)
    for x, c in np.argwhere(~proxy.undecided.numpy()).tolist():
        assert proxy.feasible[x, c] != contradictory(fixed + rows(unseen[x : x + 1], [c]))

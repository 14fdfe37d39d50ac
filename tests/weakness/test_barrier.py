"""Steps through the interior of the cone."""

import numpy as np
import pytest
import torch

from lowland.weakness import barrier
from lowland.weakness.barrier import Interior
from lowland.weakness.cone import build_cone
from lowland.weakness.findings import Findings
from lowland.weakness.programs import find_layer


@pytest.fixture
def cone():
    rng = np.random.default_rng(0)
    train, unseen = (torch.from_numpy(rng.standard_normal((n, 3))) for n in (40, 12))
    labels = (train @ torch.from_numpy(rng.standard_normal((3, 4)))).argmax(1)
    return build_cone(train, labels, unseen, 4)


@pytest.fixture
def interior(cone):
    return Interior(cone, find_layer(Findings(cone)))


def margins(cone, layer):
    scores = cone.train @ layer.T
    own = scores[np.arange(len(scores)), cone.labels]
    scores[np.arange(len(scores)), cone.labels] = -np.inf
    return own[:, None] - scores


def test_the_center_balances_all_margins(cone, interior):
    layer = torch.from_numpy(interior.to_cone(interior.center[None])[0]).requires_grad_()
    scores = torch.from_numpy(cone.train) @ layer.T
    labels = torch.from_numpy(cone.labels)
    other = torch.nn.functional.one_hot(labels, 4) == 0
    slack = (scores.gather(1, labels[:, None]) - scores)[other]
    (gradient,) = torch.autograd.grad(slack.log().sum(), layer, retain_graph=True)
    (total,) = torch.autograd.grad(slack.sum(), layer)
    # At the center both pull the same way.
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), total.flatten(), dim=0)
    assert cosine > 1 - 1e-2
    assert (slack > 0).all()


def test_little_memory_takes_fewer_pairs_at_a_time_and_the_same_steps(cone, interior, monkeypatch):
    every = np.argwhere(np.ones((12, 4))).T
    assert interior.together > 1
    after, closest, weights = interior.step(interior.start(*every))
    monkeypatch.setattr(barrier, "_MEMORY", 0)
    small = Interior(cone, find_layer(Findings(cone)))
    assert small.together == 1
    found = small.step(small.start(*every))
    np.testing.assert_allclose(found[0].deficit, after.deficit, rtol=1e-8)
    np.testing.assert_allclose(found[1], closest, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found[2].own, weights.own, rtol=1e-6, atol=1e-9)


def test_steps_stay_inside_and_lower_the_deficit(cone, interior):
    at = interior.start(*np.argwhere(np.ones((12, 4))).T)
    for _ in range(4):
        before = at
        at, closest, _ = interior.step(at)
        assert (at.deficit < before.deficit).all()
        for layer in (*closest, *interior.to_cone(at.layers)):
            assert (margins(cone, layer) > 0).all()
        reached = at.deficit < 0
        scores = np.einsum("pkr,pr->pk", at.layers, interior.unseen[at.unseen])
        assert np.array_equal(scores.argmax(1)[reached], at.label[reached])
        at = at.only(~reached)


def test_weights_add_inequalities_up_to_zero(cone, interior):
    at = interior.start(np.arange(12), np.arange(12) % 4)
    _, _, weights = interior.step(at)
    for index in range(12):
        total = np.zeros((4, cone.coordinates))
        every = [(weights.train[:, index], cone.labels, cone.train)]
        every.append((weights.own[index][None], [index % 4], cone.unseen[index][None]))
        for weight, own, points in every:
            for row, label, point in zip(weight, own, points, strict=True):
                total -= row[:, None] * point
                total[label] += row.sum() * point
        assert np.abs(total).max() < 1e-9 * np.abs(weights.train).max()


def test_out_of_the_hull_every_class_is_reached():
    train = torch.tensor([[0.0, 1.0], [1.0, 1.0], [3.0, 1.0]]).double()
    unseen = torch.tensor([[0.0, 2.0], [1.0, 1.0]]).double()
    cone = build_cone(train, torch.tensor([0, 0, 1]), unseen, 3)
    layers = Interior(cone, find_layer(Findings(cone))).escapes()
    assert (cone.unseen[0] @ layers.transpose(0, 2, 1)).argmax(1).tolist() == [0, 1, 2]
    assert all((margins(cone, layer) > 0).all() for layer in layers)


def test_attempts_begin_with_every_inequality_fulfilled(interior):
    every = np.argwhere(np.ones((12, 4))).T
    at = interior.start(*every)
    scores = np.einsum("pkr,pr->pk", at.layers, interior.unseen[at.unseen])
    lead = np.take_along_axis(scores, at.label[:, None], 1) - scores
    lead[np.arange(48), at.label] = np.inf
    missing = lead.min(axis=1) < 0
    assert 0 < missing.sum() < 48
    assert (lead + at.deficit[:, None] > 0)[missing].all()


def test_doubt_is_the_share_of_negative_weights(interior):
    _, _, weights = interior.step(interior.start(np.arange(12), np.arange(12) % 4))
    negative = np.where(weights.train < 0, -weights.train, 0.0).sum(axis=(0, 2))
    np.testing.assert_allclose(weights.doubt(), negative / np.abs(weights.train).sum(axis=(0, 2)))


def test_what_matters_is_all_but_a_thousandth_of_the_largest_weight(interior):
    at = interior.start(np.arange(12), np.arange(12) % 4)
    _, _, weights = interior.step(at)
    for index in range(12):
        point, against = weights.support(index)
        new = point < 0
        left = weights.train[:, index].copy()
        left[point[~new], against[~new]] = 0
        assert left.max() < 1e-3 * weights.train[:, index].max()
        own = weights.own[index].copy()
        own[against[new]] = 0
        assert own.max() < 1e-3 * weights.own[index].max()
        assert (weights.train[point[~new], index, against[~new]] > 0).all()


def test_a_direction_in_which_points_differ_by_little_counts():
    rng = np.random.default_rng(0)
    train = rng.standard_normal((20, 2))
    train = np.column_stack([train, train[:, 0] + 1e-6 * rng.standard_normal(20)])
    labels = torch.from_numpy(train[:, 2] > train[:, 0]).long()
    cone = build_cone(torch.from_numpy(train), labels, torch.from_numpy(train[:4]), 2)
    interior = Interior(cone, find_layer(Findings(cone)))
    center = interior.to_cone(interior.center[None])[0]
    assert (margins(cone, center) > 0).all()
    assert len(interior.escapes()) == 0


def test_who_is_out_of_the_hull_by_little_escapes_as_well():
    train = torch.tensor([[0.0, 1.0, 1.0], [1.0, 2.0, 3.0], [3.0, 1.0, 4.0]]).double()
    unseen = torch.tensor([[1.0, 1.0, 2.0 + 1e-6], [1.0, 1.0, 2.0]]).double()
    cone = build_cone(train, torch.tensor([0, 0, 1]), unseen, 2)
    layers = Interior(cone, find_layer(Findings(cone))).escapes()
    assert (cone.unseen[0] @ layers.transpose(0, 2, 1)).argmax(1).tolist() == [0, 1]
    assert all((margins(cone, layer) > 0).all() for layer in layers)

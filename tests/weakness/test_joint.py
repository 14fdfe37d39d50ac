"""Joint weakness where volumes are known, and under maps that must not matter."""

import math

import pytest
import torch

from lowland.weakness import joint, joint_weakness, pair_proxy
from lowland.weakness.joint import _collisions
from lowland.weakness.polytope import Polytope, analytic_center, billiard, split_r_hat


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(seed=0, classes=3, train=12, unseen=3):
    generator = seeded(seed)
    x = torch.randn(train + unseen, 2, generator=generator).double()
    layer = torch.randn(classes, 2, generator=generator).double()
    return x[:train], (x[:train] @ layer.T).argmax(1), x[train:], classes


SHORT = {"chains": 16, "samples": 100, "thinning": 10, "burn_in": 200}


@pytest.mark.slow
@pytest.mark.parametrize("place", [0.25, 0.5, 0.9])
def test_between_two_points_shares_are_distances(place):
    train, labels = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])
    found = joint_weakness(
        train, labels, torch.tensor([[place]]), 2, generator=seeded(), chains=32, samples=200
    )
    shares = dict(zip(found.labelings[:, 0].tolist(), found.shares.tolist(), strict=True))
    assert shares[1] == pytest.approx(place, abs=0.03)
    expected = -math.log(place**2 + (1 - place) ** 2)
    assert abs(found.log_effective - expected) < 4 * found.stderr + 1e-3
    assert found.converged


def test_every_labeling_consists_of_feasible_pairs():
    train, labels, unseen, classes = problem()
    found = joint_weakness(train, labels, unseen, classes, generator=seeded(), **SHORT)
    feasible = pair_proxy(train, labels, unseen, classes).feasible
    for labeling in found.labelings:
        assert feasible[torch.arange(len(unseen)), labeling].all()
    assert found.shares.sum() == pytest.approx(1)
    assert (found.shares.diff() <= 0).all()
    assert found.to_frame()["share"].tolist() == found.shares.tolist()


def test_affine_maps_of_the_features_change_nothing():
    train, labels, unseen, classes = problem(1)
    change = torch.tensor([[2.0, -1.0], [0.5, 3.0]]).double()
    shift = torch.tensor([5.0, -2.0]).double()
    plain = joint_weakness(train, labels, unseen, classes, generator=seeded(), **SHORT)
    mapped = joint_weakness(
        train @ change + shift,
        labels,
        unseen @ change + shift,
        classes,
        generator=seeded(),
        **SHORT,
    )
    assert mapped.log_effective == pytest.approx(plain.log_effective, abs=1e-3)
    assert mapped.labelings[0].tolist() == plain.labelings[0].tolist()


def test_what_no_training_point_bounds_is_refused():
    train, labels, unseen, classes = problem()
    flat, lifted = (
        torch.nn.functional.pad(x, (0, 1), value=v) for x, v in ((train, 0), (unseen, 1))
    )
    with pytest.raises(ValueError, match="3 of 3 unseen points lie outside"):
        joint_weakness(flat, labels, lifted, classes, generator=seeded())
    with pytest.raises(ValueError, match="nothing to sample"):
        joint_weakness(
            torch.tensor([[0.0], [1.0], [2.0]]),
            torch.tensor([0, 1, 0]),
            torch.tensor([[0.5]]),
            2,
            generator=seeded(),
        )
    with pytest.raises(ValueError, match="chains must be at least 2"):
        joint_weakness(train, labels, unseen, classes, generator=seeded(), chains=1)


def test_chains_that_disagree_are_told():
    with pytest.warns(UserWarning, match="chains disagree"):
        found = joint_weakness(
            *problem(2, 4, 40), generator=seeded(), chains=4, samples=4, thinning=1, burn_in=1
        )
    assert not found.converged


@pytest.mark.parametrize(("r_hat", "agree"), [(1.04, True), (1.1, False)])
def test_chains_agree_up_to_what_is_usual(r_hat, agree, monkeypatch, recwarn):
    monkeypatch.setattr(joint, "split_r_hat", lambda points: torch.tensor([1.0, r_hat]))
    found = joint_weakness(*problem(), generator=seeded(), **{**SHORT, "samples": 2})
    assert found.converged == agree
    assert len(recwarn) == (not agree)


def test_a_point_out_of_the_hull_by_little_is_refused():
    train, labels, unseen, classes = problem()
    train, unseen = (torch.cat([x, x[:, :1] + x[:, 1:]], dim=1) for x in (train, unseen))
    joint_weakness(train, labels, unseen, classes, generator=seeded(), **SHORT)
    unseen[1, 2] += 1e-5
    with pytest.raises(ValueError, match="1 of 3 unseen points lie outside"):
        joint_weakness(train, labels, unseen, classes, generator=seeded(), **SHORT)


def test_the_entropy_is_that_of_the_shares_and_half_a_sample_for_each_labeling():
    found = joint_weakness(*problem(), generator=seeded(), **SHORT)
    assert len(found.labelings) > 1
    plain = -sum(p * math.log(p) for p in found.shares.tolist())
    # Miller and Madow: what an entropy of N samples is too small by on average.
    assert found.entropy == pytest.approx(plain + (len(found.labelings) - 1) / (2 * 1600))


def test_balls_fill_a_simplex_evenly():
    size = 6
    rows = torch.cat([torch.eye(size), -torch.ones(1, size)]).double()
    offset = torch.full((size + 1,), 1 / (size + 1)).double()  # zero is the middle
    polytope = Polytope(rows, offset)
    points = billiard(
        polytope,
        analytic_center(polytope),
        chains=32,
        samples=200,
        thinning=10,
        burn_in=300,
        generator=seeded(),
    )
    places = (points @ rows.T + offset).flatten(0, 1)
    assert (places > -1e-12).all()
    assert (split_r_hat(points) < 1.02).all()
    # Dirichlet(1, ..., 1): means 1 / n, variances (n - 1) / (n^2 (n + 1)), with n = size + 1.
    count = size + 1
    assert places.mean(0) == pytest.approx(torch.full((count,), 1 / count), abs=0.01)
    variance = size / (count**2 * (count + 1))
    assert places.var(0).mean().item() == pytest.approx(variance, rel=0.05)


def test_collisions_are_counted_between_chains_only():
    index = torch.tensor([[0, 0, 1], [0, 1, 1], [2, 2, 0]])
    pairs = [
        (a == b).item()
        for i in range(3)
        for j in range(3)
        if i != j
        for a in index[i]
        for b in index[j]
    ]
    estimate, error = _collisions(index, 3)
    assert estimate == pytest.approx(-math.log(sum(pairs) / len(pairs)))
    assert error > 0
    assert _collisions(torch.arange(6).view(2, 3), 6) == (math.inf, math.inf)


def test_the_standard_error_comes_from_leaving_out_each_chain_in_turn():
    index = torch.randint(3, (6, 40), generator=seeded())
    _, error = _collisions(index, 3)
    without = [_collisions(torch.cat([index[:i], index[i + 1 :]]), 3)[0] for i in range(6)]
    mean = sum(without) / 6
    assert error == pytest.approx(math.sqrt(5 / 6 * sum((one - mean) ** 2 for one in without)))


def test_a_generator_that_is_none_is_refused(as_installed):
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, .*; got int"):
        joint_weakness(torch.randn(6, 2), torch.arange(6) % 2, torch.randn(3, 2), 2, generator=0)

"""The center of a polytope, and what tells whether chains agree."""

import math

import pytest
import torch

from lowland.weakness.polytope import Polytope, analytic_center, split_r_hat


@pytest.mark.parametrize("near", [1.0, 1e-3, 1e-9])
def test_the_center_is_found_from_next_to_a_wall(near):
    # 0 < x < 1 and 0 < y < 2, seen from a point that is so close to a corner.
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]).double()
    offset = torch.tensor([near, near, 1.0 - near, 2.0 - near]).double()
    if near == 1.0:
        offset = torch.tensor([0.5, 1.0, 0.5, 1.0]).double()
    center, factor = analytic_center(Polytope(rows, offset))
    slack = rows @ center + offset
    torch.testing.assert_close(
        slack, torch.tensor([0.5, 1.0, 0.5, 1.0]).double(), rtol=1e-6, atol=0
    )
    hessian = (rows / slack[:, None]).T @ (rows / slack[:, None])
    torch.testing.assert_close(factor @ factor.T, hessian)


def test_split_r_hat_compares_the_halves_of_chains():
    torch.manual_seed(0)
    half = torch.randn(5, 2).double()
    alike = torch.cat([half, half])[None].repeat(3, 1, 1)
    assert split_r_hat(alike).tolist() == pytest.approx([math.sqrt(4 / 5)] * 2)
    apart = torch.cat([half, half + 7])[None]
    within = half.var(dim=0)
    expected = (4 / 5 + 7**2 / 2 / within).sqrt()
    torch.testing.assert_close(split_r_hat(apart), expected)
    assert split_r_hat(alike[:, :3]).isinf().all()


def test_no_step_toward_the_center_leaves_the_polytope():
    # Of a thousand walls to one on the other side: a whole step of Newton's would overshoot.
    rows = torch.tensor([[1.0]] * 1000 + [[-1.0]]).double()
    offset = torch.tensor([0.6] * 1000 + [0.4]).double()
    center, _ = analytic_center(Polytope(rows, offset))
    assert center.item() == pytest.approx(1000 / 1001 - 0.6)

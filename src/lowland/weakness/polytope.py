"""Uniform samples from a bounded polytope, and whether they can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_NEWTON = 200  # steps to the analytic center at most
_GRAM = 4096  # walls whose mutual products are kept, in 128 MiB at most
_RENEW = 64  # events


@dataclass(frozen=True, eq=False)
class Polytope:
    """``rows @ x + offset >= 0``; bounded, and zero lies inside."""

    rows: Float[Tensor, "rows d"]
    offset: Float[Tensor, " rows"]


def analytic_center(polytope: Polytope) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    r"""The maximum of :math:`\sum \log(a_i x + b_i)`, and the Hessian's Cholesky factor there.

    Both go along with linear maps. Between the ellipsoid of the Hessian and the same one, larger by
    the number of rows, lies the polytope, so that steps drawn from it go some way in any direction.
    """
    rows, offset = polytope.rows, polytope.offset
    x = rows.new_zeros(rows.shape[1])
    factor = torch.eye(len(x), dtype=rows.dtype)
    for _ in range(_NEWTON):
        slack = rows @ x + offset
        scaled = rows / slack[:, None]
        factor = torch.linalg.cholesky(scaled.T @ scaled)
        step = torch.cholesky_solve(scaled.sum(dim=0)[:, None], factor)[:, 0]
        decrement = float((scaled @ step).norm())
        # The damped step of self-concordant functions, which never leaves the polytope.
        x = x + step / (1 + decrement) if decrement > 0.25 else x + step
        if decrement < 1e-8:
            break
    return x, factor


def billiard(
    polytope: Polytope,
    center: tuple[Float[Tensor, " d"], Float[Tensor, "d d"]],
    *,
    chains: int,
    samples: int,
    thinning: int,
    burn_in: int,
    generator: torch.Generator,
) -> Float[Tensor, "chains samples d"]:
    r"""Independent chains: balls that fly straight, bounce off the walls, and now and then turn.

    Reflections keep the uniform distribution and velocities normal, new velocities at random times
    make every place reachable. A ball crosses the polytope between two turns, where hit-and-run
    needs many small steps. Positions are kept at equal intervals of time, not where a ball bounces.

    Args:
        polytope: Where to sample.
        center: Where every chain starts, and a root of the Hessian there, in whose coordinates
            velocities are standard normal.
        chains: How many.
        samples: Positions to keep of each.
        thinning: Bounces from one to the next, about.
        burn_in: Bounces before the first, about.
        generator: Of the velocities and of the times.
    """
    start, factor = center
    size = len(start)
    if not size:
        return start.new_zeros(chains, samples, 0)
    shape = torch.linalg.inv(factor).T
    table = _Table(polytope.rows @ shape, polytope.rows @ start + polytope.offset)
    y = start.new_zeros(chains, size)
    # The time between bounces differs from polytope to polytope: a first stretch measures it.
    y, _, pace = _fly(table, y, 0.0, max(burn_in // 4, 16), generator=generator)
    y, _, pace = _fly(table, y, size * pace, burn_in, generator=generator)
    _, kept, _ = _fly(
        table, y, size * pace, 0, keep=(samples, thinning * pace), generator=generator
    )
    moved: Tensor = kept @ shape.T
    return start + moved


class _Table:
    """Walls in coordinates in which they are about equally far away in every direction."""

    def __init__(self, rows: Float[Tensor, "rows d"], offset: Float[Tensor, " rows"]) -> None:
        self.rows, self.offset = rows, offset
        self.squares = rows.square().sum(dim=1)
        # How a bounce off one wall changes the speed toward all others.
        self.gram = rows @ rows.T if len(rows) <= _GRAM else None

    def towards(self, walls: Int[Tensor, " chains"]) -> Float[Tensor, "chains rows"]:
        if self.gram is not None:
            return self.gram[walls]
        return self.rows[walls] @ self.rows.T


def _fly(
    table: _Table,
    y: Float[Tensor, "chains d"],
    turn: float,
    bounces: int,
    *,
    keep: tuple[int, float] | None = None,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "chains d"], Float[Tensor, "chains samples d"], float]:
    """Fly on from ``y``, turning after ``turn`` on average, or never if it is zero.

    For so many events, or until so many positions of each chain, so much time apart, are kept.

    Returns:
        Where the balls are, the positions kept, and the mean time between bounces.
    """
    chains, size = y.shape
    y = y.clone()
    own = torch.arange(chains)
    velocity = torch.randn(chains, size, generator=generator, dtype=y.dtype)
    samples, interval = keep or (0, torch.inf)
    kept, done = y.new_zeros(chains, samples, size), torch.zeros(chains, dtype=torch.long)
    next_kept = torch.full((chains,), interval, dtype=y.dtype)
    next_turn = _times(turn, chains, generator)
    slack, speed = y @ table.rows.T + table.offset, velocity @ table.rows.T
    time = hits = 0.0
    event = 0
    while event < bounces if keep is None else bool((done < samples).any()):
        event += 1
        wait = torch.where(speed < 0, -slack / speed, torch.inf)
        hit, wall = wait.min(dim=1)
        step = torch.minimum(torch.minimum(hit, next_turn), next_kept)
        y += step[:, None] * velocity
        slack = (slack + step[:, None] * speed).clamp_min_(0)
        next_turn, next_kept = next_turn - step, next_kept - step
        time += float(step.sum())
        bounce = hit <= step
        hits += float(bounce.sum())
        along = torch.where(bounce, 2 * speed[own, wall] / table.squares[wall], 0.0)[:, None]
        velocity = velocity - along * table.rows[wall]
        speed = speed - along * table.towards(wall)
        turned = next_turn <= 0
        if bool(turned.any()):
            count = int(turned.sum())
            velocity[turned] = torch.randn(count, size, generator=generator, dtype=y.dtype)
            speed[turned] = velocity[turned] @ table.rows.T
            next_turn[turned] = _times(turn, count, generator)
        full = (next_kept <= 0) & (done < samples)
        if bool(full.any()):
            kept[full, done[full]] = y[full]
            done[full] += 1
        next_kept = torch.where(next_kept <= 0, interval, next_kept)
        if event % _RENEW == 0:  # sums of many steps drift from what they stand for
            slack = (y @ table.rows.T + table.offset).clamp_min_(0)
            speed = velocity @ table.rows.T
    return y, kept, time / max(hits, 1.0)


def _times(mean: float, count: int, generator: torch.Generator) -> Float[Tensor, " chains"]:
    """Exponential times."""
    if not mean:
        return torch.full((count,), torch.inf, dtype=torch.float64)
    return (
        -mean * torch.rand(count, generator=generator, dtype=torch.float64).clamp_min(1e-300).log()
    )


def split_r_hat(points: Float[Tensor, "chains samples d"]) -> Float[Tensor, " d"]:
    """Split R-hat of each coordinate: how far halves of chains lie apart, against their width."""
    chains, samples, size = points.shape
    half = samples // 2
    halves = points[:, : 2 * half].reshape(2 * chains, half, size)
    if half < 2:
        return torch.full((size,), torch.inf, dtype=points.dtype)
    within = halves.var(dim=1).mean(dim=0)
    between = halves.mean(dim=1).var(dim=0)
    return ((half - 1) / half + between / within).sqrt()

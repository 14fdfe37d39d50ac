r"""Brackets of eigenvalues from four moments of the spectrum.

The spectral distribution puts the mass ``1 / P`` on each eigenvalue. In standardized units, of mean
0 and variance 1, its skewness :math:`\gamma` and kurtosis :math:`\kappa` give the polynomials
orthonormal in it

.. math:: p_0 = 1, \qquad p_1 = x, \qquad p_2 = q(x) / \sqrt\delta, \qquad
    q(x) = x^2 - \gamma x - 1, \quad \delta = \kappa - \gamma^2 - 1,

and the kernel :math:`K(x, t) = \sum_j p_j(x) p_j(t)`. No distribution of these moments has more
mass than :math:`1 / K(x, x)` at :math:`x`. The one that has it there is a quadrature rule with
three nodes, :math:`x` and the zeros of :math:`K(x, \cdot)`, and it is also the one with the most
mass on :math:`[x, \infty)`. With ``p_0`` and ``p_1`` alone all this gives Wolkowicz and Styan's
brackets; so it does in the limit of an infinite :math:`\delta`.

References:
    N. I. Akhiezer, The Classical Moment Problem (1965), chapter 2: the Chebyshev-Markov-Stieltjes
    inequalities. G. H. Golub and G. Meurant, Matrices, Moments and Quadrature with Applications
    (2010), chapter 6: the rules with one node prescribed, of Gauss and Radau.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS = 15  # of Newton's iteration, enough for rounding to be all that is left


@torch.no_grad()
def four_moment_bracket(k: int, dim: int, means: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """``(low, high)`` for the ``k``-th largest of ``dim`` real numbers from means of their powers.

    Args:
        k: 1 for the largest, ``dim`` for the smallest.
        dim: How many numbers there are.
        means: The means of their first four powers, each of shape ``(*ensemble)``.

    Returns:
        Two tensors of shape ``(*ensemble)``, without gradients; NaN where rounding has left nothing
        of the third and fourth moments, as it has when all numbers are nearly equal.

    Example:
        >>> import torch
        >>> from lowland.brackets import four_moment_bracket
        >>> numbers = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
        >>> means = tuple((numbers**power).mean() for power in (1, 2, 3, 4))
        >>> low, high = four_moment_bracket(2, 3, means)
        >>> bool(low <= 2 <= high)
        True
    """
    of = _standardized(means)
    skewness = of.skewness
    # Towards either end the excess errs to the side on which the bracket is wider.
    ample, scant = of.excess.clamp(min=0) + of.noise, (of.excess - of.noise).clamp(min=0)

    if k < dim:
        high = _kth_at_most(k, dim, skewness, ample)
    else:
        high = -_largest_at_least(dim, -skewness, ample, scant)
    if k > 1:
        low = -_kth_at_most(dim - k + 1, dim, -skewness, ample)
    else:
        low = _largest_at_least(dim, skewness, ample, scant)
    low, high = (torch.where(of.trusted, of.mean + of.std * end, torch.nan) for end in (low, high))
    return low, high


def four_moment_upper(dim: int, means: tuple[Tensor, ...]) -> Tensor:
    r"""The upper end for the largest of ``dim`` real numbers, with its gradient in the means.

    It is where :math:`\delta (1 + x^2 - P) + q(x)^2 = 0`, so that by the theorem of implicit
    functions its derivative in the skewness and the excess is that of the left side over minus the
    slope in ``x``.

    Args:
        dim: How many numbers there are.
        means: The means of their first four powers, each of shape ``(*ensemble)``.

    Returns:
        A tensor of shape ``(*ensemble)``; NaN without a gradient where rounding has left nothing of
        the third and fourth moments. Where it has left nothing of the excess alone, as for numbers
        of two values, the excess is a constant.

    Example:
        >>> import torch
        >>> from lowland.brackets import four_moment_bracket, four_moment_upper
        >>> numbers = torch.tensor([1.0, 2.0, 4.0, 6.0], dtype=torch.float64, requires_grad=True)
        >>> means = tuple((numbers**power).mean() for power in (1, 2, 3, 4))
        >>> upper = four_moment_upper(4, means)
        >>> torch.equal(upper, four_moment_bracket(1, 4, means)[1])
        True
        >>> upper.backward()
    """
    with torch.no_grad():
        trusted = _standardized(means).trusted
    # In place of what has no spread others, whose derivatives are finite: NaN times zero is NaN.
    safe = (0.0, 1.0, 0.0, 3.0)
    of = _standardized(
        tuple(torch.where(trusted, mean, at) for mean, at in zip(means, safe, strict=True))
    )
    excess = torch.where(of.excess > of.noise.detach(), of.excess, of.excess.detach())
    skewness, excess = of.skewness, excess.clamp(min=0) + of.noise.detach()
    with torch.no_grad():
        x = _kth_at_most(1, dim, skewness, excess) if dim > 1 else torch.zeros_like(skewness)
        q = x.square() - skewness * x - 1
        slope = 2 * (excess * x + q * (2 * x - skewness))
    zero = excess * (1 + x.square() - dim) + (x.square() - skewness * x - 1).square()
    change = torch.where(slope > 0, zero, 0) / torch.where(slope > 0, slope, 1)
    end = x - (change - change.detach())
    return torch.where(trusted, of.mean + of.std * end, torch.nan)


@dataclass(frozen=True)
class _Standardized:
    """What four moments say beside mean and standard deviation.

    Attributes:
        mean: The mean.
        std: The standard deviation.
        skewness: The third moment in standardized units.
        excess: What is above its least value in the fourth, ``delta``.
        noise: What rounding in the moments may have added to the excess, generously; and what a
            dtype cannot hold of a fourth power.
        trusted: Whether rounding has left anything of them.
    """

    mean: Tensor
    std: Tensor
    skewness: Tensor
    excess: Tensor
    noise: Tensor
    trusted: Tensor


def _standardized(means: tuple[Tensor, ...]) -> _Standardized:
    first, second, third, fourth = means
    scale = second.sqrt()
    first, third, fourth = first / scale, third / scale / second, fourth / second / second
    variance = 1 - first.square()
    skewness = (third - 3 * first + 2 * first**3) / variance**1.5
    kurtosis = (fourth - 4 * first * third + 6 * first.square() - 3 * first**4) / variance.square()
    excess = kurtosis - skewness.square() - 1
    info = torch.finfo(first.dtype)
    noise = 64 * info.eps * (fourth / variance.square() + kurtosis / variance)
    noise = noise + info.tiny / (second * variance).square()
    trusted = (noise < kurtosis) & (excess > -noise)
    return _Standardized(first * scale, variance.sqrt() * scale, skewness, excess, noise, trusted)


def _kth_at_most(k: int, dim: int, skewness: Tensor, excess: Tensor) -> Tensor:
    """The largest ``x`` for which ``[x, oo)`` can hold the mass ``k / dim``, ``k < dim``."""
    # Beyond the zeros of q the mass of [x, oo) is that of x itself.
    far = _farthest(k, dim, skewness, excess)
    # Between them x is the middle node, and all but the mass of the smallest is on [x, oo).
    near, _ = _other_nodes(-_farthest(dim - k, dim, -skewness, excess), skewness, excess)
    return torch.where(_positive_zero(skewness).square() <= (dim - k) / k, far, near)


def _largest_at_least(dim: int, skewness: Tensor, ample: Tensor, scant: Tensor) -> Tensor:
    """The largest node of the Gauss-Radau rule whose prescribed node no eigenvalue lies below."""
    _, largest = _other_nodes(-_farthest(1, dim, -skewness, ample), skewness, scant)
    return largest


def _farthest(k: int, dim: int, skewness: Tensor, excess: Tensor) -> Tensor:
    """The largest ``x`` with ``K(x, x) <= dim / k``, if that is not below the zeros of q.

    There ``excess (1 + x^2 - dim / k) + q(x)^2`` is convex, so that each of Newton's steps from the
    right ends on the right: also an iteration cut short gives a bound.
    """
    square = (dim - k) / k  # of where it would be without q
    zero = _positive_zero(skewness)
    # Two points on the right: K(x, x) = dim / k with the third and with the second term left out.
    start = _positive_zero(skewness, 1 + (excess * square).sqrt())
    x = start.clamp(max=square**0.5)
    for _ in range(_STEPS):
        q, slope = (x - zero) * (x + 1 / zero), (x - zero) + (x + 1 / zero)
        value = excess * (x.square() - square) + q.square()
        x = x - value / (2 * (excess * x + q * slope))
    return x


def _positive_zero(skewness: Tensor, offset: Tensor | float = 1.0) -> Tensor:
    """The positive zero of ``x^2 - skewness x - offset``, without cancellation."""
    root = offset**0.5
    return root * torch.asinh(skewness / (2 * root)).exp()


def _other_nodes(t: Tensor, skewness: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
    """The zeros ``x`` of ``K(x, t)``, in ascending order, for a ``t`` below those of q.

    They are those of ``q x^2 - (skewness q - excess t) x + excess - q`` with ``q = q(t)``.
    """
    zero = _positive_zero(skewness)
    # Where t is itself a zero of q, one node is at infinity, without mass.
    q = ((t - zero) * (t + 1 / zero)).clamp(min=torch.finfo(t.dtype).eps)
    middle = (skewness * q - excess * t) / 2
    root = (middle.square() - q * (excess - q)).clamp(min=0).sqrt()
    outer = middle + torch.where(middle < 0, -root, root)  # no cancellation; the other by Vieta
    nodes = outer / q, (excess - q) / outer
    return torch.minimum(*nodes), torch.maximum(*nodes)

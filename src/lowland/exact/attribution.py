r"""What the direction of HSR is made of: by sample, by pair of samples, by moment.

Source: arXiv:2606.28662, sections V-A to V-C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowland.exact.plan import OrderChoice
from lowland.exact.problem import run_moments
from lowland.exact.setup import Activations, Reduction, prepare
from lowland.exact.torch_backend import TorchBackend
from lowland.limits import DEFAULT_MEMORY_BUDGET
from lowland.losses import Loss
from lowland.moments import HessianMoments


@dataclass(frozen=True)
class Direction:
    r"""The gradient of the bound :math:`U = m + s\sqrt{P - 1}`, split by its two parts.

    Attributes:
        mean: The gradient of ``m``, shaped like ``weights``.
        spread: The gradient of ``s sqrt(P - 1)``, shaped like ``weights``.
    """

    mean: tuple[Tensor, ...]
    spread: tuple[Tensor, ...]

    @property
    def total(self) -> tuple[Tensor, ...]:
        """The gradient of ``U``."""
        return tuple(mean + spread for mean, spread in zip(self.mean, self.spread, strict=True))


def direction(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    activation: Activations,
    loss: str | Loss,
    order: OrderChoice = "auto",
    reduction: Reduction = "mean",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Direction:
    """The gradient of ``U``, split into its mean part and its spread part (section V-C).

    Arguments and errors are those of :func:`lowland.exact.moments`.

    Returns:
        Gradients of the shapes of ``weights``; at zero spread the spread part is zero.
    """
    setup = prepare(weights, x, y, activation, loss, reduction)
    problem = setup.problem(order, memory_budget)
    leaves = [weight.detach().requires_grad_() for weight in setup.weights]
    with torch.enable_grad():
        moments = HessianMoments(setup.size.dim, *run_moments(problem, leaves))
        mean = moments.mean.sum()
        spread = (moments.std * math.sqrt(setup.size.dim - 1)).sum()
    mean_part = torch.autograd.grad(mean, leaves, retain_graph=True)
    spread_part = torch.autograd.grad(spread, leaves)
    return Direction(setup.shaped(mean_part), setup.shaped(spread_part))


def sample_contributions(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    activation: Activations,
    loss: str | Loss,
    order: OrderChoice = "auto",
    reduction: Reduction = "mean",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> tuple[Tensor, ...]:
    r"""Each sample's share of the gradient of ``U`` (section V-A).

    With ``U``'s derivatives ``a`` and ``b`` in the two traces, the share of sample ``i`` is
    :math:`\nabla\langle C, H_i\rangle / n`, :math:`C = a I + 2 b H`. The shares add up to the
    gradient of ``U``, and a sample's share vanishes as the sample is fitted (Proposition 1).

    Arguments and errors are those of :func:`lowland.exact.moments`.

    Returns:
        Shares for ``W`` and ``v``, of shapes ``(*ensemble, samples, inputs + 1, hidden)`` and
        ``(*ensemble, samples, hidden + 1, 1)``. They come on top of the memory budget.
    """
    setup = prepare(weights, x, y, activation, loss, reduction)
    problem = setup.problem(order, memory_budget, compiled=False)

    def shares(backend: TorchBackend) -> list[Tensor]:
        first, second, kept = backend.moments()
        with torch.enable_grad():
            first, second = first.requires_grad_(), second.requires_grad_()
            upper = HessianMoments(setup.size.dim, first, second).upper.sum()
        a, b = torch.autograd.grad(upper, (first, second))
        return backend.sample_gradients(a, b, kept)

    with torch.no_grad():
        found = problem.on_torch(setup.weights, shares)
    return setup.shaped([torch.cat(layer) for layer in zip(*found, strict=True)])


def pair_contributions(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    activation: Activations,
    loss: str | Loss,
    reduction: Reduction = "mean",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    """What each pair of samples adds to ``Tr H^2`` (section V-B).

    Arguments and errors are those of :func:`lowland.exact.moments`.

    Returns:
        A symmetric matrix of shape ``(*ensemble, samples, samples)`` whose sum is ``Tr H^2``; it
        comes on top of the memory budget.
    """
    setup = prepare(weights, x, y, activation, loss, reduction)
    problem = setup.problem("samples", memory_budget)
    with torch.no_grad():
        matrix = torch.cat(problem.on_torch(setup.weights, TorchBackend.pairs))
    return matrix.view(*setup.ensemble, *matrix.shape[1:])

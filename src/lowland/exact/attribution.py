r"""What the direction of HSR is made of: by sample, by pair of samples, by moment.

Source: arXiv:2606.28662, sections V-A to V-C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowland.activations import Activation
from lowland.exact.api import OrderChoice, Reduction, Setup, prepare
from lowland.exact.engine import run_moments
from lowland.exact.plan import DEFAULT_MEMORY_BUDGET
from lowland.exact.reference import Reference
from lowland.exact.terms import sensitivities
from lowland.losses import Loss
from lowland.moments import HessianMoments


@dataclass(frozen=True)
class Direction:
    r"""The gradient of the bound :math:`U = m + s\sqrt{P - 1}`, split by its two parts.

    Attributes:
        mean: The gradient of ``m``, shaped like ``weights``.
        spread: The gradient of ``s sqrt(P - 1)``, shaped like ``weights``.
    """

    mean: tuple[Tensor, Tensor]
    spread: tuple[Tensor, Tensor]

    @property
    def total(self) -> tuple[Tensor, Tensor]:
        """The gradient of ``U``."""
        return self.mean[0] + self.spread[0], self.mean[1] + self.spread[1]


def direction(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    activation: str | Activation,
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
    weight = setup.weight.detach().requires_grad_()
    output = setup.output.detach().requires_grad_()
    with torch.enable_grad():
        moments = HessianMoments(setup.size.dim, *run_moments(problem, weight, output))
        mean = moments.mean.sum()
        spread = (moments.std * math.sqrt(setup.size.dim - 1)).sum()
    mean_part = torch.autograd.grad(mean, (weight, output), retain_graph=True)
    spread_part = torch.autograd.grad(spread, (weight, output))
    return Direction(_shaped(setup, *mean_part), _shaped(setup, *spread_part))


def sample_contributions(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    activation: str | Activation,
    loss: str | Loss,
    order: OrderChoice = "auto",
    reduction: Reduction = "mean",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> tuple[Tensor, Tensor]:
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

    def shares(group: Reference) -> tuple[Tensor, Tensor]:
        first, second, matrix = group.moments()
        with torch.enable_grad():
            first, second = first.requires_grad_(), second.requires_grad_()
            upper = HessianMoments(setup.size.dim, first, second).upper.sum()
        a, b = torch.autograd.grad(upper, (first, second))
        networks, samples = group.output.shape[0], setup.size.samples
        in_weight = group.output.new_zeros(networks, samples, *setup.weight.shape[1:])
        in_output = group.output.new_zeros(networks, samples, setup.output.shape[1])
        for run, terms, adjoint in group.adjoints(a, b, matrix):
            in_a, in_v = sensitivities(problem.arch, group.output, terms, adjoint)
            inputs = terms.inputs.expand(networks, -1, -1)
            in_weight[:, run] += torch.einsum("ekn,ejn->enkj", inputs, in_a)
            in_output[:, run] += in_v.mT
        return in_weight, in_output

    with torch.no_grad():
        parts = problem.on_references(setup.weight, setup.output, shares)
    return _shaped(setup, *(torch.cat(part) for part in zip(*parts, strict=True)))


def pair_contributions(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    activation: str | Activation,
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
        parts = problem.on_references(setup.weight, setup.output, Reference.pairs)
    matrix = torch.cat(parts)
    return matrix.view(*setup.ensemble, *matrix.shape[1:])


def _shaped(setup: Setup, in_weight: Tensor, in_output: Tensor) -> tuple[Tensor, Tensor]:
    return (
        in_weight.view(*setup.ensemble, *in_weight.shape[1:]),
        in_output.view(*setup.ensemble, *in_output.shape[1:], 1),
    )

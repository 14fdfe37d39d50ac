r"""What the direction of HSR is made of: by sample, by pair of samples, by moment.

Source: arXiv:2606.28662, sections V-A to V-C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowland._limits import DEFAULT_MEMORY_BUDGET
from lowland.exact.plan import OrderChoice
from lowland.exact.problem import run_moments
from lowland.exact.setup import Activations, Reduction, prepare
from lowland.exact.torch_backend import TorchBackend
from lowland.losses import Loss
from lowland.moments import HessianMoments


@dataclass(frozen=True)
class Direction:
    r"""The gradient of the bound :math:`U = m + s\sqrt{P - 1}`, split by its two summands.

    Attributes:
        mean: The gradient of the mean eigenvalue ``m``, layer by layer.
        spread: The gradient of ``s sqrt(P - 1)``, with the eigenvalues' standard deviation ``s``,
            layer by layer.

    Example:
        >>> import torch
        >>> from lowland import exact
        >>> weights = [torch.randn(3, 4).double(), torch.randn(5, 2).double()]
        >>> x, y = torch.randn(6, 2).double(), torch.randint(2, (6,))
        >>> network = {"activation": "tanh", "loss": "ce"}
        >>> direction = exact.direction(weights, x, y, **network)
        >>> torch.equal(direction.total[0], direction.mean[0] + direction.spread[0])
        True
    """

    mean: tuple[Tensor, ...]
    spread: tuple[Tensor, ...]

    @property
    def total(self) -> tuple[Tensor, ...]:
        """The gradient of ``U``, layer by layer: what HSR descends."""
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
    r"""The gradient of :math:`U = m + s\sqrt{P - 1}`, apart for each summand (section V-C).

    Arguments and errors are those of :func:`lowland.exact.moments`.

    Returns:
        Gradients in each layer's weights, ``(*ensemble, inputs + 1, outputs)``, of networks of any
        depth. At zero spread that of the second summand is zero.

    Example:
        >>> import torch
        >>> from lowland import exact
        >>> weights = [torch.randn(3, 4).double(), torch.randn(5, 2).double()]
        >>> x, y = torch.randn(6, 2).double(), torch.randint(2, (6,))
        >>> network = {"activation": "tanh", "loss": "ce"}
        >>> direction = exact.direction(weights, x, y, **network)
        >>> leaves = [weight.requires_grad_() for weight in weights]
        >>> exact.moments(leaves, x, y, **network).upper.backward()
        >>> all(torch.allclose(a, b.grad) for a, b in zip(direction.total, leaves))
        True
    """
    setup = prepare(weights, x, y, activation, loss, reduction)
    problem = setup.problem(order, memory_budget)
    leaves = [weight.detach().requires_grad_() for weight in setup.weights]
    with torch.enable_grad():
        moments = HessianMoments(setup.size.dim, *run_moments(problem, leaves))
        mean = moments.mean.sum()
        spread = (moments.std * math.sqrt(setup.size.dim - 1)).sum()
    in_mean = torch.autograd.grad(mean, leaves, retain_graph=True)
    in_spread = torch.autograd.grad(spread, leaves)
    return Direction(setup.shaped(in_mean), setup.shaped(in_spread))


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
    r"""Each sample's share of the gradient of the bound ``U`` (section V-A).

    With ``U``'s derivatives ``a`` and ``b`` in the two traces, the share of sample ``i`` is
    :math:`\nabla\langle C, H_i\rangle / n`, where :math:`C = a I + 2 b H` is constant and
    :math:`H_i` the sample's own Hessian. The shares add up to the gradient of ``U``, and a sample's
    share vanishes as the sample is fitted (Proposition 1).

    Arguments and errors are those of :func:`lowland.exact.moments`.

    Returns:
        For each layer the shares in its weights, ``(*ensemble, samples, inputs + 1, outputs)``.
        They come on top of the memory budget.

    Example:
        >>> import torch
        >>> from lowland import exact
        >>> weights = [torch.randn(3, 4).double(), torch.randn(5, 2).double()]
        >>> x, y = torch.randn(6, 2).double(), torch.randint(2, (6,))
        >>> network = {"activation": "tanh", "loss": "ce"}
        >>> shares = exact.sample_contributions(weights, x, y, **network)
        >>> [share.shape for share in shares]
        [torch.Size([6, 3, 4]), torch.Size([6, 5, 2])]
        >>> total = exact.direction(weights, x, y, **network).total
        >>> all(torch.allclose(a.sum(0), b) for a, b in zip(shares, total))
        True
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
    r"""What each pair of samples adds to ``Tr H^2`` (section V-B).

    With the samples' own Hessians, the mean of which is ``H``, it is
    :math:`\langle H_i, H_{i'}\rangle / n^2`.

    Arguments and errors are those of :func:`lowland.exact.moments`.

    Returns:
        A symmetric matrix of shape ``(*ensemble, samples, samples)`` whose sum is ``Tr H^2``; it
        comes on top of the memory budget.

    Example:
        >>> import torch
        >>> from lowland import exact
        >>> weights = [torch.randn(3, 4).double(), torch.randn(5, 2).double()]
        >>> x, y = torch.randn(6, 2).double(), torch.randint(2, (6,))
        >>> network = {"activation": "tanh", "loss": "ce"}
        >>> pairs = exact.pair_contributions(weights, x, y, **network)
        >>> moments = exact.moments(weights, x, y, **network)
        >>> pairs.shape, torch.allclose(pairs.sum(), moments.trace_sq)
        (torch.Size([6, 6]), True)
    """
    setup = prepare(weights, x, y, activation, loss, reduction)
    problem = setup.problem("samples", memory_budget)
    with torch.no_grad():
        matrix = torch.cat(problem.on_torch(setup.weights, TorchBackend.pairs))
    return matrix.view(*setup.ensemble, *matrix.shape[1:])

"""The closed form on plain tensors: one network, or thousands in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from lowland._limits import DEFAULT_MEMORY_BUDGET
from lowland.exact.plan import OrderChoice
from lowland.exact.pruning import pruned_moments
from lowland.exact.setup import Activations, Reduction, Setup, prepare
from lowland.exact.terms import ExactMatrix
from lowland.losses import Loss
from lowland.moments import HessianMoments, check_number
from lowland.validation import check_tolerance

__all__ = [
    "OrderChoice",
    "Reduction",
    "Setup",
    "diagonal",
    "hessian",
    "loss_gradient",
    "moments",
    "prepare",
    "trace",
]


def moments(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    activation: Activations,
    loss: str | Loss,
    order: OrderChoice = "auto",
    reduction: Reduction = "mean",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    unbiased: bool = False,
    moments: Literal[2, 4] = 2,
    matrix: ExactMatrix = "hessian",
    prune: float | None = None,
) -> HessianMoments:
    r"""Exact ``Tr H`` and ``Tr H^2`` of multilayer perceptrons.

    ``H`` is the Hessian of the loss in all weights. The result can be differentiated (once) with
    respect to the weights, and to ``x``; the backward pass is analytic and costs about one more
    forward pass.

    Args:
        weights: One tensor for each layer, ``(*ensemble, inputs + 1, outputs)`` with the biases in
            row 0, from the first hidden layer to the logits; one tensor alone is a linear model.
            Leading dimensions broadcast.
        x: ``(samples, inputs)``, or ``(*ensemble, samples, inputs)`` to give each network its own.
        y: ``(samples,)`` for labels of classes, else ``(samples, outputs)``, for one output
            ``(samples,)`` too; ``*ensemble`` may precede.
        activation: ``"identity"``, ``"sigmoid"``, ``"tanh"``, ``"softplus"``, ``"gelu"``,
            ``"silu"``, ``"relu"``, ``"leaky_relu"``, or an
            :class:`~lowland.activations.Activation`; or a sequence of these, one for each hidden
            layer. For the piecewise linear ones the result is exact almost everywhere.
        loss: ``"bce"`` (binary cross-entropy on each logit, targets from 0 to 1), ``"ce"``
            (cross-entropy, labels from 0 or a distribution for each sample) or ``"mse"`` (squared
            error without a factor one half); a mean over several outputs is one over samples and
            outputs, as in PyTorch. Or a :class:`~lowland.losses.Loss` of your own.
        order: Sum over pairs of ``"samples"`` or of ``"parameters"``; ``"auto"`` takes the one that
            a measured cost model predicts to be faster.
        reduction: Of the loss over samples, ``"mean"`` or ``"sum"``.
        memory_budget: Bytes of temporaries that neither order exceeds. The results themselves, the
            weights' gradient, and data that must be converted or made contiguous come on top.
        unbiased: Take the samples for a batch, drawn from a larger data set: leave each sample's
            pair with itself out of ``Tr H^2``, whose expectation over batches is then that of the
            data set. As the sum over pairs of different samples it may come out negative, or
            smaller than any spectrum of that trace has it: see :class:`~lowland.HessianMoments`.
        moments: 4 for ``Tr H^3`` and ``Tr H^4`` as well, which narrow the brackets of eigenvalues;
            they cost some products of ``P x P`` matrices, and their gradient another contraction.
        matrix: ``"hessian"``; or in its place ``"ggn"``, the Gauss-Newton matrix, which is the
            Fisher matrix, too, for ``"bce"``, ``"ce"`` and ``"mse"``; or ``"residual"``, what the
            Hessian has beyond it (:mod:`lowland.matrices`). The compiled code is for the Hessian.
        prune: Leave out samples that are fitted, a relative tolerance above 0 and below 1: those
            that together change both moments, and where weights ask for gradients both moments'
            gradients, by no more than this part of them. That is certified by bounds on each
            sample's share, which the result reports (:attr:`~lowland.HessianMoments.pruned`); of an
            ensemble the same samples are left out of all networks, those that all of them can do
            without. The bounds take time linear in samples and parameters; where they leave out no
            more than a tenth of the samples, nothing is left out. It saves little, and only
            late in training of one hidden layer with a thousand parameters or more; small networks
            take longer with it (``benchmarks/prune.py``).

    Returns:
        Moments whose fields have the shape ``(*ensemble)``.

    Raises:
        TypeError: If tensors are not all float32 or all float64, or on different devices, or a
            setting is of no type that it can have.
        UnsupportedModelError: If ``y`` requires gradients, which would be left out; or if of
            pruned samples ``x`` does, four moments are wanted, or unbiased ones.
        ValueError: If shapes do not match, values are not finite, targets do not suit the loss,
            ``prune`` is not between 0 and 1, or the budget is too small. On accelerators values are
            not looked at, since that would wait for the device; NaN goes in, NaN comes out.

    Notes:
        Order ``"samples"`` takes time quadratic in the samples and linear in the parameters, order
        ``"parameters"`` the reverse. Both give the same numbers to rounding.

    References:
        arXiv:2606.28662, theorems 1 to 5; the order ``"parameters"`` is not in the paper. Pruning
        is what its section V-A proposes; the certificates are ours
        (:mod:`lowland.exact.pruning`).

    Example:
        >>> import torch
        >>> from lowland import exact
        >>> weights = [torch.randn(1000, 3, 4, requires_grad=True), torch.randn(1000, 5, 1)]
        >>> x, y = torch.randn(50, 2), torch.randint(2, (50,)).float()
        >>> moments = exact.moments(weights, x, y, activation="tanh", loss="bce")
        >>> moments.dim, moments.trace.shape  # 1,000 networks of 17 parameters each
        (17, torch.Size([1000]))
        >>> moments.upper.sum().backward()
        >>> weights[0].grad.shape
        torch.Size([1000, 3, 4])
    """
    check_number(moments)
    if prune is not None:
        check_tolerance(prune)
    setup = prepare(weights, x, y, activation, loss, reduction, inputs_vary=True).of(matrix)
    if prune is not None:
        return pruned_moments(
            setup, prune, order, memory_budget, unbiased=unbiased, moments=moments
        )
    return setup.moments(order, memory_budget, unbiased=unbiased, moments=moments)


def trace(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    activation: Activations,
    loss: str | Loss,
    reduction: Reduction = "mean",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    matrix: ExactMatrix = "hessian",
) -> Tensor:
    """Exact ``Tr H`` alone, without any block of ``H``.

    Arguments, errors and differentiability are those of :func:`moments`.

    Notes:
        With ``K`` outputs and layers of ``M`` and ``M'`` units the time is that of some gradients
        of the loss for one hidden layer, and beyond grows by ``samples * K * M * M'`` for each two
        hidden layers that follow one another. Smooth activations in three or more trained hidden
        layers take ``samples * M * M' * (M + M')`` in its place; straight ones, as the ReLU, never.

    Returns:
        ``Tr H``, shape ``(*ensemble)``.

    Example:
        >>> import torch
        >>> from lowland import exact
        >>> x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([-1.0, 1.0])
        >>> line = [torch.zeros(2, 1)]  # bias and slope of a linear model
        >>> exact.trace(line, x, y, activation="identity", loss="mse")
        tensor(4.)
    """
    setup = prepare(weights, x, y, activation, loss, reduction, inputs_vary=True).of(matrix)
    return setup.trace(memory_budget)


def diagonal(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    activation: Activations,
    loss: str | Loss,
    reduction: Reduction = "mean",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    matrix: ExactMatrix = "hessian",
) -> tuple[Tensor, ...]:
    """The exact diagonal of the Hessian, in time linear in samples and parameters alike.

    Arguments and errors are those of :func:`moments`.

    Returns:
        For each layer what belongs to its weights, ``(*ensemble, inputs + 1, outputs)`` with that
        of the biases in row 0; without a gradient. All together sum to :func:`trace`.

    Example:
        >>> import torch
        >>> from lowland import exact
        >>> x, y = torch.tensor([[-1.0], [2.0]]), torch.tensor([-1.0, 1.0])
        >>> line = [torch.zeros(2, 1)]  # bias and slope of a linear model
        >>> exact.diagonal(line, x, y, activation="identity", loss="mse")
        (tensor([[2.],
                [5.]]),)
    """
    setup = prepare(weights, x, y, activation, loss, reduction).of(matrix)
    return setup.diagonal(memory_budget)


def loss_gradient(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    activation: Activations,
    loss: str | Loss,
    reduction: Reduction = "mean",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> tuple[Tensor, ...]:
    """The gradient of each network's own loss, what plain training of an ensemble descends.

    Arguments and errors are those of :func:`moments`.

    Returns:
        A gradient for each layer's weights, ``(*ensemble, inputs + 1, outputs)`` with that of the
        biases in row 0; they carry no gradient.

    Example:
        >>> import torch
        >>> from lowland import exact
        >>> x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([-1.0, 1.0])
        >>> line = [torch.zeros(2, 1)]  # bias and slope of a linear model
        >>> exact.loss_gradient(line, x, y, activation="identity", loss="mse")
        (tensor([[ 0.],
                [-2.]]),)
    """
    return prepare(weights, x, y, activation, loss, reduction).loss_gradient(memory_budget)


def hessian(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    activation: Activations,
    loss: str | Loss,
    reduction: Reduction = "mean",
    matrix: ExactMatrix = "hessian",
) -> Tensor:
    """The Hessian itself, from the closed form.

    Arguments and errors are those of :func:`moments`.

    Returns:
        ``(*ensemble, P, P)``, without a gradient. The parameters come layer by layer from the first
        on, each layer's weights row by row: first its biases, then what its first input multiplies.

    Example:
        >>> import torch
        >>> from lowland import exact
        >>> x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([-1.0, 1.0])
        >>> line = [torch.zeros(2, 1)]  # bias and slope of a linear model
        >>> exact.hessian(line, x, y, activation="identity", loss="mse")
        tensor([[2., 0.],
                [0., 2.]])
    """
    return prepare(weights, x, y, activation, loss, reduction).of(matrix).hessian()

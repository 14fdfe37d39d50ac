"""The closed form on plain tensors: one network, or thousands in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import grad

from lowland.activations import Activation, get_activation
from lowland.exact import parameters
from lowland.exact.compiled import covers
from lowland.exact.engine import Pass, Problem, run_moments
from lowland.exact.plan import DEFAULT_MEMORY_BUDGET, make_linear_plan, make_plan
from lowland.exact.size import Size
from lowland.exact.terms import Architecture, Data, Quantity
from lowland.losses import Loss, get_loss
from lowland.moments import HessianMoments
from lowland.validation import check_features, check_targets

Reduction = Literal["mean", "sum"]
OrderChoice = Literal["auto", "samples", "parameters"]


def moments(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    activation: str | Activation,
    loss: str | Loss,
    order: OrderChoice = "auto",
    reduction: Reduction = "mean",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> HessianMoments:
    r"""Exact ``Tr H`` and ``Tr H^2`` of three-layer networks with one output.

    ``H`` is the Hessian of the loss in all weights. The result can be differentiated (once) with
    respect to the weights; the backward pass is analytic and costs about one more forward pass.

    Args:
        weights: ``[W, v]`` of shapes ``(*ensemble, inputs + 1, hidden)`` and
            ``(*ensemble, hidden + 1, 1)``, biases in row 0. Leading dimensions broadcast.
        x: ``(samples, inputs)``, or ``(*ensemble, samples, inputs)`` to give each network its own.
        y: ``(samples,)``, or ``(*ensemble, samples)``.
        activation: ``"identity"``, ``"sigmoid"``, ``"tanh"``, ``"softplus"``, ``"gelu"``,
            ``"silu"``, ``"relu"``, ``"leaky_relu"``, or an
            :class:`~lowland.activations.Activation`. For the piecewise linear ones the result is
            exact almost everywhere.
        loss: ``"bce"`` (binary cross-entropy on the logit, targets 0 or 1) or ``"mse"`` (squared
            error without a factor one half, as in PyTorch).
        order: Sum over pairs of ``"samples"`` or of ``"parameters"``; ``"auto"`` takes the one that
            a measured cost model predicts to be faster.
        reduction: Of the loss over samples, ``"mean"`` or ``"sum"``.
        memory_budget: Bytes of temporaries that neither order exceeds. The results themselves, the
            weights' gradient, and data that must be converted or made contiguous come on top.

    Returns:
        Moments whose fields have the shape ``(*ensemble)``.

    Raises:
        TypeError: If tensors are not all float32 or all float64, or on different devices.
        ValueError: If shapes do not match, values are not finite, targets do not suit the loss, or
            the budget is too small. On accelerators values are not looked at, since that would
            wait for the device; NaN goes in, NaN comes out.

    Notes:
        Order ``"samples"`` takes time quadratic in the samples and linear in the parameters, order
        ``"parameters"`` the reverse. Both give the same numbers to rounding.

    References:
        arXiv:2606.28662, theorems 1 to 5; the order ``"parameters"`` is not in the paper.
    """
    return prepare(weights, x, y, activation, loss, reduction).moments(order, memory_budget)


def trace(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    activation: str | Activation,
    loss: str | Loss,
    reduction: Reduction = "mean",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    """Exact ``Tr H`` alone, in time linear in samples and parameters alike.

    Arguments, errors and differentiability are those of :func:`moments`.

    Returns:
        ``Tr H``, shape ``(*ensemble)``.
    """
    return prepare(weights, x, y, activation, loss, reduction).trace(memory_budget)


def loss_gradient(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    activation: str | Activation,
    loss: str | Loss,
    reduction: Reduction = "mean",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> tuple[Tensor, Tensor]:
    """The gradient of each network's own loss, what plain training of an ensemble descends.

    Arguments and errors are those of :func:`moments`.

    Returns:
        Gradients in ``W`` and ``v``, ``(*ensemble, inputs + 1, hidden)`` and
        ``(*ensemble, hidden + 1, 1)``; they carry no gradient.
    """
    return prepare(weights, x, y, activation, loss, reduction).loss_gradient(memory_budget)


def hessian(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    activation: str | Activation,
    loss: str | Loss,
    reduction: Reduction = "mean",
) -> Tensor:
    """The Hessian itself, ``(*ensemble, P, P)``, from the closed form; it carries no gradient.

    Parameters are ordered as ``W`` row by row, then ``v``. Arguments and errors are those of
    :func:`moments`.
    """
    setup = prepare(weights, x, y, activation, loss, reduction)
    # The result is as large as the matrix; a budget beside it only sets the length of runs.
    needed = 8 * setup.size.dim**2 * setup.size.itemsize
    budget = max(DEFAULT_MEMORY_BUDGET, needed)
    problem = setup.problem("parameters", budget, compiled=False)
    whole = parameters.Block(slice(0, setup.size.inputs), with_output=True)
    with torch.no_grad():
        parts = problem.on_references(
            setup.weight, setup.output, lambda part: part.hessian_rows(whole)
        )
    dim = setup.size.dim
    return torch.cat(parts).view(*setup.ensemble, dim, dim)


@dataclass(frozen=True)
class Setup:
    """Checked arguments, the ensemble flattened to one leading dimension.

    What is to be computed again and again on the same data is set up once: in a step of training,
    looking at the data would take longer than a small network's gradient.
    """

    arch: Architecture
    data: Data
    weight: Tensor
    output: Tensor
    ensemble: torch.Size
    size: Size

    def at(self, weights: Sequence[Tensor]) -> Setup:
        """The same at other weights of the same shapes, which are not looked at."""
        networks = len(self.weight)
        weight, output = weights
        return replace(
            self,
            weight=weight.reshape(networks, *self.weight.shape[1:]),
            output=output.reshape(networks, *self.output.shape[1:]),
        )

    def moments(
        self, order: OrderChoice = "auto", memory_budget: int = DEFAULT_MEMORY_BUDGET
    ) -> HessianMoments:
        """As :func:`moments`."""
        problem = self.problem(order, memory_budget)
        first, second = run_moments(problem, self.weight, self.output)
        return HessianMoments(self.size.dim, first.view(self.ensemble), second.view(self.ensemble))

    def trace(self, memory_budget: int = DEFAULT_MEMORY_BUDGET) -> Tensor:
        """As :func:`trace`."""
        problem = self.linear_problem("trace", memory_budget)
        first, _ = run_moments(problem, self.weight, self.output)
        return first.view(self.ensemble)

    def loss_gradient(self, memory_budget: int = DEFAULT_MEMORY_BUDGET) -> tuple[Tensor, Tensor]:
        """As :func:`loss_gradient`."""
        return self._gradients(
            self.linear_problem("loss", memory_budget), lambda part: part.loss_gradient()
        )

    def trace_gradient(self, memory_budget: int = DEFAULT_MEMORY_BUDGET) -> tuple[Tensor, Tensor]:
        """The gradient of each network's ``Tr H``, without a graph."""

        def gradient(part: Pass) -> tuple[Tensor, Tensor]:
            one = part.output.new_ones(len(part.output))
            return part.gradient(one, torch.zeros_like(one), None)

        return self._gradients(self.linear_problem("trace", memory_budget), gradient)

    def gradient(
        self,
        function: Callable[[HessianMoments], Tensor],
        order: OrderChoice = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
    ) -> tuple[Tensor, Tensor]:
        """The gradient of a function of each network's own moments, without a graph.

        The same as a backward pass through :meth:`moments`, without what autograd costs a step.
        """
        dim = self.size.dim

        def gradient(part: Pass) -> tuple[Tensor, Tensor]:
            first, second, kept = part.moments()
            with torch.enable_grad():
                leaves = first.detach().requires_grad_(), second.detach().requires_grad_()
                value = function(HessianMoments(dim, *leaves)).sum()
            by_trace, by_square = grad(value, leaves, materialize_grads=True)
            return part.gradient(by_trace, by_square, kept)

        return self._gradients(self.problem(order, memory_budget), gradient)

    def _gradients(
        self, problem: Problem, compute: Callable[[Pass], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            parts = problem.on_passes(self.weight, self.output, lambda _, part: compute(part))
        in_weight, in_output = (torch.cat(part) for part in zip(*parts, strict=True))
        return (
            in_weight.view(*self.ensemble, *self.weight.shape[1:]),
            in_output.view(*self.ensemble, *self.output.shape[1:], 1),
        )

    def problem(self, order: OrderChoice, memory_budget: int, *, compiled: bool = True) -> Problem:
        """The problem of both moments; ``compiled=False`` insists on the PyTorch path."""
        device = self.weight.device
        plan = make_plan(
            self.size,
            order,
            memory_budget,
            on_cpu=device.type == "cpu",
            compiled=compiled and covers(self.arch, device),
        )
        return Problem(self.arch, self.data, plan)

    def linear_problem(self, quantity: Quantity, memory_budget: int) -> Problem:
        """The problem of the trace alone, or of the loss."""
        device = self.weight.device
        plan = make_linear_plan(
            self.size,
            memory_budget,
            on_cpu=device.type == "cpu",
            compiled=covers(self.arch, device),
        )
        return Problem(self.arch, self.data, plan, quantity)


def prepare(  # noqa: PLR0917 - the arguments of every public function, in their order
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    activation: str | Activation,
    loss: str | Loss,
    reduction: Reduction,
    *,
    sample_weights: Tensor | None = None,
    input_rows: slice | None = None,
    output_rows: slice | None = None,
) -> Setup:
    """Check everything at the door and bring it into the engine's shapes.

    ``input_rows`` and ``output_rows`` name the trained rows of ``W`` and ``v`` (all by default).
    """
    activation, loss = get_activation(activation), get_loss(loss)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"unknown reduction {reduction!r}: expected 'mean' or 'sum'")
    weight, output = _check_weights(weights)
    check_features(x, like=weight)
    if x.ndim < 2 or x.shape[-1] + 1 != weight.shape[-2]:
        raise ValueError(
            f"x and weights[0] do not match: expected x of shape (samples, {weight.shape[-2] - 1}) "
            f"for weights[0] of shape {tuple(weight.shape)} (inputs + 1, hidden), bias in row 0; "
            f"got {tuple(x.shape)}"
        )
    check_targets(y, samples=tuple(x.shape[:-1]), loss=loss, like=weight)
    try:
        ensemble = torch.broadcast_shapes(
            weight.shape[:-2], output.shape[:-2], x.shape[:-2], y.shape[:-1]
        )
    except RuntimeError as error:
        raise ValueError(
            "the leading (ensemble) dimensions do not broadcast: weights "
            f"{tuple(weight.shape[:-2])} and {tuple(output.shape[:-2])}, x {tuple(x.shape[:-2])}, "
            f"y {tuple(y.shape[:-1])}"
        ) from error
    networks = math.prod(ensemble)
    if networks == 0:
        raise ValueError(
            f"expected at least one network; got an ensemble of shape {tuple(ensemble)}"
        )

    samples = x.shape[-2]
    scale: float | Tensor = 1 / samples if reduction == "mean" else 1.0
    if sample_weights is not None:
        scale = _flatten(sample_weights * scale, ensemble, 1)
    hidden = weight.shape[-1]
    arch = Architecture(
        activation,
        loss,
        input_rows or slice(0, weight.shape[-2]),
        output_rows or slice(0, hidden + 1),
    )
    return Setup(
        arch,
        Data(_flatten(x.detach(), ensemble, 2), _flatten(y.detach(), ensemble, 1), scale),
        weight.expand(*ensemble, *weight.shape[-2:]).reshape(networks, *weight.shape[-2:]),
        output.squeeze(-1).expand(*ensemble, hidden + 1).reshape(networks, hidden + 1),
        ensemble,
        Size(
            networks,
            samples,
            weight.shape[-2],
            arch.input_rows.stop - arch.input_rows.start,
            hidden,
            arch.output_rows.stop - arch.output_rows.start,
            weight.element_size(),
        ),
    )


def _flatten(tensor: Tensor, ensemble: torch.Size, own: int) -> Tensor:
    """One leading dimension for the ensemble: of size 1 where all networks share the tensor."""
    leading, trailing = tensor.shape[:-own], tensor.shape[-own:]
    if math.prod(leading) == 1:
        return tensor.reshape(1, *trailing)
    return tensor.expand(*ensemble, *trailing).reshape(-1, *trailing)


def _check_weights(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    if len(weights) != 2:
        raise ValueError(
            "expected two weight tensors [W, v], one per layer of a three-layer network; "
            f"got {len(weights)}"
        )
    weight, output = weights
    if weight.ndim < 2 or output.ndim < 2:
        raise ValueError(
            "expected weights of shapes (*ensemble, inputs + 1, hidden) and "
            f"(*ensemble, hidden + 1, 1); got {tuple(weight.shape)} and {tuple(output.shape)}"
        )
    check_features(weight, like=weight, name="weights[0]")
    check_features(output, like=weight, name="weights[1]")
    if output.shape[-2:] != (weight.shape[-1] + 1, 1):
        raise ValueError(
            f"weights do not chain: weights[0] of shape {tuple(weight.shape)} has "
            f"{weight.shape[-1]} hidden units, so weights[1] must end in "
            f"({weight.shape[-1] + 1}, 1), bias in row 0; got {tuple(output.shape)}"
        )
    return weight, output

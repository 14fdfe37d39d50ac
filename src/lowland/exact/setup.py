"""Checked arguments in the engine's shapes, and everything that is computed from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import grad

from lowland.activations import Activation, get_activation
from lowland.exact.c_backend import covers
from lowland.exact.plan import (
    DEFAULT_MEMORY_BUDGET,
    MEBIBYTE,
    OrderChoice,
    Path,
    cost,
    gradient_cost,
    make_linear_plan,
    make_plan,
    term_rows,
)
from lowland.exact.problem import Backend, Problem, join_layers, run_moments
from lowland.exact.size import Size
from lowland.exact.terms import Architecture, Data, Quantity
from lowland.exact.torch_backend import TorchBackend
from lowland.loss_checks import check_loss
from lowland.losses import Loss, get_loss
from lowland.moments import HessianMoments
from lowland.validation import (
    as_outputs,
    check_budget,
    check_constant,
    check_features,
    check_weights,
)

Reduction = Literal["mean", "sum"]
Activations = str | Activation | Sequence[str | Activation]

_NEAR = 32 * MEBIBYTE


@dataclass(frozen=True)
class Setup:
    """Checked arguments, the ensemble flattened to one leading dimension.

    What is to be computed again and again on the same data is set up once: in a step of training,
    looking at the data would take longer than a small network's gradient.
    """

    arch: Architecture
    data: Data
    weights: tuple[Tensor, ...]
    ensemble: torch.Size
    size: Size
    is_mean: bool
    covered: bool  # by the compiled code

    def at(self, weights: Sequence[Tensor]) -> Setup:
        """The same at other weights of the same shapes, which are not looked at."""
        shaped = zip(weights, self.weights, strict=True)
        return replace(self, weights=tuple(new.reshape(old.shape) for new, old in shaped))

    def moments(
        self,
        order: OrderChoice = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        *,
        unbiased: bool = False,
        moments: int = 2,
    ) -> HessianMoments:
        """As :func:`moments`."""
        problem = self.problem(order, memory_budget, unbiased=unbiased)
        first, second = run_moments(problem, self.weights)
        higher = self._higher(memory_budget, unbiased=unbiased) if moments != 2 else None
        return HessianMoments(
            self.size.dim, first.view(self.ensemble), second.view(self.ensemble), higher=higher
        )

    def _higher(self, memory_budget: int, *, unbiased: bool) -> tuple[Tensor, Tensor]:
        if unbiased:
            raise ValueError("unbiased=True estimates Tr H and Tr H^2 alone; use moments=2")
        needed = 3 * self.size.dim**2 * self.size.itemsize
        if needed > memory_budget:
            raise ValueError(
                f"a memory budget of {memory_budget / MEBIBYTE:.3g} MiB is too small: moments=4 "
                f"squares the Hessian of {self.size.dim} parameters and takes "
                f"{needed / MEBIBYTE:.3g} MiB; raise memory_budget"
            )
        problem = self.problem("parameters", max(memory_budget, 16 * needed), compiled=False)
        problem = replace(problem, plan=replace(problem.plan, networks=1))

        def powers(part: TorchBackend) -> Tensor:
            matrix = part.hessian()
            square = matrix @ matrix
            return torch.stack([(square * matrix).sum((1, 2)), square.square().sum((1, 2))])

        with torch.no_grad():
            third, fourth = torch.cat(problem.on_torch(self.weights, powers), 1)
        return third.view(self.ensemble), fourth.view(self.ensemble)

    def relative_cost(self) -> float:
        """What the moments and their gradient are predicted to cost, in gradients of the loss."""
        size = self.size
        paths: list[Path] = ["samples", "compiled" if self.covered else "parameters"]
        exact = min(cost(size, path) for path in paths)
        # The prices are those of terms near the cache; wide layers' are not.
        far = size.samples * term_rows(size) * size.itemsize > _NEAR
        return (8 if far else 1) * exact / gradient_cost(size)

    def trace(self, memory_budget: int = DEFAULT_MEMORY_BUDGET) -> Tensor:
        """As :func:`trace`."""
        first, _ = run_moments(self.linear_problem("trace", memory_budget), self.weights)
        return first.view(self.ensemble)

    def hessian(self) -> Tensor:
        """As :func:`hessian`."""
        # The result is as large as the matrix; a budget beside it only sets the length of runs.
        needed = 16 * self.size.dim**2 * self.size.itemsize
        budget = max(DEFAULT_MEMORY_BUDGET, needed)
        problem = self.problem("parameters", budget, compiled=False)
        with torch.no_grad():
            parts = problem.on_torch(self.weights, TorchBackend.hessian)
        return torch.cat(parts).view(*self.ensemble, self.size.dim, self.size.dim)

    def loss_gradient(self, memory_budget: int = DEFAULT_MEMORY_BUDGET) -> tuple[Tensor, ...]:
        """As :func:`loss_gradient`."""
        return self._gradients(
            self.linear_problem("loss", memory_budget), lambda part: part.loss_gradient()
        )

    def trace_gradient(self, memory_budget: int = DEFAULT_MEMORY_BUDGET) -> tuple[Tensor, ...]:
        """The gradient of each network's ``Tr H``, without a graph."""

        def gradient(part: Backend) -> Sequence[Tensor]:
            one = self.weights[0].new_ones(part.networks)
            return part.gradient(one, torch.zeros_like(one), [])

        return self._gradients(self.linear_problem("trace", memory_budget), gradient)

    def gradient(
        self,
        function: Callable[[HessianMoments], Tensor],
        order: OrderChoice = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
    ) -> tuple[Tensor, ...]:
        """The gradient of a function of each network's own moments, without a graph.

        The same as a backward pass through :meth:`moments`, without what autograd costs a step.
        """
        dim = self.size.dim

        def gradient(part: Backend) -> Sequence[Tensor]:
            first, second, kept = part.moments()
            with torch.enable_grad():
                leaves = first.detach().requires_grad_(), second.detach().requires_grad_()
                value = function(HessianMoments(dim, *leaves)).sum()
            by_trace, by_square = grad(value, leaves, materialize_grads=True)
            return part.gradient(by_trace, by_square, kept)

        return self._gradients(self.problem(order, memory_budget), gradient)

    def _gradients(
        self, problem: Problem, compute: Callable[[Backend], Sequence[Tensor]]
    ) -> tuple[Tensor, ...]:
        with torch.no_grad():
            parts = problem.on_backend(self.weights, lambda _, part: compute(part))
        return self.shaped(join_layers(parts, self.weights))

    def shaped(self, layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What there is for each layer, with the ensemble's dimensions in front."""
        return tuple(part.view(*self.ensemble, *part.shape[1:]) for part in layers)

    def problem(
        self,
        order: OrderChoice,
        memory_budget: int,
        *,
        compiled: bool = True,
        unbiased: bool = False,
    ) -> Problem:
        """The problem of both moments; ``compiled=False`` insists on the PyTorch path."""
        memory_budget = check_budget(memory_budget)
        if unbiased:
            self._check_unbiased()
        plan = make_plan(
            self.size,
            order,
            memory_budget,
            on_cpu=self._device.type == "cpu",
            compiled=compiled and not unbiased and self.covered,
        )
        return Problem(self.arch, self.data, plan, self.size, unbiased=unbiased)

    def linear_problem(self, quantity: Quantity, memory_budget: int) -> Problem:
        """The problem of the trace alone, or of the loss."""
        memory_budget = check_budget(memory_budget)
        plan = make_linear_plan(
            self.size,
            memory_budget,
            on_cpu=self._device.type == "cpu",
            compiled=self.covered,
        )
        return Problem(self.arch, self.data, plan, self.size, quantity)

    @property
    def _device(self) -> torch.device:
        return self.weights[0].device

    def _check_unbiased(self) -> None:
        if self.size.samples < 2:
            raise ValueError(
                "unbiased=True leaves out each sample's pair with itself, so it needs at least 2 "
                f"samples; got {self.size.samples}"
            )
        if not self.is_mean:
            raise ValueError(
                "unbiased=True estimates the moments of a mean over samples; got a sum, or a mean "
                "weighed by classes, whose denominator depends on the batch: use a mean without "
                "class weights"
            )


def prepare(  # noqa: PLR0917 - the arguments of every public function, in their order
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    activation: Activations,
    loss: str | Loss,
    reduction: Reduction,
    *,
    scale: float | Tensor | None = None,
    rows: Sequence[slice] | None = None,
) -> Setup:
    """Check everything at the door and bring it into the engine's shapes.

    Args:
        weights: As for :func:`moments`, like all that follows.
        x: Inputs.
        y: Targets; for classes also a distribution over them for each sample.
        activation: Of all layers but the last, or one for each of them.
        loss: Of the logits.
        reduction: Of the loss over samples.
        scale: The weight of each sample, ``(*ensemble, samples)``, or of each of its outputs, in
            place of what ``reduction`` gives.
        rows: The trained rows of each layer's weights (all by default).
    """
    loss = get_loss(loss)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"unknown reduction {reduction!r}: expected 'mean' or 'sum'")
    check_weights(weights)
    activations = _read_activations(activation, len(weights) - 1)
    first, outputs = weights[0], weights[-1].shape[-1]
    check_features(x, like=first)
    check_constant(x, "x")
    check_constant(y, "y")
    if x.ndim < 2 or x.shape[-1] + 1 != first.shape[-2]:
        raise ValueError(
            f"x and weights[0] do not match: expected x of shape (samples, {first.shape[-2] - 1}) "
            f"for weights[0] of shape {tuple(first.shape)} (inputs + 1, outputs), bias in row 0; "
            f"got {tuple(x.shape)}"
        )
    y = as_outputs(y, samples=tuple(x.shape[:-1]), outputs=outputs, loss=loss, like=first)
    check_loss(loss, y, like=first)
    try:
        ensemble = torch.broadcast_shapes(
            *(weight.shape[:-2] for weight in weights), x.shape[:-2], y.shape[:-2]
        )
    except RuntimeError as error:
        leading = " and ".join(str(tuple(weight.shape[:-2])) for weight in weights)
        raise ValueError(
            "the leading (ensemble) dimensions do not broadcast: weights "
            f"{leading}, x {tuple(x.shape[:-2])}, y {tuple(y.shape[:-2])}"
        ) from error
    networks = math.prod(ensemble)
    if networks == 0:
        raise ValueError(
            f"expected at least one network; got an ensemble of shape {tuple(ensemble)}"
        )
    samples = x.shape[-2]
    if scale is None:
        terms = samples * (outputs if loss.per_output else 1)
        scale = 1 / terms if reduction == "mean" else 1.0
    if isinstance(scale, Tensor):
        scale = _flatten(scale if scale.ndim == y.ndim else scale.unsqueeze(-1), ensemble, 2)
    rows = tuple(rows or (slice(0, weight.shape[-2]) for weight in weights))
    arch = Architecture(activations, loss, rows)
    data = Data(_flatten(x.detach(), ensemble, 2), _flatten(y.detach(), ensemble, 2), scale)
    size = Size(
        networks,
        samples,
        (x.shape[-1], *(weight.shape[-1] for weight in weights)),
        tuple(part.stop - part.start for part in rows),
        first.element_size(),
    )
    return Setup(
        arch,
        data,
        tuple(
            weight.expand(*ensemble, *weight.shape[-2:]).reshape(networks, *weight.shape[-2:])
            for weight in weights
        ),
        ensemble,
        size,
        is_mean=reduction == "mean",
        covered=covers(arch, size, data),
    )


def _read_activations(activation: Activations, count: int) -> tuple[Activation, ...]:
    if isinstance(activation, str | Activation):
        return (get_activation(activation),) * count
    if not (
        isinstance(activation, Sequence)
        and all(isinstance(each, str | Activation) for each in activation)
    ):
        raise TypeError(
            "activation must be a name such as 'tanh', a lowland.activations.Activation, or a "
            f"sequence of these, one for each hidden layer; got {activation!r}"
        )
    if len(activation) != count:
        raise ValueError(
            f"expected one activation, or one for each of the {count} hidden layers; got "
            f"{len(activation)}"
        )
    return tuple(get_activation(each) for each in activation)


def _flatten(tensor: Tensor, ensemble: torch.Size, own: int) -> Tensor:
    """One leading dimension for the ensemble: of size 1 where all networks share the tensor."""
    leading, trailing = tensor.shape[:-own], tensor.shape[-own:]
    if math.prod(leading) == 1:
        return tensor.reshape(1, *trailing)
    return tensor.expand(*ensemble, *trailing).reshape(-1, *trailing)

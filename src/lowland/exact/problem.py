r"""The closed form as a differentiable function: plan, run, and the analytic backward pass.

The gradient of :math:`a\,\mathrm{Tr} H + b\,\mathrm{Tr} H^2` is :math:`\nabla\langle C, H\rangle`
with the constant matrix :math:`C = a I + 2 b H` (theorems 2 to 5 of arXiv:2606.28662 in one
formula). So the backward pass runs over the samples once more and contracts each sample's blocks
with ``C``; autograd never sees the inside of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from lowland.exact.c_backend import CBackend, make_c_backend
from lowland.exact.plan import Plan
from lowland.exact.size import Size
from lowland.exact.terms import Architecture, Data, Quantity
from lowland.exact.torch_backend import PerNetwork, TorchBackend

Result = TypeVar("Result")

Backend = TorchBackend | CBackend
"""Some networks and their data on the path that a plan has chosen."""


@dataclass(frozen=True)
class Problem:
    """An architecture, its data, and the plan to run it by."""

    arch: Architecture
    data: Data
    plan: Plan
    size: Size
    quantity: Quantity = "moments"
    unbiased: bool = False
    differentiable: bool = False

    def on_torch(
        self, weights: Sequence[Tensor], compute: Callable[[TorchBackend], Result]
    ) -> list[Result]:
        """``compute`` on the PyTorch path, for each group of networks that are handled together."""
        with _full_precision(weights[0]):
            return [compute(self._reference(weights, chosen)) for chosen in self._groups(weights)]

    def on_backend(
        self, weights: Sequence[Tensor], compute: Callable[[slice, Backend], Result]
    ) -> list[Result]:
        """``compute`` on the path that the plan has chosen, group by group."""
        make = self._kernel if self.plan.compiled else self._reference
        with _full_precision(weights[0]):
            return [compute(chosen, make(weights, chosen)) for chosen in self._groups(weights)]

    def _reference(self, weights: Sequence[Tensor], chosen: slice) -> TorchBackend:
        return TorchBackend(
            self.arch,
            [weight[chosen] for weight in weights],
            self.data.of_networks(chosen),
            self.plan,
            self.size,
            self.quantity,
            self.unbiased,
            self.differentiable,
        )

    def _kernel(self, weights: Sequence[Tensor], chosen: slice) -> CBackend:
        weight, output = weights
        return make_c_backend(
            self.arch,
            weight[chosen],
            output[chosen].squeeze(2),
            self.data.of_networks(chosen),
            self.plan.block,
            self.quantity,
        )

    def _groups(self, weights: Sequence[Tensor]) -> Iterator[slice]:
        size, networks = self.plan.networks, weights[0].shape[0]
        return (slice(start, start + size) for start in range(0, networks, size))


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast would round the factors of each matrix product to 16 bits."""
    return torch.autocast(tensor.device.type, enabled=False)


class _Moments(Function):
    # The data come as arguments, not inside the problem: so torch.func can unwrap them.
    @staticmethod
    def forward(problem: Problem, x: Tensor, y: Tensor, scale: Any, *weights: Tensor) -> Any:
        problem = replace(problem, data=Data(x, y, scale))
        first, second, kept = zip(
            *problem.on_backend(weights, lambda _, part: part.moments()), strict=True
        )
        keep = problem.plan.keep or not problem.plan.compiled
        return _join(first), _join(second), *map(_join, zip(*kept, strict=True) if keep else ())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        problem, x, y, scale, *weights = inputs
        kept = output[2:]
        ctx.mark_non_differentiable(*kept)
        # Saved rather than kept as attributes, tensors are guarded against changes in place.
        guarded = [scale] if isinstance(scale, Tensor) else []
        ctx.save_for_backward(x, y, *guarded, *weights, *kept)
        ctx.problem, ctx.scale = problem, scale if not guarded else None
        ctx.layers = len(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *rest = ctx.saved_tensors
        scale = rest.pop(0) if ctx.scale is None else ctx.scale
        result = _Gradient.apply(  # type: ignore[no-untyped-call]
            ctx.problem, ctx.layers, grads[0], grads[1], x, y, scale, *rest
        )
        return None, None, None, None, *result


class _Gradient(Function):
    """The backward pass, as a function of its own: differentiated, it says what is wrong."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd functions take their arguments by position
        problem: Problem,
        layers: int,
        trace_weight: PerNetwork,
        square_weight: PerNetwork,
        x: Tensor,
        y: Tensor,
        scale: Any,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        problem = replace(problem, data=Data(x, y, scale))
        weights, kept = rest[:layers], rest[layers:]

        def gradient(chosen: slice, part: Backend) -> Sequence[Tensor]:
            return part.gradient(
                trace_weight[chosen], square_weight[chosen], [each[chosen] for each in kept]
            )

        return join_layers(problem.on_backend(weights, gradient), weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
        raise RuntimeError(
            "the exact moments can be differentiated once, not twice: their gradient is a closed "
            "form without a graph of its own; for higher derivatives use "
            "lowland.hessian_moments(..., method='dense')"
        )


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def join_layers(parts: Sequence[Sequence[Tensor]], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Layer by layer the gradients of all groups of networks, shaped like the weights."""
    return tuple(
        _join(layer).view_as(weight)
        for layer, weight in zip(zip(*parts, strict=True), like, strict=True)
    )


def run_moments(problem: Problem, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``Tr H`` and ``Tr H^2`` of each network, with gradients in the weights."""
    data = problem.data
    wanted = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    problem = replace(problem, differentiable=wanted)
    first, second, *_ = _Moments.apply(  # type: ignore[no-untyped-call]
        problem, data.x, data.y, data.scale, *weights
    )
    return first, second

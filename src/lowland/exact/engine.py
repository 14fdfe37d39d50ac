r"""The closed form as a differentiable function: plan, run, and the analytic backward pass.

The gradient of :math:`a\,\mathrm{Tr} H + b\,\mathrm{Tr} H^2` is :math:`\nabla\langle C, H\rangle`
with the constant matrix :math:`C = a I + 2 b H` (theorems 2 to 5 of arXiv:2606.28662 in one
formula). So the backward pass runs over the samples once more and contracts each sample's blocks
with ``C``; autograd never sees the inside of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from lowland.exact.compiled import Kernel, make_kernel
from lowland.exact.plan import Plan
from lowland.exact.reference import PerNetwork, Reference
from lowland.exact.terms import Architecture, Data, Quantity

Result = TypeVar("Result")

Pass = Reference | Kernel
"""Some networks and their data on the path that a plan has chosen."""


@dataclass(frozen=True)
class Problem:
    """An architecture, its data, and the plan to run it by."""

    arch: Architecture
    data: Data
    plan: Plan
    quantity: Quantity = "moments"

    def on_references(
        self, weight: Tensor, output: Tensor, compute: Callable[[Reference], Result]
    ) -> list[Result]:
        """``compute`` on the PyTorch path, for each group of networks that are handled together."""
        with _full_precision(weight):
            return [
                compute(self._reference(weight, output, chosen))
                for chosen in self._groups(weight.shape[0])
            ]

    def on_passes(
        self, weight: Tensor, output: Tensor, compute: Callable[[slice, Pass], Result]
    ) -> list[Result]:
        """``compute`` on the path that the plan has chosen, group by group."""
        make = self._kernel if self.plan.compiled else self._reference
        with _full_precision(weight):
            return [
                compute(chosen, make(weight, output, chosen))
                for chosen in self._groups(weight.shape[0])
            ]

    def _reference(self, weight: Tensor, output: Tensor, chosen: slice) -> Reference:
        data = self.data.of_networks(chosen)
        return Reference(
            self.arch,
            weight[chosen],
            output[chosen],
            data,
            self.plan,
            self.quantity,
        )

    def _kernel(self, weight: Tensor, output: Tensor, chosen: slice) -> Kernel:
        data = self.data.of_networks(chosen)
        return make_kernel(
            self.arch,
            weight[chosen],
            output[chosen],
            data,
            self.plan.block,
            self.quantity,
        )

    def _groups(self, networks: int) -> Iterator[slice]:
        size = self.plan.networks
        return (slice(start, start + size) for start in range(0, networks, size))


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast would round the factors of each matrix product to 16 bits."""
    return torch.autocast(tensor.device.type, enabled=False)


class _Moments(Function):
    # The data come as arguments, not inside the problem: so torch.func can unwrap them.
    @staticmethod
    def forward(
        problem: Problem, weight: Tensor, output: Tensor, *data: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        problem = replace(problem, data=Data(*data))
        parts = problem.on_passes(weight, output, lambda _, part: part.moments())
        kept = [part[2] for part in parts if part[2] is not None and problem.plan.keep]
        return (
            _join([part[0] for part in parts]),
            _join([part[1] for part in parts]),
            _join(kept) if kept else weight.new_empty(0),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        problem, weight, output_weight, x, y, scale = inputs
        hessian = output[2]
        ctx.mark_non_differentiable(hessian)
        # Saved rather than kept as attributes, tensors are guarded against changes in place.
        guarded = [scale] if isinstance(scale, Tensor) else []
        ctx.save_for_backward(weight, output_weight, hessian, x, y, *guarded)
        ctx.problem, ctx.scale = problem, scale if not guarded else None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, output, hessian, x, y, *guarded = ctx.saved_tensors
        scale = guarded[0] if guarded else ctx.scale
        in_weight, in_output = _Gradient.apply(  # type: ignore[no-untyped-call]
            ctx.problem, weight, output, hessian, grads[0], grads[1], x, y, scale
        )
        return None, in_weight, in_output, None, None, None


class _Gradient(Function):
    """The backward pass, as a function of its own: differentiated, it says what is wrong."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd functions take their arguments by position
        problem: Problem,
        weight: Tensor,
        output: Tensor,
        hessian: Tensor,
        trace_weight: PerNetwork,
        square_weight: PerNetwork,
        *data: Any,
    ) -> tuple[Tensor, Tensor]:
        problem = replace(problem, data=Data(*data))

        def gradient(chosen: slice, part: Pass) -> tuple[Tensor, Tensor]:
            kept = hessian[chosen] if hessian.numel() else None
            return part.gradient(trace_weight[chosen], square_weight[chosen], kept)

        parts = problem.on_passes(weight, output, gradient)
        return _join([part[0] for part in parts]), _join([part[1] for part in parts])

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


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def run_moments(problem: Problem, weight: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """``Tr H`` and ``Tr H^2`` of each network, with gradients in ``weight`` and ``output``."""
    data = problem.data
    first, second, _ = _Moments.apply(  # type: ignore[no-untyped-call]
        problem, weight, output, data.x, data.y, data.scale
    )
    return first, second

"""A number whose gradient is known already, in the place of one with a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

ONCE = (
    "a penalty that limits its gradient, or has a strength=, has taken it already, which leaves "
    "nothing to differentiate again: use weight= with limit=None"
)


def carried(value: Tensor, inputs: Sequence[Tensor], gradient: Sequence[Tensor]) -> Tensor:
    """A value with this gradient in some inputs, which holds no other graph.

    Args:
        value: A scalar.
        inputs: What it is a function of.
        gradient: As many tensors; a backward pass may hand them out as they are.
    """
    found: Tensor = _Carried.apply(value, _Held(gradient), *inputs)  # type: ignore[no-untyped-call]
    return found


class _Held:
    """A gradient, as long as somebody may still ask for it."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts: list[Tensor] | None = list(parts)

    def take(self, slope: Tensor) -> list[Tensor]:
        parts = self.parts
        if parts is None:
            raise RuntimeError(
                "the gradient of this loss has been handed out: to go backward twice, pass "
                "retain_graph=True to the first call"
            )
        kept = torch._C._autograd._get_current_graph_task_keep_graph()  # noqa: SLF001
        if not kept:
            self.parts = None
            if slope.device.type == "cpu" and slope == 1:  # nearly always: a pass less
                return parts
        return list(torch._foreach_mul(parts, slope))  # noqa: SLF001


class _Carried(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, held: _Held, *inputs: Tensor) -> Tensor:
        ctx.held, ctx.inputs = held, inputs
        return value.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return None, None, *ctx.held.take(slope)
        return None, None, *_Gradient.apply(ctx.held, slope, *ctx.inputs)  # type: ignore[no-untyped-call]


class _Gradient(Function):
    """The backward pass as a function of the inputs, whose own backward pass says no."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ARG004
        held: _Held,
        slope: Tensor,
        *inputs: Tensor,  # noqa: ARG004
    ) -> tuple[Tensor, ...]:
        return tuple(held.take(slope))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
        raise RuntimeError(ONCE)

r"""Functions of each network's whole ``H`` with analytic gradients, however ``H`` is looked at.

The gradient of any of them is :math:`\nabla\langle C, H\rangle` with a constant ``C``; of several,
that with the sum of their matrices, each times the slope that a backward pass brings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd import Function

from lowland.exact.problem import Backend, Problem, join_layers, save, saved
from lowland.exact.torch_backend import PerNetwork


@runtime_checkable
class Way(Protocol):
    """How to come to functions of ``H``, and to their gradients, with a backend of the plan's."""

    def look(self, backend: Any) -> tuple[list[PerNetwork], list[Tensor]]:
        """Of each function its values; and what, if kept, spares the gradient from looking again.

        All tensors have the networks in front.
        """

    def gradient(
        self, backend: Any, slopes: Sequence[PerNetwork], kept: Sequence[Tensor]
    ) -> list[Tensor]:
        """The gradient of the functions' sum, each times its slope, in each layer's weights.

        That in the data comes last, if these vary.
        """


# Of matrices (networks, P, P) each function's value, and what makes its C.
OfMatrix = Callable[[Tensor], Iterable[tuple[PerNetwork, Callable[[], Tensor]]]]


@dataclass(frozen=True)
class ByMatrix:
    """Functions of ``H``, which is formed; what is kept is the ``C`` of each.

    Attributes:
        functions: Of matrices each function's value, and what makes its ``C``.
        keep: Whether the gradient will be asked for, and the plan has room for ``C``.
    """

    functions: OfMatrix
    keep: bool

    def look(self, backend: Backend) -> tuple[list[PerNetwork], list[Tensor]]:
        """The values, and what is kept."""
        found = list(self.functions(backend.hessian()))
        return [value for value, _ in found], [make() for _, make in found] if self.keep else []

    def gradient(
        self, backend: Backend, slopes: Sequence[PerNetwork], kept: Sequence[Tensor]
    ) -> list[Tensor]:
        """One contraction, with the sum of all ``C``."""
        matrices = kept or [make() for _, make in self.functions(backend.hessian())]
        weighed = [
            slope[:, None, None] * matrix for slope, matrix in zip(slopes, matrices, strict=True)
        ]
        return list(backend.contraction(torch.stack(weighed).sum(0)))


def run(problem: Problem, weights: Sequence[Tensor], way: Way) -> tuple[Tensor, ...]:
    """Functions of each network's ``H``, with gradients in the weights, and in the inputs.

    Args:
        problem: The networks, and how many at a time.
        weights: Of each layer, ``(networks, inputs + 1, outputs)``.
        way: How to come to them.

    Returns:
        Of each function a tensor ``(networks,)``.
    """
    data = problem.data
    values, *_ = _OfMatrix.apply(  # type: ignore[no-untyped-call]
        problem, way, len(weights), data.x, data.y, data.scale, *weights
    )
    return tuple(values.unbind(1))


class _OfMatrix(Function):
    """The functions' values ``(networks, functions)``, and what is kept for the backward pass."""

    # The data come as arguments, not inside the problem: so torch.func can unwrap them.
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd functions take their arguments by position
        problem: Problem,
        way: Way,
        layers: int,  # noqa: ARG004
        x: Tensor,
        y: Tensor,
        scale: Any,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        problem = problem.on(x, y, scale)
        # Of some networks after the others.
        pieces = problem.on_backend(weights, lambda _, backend: way.look(backend))
        values = torch.cat([torch.stack(values, 1) for values, _ in pieces])
        return values, *map(torch.cat, zip(*(kept for _, kept in pieces), strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        problem, way, layers, x, y, scale, *weights = inputs
        ctx.mark_non_differentiable(*output[1:])
        save(ctx, x, y, scale, *weights, *output[1:])
        ctx.problem, ctx.way, ctx.layers = problem, way, layers

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = _Gradient.apply(  # type: ignore[no-untyped-call]
            ctx.problem, ctx.way, ctx.layers, grads[0], *saved(ctx)
        )
        in_weights, in_x = found[: ctx.layers], found[ctx.layers :] or (None,)
        return None, None, None, *in_x, None, None, *in_weights


class _Gradient(Function):
    """The backward pass of ``_OfMatrix``, whose own backward pass says no.

    Without that, second derivatives would silently be those of a constant.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd functions take their arguments by position
        problem: Problem,
        way: Way,
        layers: int,
        slopes: Tensor,
        x: Tensor,
        y: Tensor,
        scale: Any,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        problem = problem.on(x, y, scale)
        weights, kept = rest[:layers], rest[layers:]

        def gradient(some: slice, backend: Backend) -> list[Tensor]:
            return way.gradient(backend, slopes[some].unbind(1), [each[some] for each in kept])

        like = [*weights, x] if problem.data.inputs_vary else weights
        return join_layers(problem.on_backend(weights, gradient), like)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
        raise RuntimeError(
            "functions of the exact Hessian can be differentiated once, not twice: their gradient "
            "is a closed form without a graph of its own; for higher derivatives use "
            "lowland.dense.dense_hessian, which has one"
        )

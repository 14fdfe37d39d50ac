r"""The closed form as a differentiable function, with its analytic backward pass.

The gradient of :math:`a\,\mathrm{Tr} H + b\,\mathrm{Tr} H^2` is :math:`\nabla\langle C, H\rangle`
with the constant matrix :math:`C = a I + 2 b H` (theorems 2 to 5 of arXiv:2606.28662 in one
formula). So the backward pass goes over the samples once more and contracts each sample's blocks
with ``C``; autograd never sees the inside of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
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
"""Some networks with their data, in PyTorch or in compiled code: both give the same results."""


@dataclass(frozen=True)
class Problem:
    """What is to be computed of which networks and data, and the plan to do it by.

    Attributes:
        arch: What the networks share.
        data: The samples.
        plan: In which order, by which backend, how much at a time.
        size: The extent of it all.
        quantity: What is wanted of each network.
        unbiased: Whether ``Tr H^2`` leaves out each sample's pair with itself.
        differentiable: Whether the gradient will be asked for.
    """

    arch: Architecture
    data: Data
    plan: Plan
    size: Size
    quantity: Quantity = "moments"
    unbiased: bool = False
    differentiable: bool = False

    def on(self, x: Tensor, y: Tensor, scale: float | Tensor) -> Problem:
        """The same of other samples of the same shapes."""
        return replace(self, data=replace(self.data, x=x, y=y, scale=scale))

    def on_torch(
        self, weights: Sequence[Tensor], compute: Callable[[TorchBackend], Result]
    ) -> list[Result]:
        """``compute`` in PyTorch, for as many networks at a time as the plan says."""
        with full_precision(weights[0]):
            return [compute(self._torch_backend(weights, some)) for some in self._slices(weights)]

    def on_backend(
        self, weights: Sequence[Tensor], compute: Callable[[slice, Backend], Result]
    ) -> list[Result]:
        """``compute`` with the plan's backend, for as many networks at a time as the plan says.

        It is given the networks' places in the ensemble, too.
        """
        make = self._c_backend if self.plan.compiled else self._torch_backend
        with full_precision(weights[0]):
            return [compute(some, make(weights, some)) for some in self._slices(weights)]

    def _torch_backend(self, weights: Sequence[Tensor], networks: slice) -> TorchBackend:
        return TorchBackend(
            self.arch,
            [weight[networks] for weight in weights],
            self.data.of_networks(networks),
            self.plan,
            self.size,
            self.quantity,
            self.unbiased,
            self.differentiable,
        )

    def _c_backend(self, weights: Sequence[Tensor], networks: slice) -> CBackend:
        weight, output = weights  # W and v: only one hidden layer is covered
        return make_c_backend(
            self.arch,
            weight[networks],
            output[networks].squeeze(2),
            self.data.of_networks(networks),
            self.plan.chunk,
            self.quantity,
        )

    def _slices(self, weights: Sequence[Tensor]) -> Iterator[slice]:
        """The ensemble, as many networks at a time as the plan says."""
        size, networks = self.plan.networks, weights[0].shape[0]
        return (slice(start, start + size) for start in range(0, networks, size))


TWICE = (
    "the exact moments can be differentiated once, not twice: their gradient is a closed form "
    "without a graph of its own; for higher derivatives use "
    "lowland.hessian_moments(..., method='dense')"
)


def full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """Keep a caller's autocast out: it would round the factors of each product to 16 bits."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind):  # nearly always, and then the look is far cheaper
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def save(ctx: Any, x: Tensor, y: Tensor, scale: float | Tensor, *others: Tensor) -> None:
    """Save data and other tensors for a backward pass, which :func:`saved` gives back.

    Rather than as attributes: so they are guarded against changes in place.
    """
    guarded = [scale] if isinstance(scale, Tensor) else []
    ctx.save_for_backward(x, y, *guarded, *others)
    ctx.scale = scale if not guarded else None


def saved(ctx: Any) -> tuple[Any, ...]:
    """What :func:`save` was given, in its order."""
    x, y, *rest = ctx.saved_tensors
    scale = rest.pop(0) if ctx.scale is None else ctx.scale
    return x, y, scale, *rest


class _Moments(Function):
    """``Tr H`` and ``Tr H^2`` of all networks, and what is kept for the backward pass."""

    # The data come as arguments, not inside the problem: so torch.func can unwrap them.
    @staticmethod
    def forward(problem: Problem, x: Tensor, y: Tensor, scale: Any, *weights: Tensor) -> Any:
        problem = problem.on(x, y, scale)
        first, second, kept = zip(
            *problem.on_backend(weights, lambda _, backend: backend.moments()), strict=True
        )
        # The compiled code always hands out its packed Hessians, also where the plan has no room.
        keep = problem.plan.keep or not problem.plan.compiled
        return _join(first), _join(second), *map(_join, zip(*kept, strict=True) if keep else ())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        problem, x, y, scale, *weights = inputs
        kept = output[2:]
        ctx.mark_non_differentiable(*kept)
        save(ctx, x, y, scale, *weights, *kept)
        ctx.problem, ctx.layers = problem, len(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        result = _Gradient.apply(  # type: ignore[no-untyped-call]
            ctx.problem, ctx.layers, grads[0], grads[1], *saved(ctx)
        )
        in_weights, in_x = result[: ctx.layers], result[ctx.layers :] or (None,)
        return None, *in_x, None, None, *in_weights


class _Gradient(Function):
    """The backward pass of ``_Moments`` as a function of its own, whose own backward pass says no.

    Without that, second derivatives would silently be those of a constant.
    """

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
        problem = problem.on(x, y, scale)
        weights, kept = rest[:layers], rest[layers:]

        def gradient(some: slice, backend: Backend) -> Sequence[Tensor]:
            return backend.gradient(
                trace_weight[some], square_weight[some], [each[some] for each in kept]
            )

        like = [*weights, x] if problem.data.inputs_vary else weights
        return join_layers(problem.on_backend(weights, gradient), like)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
        raise RuntimeError(TWICE)


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """Those of some networks after those of others; a single one without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def join_layers(
    gradients: Sequence[Sequence[Tensor]], like: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Each layer's gradient, shaped like its weights, from those of some networks at a time."""
    return tuple(
        _join(layer).view_as(weight)
        for layer, weight in zip(zip(*gradients, strict=True), like, strict=True)
    )


def run_moments(problem: Problem, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``Tr H`` and ``Tr H^2`` of each network, with gradients in the weights, and in the inputs."""
    data = problem.data
    wanted = torch.is_grad_enabled() and any(each.requires_grad for each in (data.x, *weights))
    problem = replace(problem, differentiable=wanted)
    first, second, *_ = _Moments.apply(  # type: ignore[no-untyped-call]
        problem, data.x, data.y, data.scale, *weights
    )
    return first, second

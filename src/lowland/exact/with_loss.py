"""``Tr H`` beside the logits, as one differentiable function: a loss and its trace of one pass.

Both gradients in a layer's weights are products with the layer's inputs, which are taken together:
what the trace costs on top of the loss is what lies between the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lowland.exact.problem import TWICE, full_precision
from lowland.exact.terms import Architecture, Data
from lowland.exact.trace_alone import Layer, TracePass, joined, split

# A layer's weights as PyTorch's Linear has them, (outputs, inputs), and its biases; or those of
# networks, (networks, inputs + 1, outputs), with the biases in row 0.
Given = tuple[Tensor, Tensor | None] | Tensor


def logits_and_trace(
    arch: Architecture, given: Sequence[Given], data: Data
) -> tuple[Tensor, Tensor]:
    """The logits, ``(networks, samples, K)``, and ``Tr H`` of each network.

    Of a network as PyTorch's layers have it, without that dimension. Both can be differentiated
    once in the weights; one alone at its own price, that of a plain backward pass for the logits.
    """
    flat = [part for each in given for part in (each if isinstance(each, tuple) else (each,))]
    logits, trace = _LogitsAndTrace.apply(arch, data, *flat)  # type: ignore[no-untyped-call]
    return logits, trace


def _layers(arch: Architecture, flat: Sequence[Tensor | None]) -> list[Layer]:
    if len(flat) == len(arch.rows):
        return [split(weight) for weight in flat if weight is not None]
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return [
        (weight, None if bias is None else bias.unsqueeze(1))
        for weight, bias in pairs
        if weight is not None
    ]


class _LogitsAndTrace(Function):
    @staticmethod
    def forward(
        ctx: Any, arch: Architecture, data: Data, *flat: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with full_precision(data.x):
            passed = TracePass(arch, _layers(arch, flat), data)
        # For the guard against changes in place; what the pass holds beside them is its own.
        ctx.save_for_backward(data.x, data.y, *flat)
        ctx.passed, ctx.joined = passed, len(flat) == len(arch.rows)
        ctx.set_materialize_grads(False)
        return passed.hand_out()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018 - raises if one has changed, or the graph is freed
        # Whether somebody asks for it in the layers below all that are looked at.
        below = ctx.passed.lowest * (1 if ctx.joined else 2)
        how = ctx.joined, any(ctx.needs_input_grad[2 : 2 + below])
        if not torch.is_grad_enabled():  # nobody will differentiate it
            return None, None, *_gradient(ctx.passed, how, *grads)
        return None, None, *_Gradient.apply(ctx.passed, how, *grads)  # type: ignore[no-untyped-call]


def _gradient(
    passed: TracePass,
    how: tuple[bool, bool],
    logits: Tensor | None,
    trace: Tensor | None,
) -> tuple[Tensor | None, ...]:
    as_joined, everywhere = how
    with full_precision(passed.layers[0][0]):
        adjoint = None if logits is None else logits.mT
        found, _ = passed.gradient(trace, adjoint, everywhere=everywhere)
    if as_joined:
        return tuple(None if part is None else joined(part) for part in found)
    flat: list[Tensor | None] = []
    for part in found:
        matrix, bias = part or (None, None)
        flat += [matrix, None if bias is None else bias.squeeze(1)]
    return tuple(flat)


class _Gradient(Function):
    """The backward pass as a function of its own, whose own backward pass says no."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ARG004
        passed: TracePass,
        how: tuple[bool, bool],
        logits: Tensor | None,
        trace: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        return _gradient(passed, how, logits, trace)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
        raise RuntimeError(TWICE)

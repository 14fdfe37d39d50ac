r"""Both passes of the closed form: the moments, and the gradient of any function of them.

The gradient of :math:`a\,\mathrm{Tr} H + b\,\mathrm{Tr} H^2` is :math:`\nabla\langle C, H\rangle`
with the constant matrix :math:`C = a I + 2 b H` (math of arXiv:2606.28662, theorems 2 to 5, in one
formula). So the backward pass runs over the samples once more and contracts each sample's blocks
with ``C``; autograd never sees the inside of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from lowland.exact import parameters, samples
from lowland.exact.plan import Plan
from lowland.exact.terms import (
    Adjoint,
    Architecture,
    Data,
    Terms,
    compute_terms,
    pull_back,
    trace,
    trace_adjoint,
)

Weight = Float[Tensor, "networks inputs1 hidden"]
Output = Float[Tensor, "networks hidden1"]
Scalars = Float[Tensor, " networks"]


@dataclass(frozen=True)
class Problem:
    """An architecture, its data, and the plan to run it by; ``plan`` is None for the trace alone."""

    arch: Architecture
    data: Data
    plan: Plan | None
    run: int
    networks: int

    def groups(self, weight: Weight, output: Output) -> Iterator[tuple[slice, _Group]]:
        """Networks that are handled together."""
        for start in range(0, weight.shape[0], self.networks):
            chosen = slice(start, start + self.networks)
            data = self.data.of_networks(chosen)
            yield chosen, _Group(replace(self, data=data), weight[chosen], output[chosen])


class _Group:
    """Some networks, and their terms run by run."""

    def __init__(self, problem: Problem, weight: Weight, output: Output) -> None:
        self.arch, self.plan, self.output = problem.arch, problem.plan, output
        total = problem.data.samples
        self.runs = [slice(i, min(i + problem.run, total)) for i in range(0, total, problem.run)]
        self.inputs = problem.arch.input_rows.stop - problem.arch.input_rows.start

        def terms(index: int) -> Terms:
            return compute_terms(problem.arch, weight, output, problem.data, self.runs[index])

        # Pairs of runs need each run many times: keep the terms if memory allows.
        keep = problem.plan is not None and problem.plan.order == "samples" and problem.plan.keep
        self.terms: Callable[[int], Terms] = lru_cache(None if keep else 1)(terms)

    def all_terms(self) -> Iterator[Terms]:
        return (self.terms(index) for index in range(len(self.runs)))

    def blocks(self) -> Iterator[parameters.Block]:
        assert self.plan is not None
        return parameters.row_blocks(self.inputs, self.plan.block)

    def hessian_rows(self, block: parameters.Block) -> Tensor:
        return parameters.hessian_rows(self.arch, self.all_terms(), block)

    def moments(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``Tr H``, ``Tr H^2``, and ``H`` itself where the plan keeps it."""
        if self.plan is None:
            total = sum_tensors(trace(terms) for terms in self.all_terms())
            return total, torch.zeros_like(total), None
        if self.plan.order == "samples":
            return *self._moments_over_samples(), None
        first = second = None
        kept: Tensor | None = None
        start = 0
        for block in self.blocks():
            rows = self.hessian_rows(block)
            diagonal = rows.diagonal(start, 1, 2).sum(-1)
            square = torch.linalg.vector_norm(rows, dim=(1, 2)).square()
            first = diagonal if first is None else first + diagonal
            second = square if second is None else second + square
            start += rows.shape[1]
            kept = rows
        assert first is not None and second is not None and kept is not None
        whole = self.plan.keep and kept.shape[1] == kept.shape[2]
        return first, second, kept if whole else None

    def _moments_over_samples(self) -> tuple[Tensor, Tensor]:
        first = sum_tensors(trace(terms) for terms in self.all_terms())
        second = torch.zeros_like(first)
        for i in range(len(self.runs)):
            left = self.terms(i)
            for j in range(i, len(self.runs)):
                # The double sum is symmetric: half of the pairs of runs count twice.
                pairs = samples.pair_contributions(self.arch, left, self.terms(j))
                second.add_(pairs.sum((1, 2)), alpha=1 if i == j else 2)
        return first, second

    def pairs(self) -> Tensor:
        """The terms of the double sum over samples, ``(networks, samples, samples)``."""
        rows = [
            torch.cat(
                [samples.pair_contributions(self.arch, left, right) for right in self.all_terms()],
                dim=2,
            )
            for left in map(self.terms, range(len(self.runs)))
        ]
        return torch.cat(rows, dim=1)

    def adjoints(
        self, trace_weight: Scalars, square_weight: Scalars, hessian: Tensor | None
    ) -> Iterator[tuple[slice, Terms, Adjoint]]:
        """Adjoints of ``trace_weight Tr H + square_weight Tr H^2``, run by run.

        A run may come up several times, once for each block of rows of ``H``; its adjoints add up.
        """
        a, b = trace_weight[:, None, None], square_weight[:, None, None]
        if self.plan is None:
            for run, terms in zip(self.runs, self.all_terms(), strict=True):
                yield run, terms, trace_adjoint(terms, a)
            return
        if self.plan.order == "samples":
            for i, run in enumerate(self.runs):
                left = self.terms(i)
                total = samples.adjoint(self.arch, left, self.terms(0))
                for j in range(1, len(self.runs)):
                    total = total + samples.adjoint(self.arch, left, self.terms(j))
                yield run, left, trace_adjoint(left, a, total, b)
            return
        start = 0
        for block in self.blocks():
            rows = self.hessian_rows(block) if hessian is None else hessian
            matrix = (2 * b) * rows
            matrix.diagonal(start, 1, 2).add_(a.squeeze(2))
            start += rows.shape[1]
            for run, terms in zip(self.runs, self.all_terms(), strict=True):
                yield run, terms, parameters.adjoint(self.arch, terms, block, matrix)

    def gradient(
        self, trace_weight: Scalars, square_weight: Scalars, hessian: Tensor | None
    ) -> tuple[Weight, Output]:
        """The gradient of ``trace_weight Tr H + square_weight Tr H^2`` in ``W`` and ``v``."""
        weight = output = None
        for _, terms, adjoint in self.adjoints(trace_weight, square_weight, hessian):
            in_weight, in_output = pull_back(self.arch, self.output, terms, adjoint)
            weight = in_weight if weight is None else weight.add_(in_weight)
            output = in_output if output is None else output.add_(in_output)
        assert weight is not None and output is not None
        return weight, output


def sum_tensors(tensors: Iterator[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    total = next(tensors).clone()
    for tensor in tensors:
        total += tensor
    return total


class _Moments(Function):
    @staticmethod
    def forward(problem: Problem, weight: Weight, output: Output) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(weight.device.type, enabled=False):
            parts = [group.moments() for _, group in problem.groups(weight, output)]
        kept = [part[2] for part in parts if part[2] is not None]
        hessian = torch.cat(kept) if kept else weight.new_empty(0)
        return (
            torch.cat([part[0] for part in parts]),
            torch.cat([part[1] for part in parts]),
            hessian,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        problem, weight, weights_out = inputs
        hessian = output[2]
        ctx.mark_non_differentiable(hessian)
        ctx.save_for_backward(weight, weights_out, hessian)
        ctx.problem = problem

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        weight, output, hessian = ctx.saved_tensors
        in_weight, in_output = _Gradient.apply(
            ctx.problem, weight, output, hessian, grads[0], grads[1]
        )
        return None, in_weight, in_output


class _Gradient(Function):
    """The backward pass; a function of its own, so that differentiating it can say what is wrong."""

    @staticmethod
    def forward(
        problem: Problem,
        weight: Weight,
        output: Output,
        hessian: Tensor,
        trace_weight: Scalars,
        square_weight: Scalars,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(weight.device.type, enabled=False):
            parts = [
                group.gradient(
                    trace_weight[chosen],
                    square_weight[chosen],
                    hessian[chosen] if hessian.numel() else None,
                )
                for chosen, group in problem.groups(weight, output)
            ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "the exact moments can be differentiated once, not twice: their gradient is a closed "
            "form without a graph of its own; for higher derivatives use "
            "lowland.hessian_moments(..., method='dense')"
        )


def run_moments(problem: Problem, weight: Weight, output: Output) -> tuple[Tensor, Tensor]:
    """``Tr H`` and ``Tr H^2`` of each network, with gradients in ``weight`` and ``output``."""
    first, second, _ = _Moments.apply(problem, weight, output)
    return first, second

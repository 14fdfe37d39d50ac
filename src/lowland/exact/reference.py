"""Both passes of the closed form in PyTorch, for one group of networks, on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from lowland.exact import parameters, samples
from lowland.exact.plan import Plan
from lowland.exact.terms import (
    Adjoint,
    Architecture,
    Data,
    Quantity,
    Terms,
    compute_terms,
    loss_gradient,
    pull_back,
    trace,
    trace_adjoint,
)

PerNetwork = Float[Tensor, " networks"]


class Reference:
    """Some networks and their data, gone through run by run.

    Args:
        arch: What the networks share.
        weight: ``W``, ``(networks, inputs + 1, hidden)``.
        output: ``v``, ``(networks, hidden + 1)``.
        data: The samples.
        plan: Order of summation and sizes of its pieces.
        quantity: What is wanted.
    """

    def __init__(  # noqa: PLR0917 - the parts of a problem, in its order
        self,
        arch: Architecture,
        weight: Tensor,
        output: Tensor,
        data: Data,
        plan: Plan,
        quantity: Quantity,
    ) -> None:
        self.arch, self.output, self.plan, self.quantity = arch, output, plan, quantity
        total = data.samples
        runs = [slice(i, min(i + plan.run, total)) for i in range(0, total, plan.run)]
        self.runs = runs

        # Knows nothing of self: in a cycle the terms would live on until it is collected.
        def terms(index: int) -> Terms:
            return compute_terms(arch, weight, output, data, runs[index])

        # Pairs of runs need each run many times: keep the terms if memory allows.
        keep = plan.order == "samples" and plan.keep
        self.terms: Callable[[int], Terms] = lru_cache(None if keep else 1)(terms)

    def all_terms(self) -> Iterator[Terms]:
        """The terms of each run, computed when asked for."""
        return (self.terms(index) for index in range(len(self.runs)))

    def blocks(self) -> list[parameters.Block]:
        """The blocks of rows of ``H`` that the plan holds at a time."""
        rows = self.arch.input_rows
        return list(parameters.row_blocks(rows.stop - rows.start, self.plan.block))

    def hessian_rows(self, block: parameters.Block) -> Tensor:
        """One block of rows of ``H``."""
        return parameters.hessian_rows(self.arch, self.all_terms(), block)

    def moments(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``Tr H``, ``Tr H^2``, and ``H`` itself where the plan keeps it."""
        if self.quantity == "trace":
            first = self._trace()
            return first, torch.zeros_like(first), None
        if self.plan.order == "samples":
            return self._trace(), self._square_over_samples(), None
        first, second = self.output.new_zeros(2, self.output.shape[0])
        start = 0
        blocks = self.blocks()
        for block in blocks:
            rows = self.hessian_rows(block)
            first = first + rows.diagonal(start, 1, 2).sum(-1)
            second = second + torch.linalg.vector_norm(rows, dim=(1, 2)).square()
            start += rows.shape[1]
        return first, second, rows if self.plan.keep and len(blocks) == 1 else None

    def _trace(self) -> PerNetwork:
        total = self.output.new_zeros(self.output.shape[0])
        for terms in self.all_terms():
            total += trace(terms)
        return total

    def _square_over_samples(self) -> PerNetwork:
        total = self.output.new_zeros(self.output.shape[0])
        for i in range(len(self.runs)):
            left = self.terms(i)
            for j in range(i, len(self.runs)):
                # The double sum is symmetric: half of the pairs of runs count twice.
                pairs = samples.pair_contributions(self.arch, left, self.terms(j))
                total.add_(pairs.sum((1, 2)), alpha=1 if i == j else 2)
        return total

    def pairs(self) -> Float[Tensor, "networks samples samples"]:
        """The terms of the double sum over samples."""
        rows = []
        for index in range(len(self.runs)):
            left = self.terms(index)
            row = [samples.pair_contributions(self.arch, left, right) for right in self.all_terms()]
            rows.append(torch.cat(row, dim=2))
        return torch.cat(rows, dim=1)

    def adjoints(
        self, trace_weight: PerNetwork, square_weight: PerNetwork, hessian: Tensor | None
    ) -> Iterator[tuple[slice, Terms, Adjoint]]:
        """Adjoints of ``trace_weight Tr H + square_weight Tr H^2``, run by run.

        A run may come up several times, once for each block of rows of ``H``; its adjoints add up.
        """
        a, b = trace_weight[:, None, None], square_weight[:, None, None]
        if self.quantity == "trace":
            for run, terms in zip(self.runs, self.all_terms(), strict=True):
                yield run, terms, trace_adjoint(terms, a)
        elif self.plan.order == "samples":
            for index, run in enumerate(self.runs):
                left = self.terms(index)
                total = samples.adjoint(self.arch, left, self.terms(0))
                for other in range(1, len(self.runs)):
                    total = total + samples.adjoint(self.arch, left, self.terms(other))
                yield run, left, trace_adjoint(left, a, total, b)
        else:
            start = 0
            for block in self.blocks():
                rows = self.hessian_rows(block) if hessian is None else hessian
                matrix = (2 * b) * rows
                matrix.diagonal(start, 1, 2).add_(a.squeeze(2))
                start += rows.shape[1]
                del rows  # the next block needs its room, and that of its multiple
                for run, terms in zip(self.runs, self.all_terms(), strict=True):
                    yield run, terms, parameters.adjoint(self.arch, terms, block, matrix)
                del matrix

    def gradient(
        self, trace_weight: PerNetwork, square_weight: PerNetwork, hessian: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The gradient of ``trace_weight Tr H + square_weight Tr H^2`` in ``W`` and ``v``."""
        return _add_up(
            pull_back(self.arch, self.output, terms, adjoint)
            for _, terms, adjoint in self.adjoints(trace_weight, square_weight, hessian)
        )

    def loss_gradient(self) -> tuple[Tensor, Tensor]:
        """The gradient of the loss itself in ``W`` and ``v``."""
        return _add_up(loss_gradient(self.output, terms) for terms in self.all_terms())


def _add_up(parts: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    weight, output = next(parts)
    for in_weight, in_output in parts:
        weight, output = weight + in_weight, output + in_output
    return weight, output

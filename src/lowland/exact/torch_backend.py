"""Both passes of the closed form in PyTorch, for one group of networks, on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import grad

from lowland.exact import by_parameters, by_samples, trace_alone
from lowland.exact.blocks import dense
from lowland.exact.by_parameters import Found
from lowland.exact.plan import Plan
from lowland.exact.size import Size
from lowland.exact.terms import (
    Architecture,
    Data,
    Name,
    Quantity,
    Terms,
    compute_terms,
    loss_gradient,
)

PerNetwork = Float[Tensor, " networks"]
Slopes = dict[Name, Tensor]
Parts = Callable[[Terms], Iterable[Slopes]]
Values = Callable[[list[Tensor], Data], list[Tensor]]


class TorchBackend:
    """Some networks and their data, gone through run by run.

    Args:
        arch: What the networks share.
        weights: Of each layer, ``(networks, inputs + 1, outputs)``.
        data: The samples.
        plan: Order of summation and sizes of its pieces.
        size: The extent of the problem.
        quantity: What is wanted.
        unbiased: Whether ``Tr H^2`` leaves out each sample's pair with itself.
        differentiable: Whether the gradient will be asked for. Where that is cheaper
            :meth:`moments` then finds the gradients of both moments right away.
    """

    def __init__(  # noqa: PLR0917 - the parts of a problem, in its order
        self,
        arch: Architecture,
        weights: Sequence[Tensor],
        data: Data,
        plan: Plan,
        size: Size,
        quantity: Quantity,
        unbiased: bool = False,  # noqa: FBT001, FBT002
        differentiable: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        self.arch, self.weights, self.data = arch, list(weights), data
        self.leaves = [weight.detach().requires_grad_() for weight in weights]
        self.differentiable = differentiable
        self.plan, self.size, self.quantity, self.unbiased = plan, size, quantity, unbiased
        self.networks = weights[0].shape[0]
        total = data.samples
        self.runs = [slice(i, min(i + plan.run, total)) for i in range(0, total, plan.run)]
        # An average over pairs of different samples, where the sum has n^2 terms.
        self.pairing = total / (total - 1) if unbiased else 1.0

        # Knows nothing of self: in a cycle the terms would live on until it is collected.
        def terms(index: int) -> Terms:
            return compute(weights, data.of_samples(runs[index]))

        runs, by_pairs = self.runs, plan.order == "samples"
        compute = self.compute_terms = partial(
            compute_terms, arch, last_in_factors=by_pairs and size.last_in_factors
        )
        # Pairs of runs need each run many times: keep the terms if memory allows.
        keep = by_pairs and plan.keep
        self.terms: Callable[[int], Terms] = lru_cache(None if keep else 1)(terms)

    def all_terms(self) -> Iterator[Terms]:
        """The terms of each run, computed when asked for."""
        return (self.terms(index) for index in range(len(self.runs)))

    def groups(self) -> Iterator[Found]:
        """The pieces of ``H``, as many at a time as memory allows."""
        for pieces in self.plan.pieces:
            yield by_parameters.accumulate_pieces(self.arch, self.size, self.all_terms(), pieces)

    def moments(self) -> tuple[PerNetwork, PerNetwork, list[Tensor]]:
        """``Tr H``, ``Tr H^2``, and what the plan keeps for their gradient.

        In the order "parameters" the blocks of ``H``; else the gradients of both moments, which
        come with them at less than what it takes to compute the same terms again.
        """
        first, second = self.weights[0].new_zeros(2, self.networks)
        kept: list[Tensor] = []
        if self.quantity == "trace":
            if self.differentiable:
                kept = self._zeros()
            return self._trace(kept), second, kept
        if self.plan.order == "samples":
            if self.differentiable and self.plan.keep:
                in_first, in_second = self._zeros(), self._zeros()
                return self._trace(in_first), self._with_gradient(in_second), in_first + in_second
            first, second = self._trace(), self._over_samples()
        else:
            for found in self.groups():
                more_first, more_second = by_parameters.traces(self.size, found)
                first, second = first + more_first, second + more_second
                if self.plan.keep and len(self.plan.pieces) == 1:
                    kept = [block for _, block in found]
                del found
        if self.unbiased:
            alone = sum(by_samples.own(self.arch, terms).sum(1) for terms in self.all_terms())
            second = (second - alone) * self.pairing
        return first, second, kept

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros_like(weight) for weight in self.leaves]

    def _trace(self, gradient: list[Tensor] | None = None) -> PerNetwork:
        """``Tr H``; its gradient is added to what is given."""
        total = self.weights[0].new_zeros(self.networks)
        for run in self.runs:
            with torch.set_grad_enabled(bool(gradient)):
                trace = trace_alone.trace(self.arch, self.leaves, self.data.of_samples(run))
            total += trace.detach()
            if gradient:
                _chain(gradient, self.leaves, [trace], [torch.ones_like(total)])
        return total

    def _over_samples(self) -> PerNetwork:
        total = self.weights[0].new_zeros(self.networks)
        for i in range(len(self.runs)):
            left = self.terms(i)
            for j in range(i, len(self.runs)):
                # The double sum is symmetric: half of the pairs of runs count twice.
                kernel = by_samples.pairs(self.arch, left, self.terms(j))
                total.add_(kernel.sum((1, 2)), alpha=1 if i == j else 2)
        return total

    def _with_gradient(self, gradient: list[Tensor]) -> PerNetwork:
        """``Tr H^2`` over pairs of samples; its gradient is added to what is given."""
        total = self.weights[0].new_zeros(self.networks)
        count = len(self.runs)
        with torch.enable_grad():
            terms = [self.compute_terms(self.leaves, self._data(i)) for i in range(count)]
        leaves = [_leaves(each) for each in terms]
        for i, left in enumerate(leaves):
            for j in range(i, count):
                # Within a run one factor's share of the slope is half of it, as of two runs.
                right = leaves[j] if j > i else _detached(left)
                with torch.enable_grad():
                    value = by_samples.pairs(self.arch, left, right).sum((1, 2))
                total.add_(value.detach(), alpha=1 if i == j else 2)
                value.backward(value.new_full(value.shape, 2))
            if self.unbiased:
                with torch.enable_grad():
                    alone = by_samples.own(self.arch, left).sum(1)
                total -= alone.detach()
                alone.backward(alone.new_full(alone.shape, -1))
            slopes = {name: part.grad for name, part in left.named.items() if part.grad is not None}
            values = [terms[i].named[name] for name in slopes]
            _chain(gradient, self.leaves, values, list(slopes.values()))
        for whole in gradient:
            whole.mul_(self.pairing)
        return self.pairing * total

    def pairs(self) -> Float[Tensor, "networks samples samples"]:
        """The terms of the double sum over samples."""
        rows = []
        for index in range(len(self.runs)):
            left = self.terms(index)
            row = [by_samples.pairs(self.arch, left, right) for right in self.all_terms()]
            rows.append(torch.cat(row, dim=2))
        return torch.cat(rows, dim=1)

    def hessian(self) -> Float[Tensor, "networks dim dim"]:
        """``H`` itself, if the plan holds all of it at a time."""
        (found,) = self.groups()
        return dense(self.size, found)

    def gradient(
        self, trace_weight: PerNetwork, square_weight: PerNetwork, kept: Sequence[Tensor]
    ) -> list[Tensor]:
        """The gradient of ``trace_weight Tr H + square_weight Tr H^2`` in the weights."""
        leaves, total = self.leaves, self._zeros()
        if kept and (self.plan.order == "samples" or self.quantity == "trace"):
            count = len(leaves)
            for group, weight in ((kept[:count], trace_weight), (kept[count:], square_weight)):
                for whole, part in zip(total, group, strict=False):
                    whole.addcmul_(part, weight[:, None, None])
            return total
        for index, parts in self._derivatives(trace_weight, square_weight, kept):
            with torch.enable_grad():
                terms = self.compute_terms(leaves, self._data(index))
            slopes = _add_up(parts(_detached(terms)))
            _chain(total, leaves, [terms.named[name] for name in slopes], list(slopes.values()))
        for run, slope in self._linear_part(trace_weight):
            with torch.enable_grad():
                trace = trace_alone.trace(self.arch, leaves, self.data.of_samples(run))
            _chain(total, leaves, [trace], [slope])
        return total

    def sample_gradients(
        self, trace_weight: PerNetwork, square_weight: PerNetwork, kept: Sequence[Tensor]
    ) -> list[Tensor]:
        """The same, sample by sample: ``(networks, samples, inputs + 1, outputs)`` each."""
        result = [
            weight.new_zeros(self.networks, self.data.samples, *weight.shape[1:])
            for weight in self.weights
        ]

        def chain(run: slice, values: Values, slopes: Sequence[Tensor]) -> None:
            data = self.data.of_samples(run)
            # As many networks as samples, with one sample each.
            leaves = [
                weight.detach().repeat_interleave(data.samples, 0).requires_grad_()
                for weight in self.weights
            ]
            total = [torch.zeros_like(leaf) for leaf in leaves]
            with torch.enable_grad():
                outputs = values(leaves, data.one_by_one(self.networks))
            _chain(total, leaves, outputs, slopes)
            for whole, part in zip(result, total, strict=True):
                whole[:, run] += part.unflatten(0, (self.networks, -1))

        for index, parts in self._derivatives(trace_weight, square_weight, kept):
            slopes = _add_up(parts(self.terms(index)))
            apart = [
                slope.expand(self.networks, *slope.shape[1:])
                .movedim(-1, 1)
                .flatten(0, 1)
                .unsqueeze(-1)
                for slope in slopes.values()
            ]
            chain(self.runs[index], partial(self._named_terms, list(slopes)), apart)
        for run, slope in self._linear_part(trace_weight):
            chain(
                run,
                lambda leaves, data: [trace_alone.trace(self.arch, leaves, data)],
                [slope.repeat_interleave(run.stop - run.start)],
            )
        return result

    def _named_terms(
        self, names: Sequence[Name], weights: Sequence[Tensor], data: Data
    ) -> list[Tensor]:
        named = self.compute_terms(weights, data).named
        return [named[name] for name in names]

    def _data(self, index: int) -> Data:
        return self.data.of_samples(self.runs[index])

    def _linear_part(self, trace_weight: PerNetwork) -> Iterator[tuple[slice, PerNetwork]]:
        """The trace's share, run by run, where it does not come with the blocks of ``H``."""
        if self.quantity == "trace" or self.plan.order == "samples":
            for run in self.runs:
                yield run, trace_weight

    def _derivatives(
        self, trace_weight: PerNetwork, square_weight: PerNetwork, kept: Sequence[Tensor]
    ) -> Iterator[tuple[int, Parts]]:
        """For each run what gives the moments' derivatives in its terms, in parts that add up.

        A run may come up several times, once for each group of pieces.
        """
        if self.quantity == "trace":
            return
        square_weight = self.pairing * square_weight
        runs = range(len(self.runs))
        if self.plan.order == "samples":
            for index in runs:
                yield index, partial(self._of_pairs, square_weight, index)
        else:
            whole = [list(zip(self.plan.pieces[0], kept, strict=True))] if kept else self.groups()
            for found in whole:
                matrix = by_parameters.coefficients(self.size, found, trace_weight, square_weight)
                del found
                for index in runs:
                    yield index, partial(self._of_blocks, matrix)
                del matrix
        if self.unbiased:
            for index in runs:
                yield index, partial(self._of_own, square_weight)

    def _of_blocks(self, matrix: Found, terms: Terms) -> Iterator[Slopes]:
        for piece, part in matrix:
            yield by_parameters.derivatives(self.arch, terms, piece, part)

    def _of_pairs(self, weight: PerNetwork, index: int, terms: Terms) -> Iterator[Slopes]:
        for other in range(len(self.runs)):
            # Twice: the other sample's share of a pair is the same, when it is its turn.
            right = terms if other == index else self.terms(other)
            kernel = partial(by_samples.pairs, self.arch, right=right)
            yield _slopes(terms, kernel, 2 * weight[:, None, None])

    def _of_own(self, weight: PerNetwork, terms: Terms) -> Iterator[Slopes]:
        yield _slopes(terms, partial(by_samples.own, self.arch), -weight[:, None])

    def loss_gradient(self) -> list[Tensor]:
        """The gradient of the loss itself in the weights."""
        total = [torch.zeros_like(weight) for weight in self.weights]
        for run in self.runs:
            parts = loss_gradient(self.arch, self.weights, self.data.of_samples(run))
            for whole, part in zip(total, parts, strict=True):
                whole.add_(part)
        return total


def _detached(terms: Terms) -> Terms:
    return terms.like({name: part.detach() for name, part in terms.named.items()})


def _leaves(terms: Terms) -> Terms:
    return terms.like({name: part.detach().requires_grad_() for name, part in terms.named.items()})


def _slopes(terms: Terms, kernel: Callable[[Terms], Tensor], weight: Tensor) -> Slopes:
    """The derivatives of ``sum weight * kernel(terms)`` in the terms."""
    terms = _leaves(terms)
    named = terms.named
    with torch.enable_grad():
        value = kernel(terms)
    parts = grad(value, list(named.values()), weight.expand_as(value), allow_unused=True)
    return {name: part for name, part in zip(named, parts, strict=True) if part is not None}


def _add_up(parts: Iterable[Slopes]) -> Slopes:
    total: Slopes = {}
    for part in parts:
        for name, slope in part.items():
            total[name] = total[name] + slope if name in total else slope
    return total


def _chain(
    total: list[Tensor],
    leaves: list[Tensor],
    values: Sequence[Tensor],
    slopes: Sequence[Tensor],
) -> None:
    """Add the gradient of ``sum <slopes, values>`` in the leaves."""
    used = [
        (value, slope) for value, slope in zip(values, slopes, strict=True) if value.requires_grad
    ]
    if not used:
        return
    parts = grad(
        [value for value, _ in used], leaves, [slope for _, slope in used], allow_unused=True
    )
    for whole, part in zip(total, parts, strict=True):
        if part is not None:
            whole.add_(part)

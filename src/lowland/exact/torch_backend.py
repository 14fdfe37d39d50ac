"""The moments and their gradient in PyTorch, on any device, for some networks of an ensemble."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import grad

from lowland.exact import by_parameters, by_samples, trace_alone
from lowland.exact.along import second_derivative
from lowland.exact.blocks import dense, gathered
from lowland.exact.by_parameters import Adjoints, Tiles
from lowland.exact.diagonals import diagonal
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

# Of a chunk's terms, adjoints that add up to those of what is differentiated.
Summands = Callable[[Terms], Iterable[Adjoints]]

# Of weights and data, some tensors to differentiate.
Values = Callable[[list[Tensor], Data], list[Tensor]]


class TorchBackend:
    """Some networks and their data, gone through chunk by chunk of samples.

    Args:
        arch: What the networks share.
        weights: Of each layer, ``(networks, inputs + 1, outputs)``.
        data: The samples.
        plan: The order of summation, and how much is handled at a time.
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
        # What gradients are found in, each as large as the gradient.
        self.varying = [*weights, *([data.x] if data.inputs_vary else [])]
        self.differentiable = differentiable
        self.plan, self.size, self.quantity, self.unbiased = plan, size, quantity, unbiased
        self.networks = weights[0].shape[0]
        total = data.samples
        self.chunks = [slice(i, min(i + plan.chunk, total)) for i in range(0, total, plan.chunk)]
        # The samples' weights of 1 / n make a sum over all pairs a mean over n^2 of them; of pairs
        # of different samples there are n (n - 1).
        self.pairing = total / (total - 1) if unbiased else 1.0

        # Knows nothing of self: in a cycle the terms would live on until it is collected.
        def terms(index: int) -> Terms:
            return compute(weights, data.of_samples(chunks[index]))

        chunks, by_pairs = self.chunks, plan.order == "samples"
        compute = self.compute_terms = partial(
            compute_terms, arch, last_in_factors=by_pairs and size.last_in_factors
        )
        # Pairs of chunks need each chunk many times: keep the terms if memory allows.
        keep = by_pairs and plan.keep
        self.terms: Callable[[int], Terms] = lru_cache(None if keep else 1)(terms)

    def all_terms(self) -> Iterator[Terms]:
        """The terms of each chunk, computed when asked for."""
        return (self.terms(index) for index in range(len(self.chunks)))

    def tiles(self) -> Iterator[Tiles]:
        """All tiles of ``H``, as many at a time as memory allows."""
        for group in self.plan.tiles:
            yield by_parameters.accumulate_tiles(self.arch, self.size, self.all_terms(), group)

    @property
    def _trace_is_apart(self) -> bool:
        """Whether ``Tr H`` is a sum of its own, rather than the diagonal of blocks of ``H``."""
        return self.quantity == "trace" or self.plan.order == "samples"

    def moments(self) -> tuple[PerNetwork, PerNetwork, list[Tensor]]:
        """``Tr H``, ``Tr H^2``, and what the plan keeps for their gradient.

        In the order "parameters" that is the blocks of ``H``; else the gradients of both moments,
        layer by layer, first those of the trace: found now, they cost less than computing the same
        terms again.
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
            for tiles in self.tiles():
                more_first, more_second = by_parameters.traces(self.size, tiles)
                first, second = first + more_first, second + more_second
                if self.plan.keep and len(self.plan.tiles) == 1:
                    kept = [values for _, values in tiles]
                del tiles  # or they would be held while the next ones are made
        if self.unbiased:
            alone = sum(by_samples.own(self.arch, terms).sum(1) for terms in self.all_terms())
            second = (second - alone) * self.pairing
        return first, second, kept

    def _zeros(self) -> list[Tensor]:
        """What gradients are added to: in all weights, and in the data if these vary."""
        return [torch.zeros_like(each) for each in self.varying]

    def _leaves_of(
        self, chunk: slice, total: list[Tensor]
    ) -> tuple[Data, list[Tensor], list[Tensor]]:
        """The data of a chunk, what is differentiated in with them, and the parts of ``total``."""
        data = self.data.of_samples(chunk)
        if not data.inputs_vary:
            return data, self.leaves, total
        data = replace(data, x=data.x.detach().requires_grad_())
        parts = [*total[:-1], total[-1][:, chunk]] if total else total
        return data, [*self.leaves, data.x], parts

    def _trace(self, gradient: list[Tensor] | None = None) -> PerNetwork:
        """``Tr H``; its gradient is added to ``gradient``, if that is given."""
        total = self.weights[0].new_zeros(self.networks)
        for chunk in self.chunks:
            data, _, parts = self._leaves_of(chunk, gradient or [])
            trace, found = trace_alone.trace(self.arch, self.weights, data, gradient=bool(gradient))
            total += trace
            _accumulate(parts, found)
        return total

    def _over_samples(self) -> PerNetwork:
        """``Tr H^2`` as the sum over pairs of samples."""
        total = self.weights[0].new_zeros(self.networks)
        for i in range(len(self.chunks)):
            left = self.terms(i)
            for j in range(i, len(self.chunks)):
                # The double sum is symmetric: pairs of different chunks count twice.
                pairs = by_samples.pairs(self.arch, left, self.terms(j))
                total.add_(pairs.sum((1, 2)), alpha=1 if i == j else 2)
        return total

    def _with_gradient(self, gradient: list[Tensor]) -> PerNetwork:
        """``Tr H^2`` as the sum over pairs of samples; its gradient is added to ``gradient``."""
        total = self.weights[0].new_zeros(self.networks)
        count = len(self.chunks)
        places = [self._leaves_of(chunk, gradient) for chunk in self.chunks]
        with torch.enable_grad():
            terms = [self.compute_terms(self.leaves, data) for data, _, _ in places]
        leaves = [_leaves(each) for each in terms]
        for i, left in enumerate(leaves):
            for j in range(i, count):
                # Each value is weighed by 2: of two chunks since the pair counts twice, within one
                # since only the left factors are differentiated, and the right ones give as much.
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
            adjoints = {
                name: term.grad for name, term in left.named.items() if term.grad is not None
            }
            values = [terms[i].named[name] for name in adjoints]
            _, varying, parts = places[i]
            _chain(parts, varying, values, list(adjoints.values()))
        for whole in gradient:
            whole.mul_(self.pairing)
        return self.pairing * total

    def pairs(self) -> Float[Tensor, "networks samples samples"]:
        """What each pair of samples adds to ``Tr H^2``."""
        rows = []
        for index in range(len(self.chunks)):
            left = self.terms(index)
            row = [by_samples.pairs(self.arch, left, right) for right in self.all_terms()]
            rows.append(torch.cat(row, dim=2))
        return torch.cat(rows, dim=1)

    def hessian(self) -> Float[Tensor, "networks dim dim"]:
        """``H`` itself, if the plan holds all of it at a time."""
        (tiles,) = self.tiles()
        return dense(self.size, tiles)

    def gradient(
        self, trace_weight: PerNetwork, square_weight: PerNetwork, kept: Sequence[Tensor]
    ) -> list[Tensor]:
        """The gradient of ``trace_weight Tr H + square_weight Tr H^2`` in the weights.

        That in the data comes last, if these vary.

        Args:
            trace_weight: One for each network.
            square_weight: One for each network.
            kept: What :meth:`moments` has kept for it, if anything.
        """
        total = self._zeros()
        if kept and self._trace_is_apart:  # the two gradients, to be weighed
            count = len(total)
            for gradients, weight in ((kept[:count], trace_weight), (kept[count:], square_weight)):
                for whole, part in zip(total, gradients, strict=False):
                    whole.addcmul_(part, weight[:, None, None])
            return total
        for index, summands in self._summands(trace_weight, square_weight, kept):
            self._pull_back(total, index, summands)
        if self._trace_is_apart:
            gradient = self._zeros()
            self._trace(gradient)
            for whole, part in zip(total, gradient, strict=True):
                whole.addcmul_(part, trace_weight[:, None, None])
        return total

    def _pull_back(self, total: list[Tensor], index: int, summands: Summands) -> None:
        """Add the gradient of what has these adjoints in a chunk's terms to ``total``."""
        data, leaves, parts = self._leaves_of(self.chunks[index], total)
        with torch.enable_grad():
            terms = self.compute_terms(self.leaves, data)
        adjoints = _add_up(summands(_detached(terms)))
        _chain(parts, leaves, [terms.named[name] for name in adjoints], list(adjoints.values()))

    def contraction(self, matrix: Float[Tensor, "networks dim dim"]) -> list[Tensor]:
        r"""The gradient of :math:`\langle C, H\rangle` in the weights for a constant ``C``.

        Args:
            matrix: ``C``, symmetric, the parameters as in :meth:`hessian`.
        """
        total = self._zeros()
        for group in self.plan.tiles:
            tiles = [(tile, gathered(self.size, tile, matrix)) for tile in group]
            for index in range(len(self.chunks)):
                self._pull_back(total, index, partial(self._of_tiles, tiles))
        return total

    def product(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """``H u``; rows that are not trained have zeros.

        Args:
            direction: ``u``, shaped like the weights, zero in rows that are not trained.
        """
        leaves = [part.detach().requires_grad_() for part in direction]
        total = [torch.zeros_like(weight) for weight in self.weights]
        for chunk in self.chunks:
            data = self.data.of_samples(chunk)
            with torch.enable_grad():
                value = second_derivative(self.arch, self.weights, leaves, data)
            _chain(total, leaves, [value], [torch.full_like(value, 0.5)])
        result = [torch.zeros_like(weight) for weight in self.weights]
        for whole, part, rows in zip(result, total, self.arch.rows, strict=True):
            whole[:, rows] = part[:, rows]
        return result

    def gradient_along(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of ``u^T H u`` in the weights for a constant ``u``."""
        total = self._zeros()
        for chunk in self.chunks:
            data, varying, parts = self._leaves_of(chunk, total)
            with torch.enable_grad():
                value = second_derivative(self.arch, self.leaves, direction, data)
            _chain(parts, varying, [value], [torch.ones_like(value)])
        return total

    def sample_gradients(
        self, trace_weight: PerNetwork, square_weight: PerNetwork, kept: Sequence[Tensor]
    ) -> list[Tensor]:
        """Each sample's summand of :meth:`gradient`.

        Returns:
            For each layer ``(networks, samples, inputs + 1, outputs)``.
        """
        result = [
            weight.new_zeros(self.networks, self.data.samples, *weight.shape[1:])
            for weight in self.weights
        ]

        def chain(chunk: slice, values: Values, adjoints: Sequence[Tensor]) -> None:
            data = self.data.of_samples(chunk)
            # Autograd adds up over samples; of as many networks as samples, each with one sample of
            # its own, the gradients come out one by one.
            leaves = [
                weight.detach().repeat_interleave(data.samples, 0).requires_grad_()
                for weight in self.weights
            ]
            total = [torch.zeros_like(leaf) for leaf in leaves]
            with torch.enable_grad():
                outputs = values(leaves, data.one_by_one(self.networks))
            _chain(total, leaves, outputs, adjoints)
            for whole, part in zip(result, total, strict=True):
                whole[:, chunk] += part.unflatten(0, (self.networks, -1))

        for index, summands in self._summands(trace_weight, square_weight, kept):
            adjoints = _add_up(summands(self.terms(index)))
            one_by_one = [
                adjoint.expand(self.networks, *adjoint.shape[1:])
                .movedim(-1, 1)
                .flatten(0, 1)
                .unsqueeze(-1)
                for adjoint in adjoints.values()
            ]
            chain(self.chunks[index], partial(self._named_terms, list(adjoints)), one_by_one)
        if self._trace_is_apart:
            for chunk in self.chunks:
                data = self.data.of_samples(chunk)
                # As many networks as samples, as above.
                weights = [weight.repeat_interleave(data.samples, 0) for weight in self.weights]
                _, parts = trace_alone.trace(
                    self.arch, weights, data.one_by_one(self.networks), gradient=True
                )
                factor = trace_weight.repeat_interleave(data.samples)[:, None, None]
                for whole, part in zip(result, parts, strict=True):
                    if part is not None:
                        whole[:, chunk] += (factor * part).unflatten(0, (self.networks, -1))
        return result

    def _named_terms(
        self, names: Sequence[Name], weights: Sequence[Tensor], data: Data
    ) -> list[Tensor]:
        """The terms of these names, computed anew at the given weights and data."""
        named = self.compute_terms(weights, data).named
        return [named[name] for name in names]

    def _summands(
        self, trace_weight: PerNetwork, square_weight: PerNetwork, kept: Sequence[Tensor]
    ) -> Iterator[tuple[int, Summands]]:
        r"""Of each chunk, by its index, what gives the adjoints of :math:`\langle C, H\rangle`.

        A chunk may come up several times, once for each group of tiles. The trace is in it where it
        is the diagonal of blocks of ``H``.
        """
        if self.quantity == "trace":
            return
        square_weight = self.pairing * square_weight
        chunks = range(len(self.chunks))
        if self.plan.order == "samples":
            for index in chunks:
                yield index, partial(self._of_pairs, square_weight, index)
        else:
            groups = [list(zip(self.plan.tiles[0], kept, strict=True))] if kept else self.tiles()
            for tiles in groups:
                matrix = by_parameters.coefficients(self.size, tiles, trace_weight, square_weight)
                del tiles  # C takes the place of H
                for index in chunks:
                    yield index, partial(self._of_tiles, matrix)
                del matrix
        if self.unbiased:
            for index in chunks:
                yield index, partial(self._of_own, square_weight)

    def _of_tiles(self, matrix: Tiles, terms: Terms) -> Iterator[Adjoints]:
        """The adjoints of ``<C, H>`` over some tiles of both."""
        for tile, values in matrix:
            yield by_parameters.adjoints(self.arch, terms, tile, values)

    def _of_pairs(self, weight: PerNetwork, index: int, terms: Terms) -> Iterator[Adjoints]:
        """The adjoints of ``weight Tr H^2`` over all pairs with a sample of one chunk."""
        for other in range(len(self.chunks)):
            # Twice: a pair's two samples have equal shares, and each chunk finds only its own.
            right = terms if other == index else self.terms(other)
            value = partial(by_samples.pairs, self.arch, right=right)
            yield _adjoints(terms, value, 2 * weight[:, None, None])

    def _of_own(self, weight: PerNetwork, terms: Terms) -> Iterator[Adjoints]:
        """The adjoints of what the samples' pairs with themselves take from ``weight Tr H^2``."""
        yield _adjoints(terms, partial(by_samples.own, self.arch), -weight[:, None])

    def loss_gradient(self) -> list[Tensor]:
        """The gradient of the loss itself in the weights."""
        return self._over_chunks(loss_gradient)

    def diagonal(self) -> list[Tensor]:
        """The diagonal of ``H``, as large as the weights."""
        return self._over_chunks(diagonal)

    def _over_chunks(
        self, compute: Callable[[Architecture, Sequence[Tensor], Data], list[Tensor]]
    ) -> list[Tensor]:
        """The sum of what each chunk of samples gives for each layer's weights."""
        total = [torch.zeros_like(weight) for weight in self.weights]
        for chunk in self.chunks:
            found = compute(self.arch, self.weights, self.data.of_samples(chunk))
            for whole, part in zip(total, found, strict=True):
                whole.add_(part)
        return total


def _detached(terms: Terms) -> Terms:
    """Equal terms that autograd takes for constants."""
    return terms.like({name: term.detach() for name, term in terms.named.items()})


def _leaves(terms: Terms) -> Terms:
    """Equal terms that autograd differentiates in, without what they came from."""
    return terms.like({name: term.detach().requires_grad_() for name, term in terms.named.items()})


def _adjoints(terms: Terms, function: Callable[[Terms], Tensor], weight: Tensor) -> Adjoints:
    """The derivatives of ``sum weight * function(terms)`` in the terms."""
    terms = _leaves(terms)
    named = terms.named
    with torch.enable_grad():
        value = function(terms)
    found = grad(value, list(named.values()), weight.expand_as(value), allow_unused=True)
    return {name: each for name, each in zip(named, found, strict=True) if each is not None}


def _add_up(summands: Iterable[Adjoints]) -> Adjoints:
    """Term by term the sum of adjoints, of which each may lack some terms."""
    total: Adjoints = {}
    for adjoints in summands:
        for name, adjoint in adjoints.items():
            total[name] = total[name] + adjoint if name in total else adjoint
    return total


def _accumulate(total: list[Tensor], parts: Sequence[Tensor | None]) -> None:
    for whole, part in zip(total, parts, strict=True):
        if part is not None:
            whole.add_(part)


def _chain(
    total: list[Tensor],
    leaves: list[Tensor],
    values: Sequence[Tensor],
    adjoints: Sequence[Tensor],
) -> None:
    """Add the gradient of ``sum <adjoints, values>`` in the leaves to ``total``."""
    used = [
        (value, adjoint)
        for value, adjoint in zip(values, adjoints, strict=True)
        if value.requires_grad
    ]
    if not used:
        return
    gradients = grad(
        [value for value, _ in used], leaves, [adjoint for _, adjoint in used], allow_unused=True
    )
    _accumulate(total, gradients)

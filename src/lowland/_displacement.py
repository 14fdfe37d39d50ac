"""Moving weights to a point nearby and back, in lists of tensors and in shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowland._sharding import layout, local, local_like, sum_over_parts

Groups = list[dict[str, Any]]
Vector = Callable[[Tensor], Tensor | None]
"""A vector over the parameters: what it has for each, if anything."""


class Family(NamedTuple):
    """What operations on lists take at once: one group's tensors of one device, type and layout.

    Of parameters that are spread over processes these are the parts that lie here.
    """

    group: dict[str, Any]
    layout: Any
    parameters: list[Tensor]
    weights: list[Tensor]
    values: list[Tensor]

    @property
    def precise(self) -> torch.dtype:
        """In what to sum: norms may be beyond half precision though their parts are not."""
        return torch.promote_types(self.values[0].dtype, torch.float32)


def families(groups: Groups, vector: Vector) -> list[Family]:
    """The parameters for which a vector has values, by group, device, type and layout."""
    found: dict[Any, Family] = {}
    for index, group in enumerate(groups):
        for p in group["params"]:
            value = vector(p)
            if value is not None:
                how, weight = layout(p), p
                if how is not None:
                    weight, value = local(p), local_like(value, p)
                key = (index, p.device, p.dtype, how)
                if key not in found:
                    found[key] = Family(group, how, [], [], [])
                family = found[key]
                family.parameters.append(p)
                family.weights.append(weight)
                family.values.append(value.to_dense() if value.is_sparse else value)
    return list(found.values())


def norm(found: Iterable[Family], *, adaptive: bool = False) -> Tensor:
    """The length of a vector over all groups and processes, on the first parameter's device.

    With ``adaptive`` that of ``T v``, in the groups that are.
    """
    norms: list[Tensor] = []
    for family in found:
        values = family.values
        if adaptive and family.group["adaptive"]:
            values = list(torch._foreach_mul(values, _sizes(family)))  # noqa: SLF001
        dtype = None if values[0].dtype == family.precise else family.precise
        each = torch._foreach_norm(values, 2, dtype)  # noqa: SLF001
        length = torch.linalg.vector_norm(torch.stack(each))
        if family.layout is not None:  # double, for squares of large ones
            square = sum_over_parts(length.double().square(), family.layout)
            length = square.sqrt().to(length)
        norms.append(length)
    if len(norms) == 1:
        return norms[0]
    total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]))
    return total


def inner(found: Iterable[Family], other: Vector) -> Tensor:
    """The inner product of two vectors, as :func:`norm`; where the other has nothing it is zero."""
    sums: list[Tensor] = []
    for family in found:
        products = [
            (value.to(family.precise).conj() * local_like(with_, p)).real.sum()
            for p, value in zip(family.parameters, family.values, strict=True)
            if (with_ := other(p)) is not None
        ]
        zero = family.values[0].new_zeros((), dtype=family.precise).real
        sums.append(sum_over_parts(sum(products, zero), family.layout))
    return sum((each.to(sums[0]) for each in sums[1:]), sums[0])


def inverse(length: Tensor) -> Tensor:
    """``1 / length``; of zero something finite, so that zero times it is zero.

    Other lengths are larger than this bound, since squares of smaller numbers vanish.
    """
    return length.clamp(min=torch.finfo(length.dtype).tiny ** 0.75).reciprocal_()


class Displacement:
    """Weights that are away from where they belong, and the way back to there, bit for bit."""

    def __init__(self) -> None:
        self._moved: list[tuple[Family, list[Tensor]]] = []
        self._memory: dict[Tensor, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._moved)

    def move(self, groups: Groups, direction: Vector, sign: int = 1) -> Tensor | None:
        """Add ``sign * rho * T^2 d / ||T d||`` to the weights.

        Returns:
            ``||T d||``; None, if the direction has no values.
        """
        found = families(groups, direction)
        if not found:
            return None
        length = norm(found, adaptive=True)
        factor = inverse(length)
        for family in found:
            pairs = zip(family.parameters, family.weights, strict=True)
            before = [self._kept(p, weight) for p, weight in pairs]
            self._moved.append((family, before))
            torch._foreach_copy_(before, family.weights)
            here = factor.to(family.weights[0])
            factors = [here] * len(before)
            if family.group["adaptive"]:
                factors = _sizes(family)
                torch._foreach_mul_(factors, factors)
                torch._foreach_mul_(factors, here)
            scale = sign * family.group["rho"]
            torch._foreach_addcmul_(family.weights, family.values, factors, value=scale)
        torch.clear_autocast_cache()  # or a surrounding autocast goes on with the old weights
        return length

    def back(self) -> None:
        """Put the weights back, if they were moved."""
        for family, before in self._moved:
            torch._foreach_copy_(family.weights, before)
        if self._moved:
            torch.clear_autocast_cache()
        self._moved = []

    def way(self) -> list[Family]:
        """How far each weight was moved, as rounding left it."""
        return [
            family._replace(values=list(torch._foreach_sub(family.weights, before)))  # noqa: SLF001
            for family, before in self._moved
        ]

    def _kept(self, p: Tensor, like: Tensor) -> Tensor:
        """Where weights are kept; the same memory every step, since fresh pages cost more."""
        before = self._memory.get(p)
        if before is None or (before.shape, before.dtype, before.device) != (
            like.shape,
            like.dtype,
            like.device,
        ):
            before = self._memory[p] = torch.empty_like(like, requires_grad=False)
        return before


def _sizes(family: Family) -> list[Tensor]:
    """``T``, the sizes by which the adaptive neighbourhood is measured."""
    sizes = list(torch._foreach_abs(family.weights))  # noqa: SLF001
    torch._foreach_add_(sizes, family.group["eta"])
    return sizes

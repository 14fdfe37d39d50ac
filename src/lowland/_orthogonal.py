"""What SAM's gradient has beside the direction of the plain one, to be used again."""

from __future__ import annotations

import torch
from torch import Tensor

from lowland._displacement import Family, Groups, families, inner, inverse, norm
from lowland._sharding import like, local
from lowland.errors import UnsupportedModelError


def gradient(p: Tensor) -> Tensor | None:
    """The gradient, as a vector over the parameters."""
    return p.grad


def copied(groups: Groups) -> dict[Tensor, Tensor]:
    """Copies of the gradients, which lie where the parameters do.

    Raises:
        UnsupportedModelError: If one is sparse.
    """
    _refuse_sparse(groups)
    copies: dict[Tensor, Tensor] = {}
    for family in families(groups, gradient):
        for p, value in zip(family.parameters, family.values, strict=True):
            copies[p] = torch.empty_like(p, requires_grad=False)
            local(copies[p]).copy_(value)
    return copies


class Orthogonal:
    """The component of SAM's gradient that is orthogonal to the plain one.

    It is kept as a unit vector, since the steps that use it give it a length of their own.
    """

    def __init__(self) -> None:
        self.unit: dict[Tensor, Tensor] = {}

    def remember(self, groups: Groups, plain: dict[Tensor, Tensor]) -> None:
        """Take it from SAM's gradients, at hand, and from the plain ones, which are used up.

        The length of neither matters: they may be scaled, or clipped by their norms.
        """
        unit = copied(groups)
        unit |= {p: torch.zeros_like(plain[p]) for p in plain if p not in unit}
        whole = norm(families(groups, unit.get))
        directions = families(groups, plain.get)
        _scale(directions, inverse(norm(directions)))
        along = inner(directions, unit.get)
        for p, direction in plain.items():
            here = local(unit[p])
            here.addcmul_(local(direction), along.to(here), value=-1)
        rest = families(groups, unit.get)
        length = norm(rest)
        # Where the two gradients are parallel, what is left are roundings: no direction at all.
        rounding = 4 * max(torch.finfo(family.values[0].dtype).eps for family in rest)
        _scale(rest, (length > rounding * whole) * inverse(length))
        self.unit = unit

    def add(self, groups: Groups, share: float) -> None:
        """Add it to the gradients at hand, with a share of their length."""
        _refuse_sparse(groups)
        length = share * norm(families(groups, gradient))
        for p, unit in self.unit.items():
            if p.grad is not None:
                p.grad = like(p.grad, p)
                here = local(p.grad)
                here.addcmul_(local(unit), length.to(here))


def _scale(found: list[Family], factor: Tensor) -> None:
    for family in found:
        torch._foreach_mul_(family.values, factor.to(family.values[0]))


def _refuse_sparse(groups: Groups) -> None:
    if any(p.grad is not None and p.grad.is_sparse for group in groups for p in group["params"]):
        raise UnsupportedModelError(
            "every= keeps and adds a vector of all parameters, which sparse gradients cannot hold: "
            "use every=1, or layers with sparse=False"
        )

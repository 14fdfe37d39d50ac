r"""The order of summation over pairs of samples: ``Tr H^2`` as a double sum of kernels.

With the factors of :mod:`lowland.exact.terms`, the inner product of two samples' Hessians is

    sum_l (z_l . z_l)^2 (B_ll . B_ll) + 2 sum_l<m (z_l . z_l) R_lm,
    R_lm = (z_m . z_m) (B_lm . B_lm) + 2 (D z_m) . (B g_m) + (D . D) (g_m . g_m),  D = D_l,m-1

where the left factor of each product is of one sample and the right one of the other, and the
mixed term stands for both ways to choose. Nothing of size ``P^2`` is ever formed.

Source: arXiv:2606.28662, theorem 1 and section V-B, for three layers and one output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lowland.exact.blocks import multiplicity, packed
from lowland.exact.terms import Architecture, Rows, Terms

Kernel = Float[Tensor, "networks samples others"]
Product = Callable[[Rows, Rows], Tensor]


def pairs(arch: Architecture, left: Terms, right: Terms) -> Kernel:
    """What each pair of samples adds to ``Tr H^2``."""

    def mixed(a: Terms, b: Terms, layer: int, above: int) -> Kernel:
        # (D_b z_a) . (B_a g_b), for each pair.
        reached = b.D[layer, above - 1].permute(0, 3, 1, 2) @ _beyond_bias(
            arch, a, above
        ).unsqueeze(1)
        pulled = a.B[layer, above].permute(0, 3, 1, 2) @ b.g[above].unsqueeze(1)
        return torch.einsum("ebla,ealb->eab", reached, pulled)

    def both(layer: int, above: int) -> Kernel:
        return mixed(left, right, layer, above) + mixed(right, left, layer, above).mT

    return _sum(arch, left, right, lambda a, b: a.mT @ b, both)


def own(arch: Architecture, terms: Terms) -> Float[Tensor, "networks samples"]:
    """What each sample's pair with itself adds: the squared norm of its own Hessian."""

    def mixed(layer: int, above: int) -> Tensor:
        z = _beyond_bias(arch, terms, above)
        reached = (terms.D[layer, above - 1] * z.unsqueeze(1)).sum(2)
        pulled = (terms.B[layer, above] * terms.g[above].unsqueeze(1)).sum(2)
        return 2 * (reached * pulled).sum(1)

    return _sum(arch, terms, terms, lambda a, b: (a * b).sum(1), mixed)


def _beyond_bias(arch: Architecture, terms: Terms, layer: int) -> Rows:
    return terms.z[layer][:, 1:] if arch.rows[layer].start == 0 else terms.z[layer]


def _sum(
    arch: Architecture,
    left: Terms,
    right: Terms,
    product: Product,
    mixed: Callable[[int, int], Tensor],
) -> Tensor:
    layers = [layer for layer in range(len(arch.rows)) if arch.trains(layer)]
    inputs = {layer: product(left.z[layer], right.z[layer]) for layer in layers}
    total: Tensor | None = None
    for layer in layers:
        # Of symmetric matrices half the entries are enough, weighed by what they stand for.
        half = packed(left.B[layer, layer]) * multiplicity(
            left.B[layer, layer].shape[1], inputs[layer]
        ).unsqueeze(1)
        inner = inputs[layer] * product(half, packed(right.B[layer, layer]))
        for above in layers:
            if above <= layer:
                continue
            second, other = left.B[layer, above].flatten(1, 2), right.B[layer, above].flatten(1, 2)
            part = inputs[above] * product(second, other)
            if arch.trains_beyond_bias(above):
                if above == layer + 1:
                    part = part + _adjacent(arch, left, right, layer, product)
                else:
                    reached = [t.D[layer, above - 1].flatten(1, 2) for t in (left, right)]
                    first = product(left.g[above], right.g[above])
                    part = part + torch.addcmul(mixed(layer, above), product(*reached), first)
            inner = torch.add(inner, part, alpha=2)
        total = (
            inputs[layer] * inner if total is None else torch.addcmul(total, inputs[layer], inner)
        )
    if total is None:
        raise ValueError("expected a trained layer")
    return total


def _adjacent(
    arch: Architecture, left: Terms, right: Terms, layer: int, product: Product
) -> Tensor:
    """Everything with ``D``, which is diagonal between neighbours."""

    def rows(terms: Terms) -> tuple[Rows, Rows]:
        z, g = _beyond_bias(arch, terms, layer + 1), terms.g[layer + 1]
        second = (z.unsqueeze(2) * terms.B[layer, layer + 1]).flatten(1, 2)
        return second, (terms.slope[layer].unsqueeze(2) * g.unsqueeze(1)).flatten(1, 2)

    (second, first), (other_second, other_first) = rows(left), rows(right)
    return product(torch.cat([second + first, first], 1), torch.cat([other_first, other_second], 1))

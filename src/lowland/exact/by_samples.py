r"""The order of summation over pairs of samples: ``Tr H^2`` as a double sum of kernels.

With the factors of :mod:`lowland.exact.terms`, the inner product of two samples' Hessians is

    sum_l (z_l . z_l)^2 (B_ll . B_ll) + 2 sum_l<m (z_l . z_l) R_lm,
    R_lm = (z_m . z_m) (B_lm . B_lm) + 2 (D z_m) . (B g_m) + (D . D) (g_m . g_m),  D = D_l,m-1

where the left factor of each product is of one sample and the right one of the other, and the
mixed term stands for both ways to choose. Nothing of size ``P^2`` is ever formed, and below few
outputs nothing quadratic in the width: with ``B_ll = U Q U^T + diag(c)`` of the last hidden layer,

    <U Q U^T, U' Q' U'^T> = sum_kk' (U^T U')_kk' (Q U^T U' Q')_kk'

Source: arXiv:2606.28662, theorem 1 and section V-B, for three layers and one output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lowland.exact.blocks import multiplicity, packed
from lowland.exact.terms import Architecture, Matrices, Rows, Terms

PerPair = Float[Tensor, "networks samples others"]
Product = Callable[[Rows, Rows], Tensor]


def pairs(arch: Architecture, left: Terms, right: Terms) -> PerPair:
    """What each pair of samples adds to ``Tr H^2``."""

    def mixed(a: Terms, b: Terms, layer: int, above: int) -> PerPair:
        # (D_b z_a) . (B_a g_b), for each pair.
        reached = b.D[layer, above - 1].permute(0, 3, 1, 2) @ _beyond_bias(
            arch, a, above
        ).unsqueeze(1)
        pulled = a.B[layer, above].permute(0, 3, 1, 2) @ b.g[above].unsqueeze(1)
        return torch.einsum("ebla,ealb->eab", reached, pulled)

    def both(layer: int, above: int) -> PerPair:
        return mixed(left, right, layer, above) + mixed(right, left, layer, above).mT

    def gram(a: Matrices, b: Matrices) -> Tensor:
        """The inner products of all columns, ``(networks, columns, a, columns', b)``."""
        products = a.flatten(2).mT @ b.flatten(2)
        count, samples, others = a.shape[2], a.shape[3], b.shape[3]
        return products.view(-1, count, samples, count, others)

    def contracted(a: Terms, b: Terms, layer: int) -> PerPair:
        second = (layer, len(arch.rows) - 1)
        return (gram(a.gain[layer], b.gain[layer]) * gram(a.B[second], b.B[second])).sum((1, 3))

    return _sum(arch, left, right, _Ways(lambda a, b: a.mT @ b, both, contracted))


def own(arch: Architecture, terms: Terms) -> Float[Tensor, "networks samples"]:
    """What each sample's pair with itself adds: the squared norm of its own Hessian."""

    def mixed(layer: int, above: int) -> Tensor:
        z = _beyond_bias(arch, terms, above)
        reached = (terms.D[layer, above - 1] * z.unsqueeze(1)).sum(2)
        pulled = (terms.B[layer, above] * terms.g[above].unsqueeze(1)).sum(2)
        return 2 * (reached * pulled).sum(1)

    def gram(a: Matrices) -> Tensor:
        by_sample = a.permute(0, 3, 1, 2)
        return by_sample.mT @ by_sample

    def contracted(a: Terms, _: Terms, layer: int) -> Tensor:
        second = a.B[layer, len(arch.rows) - 1]
        return (gram(a.gain[layer]) * gram(second)).sum((2, 3))

    return _sum(arch, terms, terms, _Ways(lambda a, b: (a * b).sum(1), mixed, contracted))


def _beyond_bias(arch: Architecture, terms: Terms, layer: int) -> Rows:
    return terms.z[layer][:, 1:] if arch.rows[layer].start == 0 else terms.z[layer]


@dataclass(frozen=True)
class _Ways:
    """How samples meet: all with all, or each with itself.

    Attributes:
        product: Inner products of rows.
        mixed: Both ``(D z_m) . (B g_m)`` of a layer and one above it that is not its neighbour.
        contracted: Of a layer whose ``B`` is in factors, the inner products of ``U Q U^T``.
    """

    product: Product
    mixed: Callable[[int, int], Tensor]
    contracted: Callable[[Terms, Terms, int], Tensor]


def _sum(arch: Architecture, left: Terms, right: Terms, ways: _Ways) -> Tensor:
    product = ways.product
    layers = [layer for layer in range(len(arch.rows)) if arch.trains(layer)]
    inputs = {layer: product(left.z[layer], right.z[layer]) for layer in layers}
    total: Tensor | None = None
    for layer in layers:
        if layer in left.gain:
            inner = ways.contracted(left, right, layer) + _beyond_contracted(
                left, right, layer, product
            )
        else:
            inner = _of_symmetric(left.B[layer, layer], right.B[layer, layer], product)
        inner = inputs[layer] * inner
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
                    part = part + torch.addcmul(ways.mixed(layer, above), product(*reached), first)
            inner = torch.add(inner, part, alpha=2)
        total = (
            inputs[layer] * inner if total is None else torch.addcmul(total, inputs[layer], inner)
        )
    if total is None:
        raise ValueError("expected a trained layer")
    return total


def _of_symmetric(left: Tensor, right: Tensor, product: Product) -> Tensor:
    """The inner products of matrices, of which half the entries are enough."""
    twice = multiplicity(left.shape[1], left).unsqueeze(1)
    return product(packed(left) * twice, packed(right))


def _beyond_contracted(left: Terms, right: Terms, layer: int, product: Product) -> Tensor:
    """What ``diag(c)`` adds to the inner products of ``U Q U^T + diag(c)``.

    Of the first part only the diagonal ``b`` meets it.
    """
    (b, c), (other_b, other_c) = (
        ((t.gain[layer] * t.B[layer, layer + 1]).sum(2), t.bend[layer]) for t in (left, right)
    )
    return product(b + c, other_c) + product(c, other_b)


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

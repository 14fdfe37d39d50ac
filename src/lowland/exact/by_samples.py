r"""The order of summation over pairs of samples: ``Tr H^2 = sum_ii' <H_i, H_i'>``.

By the blocks of :mod:`lowland.exact.terms`, with ``(x . y)`` for the sum over products of all
entries, the left factor of one sample and the right one of the other, two samples have

    sum_l (z_l . z_l)^2 (B_ll . B_ll) + 2 sum_l<m (z_l . z_l) R_lm,
    R_lm = (z_m . z_m) (B_lm . B_lm) + 2 (D z_m) . (B g_m) + (D . D) (g_m . g_m),  D = D_l,m-1

since the inner product of two outer products is the product of two inner products. ``R_lm`` is that
of ``z_m (x) B + D (x) g_m`` with its like; its mixed term ``(D z_m) . (B g_m)``, of one sample's
``D`` and ``g`` with the other's ``z`` and ``B``, stands for both ways to choose. Nothing of size
``P^2`` is ever formed, and below few outputs nothing quadratic in the width either: with
``B_ll = U Q U^T + diag(c)`` of the last hidden layer,

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
from lowland.exact.terms import Architecture, Matrices, Terms, Vectors

PerPair = Float[Tensor, "networks samples others"]
Product = Callable[[Vectors, Vectors], Tensor]


def pairs(arch: Architecture, left: Terms, right: Terms) -> PerPair:
    """What each pair of a sample on the left and one on the right adds to ``Tr H^2``."""

    def mixed(a: Terms, b: Terms, layer: int, above: int) -> PerPair:
        # (D_b z_a) . (B_a g_b): both products are formed for each pair, (networks, b, M_l, a) and
        # (networks, a, M_l, b), and only then summed over M_l.
        reached = b.D[layer, above - 1].permute(0, 3, 1, 2) @ _beyond_bias(
            arch, a, above
        ).unsqueeze(1)
        pulled = a.B[layer, above].permute(0, 3, 1, 2) @ b.g[above].unsqueeze(1)
        return torch.einsum("ebla,ealb->eab", reached, pulled)

    def both(layer: int, above: int) -> PerPair:
        return mixed(left, right, layer, above) + mixed(right, left, layer, above).mT

    def gram(a: Matrices, b: Float[Tensor, "networks _ _ others"]) -> Tensor:
        """``U_a^T U_b`` for each pair of samples, ``(networks, k, a, k', b)``."""
        products = a.flatten(2).mT @ b.flatten(2)
        count, samples, others = a.shape[2], a.shape[3], b.shape[3]
        return products.view(-1, count, samples, count, others)

    def contracted(a: Terms, b: Terms, layer: int) -> PerPair:
        # B of this layer and the logits' is U Q, so its Gram matrix is Q U^T U' Q'.
        logits = (layer, len(arch.rows) - 1)
        return (gram(a.gain[layer], b.gain[layer]) * gram(a.B[logits], b.B[logits])).sum((1, 3))

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
        return (gram(a.gain[layer]) * gram(a.B[layer, len(arch.rows) - 1])).sum((2, 3))

    return _sum(arch, terms, terms, _Ways(lambda a, b: (a * b).sum(1), mixed, contracted))


def _beyond_bias(arch: Architecture, terms: Terms, layer: int) -> Vectors:
    """``z`` of a layer without the 1 in front, as its units meet ``D``."""
    return terms.z[layer][:, 1:] if arch.rows[layer].start == 0 else terms.z[layer]


@dataclass(frozen=True)
class _Ways:
    """How samples meet: all with all, or each with itself.

    Attributes:
        product: Inner products of vectors.
        mixed: ``(D z_m) . (B g_m)``, both ways, of a layer and one above it that is no neighbour.
        contracted: ``<U Q U^T, U' Q' U'^T>`` of a layer whose ``B`` is in factors.
    """

    product: Product
    mixed: Callable[[int, int], Tensor]
    contracted: Callable[[Terms, Terms, int], Tensor]


def _sum(arch: Architecture, left: Terms, right: Terms, ways: _Ways) -> Tensor:
    """The formula at the top of this module, for all samples that meet."""
    product = ways.product
    layers = [layer for layer in range(len(arch.rows)) if arch.trains(layer)]
    inputs = {layer: product(left.z[layer], right.z[layer]) for layer in layers}
    total: Tensor | None = None
    for layer in layers:
        if layer in left.gain:
            inner = ways.contracted(left, right, layer) + _diagonal_in_factors(
                left, right, layer, product
            )
        else:
            inner = _of_symmetric(left.B[layer, layer], right.B[layer, layer], product)
        # One factor z_l . z_l is common to the layer's own block and to those with layers above.
        inner = inputs[layer] * inner
        for above in layers:
            if above <= layer:
                continue
            second, other = left.B[layer, above].flatten(1, 2), right.B[layer, above].flatten(1, 2)
            across = inputs[above] * product(second, other)  # R_lm
            if arch.trains_beyond_bias(above):
                if above == layer + 1:
                    across = across + _first_order_of_neighbours(arch, left, right, layer, product)
                else:
                    reached = [t.D[layer, above - 1].flatten(1, 2) for t in (left, right)]
                    first = product(left.g[above], right.g[above])
                    mixed = ways.mixed(layer, above)
                    across = across + torch.addcmul(mixed, product(*reached), first)
            inner = torch.add(inner, across, alpha=2)
        total = (
            inputs[layer] * inner if total is None else torch.addcmul(total, inputs[layer], inner)
        )
    if total is None:
        raise ValueError("expected a trained layer")
    return total


def _of_symmetric(left: Tensor, right: Tensor, product: Product) -> Tensor:
    """The inner products of symmetric matrices, from their triangles: those beside count twice."""
    twice = multiplicity(left.shape[1], left).unsqueeze(1)
    return product(packed(left) * twice, packed(right))


def _diagonal_in_factors(left: Terms, right: Terms, layer: int, product: Product) -> Tensor:
    """What ``diag(c)`` adds to the inner product of ``U Q U^T + diag(c)`` with its like.

    With ``b`` the diagonal of ``U Q U^T``, all that ``diag(c')`` meets: ``(b + c) . c' + c . b'``.
    """
    (b, c), (other_b, other_c) = (
        ((t.gain[layer] * t.B[layer, layer + 1]).sum(2), t.bend[layer]) for t in (left, right)
    )
    return product(b + c, other_c) + product(c, other_b)


def _first_order_of_neighbours(
    arch: Architecture, left: Terms, right: Terms, layer: int, product: Product
) -> Tensor:
    """All of ``R_l,l+1`` that holds ``D_ll = diag(phi')``, of which no product has to be formed.

    With ``s = phi'[j] g[j']`` and ``t = z_j B[j,j']`` the two mixed terms are ``t . s'`` and
    ``s . t'``, and ``(D . D) (g . g)`` is ``s . s'``. Together they are ``(t + s) . s' + s . t'``,
    one product of vectors twice as long.
    """

    def vectors(terms: Terms) -> tuple[Vectors, Vectors]:
        z, g = _beyond_bias(arch, terms, layer + 1), terms.g[layer + 1]
        second = (z.unsqueeze(2) * terms.B[layer, layer + 1]).flatten(1, 2)
        return second, (terms.slope[layer].unsqueeze(2) * g.unsqueeze(1)).flatten(1, 2)

    (second, first), (other_second, other_first) = vectors(left), vectors(right)
    return product(torch.cat([second + first, first], 1), torch.cat([other_first, other_second], 1))

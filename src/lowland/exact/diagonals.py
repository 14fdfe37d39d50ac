r"""The diagonal of ``H``, and of each layer's ``B``, without any block of either.

    H[W_l (k,j), W_l (k,j)] = z~_lk^2 B_ll[j,j]
    diag(B_ll) = diag(J_l Q J_l^T) + sum_m>=l (J_lm o J_lm) c_m

with :math:`J_{lm} = \partial a_m / \partial a_l`, ``Q`` the logits' curvature, :math:`J_l` the
derivative of the logits, and :math:`c_m = \phi''_m V_{m+1} g_{m+1}` the diagonal that the bend of
layer ``m`` adds to its own ``B``: the recursion of :mod:`lowland.exact.terms`, unrolled, gives
``B_ll = J_l Q J_l^T + sum_m J_lm diag(c_m) J_lm^T``.
Between neighbours the squares of ``J`` are products with squared weights, so that a network of one
or two hidden layers costs no more than some passes over its weights for each output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowland.exact.blocks import multiplicity, pairs_of
from lowland.exact.terms import (
    Architecture,
    Data,
    ForwardPass,
    Matrices,
    Vectors,
    at_logits,
    batched_matmul,
    forward,
)


def diagonal(arch: Architecture, weights: Sequence[Tensor], data: Data) -> list[Tensor]:
    """These samples' share of the diagonal of ``H``, as large as each layer's weights.

    Rows that are not trained have zeros.
    """
    passed = forward(arch, weights, data)
    result = [torch.zeros_like(weight) for weight in weights]
    for layer, curvature in curvature_diagonals(arch, weights, data, passed):
        rows = arch.rows[layer]
        squares = passed.inputs[layer][:, rows].square()
        result[layer][:, rows] = batched_matmul(curvature, squares.mT).mT
    return result


def curvature_diagonals(
    arch: Architecture, weights: Sequence[Tensor], data: Data, passed: ForwardPass
) -> Iterator[tuple[int, Vectors]]:
    """``diag(B_ll)`` of each layer, from the logits down to the lowest that is trained."""
    last = len(weights) - 1
    residual, curvature = at_logits(arch, passed.logits, data)
    g, separable = residual.mT, curvature.ndim == residual.ndim
    yield last, (curvature if separable else curvature.diagonal(dim1=-2, dim2=-1)).mT
    # J_lm by m. That of a neighbour is only formed where a layer further below is made of it.
    jacobians: dict[int, Matrices] = {}
    bends: dict[int, Vectors] = {}
    for layer in range(last - 1, arch.lowest - 1, -1):
        slope, outgoing = passed.slope[layer], weights[layer + 1][:, 1:]
        # J_lm = diag(phi'_l) V_l+1 J_l+1,m
        for m, above in jacobians.items():
            pulled = (outgoing @ above.flatten(2)).unflatten(2, (above.shape[2], -1))
            jacobians[m] = slope.unsqueeze(2) * pulled
        # Below the logits pairs of outputs take M_l K (K + 1) / 2 numbers, the Jacobian M_l K for
        # each sample: it is the larger one, unless outputs outnumber samples.
        if layer + 1 == last and (separable or outgoing.shape[2] < slope.shape[2]):
            # With J = diag(phi') V the slopes come last, together with those of the neighbour.
            inner, found = _below_logits(outgoing, curvature, separable=separable), None
        else:
            if layer + 1 == last:
                jacobians[last] = slope.unsqueeze(2) * outgoing.unsqueeze(3)
            inner, found = None, _through_jacobian(jacobians[last], curvature, separable=separable)
        beta = outgoing @ g
        g, bends[layer] = slope * beta, passed.bend[layer] * beta
        found = bends[layer] if found is None else found + bends[layer]  # m = l: J is the identity
        for m in range(layer + 1, last):
            if m == layer + 1:  # (J_l,l+1 o J_l,l+1) c = phi'_l^2 (V o V) c
                near = outgoing.square() @ bends[m]
                inner = near if inner is None else inner + near
            else:
                found = found + (jacobians[m].square() * bends[m].unsqueeze(1)).sum(2)
        yield layer, found if inner is None else torch.addcmul(found, slope.square(), inner)
        if layer > arch.lowest and layer + 1 not in jacobians:
            jacobians[layer + 1] = slope.unsqueeze(2) * outgoing.unsqueeze(3)


def _below_logits(outgoing: Tensor, curvature: Tensor, *, separable: bool) -> Vectors:
    r"""``diag(V Q V^T)``, from products of pairs of columns of ``V``, the same for all samples.

    It is :math:`\sum_{ab} Q_{ab} V_{ka} V_{kb}`; a separable loss, of diagonal ``Q``, needs
    ``a = b`` alone.
    """
    if separable:
        return outgoing.square() @ curvature.mT
    outputs = outgoing.shape[2]
    first, second = pairs_of(outputs, outgoing.device)
    products = multiplicity(outputs, outgoing) * outgoing[:, :, first] * outgoing[:, :, second]
    return products @ curvature[:, :, first, second].mT


def _through_jacobian(jacobian: Matrices, curvature: Tensor, *, separable: bool) -> Vectors:
    """``diag(J Q J^T)``, of a ``Q`` that is diagonal where separable."""
    if separable:
        return (jacobian.square() * curvature.mT.unsqueeze(1)).sum(2)
    by_sample = jacobian.permute(0, 3, 1, 2)
    return ((by_sample @ curvature) * by_sample).sum(3).mT

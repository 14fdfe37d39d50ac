r"""``Tr H`` alone, without any block of ``H``.

    Tr H = sum_l |z~_l|^2 Tr B_ll
    Tr B_ll = Tr(J_l Q J_l^T) + sum_m>=l sum_j c_m[j] |J_lm[:, j]|^2

with :math:`J_{lm} = \partial a_m / \partial a_l`, ``Q`` the logits' curvature, :math:`J_l` the
derivative of the logits, and :math:`c_m = \phi''_m V_{m+1} g_{m+1}` the diagonal that the bend of
layer ``m`` adds to its own ``B``: the recursion of :mod:`lowland.exact.terms`, unrolled, gives
``B_ll = J_l Q J_l^T + sum_m J_lm diag(c_m) J_lm^T``.
Between neighbours the norms of ``J``'s columns are products with squared weights, so that a network
of one or two hidden layers costs no more than some passes over its weights for each output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxtyping import Float
from torch import Tensor

from lowland.exact.blocks import multiplicity, pairs_of
from lowland.exact.terms import (
    Architecture,
    Data,
    ForwardPass,
    Matrices,
    Vectors,
    at_logits,
    forward,
)

# A number for each sample.
Scalars = Float[Tensor, "#networks samples"]


def trace(arch: Architecture, weights: Sequence[Tensor], data: Data) -> Float[Tensor, " networks"]:
    """These samples' share of ``Tr H``, by operations that autograd knows."""
    passed = forward(arch, weights, data)
    total = passed.logits.new_zeros(passed.logits.shape[0])
    for layer, inner in _curvature_traces(arch, weights, data, passed):
        if arch.trains(layer):
            inputs = passed.inputs[layer][:, arch.rows[layer]]
            total = total + (inputs.square().sum(1) * inner).sum(1)
    return total


def _curvature_traces(
    arch: Architecture, weights: Sequence[Tensor], data: Data, passed: ForwardPass
) -> Iterator[tuple[int, Scalars]]:
    """``Tr B_ll`` of each layer, from the logits down."""
    last = len(weights) - 1
    logits = passed.logits
    residual, curvature = at_logits(arch, logits, data)
    g, separable = residual.mT, curvature.ndim == residual.ndim
    yield last, (curvature if separable else curvature.diagonal(dim1=-2, dim2=-1)).sum(-1)
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
            inner = _below_logits(slope, outgoing, curvature, separable=separable)
        else:
            if layer + 1 == last:
                jacobians[last] = slope.unsqueeze(2) * outgoing.unsqueeze(3)
            inner = _through_jacobian(jacobians[last], curvature, separable=separable)
        beta = outgoing @ g
        g, bends[layer] = slope * beta, passed.bend[layer] * beta
        inner = inner + bends[layer].sum(1)  # m = l, where J is the identity
        for m in range(layer + 1, last):
            # |J_l,l+1[:, j]|^2 = sum_k phi'_l[k]^2 V[k, j]^2, one product for all samples.
            norms = (
                outgoing.square().mT @ slope.square()
                if m == layer + 1
                else jacobians[m].square().sum(1)
            )
            inner = inner + (bends[m] * norms).sum(1)
        yield layer, inner
        if layer > arch.lowest and layer + 1 not in jacobians:
            jacobians[layer + 1] = slope.unsqueeze(2) * outgoing.unsqueeze(3)


def _below_logits(
    slope: Vectors, outgoing: Tensor, curvature: Tensor, *, separable: bool
) -> Scalars:
    r"""``Tr(J Q J^T)`` for ``J = diag(phi') V``, without forming ``J``.

    It is :math:`\sum_{ab} Q_{ab} \sum_k \phi'^2_k V_{ka} V_{kb}`: one product of squared slopes
    with pairs of columns of ``V``. A separable loss, of diagonal ``Q``, needs ``a = b`` alone.
    """
    if separable:
        return ((outgoing.square().mT @ slope.square()) * curvature.mT).sum(1)
    outputs = outgoing.shape[2]
    first, second = pairs_of(outputs, outgoing.device)
    products = multiplicity(outputs, outgoing) * outgoing[:, :, first] * outgoing[:, :, second]
    return ((products.mT @ slope.square()) * curvature[:, :, first, second].mT).sum(1)


def _through_jacobian(jacobian: Matrices, curvature: Tensor, *, separable: bool) -> Scalars:
    """``Tr(J Q J^T) = sum_k (J Q)_k . J_k``, of a ``Q`` that is diagonal where separable."""
    if separable:
        return (jacobian.square().sum(1) * curvature.mT).sum(1)
    by_sample = jacobian.permute(0, 3, 1, 2)
    return ((by_sample @ curvature) * by_sample).sum((2, 3))

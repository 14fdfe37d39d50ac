r"""``Tr H`` alone, without any block of ``H``.

    Tr H = sum_l |z~_l|^2 Tr B_ll,    Tr B_ll = Tr(J_l Q J_l^T) + sum_m sum_j c_m[j] |J_lm[:, j]|^2

with :math:`J_{lm} = \partial a_m / \partial a_l`, ``Q`` the logits' curvature, :math:`J_l` the
derivative of the logits, and :math:`c_m = \phi''_m \beta_m` what the bend of layer ``m`` adds.
Between neighbours the norms of ``J``'s columns are products with squared weights, so that a network
of one or two hidden layers costs no more than some passes over its weights for each output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxtyping import Float
from torch import Tensor

from lowland.exact.blocks import multiplicity, pairs_of
from lowland.exact.terms import Architecture, Data, ForwardPass, Matrices, Rows, forward
from lowland.losses import logit_derivatives

PerSample = Float[Tensor, "#networks samples"]


def trace(arch: Architecture, weights: Sequence[Tensor], data: Data) -> Float[Tensor, " networks"]:
    """These samples' share of ``Tr H``, by operations that autograd knows."""
    run = forward(arch, weights, data)
    total = run.logits.new_zeros(run.logits.shape[0])
    for layer, inner in _inner_traces(arch, weights, data, run):
        if arch.trains(layer):
            total = total + (run.inputs[layer][:, arch.rows[layer]].square().sum(1) * inner).sum(1)
    return total


def _inner_traces(
    arch: Architecture, weights: Sequence[Tensor], data: Data, run: ForwardPass
) -> Iterator[tuple[int, PerSample]]:
    """``Tr B_ll`` of each layer, from the logits down."""
    last = len(weights) - 1
    residual, curvature = logit_derivatives(
        arch.loss, run.logits.mT, data.y.to(run.logits.dtype), data.scale
    )
    g, separable = residual.mT, curvature.ndim == residual.ndim
    yield last, (curvature if separable else curvature.diagonal(dim1=-2, dim2=-1)).sum(-1)
    # By layer above: its pre-activations' derivatives in this layer's. Between neighbours they are
    # worth forming only for layers further below.
    jacobians: dict[int, Matrices] = {}
    bends: dict[int, Rows] = {}
    for layer in range(last - 1, arch.lowest - 1, -1):
        slope, gain = run.slope[layer], weights[layer + 1][:, 1:]
        for m, above in jacobians.items():
            pulled = (gain @ above.flatten(2)).unflatten(2, (above.shape[2], -1))
            jacobians[m] = slope.unsqueeze(2) * pulled
        if layer + 1 == last and (separable or gain.shape[2] < slope.shape[2]):
            inner = _of_neighbours(slope, gain, curvature, separable=separable)
        else:
            # Also for more outputs than samples, whose pairs would be larger than the Jacobian.
            if layer + 1 == last:
                jacobians[last] = slope.unsqueeze(2) * gain.unsqueeze(3)
            inner = _of_logits(jacobians[last], curvature, separable=separable)
        beta = gain @ g
        g, bends[layer] = slope * beta, run.bend[layer] * beta
        inner = inner + bends[layer].sum(1)
        for m in range(layer + 1, last):
            norms = (
                gain.square().mT @ slope.square()
                if m == layer + 1
                else jacobians[m].square().sum(1)
            )
            inner = inner + (bends[m] * norms).sum(1)
        yield layer, inner
        if layer > arch.lowest and layer + 1 not in jacobians:
            jacobians[layer + 1] = slope.unsqueeze(2) * gain.unsqueeze(3)


def _of_neighbours(slope: Rows, gain: Tensor, curvature: Tensor, *, separable: bool) -> PerSample:
    """The same for the layer below the logits, where ``J = diag(slope) V``: without forming it."""
    if separable:
        return ((gain.square().mT @ slope.square()) * curvature.mT).sum(1)
    first, second = pairs_of(gain.shape[2], gain.device)
    products = multiplicity(gain.shape[2], gain) * gain[:, :, first] * gain[:, :, second]
    return ((products.mT @ slope.square()) * curvature[:, :, first, second].mT).sum(1)


def _of_logits(jacobian: Matrices, curvature: Tensor, *, separable: bool) -> PerSample:
    """``Tr(J Q J^T)``."""
    if separable:
        return (jacobian.square().sum(1) * curvature.mT).sum(1)
    by_sample = jacobian.permute(0, 3, 1, 2)
    return ((by_sample @ curvature) * by_sample).sum((2, 3))

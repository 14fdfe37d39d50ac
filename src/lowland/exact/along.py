r"""The loss's second derivative along a direction, :math:`u^T H u`, without any block of ``H``.

Along :math:`W_l + t U_l`, with a dot for each derivative in ``t`` at zero,

    a_l' = U_l^T z~_l + V_l^T z_l',        z_l+1' = phi'_l a_l'
    a_l'' = 2 (U_l beyond the biases)^T z_l' + V_l^T z_l'',
    z_l+1'' = phi''_l a_l'^2 + phi'_l a_l''

and of one sample :math:`u^T H_i u = a_L'^T Q a_L' + r^T a_L''` with the loss's derivatives ``r``
and ``Q`` in the logits. It takes time linear in samples and parameters. Half of its gradient in the
direction is :math:`H u`; its gradient in the weights, for a constant ``u``, is that of
:math:`\langle u u^T, H\rangle`: of an eigenvalue, where ``u`` is its eigenvector.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from lowland.exact.terms import Architecture, Data, at_logits, batched_matmul, forward


def second_derivative(
    arch: Architecture, weights: Sequence[Tensor], direction: Sequence[Tensor], data: Data
) -> Float[Tensor, " networks"]:
    """These samples' share of ``u^T H u``, by operations that autograd knows.

    Args:
        arch: What the networks share; whose rows are trained is the direction's affair.
        weights: Of each layer, ``(networks, inputs + 1, outputs)``.
        direction: ``u``, as the weights; zero in rows that are not trained.
        data: The samples.
    """
    passed = forward(arch, weights, data)
    first = batched_matmul(direction[0].mT, passed.inputs[0])  # a'
    second = None  # a'', zero in the first layer: a_0 is linear in its weights
    for layer, (slope, bend) in enumerate(zip(passed.slope, passed.bend, strict=True)):
        of_bend = bend * first.square()
        second = of_bend if second is None else of_bend + slope * second  # now z''
        first = slope * first  # now z'
        outgoing, moved = weights[layer + 1][:, 1:], direction[layer + 1]
        second = 2 * (moved[:, 1:].mT @ first) + outgoing.mT @ second
        first = moved.mT @ passed.inputs[layer + 1] + outgoing.mT @ first
    residual, curvature = at_logits(arch, passed.logits, data)
    along = first.mT
    if curvature.ndim == residual.ndim:
        bent = curvature * along
    else:
        bent = (curvature @ along.unsqueeze(-1)).squeeze(-1)
    total = (bent * along).sum((1, 2))
    return total if second is None else total + (residual.mT * second).sum((1, 2))

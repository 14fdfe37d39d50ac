r"""``Tr H`` alone, without any block of ``H``: :math:`\sum_l |\tilde z_l|^2 \mathrm{Tr} B_{ll}`.

Each layer's trace is the sum of the diagonal of its ``B`` (:mod:`lowland.exact.diagonals`), so that
the whole is linear in samples and parameters alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from lowland.exact.diagonals import curvature_diagonals
from lowland.exact.terms import Architecture, Data, forward


def trace(arch: Architecture, weights: Sequence[Tensor], data: Data) -> Float[Tensor, " networks"]:
    """These samples' share of ``Tr H``, by operations that autograd knows."""
    passed = forward(arch, weights, data)
    total = passed.logits.new_zeros(passed.logits.shape[0])
    for layer, curvature in curvature_diagonals(arch, weights, data, passed):
        if arch.trains(layer):
            inputs = passed.inputs[layer][:, arch.rows[layer]]
            total = total + (inputs.square().sum(1) * curvature.sum(1)).sum(1)
    return total

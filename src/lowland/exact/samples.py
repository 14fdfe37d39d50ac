r"""The order of summation over pairs of samples: ``Tr H^2`` as a double sum of kernels.

    Tr H^2 = sum_ij  q_i q_j K_ij^2 + Gx (Gx . S + 2 R)
    K = Gx * (u_i . u_j) + z~_i . z~_j,     Gx = x~_i . x~_j

``K`` is the kernel of the Gauss-Newton part. What the residuals add lives on the diagonals of the
samples' blocks alone: with ``e = q u^2``, ``g = q u z``, ``rc = r c``, ``f = r phi'``,

    S = e_i . rc_j + rc_i . e_j + rc_i . rc_j,    R = g_i . f_j + f_i . g_j + f_i . f_j

The cost is ``O(samples^2 (inputs + hidden))``; nothing of size ``P^2`` is ever formed.

Source: arXiv:2606.28662, theorem 1 and section V-B, rearranged into matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lowland.exact.terms import Adjoint, Architecture, Rows, Terms

Kernel = Float[Tensor, "networks samples others"]


@dataclass(frozen=True)
class _Diagonals:
    """The diagonals of the samples' blocks, curvature part and residual part."""

    e: Rows
    rc: Rows
    g: Rows | None
    f: Rows | None


def _diagonals(arch: Architecture, terms: Terms) -> _Diagonals:
    q, r = terms.curvature, terms.residual
    qu = q * terms.u
    if not arch.trains_output_weights:
        return _Diagonals(qu * terms.u, r * terms.c, None, None)
    hidden = terms.u.shape[1]
    return _Diagonals(qu * terms.u, r * terms.c, qu * terms.z[:, -hidden:], r * terms.slope)


def pair_contributions(arch: Architecture, left: Terms, right: Terms) -> Kernel:
    """The terms of the double sum: what each pair of samples adds to ``Tr H^2``."""
    inputs = left.x.mT @ right.x
    kernel = torch.addcmul(left.z.mT @ right.z, inputs, left.u.mT @ right.u)
    kernel = kernel.square_().mul_(left.curvature.mT).mul_(right.curvature)
    a, b = _diagonals(arch, left), _diagonals(arch, right)
    mixed = torch.cat([a.e + a.rc, a.rc], 1).mT @ torch.cat([b.rc, b.e], 1)
    mixed = mixed.mul_(inputs)
    if a.g is not None and a.f is not None and b.g is not None and b.f is not None:
        mixed = mixed.add_(torch.cat([a.g + a.f, a.f], 1).mT @ torch.cat([b.f, b.g], 1), alpha=2)
    return kernel.addcmul_(mixed, inputs)


def adjoint(arch: Architecture, left: Terms, right: Terms) -> Adjoint:
    """The adjoint of ``Tr H^2`` for the samples ``left``, from their pairs with ``right``."""
    q = right.curvature
    inputs = right.x.mT @ left.x
    kernel = torch.addcmul(right.z.mT @ left.z, inputs, right.u.mT @ left.u)
    in_z = (q * right.z) @ kernel
    in_u = (q * right.u) @ kernel.mul_(inputs)
    b = _diagonals(arch, right)
    in_z, in_u = in_z.mul_(4), in_u.mul_(4)
    in_rslope = None
    hidden = left.u.shape[1]
    if b.g is not None and b.f is not None:
        mixed = torch.cat([b.g + b.f, b.f], 1) @ inputs
        in_rslope = 4 * mixed[:, :hidden]
        in_g = 4 * mixed[:, hidden:]
        # g = q u z is a product of both quadratic factors.
        in_u.addcmul_(in_g, left.z[:, -hidden:])
        in_z[:, -hidden:].addcmul_(in_g, left.u)
    mixed = torch.cat([b.e + b.rc, b.rc], 1) @ inputs.square_()
    in_rc = 2 * mixed[:, :hidden]
    in_u.addcmul_(mixed[:, hidden:], left.u, value=4)
    return Adjoint(in_u, in_z, in_rc, in_rslope)

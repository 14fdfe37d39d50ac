r"""The order of summation over pairs of parameters: accumulate ``H``, then square it.

The cost is ``O(samples * P^2)``, linear in the samples. ``H`` is built in blocks of rows that fit
the memory budget, from runs of samples that fit the processor's cache:

    H = J diag(q) J^T + residual part,    J = [x~ (x) u; z~]    (P x samples)

and the residual part touches only entries whose hidden units agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lowland.exact.terms import Adjoint, Architecture, Rows, Terms, batched_matmul

HessianRows = Float[Tensor, "networks block dim"]


@dataclass(frozen=True)
class Block:
    """A range of the rows of ``H``: some trained rows of ``W``, and perhaps those of ``v``."""

    inputs: slice
    with_output: bool


def row_blocks(inputs: int, per_block: int) -> Iterator[Block]:
    """Cut ``H`` into blocks of at most ``per_block`` rows of ``W``; the last one has ``v``'s."""
    starts = range(0, inputs, per_block) if inputs else range(1)
    for start in starts:
        stop = min(start + per_block, inputs)
        yield Block(slice(start, stop), with_output=stop == inputs)


def _jacobian(x: Rows, u: Rows, z: Rows | None) -> Rows:
    """``[x (x) u; z]``, written in place: a concatenation would move every row twice."""
    networks, hidden, count = u.shape
    products = x.shape[1] * hidden
    rows = products + (0 if z is None else z.shape[1])
    result = u.new_empty(networks, rows, count)
    torch.mul(
        x.unsqueeze(2), u.unsqueeze(1), out=result[:, :products].unflatten(1, (x.shape[1], hidden))
    )
    if z is not None:
        result[:, products:] = z
    return result


def hessian_rows(arch: Architecture, runs: Iterable[Terms], block: Block) -> HessianRows:
    """One block of rows of ``H``, summed over runs of samples."""
    total: Tensor | None = None
    in_rc: Tensor | None = None
    in_rslope: Tensor | None = None
    for terms in runs:
        root = terms.curvature.sqrt()
        full = _jacobian(terms.x * root, terms.u, terms.z * root)
        whole = block.inputs == slice(0, terms.x.shape[1]) and block.with_output
        part = full if whole else _select(full, terms, block)
        products = part @ full.mT
        x_block = terms.x[:, block.inputs]
        pairs = (x_block.unsqueeze(2) * terms.x.unsqueeze(1)).flatten(1, 2)
        rc = batched_matmul(terms.residual * terms.c, pairs.mT)
        rslope = batched_matmul(terms.residual * terms.slope, terms.x.mT)
        if total is None or in_rc is None or in_rslope is None:
            total, in_rc, in_rslope = products, rc, rslope
        else:
            total, in_rc, in_rslope = total.add_(products), in_rc.add_(rc), in_rslope.add_(rslope)
    if total is None or in_rc is None or in_rslope is None:
        raise ValueError("expected at least one run of samples")
    _add_residual(arch, total, in_rc, in_rslope, block)
    return total


def _select(full: Rows, terms: Terms, block: Block) -> Rows:
    hidden = terms.u.shape[1]
    start, stop = block.inputs.start * hidden, block.inputs.stop * hidden
    return full[:, start:] if block.with_output else full[:, start:stop]


def _add_residual(
    arch: Architecture, rows: HessianRows, in_rc: Tensor, in_rslope: Tensor, block: Block
) -> None:
    """Add the residual part: ``r c`` where hidden units agree, ``r phi'`` between W and v."""
    networks, hidden, inputs = in_rslope.shape
    count = block.inputs.stop - block.inputs.start
    if not count:
        return
    ww = rows[:, : count * hidden, : inputs * hidden]
    ww = ww.unflatten(2, (inputs, hidden)).unflatten(1, (count, hidden))
    ww.diagonal(dim1=2, dim2=4).add_(
        in_rc.view(networks, hidden, count, inputs).permute(0, 2, 3, 1)
    )
    if not arch.trains_output_weights:
        return
    wv = rows[:, : count * hidden, -hidden:].unflatten(1, (count, hidden))
    wv.diagonal(dim1=2, dim2=3).add_(in_rslope.mT[:, block.inputs])
    if block.with_output:
        vw = rows[:, -hidden:, : inputs * hidden].unflatten(2, (inputs, hidden))
        vw.diagonal(dim1=1, dim2=3).add_(in_rslope.mT)


def adjoint(arch: Architecture, terms: Terms, block: Block, matrix: HessianRows) -> Adjoint:
    r"""The adjoint of :math:`\langle C, H\rangle` for the rows ``matrix`` of a symmetric ``C``."""
    networks, hidden, _ = terms.u.shape
    x_block = terms.x[:, block.inputs]
    size, inputs = x_block.shape[1], terms.x.shape[1]
    product = matrix @ _jacobian(terms.x, terms.u, terms.z)
    in_u = torch.zeros_like(terms.u)
    for k in range(size):
        in_u.addcmul_(product[:, k * hidden : (k + 1) * hidden], x_block[:, k : k + 1])
    in_z = product[:, size * hidden :] if block.with_output else torch.zeros_like(terms.z)

    ww = matrix[:, : size * hidden, : inputs * hidden]
    ww = ww.unflatten(2, (inputs, hidden)).unflatten(1, (size, hidden))
    ww = ww.diagonal(dim1=2, dim2=4).permute(0, 3, 1, 2).reshape(networks, hidden, size * inputs)
    pairs = (x_block.unsqueeze(2) * terms.x.unsqueeze(1)).flatten(1, 2)
    in_rslope = None
    if arch.trains_output_weights:
        wv = matrix[:, : size * hidden, -hidden:].unflatten(1, (size, hidden))
        in_rslope = batched_matmul(2 * wv.diagonal(dim1=2, dim2=3).mT, x_block)
    return Adjoint(in_u.mul_(2), 2 * in_z, batched_matmul(ww, pairs), in_rslope)

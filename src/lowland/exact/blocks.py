r"""The Hessian's blocks as sums of products over samples, and pieces of them.

The block of layers ``l`` and ``m`` is :math:`\sum_i F_i G_i^T` with

    l = m      F = pairs of z~_l,          G = pairs of B_ll       (both symmetric: packed)
    m = l + 1  F = z~_l (x) z~_m,          G = B_lm                and on the diagonal k' = j
               F = z~_l,                   G = slope_l (x) g_m
    m > l + 1  F = z~_l,                   G = z~_m (x) B_lm + D_l,m-1 (x) g_m

A piece of a block is held as ``(networks, rows of F, rows of G)``; each of its entries stands for
one, two or four equal ones of the Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowland.exact.size import Size
from lowland.exact.terms import Architecture, Rows, Terms


@dataclass(frozen=True)
class Piece:
    """Some rows of a block: those of the trained rows ``start`` to ``stop`` of layer ``left``."""

    left: int
    right: int
    start: int
    stop: int


@dataclass(frozen=True)
class Factors:
    """``F`` and ``G`` of a piece, ``(1 | networks, rows, samples)`` each.

    ``on_diagonal`` are those of the part that lies on the diagonal ``k' = j``, if there is one.
    """

    left: Rows
    right: Rows
    on_diagonal: tuple[Rows, Rows] | None = None


def shape(size: Size, piece: Piece) -> tuple[int, int]:
    """Rows of ``F`` and of ``G``."""
    count, width = piece.stop - piece.start, size.widths[piece.left + 1]
    if piece.left == piece.right:
        rows = size.rows[piece.left]
        pairs = count * rows - (piece.start + piece.stop - 1) * count // 2
        return pairs, width * (width + 1) // 2
    others, other = size.rows[piece.right], size.widths[piece.right + 1]
    if piece.right == piece.left + 1:
        return count * others, width * other
    return count, width * others * other


def blocks(size: Size) -> Iterator[Piece]:
    """The blocks on and above the diagonal."""
    for left in size.trained:
        for right in size.trained:
            if left <= right:
                yield Piece(left, right, 0, size.rows[left])


def cut(size: Size, limit: int) -> list[list[Piece]] | None:
    """Groups of pieces that have at most ``limit`` entries together; None if a row has more."""
    groups: list[list[Piece]] = [[]]
    room = limit
    for block in blocks(size):
        start = 0
        while start < block.stop:
            stop = start
            while stop < block.stop and _entries(size, block, start, stop + 1) <= room:
                stop += 1
            if stop == start:
                if room == limit:
                    return None
                groups.append([])
                room = limit
                continue
            groups[-1].append(Piece(block.left, block.right, start, stop))
            room -= _entries(size, block, start, stop)
            start = stop
    return groups


def _entries(size: Size, block: Piece, start: int, stop: int) -> int:
    return math.prod(shape(size, Piece(block.left, block.right, start, stop)))


def entries(size: Size) -> int:
    """Entries of all blocks: half of the Hessian's where layers are wide, a quarter on them."""
    return sum(math.prod(shape(size, block)) for block in blocks(size))


@lru_cache(64)
def pairs_of(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of a packed symmetric matrix: row by row, from the diagonal on."""
    first, second = torch.triu_indices(count, count, device=device)
    return first, second


def factors(arch: Architecture, terms: Terms, piece: Piece) -> Factors:
    """``F`` and ``G`` of a piece."""
    left, right, rows = piece.left, piece.right, slice(piece.start, piece.stop)
    z = terms.z[left]
    if left == right:
        return Factors(products(z, piece.start, piece.stop), packed(terms.B[left, left]))
    if right > left + 1:
        return Factors(z[:, rows], outer(arch, terms, left, right).flatten(1, 3))
    pairs = (z[:, rows].unsqueeze(2) * terms.z[right].unsqueeze(1)).flatten(1, 2)
    second = terms.B[left, right].flatten(1, 2)
    if not arch.trains_beyond_bias(right):
        return Factors(pairs, second)
    first = (terms.slope[left].unsqueeze(2) * terms.g[right].unsqueeze(1)).flatten(1, 2)
    return Factors(pairs, second, (z[:, rows], first))


def outer(arch: Architecture, terms: Terms, left: int, right: int) -> Tensor:
    """What a row of the block is made of, ``(networks, k', j, j', samples)``."""
    whole = terms.z[right][:, :, None, None] * terms.B[left, right].unsqueeze(1)
    if arch.trains_beyond_bias(right):
        beyond = whole[:, arch.first_beyond_bias(right) :]
        g = terms.g[right].unsqueeze(1)
        if right == left + 1:
            along = beyond.diagonal(dim1=1, dim2=2)
            along += (g * terms.slope[left].unsqueeze(2)).permute(0, 2, 3, 1)
        else:
            beyond += terms.D[left, right - 1].transpose(1, 2).unsqueeze(3) * g.unsqueeze(1)
    return whole


def products(z: Rows, start: int, stop: int) -> Rows:
    """Products of pairs of rows, the first of each among ``start`` to ``stop``."""
    count = z.shape[1]
    total = sum(count - k for k in range(start, stop))
    result = z.new_empty(z.shape[0], total, z.shape[2])
    at = 0
    for k in range(start, stop):
        torch.mul(z[:, k : k + 1], z[:, k:], out=result[:, at : at + count - k])
        at += count - k
    return result


def packed(matrices: Tensor) -> Rows:
    """The upper triangle of symmetric matrices ``(networks, width, width, samples)``."""
    width = matrices.shape[1]
    first, second = pairs_of(width, matrices.device)
    return matrices.flatten(1, 2).index_select(1, first * width + second)


def multiplicity(count: int, like: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """How many entries of a symmetric matrix each packed one stands for: 1 or 2.

    Of all of its rows, or of those from ``start`` to ``stop``.
    """
    stop = count if stop is None else stop
    entries = (stop - start) * count - (start + stop - 1) * (stop - start) // 2
    diagonal = _diagonal(count, start, stop, like.device)
    return like.new_full((entries,), 2).index_fill_(0, diagonal, 1)


def weights_of(size: Size, piece: Piece, like: Tensor) -> Tensor:
    """How many entries of the Hessian each entry of a piece stands for, ready to multiply it."""
    if piece.left != piece.right:
        return like.new_full((1, 1), 2)
    of_rows = multiplicity(size.rows[piece.left], like, piece.start, piece.stop)
    return of_rows[:, None] * multiplicity(size.widths[piece.left + 1], like)


@lru_cache(64)
def _diagonal(count: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Where the pairs (k, k) of some rows are in a packed piece."""
    k = torch.arange(start, stop, device=device)
    before = k * count - k * (k - 1) // 2
    return before - before[:1]


def diagonals(size: Size, piece: Piece, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ``F`` and of ``G`` whose products are on the Hessian's diagonal."""
    width = size.widths[piece.left + 1]
    rows = _diagonal(size.rows[piece.left], piece.start, piece.stop, device)
    return rows, _diagonal(width, 0, width, device)


def accumulate(block: Tensor | None, found: Factors) -> Tensor:
    """Add a run of samples to a piece, ``(networks, rows of F, rows of G)``.

    Without its diagonal part, see :func:`add_diagonal`.
    """
    right = found.right.mT
    if block is None:
        return found.left @ right
    return torch.baddbmm(
        block, found.left.expand(len(block), -1, -1), right.expand(len(block), -1, -1), out=block
    )


def on_diagonal(size: Size, piece: Piece, block: Tensor) -> Tensor:
    """A view of the diagonal ``k' = j`` of a piece: ``(networks, k, j', j)``."""
    count, others = piece.stop - piece.start, size.rows[piece.right]
    width, other = size.widths[piece.left + 1], size.widths[piece.right + 1]
    view = block.view(-1, count, others, width, other)
    return view[:, :, others - width :].diagonal(dim1=2, dim2=3)


def dense(size: Size, found: Sequence[tuple[Piece, Tensor]]) -> Tensor:
    """The Hessian ``(networks, P, P)`` from all of its pieces; trained rows layer by layer."""
    networks, dim = len(found[0][1]), size.dim
    result = found[0][1].new_empty(networks, dim, dim)
    starts = [
        sum(r * w for r, w in zip(size.rows[:layer], size.widths[1 : layer + 1], strict=True))
        for layer in range(size.depth)
    ]
    for piece, block in found:
        at = [starts[layer] for layer in (piece.left, piece.right)]
        extent = [size.rows[layer] * size.widths[layer + 1] for layer in (piece.left, piece.right)]
        whole = _unpack(size, piece, block)
        result[:, at[0] : at[0] + extent[0], at[1] : at[1] + extent[1]] = whole
        if piece.left != piece.right:
            result[:, at[1] : at[1] + extent[1], at[0] : at[0] + extent[0]] = whole.mT
    return result


def _unpack(size: Size, piece: Piece, block: Tensor) -> Tensor:
    """A whole block as a matrix."""
    rows, width = size.rows[piece.left], size.widths[piece.left + 1]
    if piece.left == piece.right:
        k, other_k = pairs_of(rows, block.device)
        j, other_j = pairs_of(width, block.device)
        result = block.new_empty(len(block), rows, width, rows, width)
        for a, b in ((k, other_k), (other_k, k)):
            for c, d in ((j, other_j), (other_j, j)):
                result[:, a[:, None], c, b[:, None], d] = block
        return result.flatten(3).flatten(1, 2)
    others, other = size.rows[piece.right], size.widths[piece.right + 1]
    return block.view(-1, rows, others, width, other).transpose(2, 3).flatten(3).flatten(1, 2)

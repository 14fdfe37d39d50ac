r"""The Hessian's blocks as sums of products over samples, and tiles of them.

The block of ``W_l`` and ``W_m``, with the entries

    sum_i z~_lk ( z~_mk' B_lm[j,j'] + [l < m, k' > 0] D_l,m-1[j,k'] g_m[j'] )

in row ``(k, j)`` and column ``(k', j')``, is :math:`\sum_i F_i G_i^T` with two vectors a sample:

    l = m      F = z~_lk z~_lk', k <= k'   G = B_ll[j,j'], j <= j'     (both symmetric: packed)
    m = l + 1  F = z~_lk z~_mk'            G = B_lm[j,j']
               F = z~_lk                   G = phi'_l[j] g_m[j']       where k' is unit j alone
    m > l + 1  F = z~_lk                   G = z~_mk' B_lm[j,j'] + D_l,m-1[j,k'] g_m[j']

For ``m = l + 1`` the matrix ``D_ll`` is the diagonal one of slopes, so that its part lies on the
diagonal ``k' = j`` of the block and is added up apart. For ``m > l + 1`` it is full, ``k'`` has to
be in ``G``, and then one product serves both parts.

A tile is some rows ``k`` of a block, held as ``(networks, entries of F, entries of G)``; each of
its entries stands for one, two or four equal ones of the Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowland.exact.size import Size
from lowland.exact.terms import Architecture, Terms, Vectors


@dataclass(frozen=True)
class Tile:
    """Some rows of the block of two layers: the trained rows ``start`` to ``stop`` of the lower."""

    lower: int
    upper: int
    start: int
    stop: int


@dataclass(frozen=True)
class Factors:
    """``F`` and ``G`` of a tile over a chunk of samples, ``(1 | networks, entries, samples)`` each.

    Attributes:
        left: ``F``.
        right: ``G``.
        on_diagonal: Between neighbouring layers the two factors of the part on ``k' = j``.
    """

    left: Vectors
    right: Vectors
    on_diagonal: tuple[Vectors, Vectors] | None = None


def shape(size: Size, tile: Tile) -> tuple[int, int]:
    """Entries of ``F`` and of ``G``."""
    count, width = tile.stop - tile.start, size.widths[tile.lower + 1]
    if tile.lower == tile.upper:
        rows = size.rows[tile.lower]
        # Row k has the pairs (k, k) to (k, rows - 1): the sum of rows - k over the tile's rows.
        pairs = count * rows - (tile.start + tile.stop - 1) * count // 2
        return pairs, width * (width + 1) // 2
    others, other = size.rows[tile.upper], size.widths[tile.upper + 1]
    if tile.upper == tile.lower + 1:
        return count * others, width * other
    return count, width * others * other


def blocks(size: Size) -> Iterator[Tile]:
    """The blocks on and above the diagonal, each as one tile."""
    for lower in size.trained:
        for upper in size.trained:
            if lower <= upper:
                yield Tile(lower, upper, 0, size.rows[lower])


def cut(size: Size, limit: int) -> list[list[Tile]] | None:
    """Groups of tiles of at most ``limit`` entries a group; None if one row of a block has more."""
    groups: list[list[Tile]] = [[]]
    room = limit  # in the last group
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
            groups[-1].append(Tile(block.lower, block.upper, start, stop))
            room -= _entries(size, block, start, stop)
            start = stop
    return groups


def _entries(size: Size, block: Tile, start: int, stop: int) -> int:
    """Entries of the tile of a block from row ``start`` to ``stop``."""
    return math.prod(shape(size, Tile(block.lower, block.upper, start, stop)))


def entries(size: Size) -> int:
    """Entries of all blocks: of those off the diagonal half are held, of those on it a quarter."""
    return sum(math.prod(shape(size, block)) for block in blocks(size))


@lru_cache(64)
def pairs_of(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of a packed symmetric matrix's entries: row by row, from the diagonal on."""
    first, second = torch.triu_indices(count, count, device=device)
    return first, second


def factorize(arch: Architecture, terms: Terms, tile: Tile) -> Factors:
    """``F`` and ``G`` of a tile, by the table above."""
    lower, upper, rows = tile.lower, tile.upper, slice(tile.start, tile.stop)
    z = terms.z[lower]
    if lower == upper:
        return Factors(products(z, tile.start, tile.stop), packed(terms.B[lower, lower]))
    if upper > lower + 1:
        return Factors(z[:, rows], right_factor(arch, terms, lower, upper).flatten(1, 3))
    pairs = (z[:, rows].unsqueeze(2) * terms.z[upper].unsqueeze(1)).flatten(1, 2)
    second = terms.B[lower, upper].flatten(1, 2)
    if not arch.trains_beyond_bias(upper):
        return Factors(pairs, second)
    first = (terms.slope[lower].unsqueeze(2) * terms.g[upper].unsqueeze(1)).flatten(1, 2)
    return Factors(pairs, second, (z[:, rows], first))


def right_factor(arch: Architecture, terms: Terms, lower: int, upper: int) -> Tensor:
    """All but ``z~_lk`` of the entries of a block off the diagonal.

    Returns:
        ``z~_mk' B_lm[j,j'] + D_l,m-1[j,k'] g_m[j']`` of each sample, ``(networks, k', j, j',
        samples)``.
    """
    whole = terms.z[upper][:, :, None, None] * terms.B[lower, upper].unsqueeze(1)
    if arch.trains_beyond_bias(upper):
        # The row k' of W_m multiplies unit k' of layer m - 1; a row of biases multiplies none.
        beyond = whole[:, arch.first_beyond_bias(upper) :]
        g = terms.g[upper].unsqueeze(1)
        if upper == lower + 1:
            # D_ll is diagonal: only k' = j, as (networks, j', samples, j).
            along = beyond.diagonal(dim1=1, dim2=2)
            along += (g * terms.slope[lower].unsqueeze(2)).permute(0, 2, 3, 1)
        else:
            beyond += terms.D[lower, upper - 1].transpose(1, 2).unsqueeze(3) * g.unsqueeze(1)
    return whole


def products(z: Vectors, start: int, stop: int) -> Vectors:
    """``z_k z_k'`` for ``k`` from ``start`` to ``stop`` and all ``k' >= k``, packed row by row."""
    count = z.shape[1]
    total = sum(count - k for k in range(start, stop))
    # Written into place: gathering both sides by index would take two more tensors of this size.
    result = z.new_empty(z.shape[0], total, z.shape[2])
    at = 0
    for k in range(start, stop):
        torch.mul(z[:, k : k + 1], z[:, k:], out=result[:, at : at + count - k])
        at += count - k
    return result


def packed(matrices: Tensor) -> Vectors:
    """The upper triangles of symmetric matrices, row by row, ``(networks, pairs, samples)``."""
    width = matrices.shape[1]
    first, second = pairs_of(width, matrices.device)
    return matrices.flatten(1, 2).index_select(1, first * width + second)


def multiplicity(count: int, like: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """How many entries of a symmetric matrix each packed one stands for: 1 on the diagonal, else 2.

    Args:
        count: Rows of the matrix.
        like: A tensor of the type and device wanted.
        start: The first row that is packed.
        stop: The row after the last; all by default.
    """
    stop = count if stop is None else stop
    entries = (stop - start) * count - (start + stop - 1) * (stop - start) // 2
    diagonal = _diagonal(count, start, stop, like.device)
    return like.new_full((entries,), 2).index_fill_(0, diagonal, 1)


def tile_multiplicity(size: Size, tile: Tile, like: Tensor) -> Tensor:
    """How many entries of the Hessian each entry of a tile stands for, ready to multiply it."""
    if tile.lower != tile.upper:
        return like.new_full((1, 1), 2)  # H is symmetric: the block (m, l) is this one transposed
    # z~_k z~_k' B[j,j'] is also that of (k', k) and that of (j', j).
    of_rows = multiplicity(size.rows[tile.lower], like, tile.start, tile.stop)
    return of_rows[:, None] * multiplicity(size.widths[tile.lower + 1], like)


@lru_cache(64)
def _diagonal(count: int, start: int, stop: int, device: torch.device) -> Tensor:
    """The places of the pairs ``(k, k)`` in what is packed from row ``start`` to ``stop``."""
    k = torch.arange(start, stop, device=device)
    before = k * count - k * (k - 1) // 2  # the pairs of rows 0 to k - 1: count, count - 1, ...
    return before - before[:1]


def diagonals(size: Size, tile: Tile, device: torch.device) -> tuple[Tensor, Tensor]:
    """The entries ``k = k'`` of ``F`` and ``j = j'`` of ``G``, that give the Hessian's diagonal."""
    width = size.widths[tile.lower + 1]
    rows = _diagonal(size.rows[tile.lower], tile.start, tile.stop, device)
    return rows, _diagonal(width, 0, width, device)


def accumulate(total: Tensor | None, left: Vectors, right: Vectors) -> Tensor:
    """``total`` plus ``sum_i F_i G_i^T`` over a chunk, ``(networks, entries of F, entries of G)``.

    It is added to in place where there is one, so that a tile is held only once.
    """
    right = right.mT
    if total is None:
        return left @ right
    return torch.baddbmm(
        total, left.expand(len(total), -1, -1), right.expand(len(total), -1, -1), out=total
    )


def on_diagonal(size: Size, tile: Tile, values: Tensor) -> Tensor:
    """A view of the diagonal ``k' = j`` of a tile between neighbours: ``(networks, k, j', j)``.

    All rows that multiply units are trained there, and they are the last ``width`` of the layer's.
    """
    count, others = tile.stop - tile.start, size.rows[tile.upper]
    width, other = size.widths[tile.lower + 1], size.widths[tile.upper + 1]
    view = values.view(-1, count, others, width, other)
    return view[:, :, others - width :].diagonal(dim1=2, dim2=3)


def dense(size: Size, blocks: Sequence[tuple[Tile, Tensor]]) -> Tensor:
    """The Hessian ``(networks, P, P)`` from all of its blocks, the parameters layer by layer.

    A layer's are the trained rows of its weights, one after the other.
    """
    networks, dim = len(blocks[0][1]), size.dim
    result = blocks[0][1].new_empty(networks, dim, dim)
    for tile, values in blocks:
        lower, upper = places(size, tile.lower), places(size, tile.upper)
        whole = _unpack(size, tile, values)
        result[:, lower, upper] = whole
        if tile.lower != tile.upper:
            result[:, upper, lower] = whole.mT
    return result


def places(size: Size, layer: int) -> slice:
    """Where a layer's trained weights stand among all parameters, row by row."""
    counts = [r * w for r, w in zip(size.rows, size.widths[1:], strict=True)]
    return slice(sum(counts[:layer]), sum(counts[: layer + 1]))


def gathered(size: Size, tile: Tile, matrix: Tensor) -> Tensor:
    """Of a symmetric matrix ``C`` what each entry of a tile of ``H`` is multiplied by in <C, H>.

    It is the sum of C over all entries of ``H`` that this one stands for: unlike in ``H`` they need
    not be equal, since ``C`` has no symmetry within the blocks of a layer.

    Args:
        size: The extent of the problem.
        tile: The tile.
        matrix: ``C``, ``(networks, P, P)``, the parameters as in :func:`dense`.
    """
    rows, width = size.rows[tile.lower], size.widths[tile.lower + 1]
    others, other = size.rows[tile.upper], size.widths[tile.upper + 1]
    block = matrix[:, places(size, tile.lower), places(size, tile.upper)]
    block = block.reshape(-1, rows, width, others, other)
    if tile.lower != tile.upper:
        rows_of_tile = 2 * block[:, tile.start : tile.stop]
        return rows_of_tile.transpose(2, 3).contiguous().view(-1, *shape(size, tile))
    k, other_k = pairs_of(rows, matrix.device)
    chosen = (k >= tile.start) & (k < tile.stop)
    k, other_k = k[chosen], other_k[chosen]
    j, other_j = pairs_of(width, matrix.device)
    # (k, k') and (k', k), once where they are the same; so for (j, j').
    one_row, one_column = (k == other_k)[:, None], j == other_j
    result = matrix.new_zeros(len(matrix), len(k), len(j))
    for a, b, counts_row in ((k, other_k, None), (other_k, k, one_row)):
        for c, d, counts_column in ((j, other_j, None), (other_j, j, one_column)):
            share = block[:, a[:, None], c, b[:, None], d]
            for same in (counts_row, counts_column):
                if same is not None:
                    share = share.masked_fill(same, 0)
            result += share
    return result


def _unpack(size: Size, block: Tile, values: Tensor) -> Tensor:
    """A whole block as a matrix, ``(networks, (k, j), (k', j'))``."""
    rows, width = size.rows[block.lower], size.widths[block.lower + 1]
    if block.lower == block.upper:
        k, other_k = pairs_of(rows, values.device)
        j, other_j = pairs_of(width, values.device)
        result = values.new_empty(len(values), rows, width, rows, width)
        for a, b in ((k, other_k), (other_k, k)):
            for c, d in ((j, other_j), (other_j, j)):
                result[:, a[:, None], c, b[:, None], d] = values
        return result.flatten(3).flatten(1, 2)
    others, other = size.rows[block.upper], size.widths[block.upper + 1]
    return values.view(-1, rows, others, width, other).transpose(2, 3).flatten(3).flatten(1, 2)

r"""The order of summation over pairs of parameters: accumulate ``H``'s blocks, then square them.

The cost is ``O(samples * P^2)``, linear in the samples. Memory is that of the tiles that are held
at a time and of one chunk of samples. With a tile as :math:`\sum_i F_i G_i^T` and the matching tile
of ``C``, what the gradient needs of a sample is

    <C, F G^T> = F^T C G,   with the adjoints  C G  in F  and  C^T F  in G

and from there the product rule leads to the terms that ``F`` and ``G`` are made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lowland.exact.blocks import (
    Tile,
    accumulate,
    diagonals,
    factorize,
    on_diagonal,
    packed,
    pairs_of,
    products,
    right_factor,
    tile_multiplicity,
)
from lowland.exact.size import Size
from lowland.exact.terms import Architecture, Matrices, Name, Terms, Vectors

Tiles = list[tuple[Tile, Tensor]]
"""Tiles of a symmetric matrix, each with its values."""

Adjoints = dict[Name, Tensor]

CACHE_BYTES = 4 << 20
FEWEST_SAMPLES = 16


def accumulate_tiles(
    arch: Architecture, size: Size, chunks: Iterable[Terms], tiles: Sequence[Tile]
) -> Tiles:
    """Some tiles of ``H``, summed over chunks of samples."""
    sums: dict[Tile, Tensor] = {}
    diagonal_sums: dict[Tile, Tensor] = {}
    for terms in chunks:
        for tile in tiles:
            factors = factorize(arch, terms, tile)
            sums[tile] = accumulate(sums.get(tile), factors.left, factors.right)
            if factors.on_diagonal is not None:
                diagonal_sums[tile] = accumulate(diagonal_sums.get(tile), *factors.on_diagonal)
    for tile, values in diagonal_sums.items():  # (networks, k, (j, j'))
        view = on_diagonal(size, tile, sums[tile])
        view.add_(values.unflatten(2, (view.shape[3], view.shape[2])).transpose(2, 3))
    return list(sums.items())


def traces(size: Size, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """What tiles of ``H`` add to ``Tr H``, its diagonal, and to ``Tr H^2``, all its squares."""
    networks = len(tiles[0][1])
    first, second = tiles[0][1].new_zeros(2, networks)
    for tile, values in tiles:
        weighed = tile_multiplicity(size, tile, values) * values
        second = second + (weighed.flatten(1) * values.flatten(1)).sum(1)
        if tile.lower == tile.upper:
            rows, columns = diagonals(size, tile, values.device)
            first = first + values[:, rows[:, None], columns].sum((1, 2))
    return first, second


def coefficients(size: Size, tiles: Tiles, trace_weight: Tensor, square_weight: Tensor) -> Tiles:
    r"""The tiles of :math:`C = a I + 2 b H`, times how many entries of it each one stands for.

    So the plain sum of products with a tile of ``H`` is that tile's share of <C, H>.
    """
    result = []
    for tile, values in tiles:
        matrix = tile_multiplicity(size, tile, values) * values
        matrix *= 2 * square_weight[:, None, None]
        if tile.lower == tile.upper:
            rows, columns = diagonals(size, tile, values.device)
            matrix[:, rows[:, None], columns] += trace_weight[:, None, None]
        result.append((tile, matrix))
    return result


def adjoints(arch: Architecture, terms: Terms, tile: Tile, matrix: Tensor) -> Adjoints:
    r"""The derivatives of :math:`\langle C, H\rangle` in a chunk's terms, through one tile.

    Args:
        arch: What the networks share.
        terms: Those of the chunk.
        tile: The tile.
        matrix: The tile of ``C``, as :func:`coefficients` gives it.
    """
    if tile.lower == tile.upper:
        return _in_diagonal_block(terms, tile, matrix)
    # C contracted with z_l is as large, for each sample, as a row of the tile. On a processor it is
    # made for a few samples at a time, so that it is still in the cache when it is used; but each
    # time all of C is read, so they must be enough for the products to outweigh that.
    few = terms.samples
    if matrix.device.type == "cpu":
        each = matrix.numel() // (tile.stop - tile.start) * matrix.element_size()
        few = max(FEWEST_SAMPLES, CACHE_BYTES // each)
    few = min(few, terms.samples)
    # One workspace for all of them, which stays in the cache.
    workspace = matrix.new_empty(few * matrix.numel() // (tile.stop - tile.start))
    found = [
        _in_block_across(arch, terms.of_samples(slice(start, start + few)), tile, matrix, workspace)
        for start in range(0, terms.samples, few)
    ]
    if len(found) == 1:
        return found[0]
    return {name: torch.cat([each[name] for each in found], -1) for name in found[0]}


def _in_block_across(
    arch: Architecture, terms: Terms, tile: Tile, matrix: Tensor, workspace: Tensor
) -> Adjoints:
    r"""The adjoints of a block between two layers, :math:`\sum_k \tilde z_{lk} <C_k, G>`.

    ``C_k`` is a row of the tile of ``C``, ``(k', j, j')``. With ``Y = sum_k z~_lk C_k``, they are

        in B_lm[j,j']    sum_k' z~_mk' Y[k',j,j']
        in z~_mk'        sum_jj' B_lm[j,j'] Y[k',j,j']
        in z~_lk         <C_k, G>
    """
    lower, upper = tile.lower, tile.upper
    z, upper_z = terms.z[lower][:, tile.start : tile.stop], terms.z[upper]
    second = terms.B[lower, upper]
    networks, width, other, count = second.shape
    rows = matrix.view(networks, tile.stop - tile.start, -1)
    inputs = z.mT.expand(networks, -1, -1)
    contracted = workspace[: networks * count * rows.shape[2]].view(networks, count, -1)
    torch.bmm(inputs, rows, out=contracted)
    contracted = contracted.view(networks, count, upper_z.shape[1], width * other)  # Y
    by_sample = second.permute(0, 3, 1, 2).flatten(2)
    result: Adjoints = {
        ("B", (lower, upper)): _samples_last(
            (_samples_first(upper_z).unsqueeze(2) @ contracted).view(networks, count, width, other)
        ),
        ("z", upper): (contracted @ by_sample.unsqueeze(3)).squeeze(3).mT,
    }
    if arch.trains_beyond_bias(upper):
        beyond = contracted[:, :, arch.first_beyond_bias(upper) :].unflatten(3, (width, other))
        result |= _in_first_order_part(terms, lower, upper, beyond)
    if terms.varies(lower):
        whole = right_factor(arch, terms, lower, upper).flatten(1, 3)
        in_z = torch.zeros_like(terms.z[lower].expand(networks, -1, -1))
        in_z[:, tile.start : tile.stop] = rows @ whole
        result["z", lower] = in_z
    return result


def _in_first_order_part(terms: Terms, lower: int, upper: int, beyond: Tensor) -> Adjoints:
    r"""The adjoints of what a block has in ``D_l,m-1[j,k'] g_m[j']``.

    Args:
        terms: Those of some samples.
        lower: ``l``.
        upper: ``m``.
        beyond: ``Y`` without the biases' row, ``(networks, samples, k', j, j')``.
    """
    g = _samples_first(terms.g[upper])
    if upper == lower + 1:
        # D is diag(phi'_l): only k' = j counts. In phi'_l[j]: sum_j' g_m[j'] Y[j,j,j'].
        along = beyond.diagonal(dim1=2, dim2=3)  # (networks, samples, j', j)
        slope = _samples_first(terms.slope[lower])
        return {
            ("slope", lower): (g.unsqueeze(2) @ along).squeeze(2).mT,
            ("g", upper): (along @ slope.unsqueeze(3)).squeeze(3).mT,
        }
    # In D[j,k']: sum_j' g_m[j'] Y[k',j,j'];  in g_m[j']: sum_k'j D[j,k'] Y[k',j,j'].
    first = terms.D[lower, upper - 1].permute(0, 3, 2, 1)  # (networks, samples, k', j)
    in_first = (beyond @ g[:, :, None, :, None]).squeeze(4)
    in_g = first.flatten(2).unsqueeze(2) @ beyond.flatten(2, 3)
    return {
        ("D", (lower, upper - 1)): in_first.permute(0, 3, 2, 1),
        ("g", upper): in_g.squeeze(2).mT,
    }


def _in_diagonal_block(terms: Terms, tile: Tile, matrix: Tensor) -> Adjoints:
    r"""The adjoints of a layer's own block, :math:`f = F^T C G` with both factors packed."""
    layer = tile.lower
    z, second = terms.z[layer], terms.B[layer, layer]
    networks, width, _, count = second.shape
    # In G: C^T F. C holds the multiplicities, so half of B's entries have all of its adjoint.
    in_packed = matrix.mT @ products(z, tile.start, tile.stop)
    result: Adjoints = {("B", (layer, layer)): _unpacked(in_packed, width)}
    if terms.varies(layer):
        # In F: C G, and F = z~_k z~_k' passes it on to both, times the other; twice for k = k'.
        rows = z.shape[1]
        in_z = z.new_zeros(networks, rows, count)
        result["z", layer] = in_z
        if layer == 0:  # row by row, since of many inputs all pairs at a time take much memory
            in_pairs, at = matrix @ packed(second), 0
            for k in range(tile.start, tile.stop):
                in_row = in_pairs[:, at : at + rows - k]
                in_z[:, k] += (in_row * z[:, k:]).sum(1)
                in_z[:, k:] += in_row * z[:, k : k + 1]
                at += rows - k
            return result
        first, other = pairs_of(rows, z.device)
        chosen = (first >= tile.start) & (first < tile.stop)
        first, other = first[chosen], other[chosen]
        in_pairs = matrix @ packed(second)
        in_z.index_add_(1, first, in_pairs * z[:, other])
        in_z.index_add_(1, other, in_pairs * z[:, first])
    return result


def _unpacked(triangle: Vectors, width: int) -> Matrices:
    """Matrices with a packed triangle on and above the diagonal, and zeros below."""
    first, second = pairs_of(width, triangle.device)
    result = triangle.new_zeros(triangle.shape[0], width * width, triangle.shape[2])
    result[:, first * width + second] = triangle
    return result.view(-1, width, width, triangle.shape[2])


def _samples_first(vectors: Vectors) -> Tensor:
    """``(networks, samples, entries)`` in memory, as products sample by sample read them."""
    return vectors.mT.contiguous()


def _samples_last(matrices: Tensor) -> Matrices:
    """A view of ``(networks, samples, rows, columns)`` in the order of all terms."""
    return matrices.permute(0, 2, 3, 1)

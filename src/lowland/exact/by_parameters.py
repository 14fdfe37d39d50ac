r"""The order of summation over pairs of parameters: accumulate ``H``'s blocks, then square them.

The cost is ``O(samples * P^2)``, linear in the samples. Memory is that of the pieces that are held
at a time and of one run of samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lowland.exact.blocks import (
    Factors,
    Piece,
    accumulate,
    diagonals,
    factors,
    on_diagonal,
    outer,
    packed,
    pairs_of,
    products,
    weights_of,
)
from lowland.exact.size import Size
from lowland.exact.terms import Architecture, Matrices, Name, Rows, Terms

Found = list[tuple[Piece, Tensor]]

CACHE_BYTES = 4 << 20
SHORTEST_RUN = 16


def accumulate_pieces(
    arch: Architecture, size: Size, runs: Iterable[Terms], pieces: Sequence[Piece]
) -> Found:
    """Some pieces of ``H``, summed over runs of samples."""
    blocks: dict[Piece, Tensor] = {}
    extra: dict[Piece, Tensor] = {}
    for terms in runs:
        for piece in pieces:
            found = factors(arch, terms, piece)
            blocks[piece] = accumulate(blocks.get(piece), found)
            if found.on_diagonal is not None:
                extra[piece] = accumulate(extra.get(piece), Factors(*found.on_diagonal))
    for piece, part in extra.items():
        view = on_diagonal(size, piece, blocks[piece])
        view.add_(part.unflatten(2, (view.shape[3], view.shape[2])).transpose(2, 3))
    return list(blocks.items())


def traces(size: Size, found: Found) -> tuple[Tensor, Tensor]:
    """What pieces add to ``Tr H`` and to ``Tr H^2``."""
    networks = len(found[0][1])
    first, second = found[0][1].new_zeros(2, networks)
    for piece, block in found:
        weighed = weights_of(size, piece, block) * block
        second = second + (weighed.flatten(1) * block.flatten(1)).sum(1)
        if piece.left == piece.right:
            rows, columns = diagonals(size, piece, block.device)
            first = first + block[:, rows[:, None], columns].sum((1, 2))
    return first, second


def coefficients(size: Size, found: Found, trace_weight: Tensor, square_weight: Tensor) -> Found:
    r"""Pieces of :math:`C = a I + 2 b H`, times what each entry stands for."""
    result = []
    for piece, block in found:
        matrix = weights_of(size, piece, block) * block
        matrix *= 2 * square_weight[:, None, None]
        if piece.left == piece.right:
            rows, columns = diagonals(size, piece, block.device)
            matrix[:, rows[:, None], columns] += trace_weight[:, None, None]
        result.append((piece, matrix))
    return result


def derivatives(
    arch: Architecture, terms: Terms, piece: Piece, matrix: Tensor
) -> dict[Name, Tensor]:
    r"""The derivatives of :math:`\langle C, H\rangle` in a run's terms, for a piece of ``C``."""
    if piece.left == piece.right:
        return _on_diagonal_block(terms, piece, matrix)
    # What is contracted in a few samples at a time stays in the processor's cache.
    few = terms.samples
    if matrix.device.type == "cpu":
        each = matrix.numel() // (piece.stop - piece.start) * matrix.element_size()
        few = max(SHORTEST_RUN, CACHE_BYTES // each)
    few = min(few, terms.samples)
    room = matrix.new_empty(few * matrix.numel() // (piece.stop - piece.start))
    parts = [
        _across_layers(arch, terms.of_samples(slice(start, start + few)), piece, matrix, room)
        for start in range(0, terms.samples, few)
    ]
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}


def _across_layers(
    arch: Architecture, terms: Terms, piece: Piece, matrix: Tensor, room: Tensor
) -> dict[Name, Tensor]:
    left, right = piece.left, piece.right
    z, other = terms.z[left][:, piece.start : piece.stop], terms.z[right]
    second = terms.B[left, right]
    networks, width, above, count = second.shape
    # C contracted with this layer's inputs, sample by sample.
    rows = matrix.view(networks, piece.stop - piece.start, -1)
    inputs = z.mT.expand(networks, -1, -1)
    contracted = room[: networks * count * rows.shape[2]].view(networks, count, -1)
    torch.bmm(inputs, rows, out=contracted)
    contracted = contracted.view(networks, count, other.shape[1], width * above)
    by_sample = second.permute(0, 3, 1, 2).flatten(2)
    result: dict[Name, Tensor] = {
        ("B", (left, right)): _by_rows(
            (_samples_first(other).unsqueeze(2) @ contracted).view(networks, count, width, above)
        ),
        ("z", right): (contracted @ by_sample.unsqueeze(3)).squeeze(3).mT,
    }
    if arch.trains_beyond_bias(right):
        beyond = contracted[:, :, arch.first_beyond_bias(right) :].unflatten(3, (width, above))
        result |= _first_order(terms, left, right, beyond)
    if left:
        whole = outer(arch, terms, left, right).flatten(1, 3)
        in_z = torch.zeros_like(terms.z[left].expand(networks, -1, -1))
        in_z[:, piece.start : piece.stop] = rows @ whole
        result["z", left] = in_z
    return result


def _first_order(terms: Terms, left: int, right: int, beyond: Tensor) -> dict[Name, Tensor]:
    """What goes through ``D (x) g``; ``beyond`` is ``(networks, samples, k', j, j')``."""
    g = _samples_first(terms.g[right])
    if right == left + 1:
        along = beyond.diagonal(dim1=2, dim2=3)  # (networks, samples, j', j)
        slope = _samples_first(terms.slope[left])
        return {
            ("slope", left): (g.unsqueeze(2) @ along).squeeze(2).mT,
            ("g", right): (along @ slope.unsqueeze(3)).squeeze(3).mT,
        }
    first = terms.D[left, right - 1].permute(0, 3, 2, 1)  # (networks, samples, k', j)
    in_first = (beyond @ g[:, :, None, :, None]).squeeze(4)
    in_g = first.flatten(2).unsqueeze(2) @ beyond.flatten(2, 3)
    return {
        ("D", (left, right - 1)): in_first.permute(0, 3, 2, 1),
        ("g", right): in_g.squeeze(2).mT,
    }


def _on_diagonal_block(terms: Terms, piece: Piece, matrix: Tensor) -> dict[Name, Tensor]:
    layer = piece.left
    z, second = terms.z[layer], terms.B[layer, layer]
    networks, width, _, count = second.shape
    in_packed = matrix.mT @ products(z, piece.start, piece.stop)
    result: dict[Name, Tensor] = {("B", (layer, layer)): _unpacked(in_packed, width)}
    if layer:
        rows = z.shape[1]
        first, other = pairs_of(rows, z.device)
        chosen = (first >= piece.start) & (first < piece.stop)
        first, other = first[chosen], other[chosen]
        in_pairs = matrix @ packed(second)
        in_z = z.new_zeros(networks, rows, count)
        in_z.index_add_(1, first, in_pairs * z[:, other])
        in_z.index_add_(1, other, in_pairs * z[:, first])
        result["z", layer] = in_z
    return result


def _unpacked(rows: Rows, width: int) -> Matrices:
    """Packed rows in the upper triangle of matrices, zeros below."""
    first, second = pairs_of(width, rows.device)
    result = rows.new_zeros(rows.shape[0], width * width, rows.shape[2])
    result[:, first * width + second] = rows
    return result.view(-1, width, width, rows.shape[2])


def _samples_first(rows: Rows) -> Tensor:
    return rows.mT.contiguous()


def _by_rows(matrices: Tensor) -> Matrices:
    return matrices.permute(0, 2, 3, 1)

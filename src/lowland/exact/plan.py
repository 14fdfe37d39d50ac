"""In which order a problem is computed, and how much at a time, to respect memory and cache.

Memory is counted in *floats*, numbers of the tensors' own type. All counts are upper bounds: what
is allocated stays within the budgets that are cut by them. *Measured* is the peak of live tensors,
by sample or by pair of samples, over GELU networks of none to five hidden layers under each loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch

from lowland._limits import DEFAULT_MEMORY_BUDGET, MEBIBYTE
from lowland.exact import blocks
from lowland.exact.blocks import Tile
from lowland.exact.c_backend import choose_chunk, packed_entries
from lowland.exact.size import Size

Order = Literal["samples", "parameters"]
OrderChoice = Literal["auto", "samples", "parameters"]


@dataclass(frozen=True)
class Plan:
    """The order of summation, the backend, and how much is handled at a time.

    Attributes:
        order: Over pairs of ``"samples"`` or of ``"parameters"``.
        networks: Networks handled together.
        chunk: Samples handled together.
        tiles: Of ``H``, in groups that are held at a time (order ``"parameters"`` in PyTorch).
        keep: Whether the backward pass may keep what the forward pass has built: ``H`` in the
            order ``"parameters"``, the terms of all chunks in the order ``"samples"``.
        compiled: Whether the compiled code does it; else PyTorch.
    """

    order: Order
    networks: int
    chunk: int
    tiles: list[list[Tile]] = field(default_factory=list)
    keep: bool = False
    compiled: bool = False


# Beyond this products gain nothing, and the processor's cache is left behind.
LONGEST_CHUNK = 1024

Path = Literal["samples", "parameters", "compiled"]

# Seconds for each unit of `work`, as fitted by `python benchmarks/cost_model.py` on one core in
# float64. Only their ratios matter to the choice.
PRICES: dict[Path, tuple[float, float, float]] = {
    "samples": (6.7e-11, 1.2e-9, 5.3e-6),
    "parameters": (6.5e-11, 3.3e-9, 7.0e-6),
    "compiled": (5.9e-11, 5.6e-8, 4.7e-4),
}


def work(size: Size, path: Path) -> tuple[float, float, float]:
    """The work of the moments and their gradient, for one network.

    Prices are fitted to it, so what counts is how it grows; a factor common to an amount is theirs.

    Returns:
        Multiply-adds in matrix products, elements touched between them, and operations launched
        (for the compiled path: multiply-adds, hidden units evaluated, and calls).
    """
    n = size.samples
    if path == "compiled":
        # Each packed entry of H: accumulated once, contracted with C once.
        return 2.0 * n * _packed_entries(size), float(n * size.widths[1]), 1.0
    # Pairs of layers have their own terms and blocks. PyTorch counts 1.5 to 3.3 times as many.
    launched = 60 * size.depth * (size.depth + 1)
    if path == "parameters":
        # F G^T; C^T F for the adjoint of G; C G for that of F, which in the first layer's own block
        # is data.
        products = sum(
            (2.0 if block.upper == 0 else 3.0) * math.prod(blocks.shape(size, block))
            for block in blocks.blocks(size)
        )
        chunks = max(1.0, n / LONGEST_CHUNK)
        return n * products, n * 0.5 * _floats_over_parameters(size), launched * chunks
    # Where memory forces short chunks, each is gone through once for each of the others.
    room = _chunk_of_pairs(size, DEFAULT_MEMORY_BUDGET // 2)
    chunks = max(1.0, n / max(1, min(LONGEST_CHUNK, room)))
    return (
        # The moments take half of all pairs, 0.5. Their gradient takes every pair's products once
        # more and with each the adjoint of one of the two samples, 2.
        2.5 * n * n * _gram_length(size, size.widths[-1]),
        n * n * (_FLOATS_PER_BLOCK * len(list(blocks.blocks(size))) + _floats_of_outputs(size))
        + n * 0.5 * chunks * _term_floats_over_samples(size),
        launched * chunks * (chunks + 1),
    )


def cost(size: Size, path: Path) -> float:
    """Predicted seconds for the moments and their gradient, one network."""
    return sum(amount * price for amount, price in zip(work(size, path), PRICES[path], strict=True))


def gradient_cost(size: Size) -> float:
    """Predicted seconds for one plain gradient of the loss of one network, at the same prices."""
    n, layers = size.samples, list(pairwise(size.widths))
    products = 3.0 * n * sum(a * b for a, b in layers)  # forward, and back to inputs and weights
    touched = 6.0 * n * sum(b for _, b in layers) + 4.0 * sum(a * b for a, b in layers)
    amounts = (products, touched, 12.0 * size.depth)
    return sum(a * price for a, price in zip(amounts, PRICES["parameters"], strict=True))


def trace_cost(size: Size, *, in_full: bool) -> float:
    """Predicted seconds for ``Tr H`` alone and its gradient, one network, at the same prices.

    Args:
        size: The extent of the problem.
        in_full: Whether bends make it carry whole ``B`` along (:mod:`lowland.exact.trace_alone`).
    """
    n, outputs = size.samples, size.widths[-1]
    # The units' own passes, as a gradient of the loss has them, and what lies in between.
    products = 3.0 * n * sum(a * b for a, b in pairwise(size.widths))
    touched = n * sum(16.0 * width for width in size.widths[1:-1]) + 3.0 * n * size.widths[0]
    hidden = size.widths[size.trained[0] + 1 : -1]
    for a, b in pairwise(hidden):
        # B down and S up, two products each, and the one for the adjoint of V; or J, A and this.
        products += n * (3.0 * a * b * (a + b) if in_full else 3.0 * a * b * outputs)
        touched += n * (8.0 * a * (a + b) if in_full else 16.0 * a * outputs)
    if len(hidden) > 1:  # else V Q V^T by products alone
        touched += 16.0 * n * hidden[-1] * outputs
    elif hidden:
        products += 6.0 * n * hidden[0] * outputs
    # Much of what a small call takes is the reading of the model and the batch, once.
    amounts = (products, touched, 60.0 * (1 + size.depth))
    return sum(a * price for a, price in zip(amounts, PRICES["parameters"], strict=True))


def make_plan(
    size: Size,
    order: OrderChoice,
    budget: int,
    *,
    on_cpu: bool,
    compiled: bool,
) -> Plan:
    """Choose the order if it is open, and say how much is handled at a time.

    Args:
        size: The extent of the problem.
        order: The order wanted, or ``"auto"``: the one predicted to be faster among those whose
            smallest plan fits into the budget.
        budget: Bytes of temporaries that must not be exceeded.
        on_cpu: On a processor chunks are cut to fit its cache, on an accelerator the budget.
        compiled: Whether compiled code covers the problem.

    Raises:
        ValueError: If the order is unknown, or the budget too small for its smallest plan.
    """
    if order not in ("auto", "samples", "parameters"):
        raise ValueError(
            f"unknown order {order!r}: expected 'auto', 'samples' (cost quadratic in the samples) "
            "or 'parameters' (cost quadratic in the parameters)"
        )
    threads = torch.get_num_threads()
    # A quarter for the threads' workspaces, half for their Hessians, a quarter for what is kept.
    compiled_chunk = choose_chunk(size, budget // 4 // threads) if compiled else 0
    compiled_networks = budget // 2 // _packed_bytes(size, threads) if compiled else 0
    compiled = compiled_chunk > 0 and compiled_networks > 0
    if order == "auto":
        path: Path = "compiled" if compiled else "parameters"
        fits = compiled or _smallest_over_parameters(size) <= budget
        worth = cost(size, path) <= cost(size, "samples") or _smallest_over_samples(size) > budget
        order = "parameters" if fits and worth else "samples"
    if order == "samples":
        return _plan_over_samples(size, budget, on_cpu=on_cpu)
    if compiled:
        return Plan(
            "parameters",
            min(size.networks, compiled_networks),
            compiled_chunk,
            keep=size.networks * _packed_entries(size) * size.itemsize <= budget // 4,
            compiled=True,
        )
    return _plan_over_parameters(size, budget, on_cpu=on_cpu)


def make_trace_plan(size: Size, budget: int, floats: int, *, on_cpu: bool, compiled: bool) -> Plan:
    """The plan of ``Tr H`` alone, for which no matrix is formed; the loss's gradient needs less.

    Args:
        size: The extent of the problem.
        budget: Bytes of temporaries that must not be exceeded.
        floats: Of one sample, as :func:`trace_floats` or :func:`diagonal_floats` counts them.
        on_cpu: As for :func:`make_plan`.
        compiled: Whether compiled code covers the problem.

    Raises:
        ValueError: If the budget is too small for one sample.
    """
    per_sample, fixed = floats * size.itemsize, _weight_copies(size) * size.itemsize
    if per_sample + fixed > budget:
        raise ValueError(
            f"a memory budget of {budget / MEBIBYTE:.3g} MiB is too small: one sample's terms take "
            f"{(per_sample + fixed) / MEBIBYTE:.3g} MiB; raise memory_budget"
        )
    if compiled:
        room = budget // torch.get_num_threads()
        chunk = choose_chunk(size, room, trace_alone=True)
        if chunk:
            return Plan("parameters", size.networks, chunk, compiled=True)
    # Longer than other chunks, since a sample takes less.
    longest = 4 * LONGEST_CHUNK if on_cpu else size.samples
    chunk = _evenly(size.samples, min(longest, (budget - fixed) // per_sample))
    networks = max(1, min(size.networks, budget // (per_sample * chunk + fixed)))
    return Plan("parameters", networks, chunk)


def _plan_over_parameters(size: Size, budget: int, *, on_cpu: bool) -> Plan:
    """Half of the budget for tiles of ``H``, half for a chunk of samples."""
    if _smallest_over_parameters(size) > budget:
        raise _too_small(size, budget, "parameters")
    half = budget // 2
    limit = (half // size.itemsize - _weight_copies(size)) // _TILE_COPIES
    entries = min(blocks.entries(size), limit)
    tiles = blocks.cut(size, limit)
    if tiles is None:
        raise _too_small(size, budget, "parameters")
    per_sample = _floats_over_parameters(size) * size.itemsize
    longest = LONGEST_CHUNK if on_cpu else size.samples
    chunk = _evenly(size.samples, max(1, min(longest, half // per_sample)))
    networks = max(
        1, min(size.networks, half // _tile_bytes(size, entries), half // (per_sample * chunk))
    )
    kept = size.networks * blocks.entries(size) * size.itemsize
    return Plan("parameters", networks, chunk, tiles, keep=len(tiles) == 1 and kept <= budget // 4)


def _plan_over_samples(size: Size, budget: int, *, on_cpu: bool) -> Plan:
    """Half of the budget for a pair of chunks; half for all terms and adjoints, if they fit."""
    if _smallest_over_samples(size) > budget:
        raise _too_small(size, budget, "samples")
    room = budget // 2 - _weight_copies(size) * size.itemsize
    longest = LONGEST_CHUNK if on_cpu else size.samples
    chunk = _evenly(size.samples, max(1, min(longest, _chunk_of_pairs(size, room))))
    floats = (_floats_per_pair(size) * chunk + _floats_over_samples(size)) * chunk
    networks = max(1, min(size.networks, room // (floats * size.itemsize)))
    kept = networks * size.samples * _term_floats_over_samples(size) * size.itemsize
    return Plan("samples", networks, chunk, keep=kept <= budget // 4)


def _evenly(samples: int, longest: int) -> int:
    """The length of chunks that are about equal, none above ``longest``."""
    return -(-samples // -(-samples // longest))


def _chunk_of_pairs(size: Size, limit: float) -> int:
    """How many samples a chunk may have for a pair of chunks to fill ``limit`` bytes.

    With ``s`` floats a sample and ``p`` a pair of samples, ``c`` solves ``p c^2 + s c = limit``.
    """
    s, p = _floats_over_samples(size), _floats_per_pair(size)
    return int(((s * s + 4 * p * limit / size.itemsize) ** 0.5 - s) / (2 * p))


def _smallest_over_parameters(size: Size) -> int:
    """Bytes of the smallest plan: half of it holds one row of a block, half one sample."""
    one_row = max(
        math.prod(blocks.shape(size, Tile(block.lower, block.upper, 0, 1)))
        for block in blocks.blocks(size)
    )
    return 2 * max(_tile_bytes(size, one_row), _floats_over_parameters(size) * size.itemsize)


def _smallest_over_samples(size: Size) -> int:
    """Bytes of the smallest plan: half of it holds one pair of samples."""
    floats = _floats_over_samples(size) + _floats_per_pair(size) + _weight_copies(size)
    return 2 * floats * size.itemsize


def _too_small(size: Size, budget: int, order: Order) -> ValueError:
    """The error that says how much an order needs, and whether the other one needs less."""
    smallest = {
        "samples": _smallest_over_samples(size),
        "parameters": _smallest_over_parameters(size),
    }
    other: Order = "samples" if order == "parameters" else "parameters"
    needed, instead = (smallest[each] / MEBIBYTE for each in (order, other))
    advice = (
        f" or try order={other!r}"
        if smallest[other] <= budget
        else f" (for order={other!r} to {instead:.3g} MiB)"
    )
    return ValueError(
        f"a memory budget of {budget / MEBIBYTE:.3g} MiB is too small for order={order!r}, whose "
        f"smallest piece here takes {needed:.3g} MiB; raise memory_budget{advice}"
    )


# What a network takes, whatever its samples

# A tile of H; what is added to it or made of it, such as its squares; the tile of C.
_TILE_COPIES = 3


def _tile_bytes(size: Size, entries: int) -> int:
    """Bytes of tiles with so many entries, and of what depends on the weights alone."""
    return (_TILE_COPIES * entries + _weight_copies(size)) * size.itemsize


def _weight_copies(size: Size) -> int:
    """Floats of gradients in the weights, and of what products copy of weights.

    Two gradients are found at a time, and a chunk's share is added to each; the rest is for copies.
    """
    return 6 * sum((a + 1) * b for a, b in pairwise(size.widths))


def _packed_entries(size: Size) -> int:
    """Entries of one network's Hessian as the compiled code packs it."""
    return packed_entries(size.rows[0], size.widths[1], size.rows[1])


def _packed_bytes(size: Size, threads: int) -> int:
    """Bytes of one network's packed Hessian, a copy a thread and one that is kept."""
    return (threads + 1) * _packed_entries(size) * size.itemsize


# What a sample takes


def term_floats(size: Size, *, in_factors: bool = False) -> int:
    """Floats of one sample's terms, of what autograd keeps of their making, and of their adjoints.

    Measured: 0.3 to 0.95 of it, more with each hidden layer.
    """
    last, outputs = size.depth - 1, size.widths[-1]
    # x and [1; x]; of the loss the residuals and up to six matrices, as softmax cross-entropy has.
    floats = 3 * size.widths[0] + 16 + 6 * outputs * outputs
    for layer in range(last):
        width, above = size.widths[layer + 1], size.widths[layer + 2]
        # Those of g, and at most of B and D for each layer above.
        columns = 1 + 2 * sum(size.widths[layer + 2 :])
        # By unit: a, z, [1; z], the derivatives of phi and what they are made of; the adjoints.
        floats += 20 * width
        # All columns side by side; after V, after the slopes, and adjoints.
        floats += (above + 3 * width) * columns
        # V times slopes on both sides, in two steps, for D; B_l,l+1 transposed.
        floats += 3 * width * above
        # B_ll in two steps, its adjoint in as many, and triangles; or U in place of B_ll.
        floats += 6 * width * (above if in_factors and layer == last - 1 else width)
    return floats


def trace_floats(size: Size, *, in_full: bool) -> int:
    """Floats of one sample in ``Tr H`` alone and its gradient.

    A bound for losses and activations of one's own, whose temporaries cannot be counted here, has
    to leave room.
    """
    outputs, hidden = size.widths[-1], size.widths[1:-1]
    floats = 3 * size.widths[0] + 16 + 8 * outputs * outputs + 16 * outputs
    for index, width in enumerate(hidden):
        # What phi gives and is made of, and the adjoints; P, P Q and what is made of them on the
        # way up; B and V B V^T, half a product, and as much for S.
        floats += 30 * width + 8 * width * outputs
        if in_full:
            floats += 8 * width * max(hidden[index : index + 2])
    return floats


def diagonal_floats(size: Size) -> int:
    """Floats of one sample in the diagonal of ``H``.

    Measured: 0.1 to 0.6 of it. A bound for losses and activations of one's own, whose temporaries
    cannot be counted here, has to leave room.
    """
    last, outputs = size.depth - 1, size.widths[-1]
    # Measured: 2 for each input, and of a coupled loss 4 for each pair of outputs.
    floats = 3 * size.widths[0] + 16 + 8 * outputs * outputs + 16 * outputs
    for layer in range(last):
        width, above = size.widths[layer + 1], size.widths[layer + 2 : last + 1]
        # Measured: 10 for each unit. Then the Jacobians: of the logits, of layers from the next
        # but one; and of the next if it is formed, for a trained layer further below.
        floats += 30 * width + 8 * width * (sum(above[1:]) + outputs)
        floats += 8 * width * sum(above[:1]) * (layer > size.trained[0])
    return floats


def _floats_over_parameters(size: Size) -> int:
    """Floats of one sample and network in the order "parameters".

    The terms, and the factors of the largest block with half as much again for their adjoints.
    Measured: 0.5 to 0.9 of it.
    """
    return term_floats(size) + 3 * _factor_floats(size) // 2


def _factor_floats(size: Size) -> int:
    """Floats of what the largest block is made of: ``F``, ``G``, and between layers their parts."""

    def floats(block: Tile) -> int:
        total = sum(blocks.shape(size, block))
        if block.lower < block.upper:  # z_m (x) B_lm, or C contracted with z_l
            total += (
                size.rows[block.upper] * size.widths[block.lower + 1] * size.widths[block.upper + 1]
            )
        return total

    return max(floats(block) for block in blocks.blocks(size))


def _term_floats_over_samples(size: Size) -> int:
    """Floats of one sample's terms in the order "samples", which may leave a layer in factors."""
    return term_floats(size, in_factors=size.last_in_factors)


def _floats_over_samples(size: Size) -> int:
    """Floats of one sample in each of two chunks whose samples meet, in the order "samples".

    The terms; a third of them for the other chunk's, of which no graph is kept; of both the vectors
    whose products are formed, and their adjoints. Measured: 0.25 to 0.5 of it.
    """
    return 4 * _term_floats_over_samples(size) // 3 + 4 * _gram_length(size)


# What a pair of samples takes

# Of a block: inner products of z_l, of z_m, of B and of what is first-order, R_lm, and the sum.
_FLOATS_PER_BLOCK = 6


def _floats_per_pair(size: Size) -> int:
    """Floats of a pair of samples, in the moments and their gradient.

    Measured: 0.3 to 0.8 of it.
    """
    total = 6 + _floats_of_outputs(size)  # the total, its adjoint, and those under way
    for block in blocks.blocks(size):
        total += _FLOATS_PER_BLOCK
        if block.upper > block.lower + 1:
            # D z_m and B g_m, for both ways to choose, and the adjoints of one.
            total += 6 * size.widths[block.lower + 1]
    return total


def _floats_of_outputs(size: Size) -> int:
    """Of a layer in factors: both Gram matrices of outputs, their product, and two adjoints."""
    return 5 * size.widths[-1] ** 2 if size.last_in_factors else 0


def _gram_length(size: Size, outputs: int = 1) -> int:
    """Entries of one sample's vectors whose inner products with another's are formed.

    Times ``outputs`` where each is multiplied by as many: then the multiply-adds, once forward.
    """
    total = 0
    for block in blocks.blocks(size):
        width, other = size.widths[block.lower + 1], size.widths[block.upper + 1]
        if size.last_in_factors and block.lower == block.upper == size.depth - 2:
            # z; U and U Q; b + c and c.
            total += size.rows[block.lower] + 2 * width * (size.widths[-1] * outputs + 1)
        elif block.lower == block.upper:
            # z; the triangle of B.
            total += size.rows[block.lower] + width * (width + 1) // 2
        elif block.upper == block.lower + 1:
            # B; first-order vectors, twice as long.
            total += width * other + 2 * width * other
        else:
            # B; B g_m and D z_m, for both ways to choose.
            total += width * other + 2 * width * (other + size.widths[block.upper])
    return total

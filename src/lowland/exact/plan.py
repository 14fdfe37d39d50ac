"""How to run a computation: order of summation, and sizes that respect memory and cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch

from lowland.exact import blocks
from lowland.exact.blocks import Piece
from lowland.exact.c_backend import choose_block, packed_entries
from lowland.exact.size import Size

Order = Literal["samples", "parameters"]
OrderChoice = Literal["auto", "samples", "parameters"]

MEBIBYTE = 1 << 20
DEFAULT_MEMORY_BUDGET = 256 * MEBIBYTE


@dataclass(frozen=True)
class Plan:
    """The chosen order and the sizes of its pieces.

    Attributes:
        order: ``"samples"`` or ``"parameters"``.
        networks: Networks handled together.
        run: Samples handled together.
        pieces: Of ``H``, in groups that are held at a time (order ``"parameters"``).
        keep: Whether the backward pass may keep what the forward pass has built: ``H`` in the
            order ``"parameters"``, the terms of all runs in the order ``"samples"``.
        compiled: Whether the order ``"parameters"`` takes the compiled code.
        block: For the compiled code the samples in a block.
    """

    order: Order
    networks: int
    run: int
    pieces: list[list[Piece]] = field(default_factory=list)
    keep: bool = False
    compiled: bool = False
    block: int = 0


# Beyond this products gain nothing, and the processor's cache is left behind.
LONGEST_RUN = 1024

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

    Returns:
        Multiply-adds in matrix products, elements touched between them, and operations launched
        (for the compiled path: multiply-adds, hidden units evaluated, and calls).
    """
    n = size.samples
    if path == "compiled":
        return 2.0 * n * _packed_entries(size), float(n * size.widths[1]), 1.0
    launched = 60 * size.depth * (size.depth + 1)
    if path == "parameters":
        # Once forward; backward once for each factor that depends on the weights.
        products = sum(
            (3.0 if block.left else 2.0 if block.right == 0 else 3.0)
            * math.prod(blocks.shape(size, block))
            for block in blocks.blocks(size)
        )
        runs = max(1.0, n / LONGEST_RUN)
        return n * products, n * 0.5 * _rows(size), launched * runs
    # Where memory forces short runs, each is gone through once for each of the others.
    room = _kernel_run(size, DEFAULT_MEMORY_BUDGET // 2)
    runs = max(1.0, n / max(1, min(LONGEST_RUN, room)))
    return (
        2.5 * n * n * _inner(size, size.widths[-1]),
        n * n * (6.0 * len(list(blocks.blocks(size))) + _pairs_of_outputs(size))
        + n * 0.5 * runs * _rows_of_pairs(size),
        launched * runs * (runs + 1),
    )


def cost(size: Size, path: Path) -> float:
    """Predicted seconds for the moments and their gradient, one network."""
    return sum(amount * price for amount, price in zip(work(size, path), PRICES[path], strict=True))


def gradient_cost(size: Size) -> float:
    """Predicted seconds for one plain gradient of the loss of one network."""
    n, layers = size.samples, list(pairwise(size.widths))
    products = 3.0 * n * sum(a * b for a, b in layers)
    touched = 6.0 * n * sum(b for _, b in layers) + 4.0 * sum(a * b for a, b in layers)
    amounts = (products, touched, 12.0 * size.depth)
    return sum(a * price for a, price in zip(amounts, PRICES["parameters"], strict=True))


def make_plan(
    size: Size,
    order: OrderChoice,
    budget: int,
    *,
    on_cpu: bool,
    compiled: bool,
) -> Plan:
    """Choose the order if it is open, and cut the problem into pieces.

    Args:
        size: The extent of the problem.
        order: The order wanted, or ``"auto"``: the one predicted to be faster among those whose
            smallest piece fits into the budget.
        budget: Bytes of temporaries that must not be exceeded.
        on_cpu: On a processor pieces are cut to fit its cache, on an accelerator the budget.
        compiled: Whether compiled code covers the problem.

    Raises:
        ValueError: If the order is unknown, or the budget too small for its smallest piece.
    """
    if order not in ("auto", "samples", "parameters"):
        raise ValueError(
            f"unknown order {order!r}: expected 'auto', 'samples' (cost quadratic in the samples) "
            "or 'parameters' (cost quadratic in the parameters)"
        )
    threads = torch.get_num_threads()
    compiled_block = choose_block(size, budget // 4 // threads) if compiled else 0
    compiled_networks = budget // 2 // _packed_bytes(size, threads) if compiled else 0
    compiled = compiled_block > 0 and compiled_networks > 0
    if order == "auto":
        path: Path = "compiled" if compiled else "parameters"
        fits = compiled or _smallest_parameters(size) <= budget
        worth = cost(size, path) <= cost(size, "samples") or _smallest_samples(size) > budget
        order = "parameters" if fits and worth else "samples"
    if order == "samples":
        return _plan_samples(size, budget, on_cpu=on_cpu)
    if compiled:
        return Plan(
            "parameters",
            min(size.networks, compiled_networks),
            size.samples,
            keep=size.networks * _packed_entries(size) * size.itemsize <= budget // 4,
            compiled=True,
            block=compiled_block,
        )
    return _plan_parameters(size, budget, on_cpu=on_cpu)


def make_linear_plan(size: Size, budget: int, *, on_cpu: bool, compiled: bool) -> Plan:
    """The plan of what one pass over the samples gives, ``Tr H`` alone: no matrix is formed.

    Raises:
        ValueError: If the budget is too small for one sample.
    """
    piece, fixed = _linear_rows(size) * size.itemsize, 6 * _weights(size) * size.itemsize
    if piece + fixed > budget:
        raise ValueError(
            f"a memory budget of {budget / MEBIBYTE:.3g} MiB is too small: one sample's terms take "
            f"{(piece + fixed) / MEBIBYTE:.3g} MiB; raise memory_budget"
        )
    if compiled:
        room = budget // torch.get_num_threads()
        block = choose_block(size, room, linear=True)
        if block:
            return Plan("parameters", size.networks, size.samples, compiled=True, block=block)
    longest = 4 * LONGEST_RUN if on_cpu else size.samples
    run = _evenly(size.samples, min(longest, (budget - fixed) // piece))
    networks = max(1, min(size.networks, budget // (piece * run + fixed)))
    return Plan("parameters", networks, run)


def _packed_entries(size: Size) -> int:
    return packed_entries(size.rows[0], size.widths[1], size.rows[1])


def _packed_bytes(size: Size, threads: int) -> int:
    """One network's packed Hessian, a copy a thread and one that is kept."""
    return (threads + 1) * _packed_entries(size) * size.itemsize


def _linear_rows(size: Size) -> int:
    """Rows of temporaries per sample of both passes for ``Tr H``."""
    last, outputs = size.depth - 1, size.widths[-1]
    rows = 3 * size.widths[0] + 16 + 8 * outputs * outputs + 16 * outputs
    for layer in range(last):
        width, above = size.widths[layer + 1], size.widths[layer + 2 : last + 1]
        rows += 30 * width + 8 * width * (sum(above[1:]) + outputs)
        rows += 8 * width * sum(above[:1]) * (layer > size.trained[0])
    return rows


def term_rows(size: Size, *, in_factors: bool = False) -> int:
    """Rows of one sample's terms, with what autograd keeps of how they came about."""
    last, outputs = size.depth - 1, size.widths[-1]
    rows = 3 * size.widths[0] + 16 + 6 * outputs * outputs
    for layer in range(last):
        width, above = size.widths[layer + 1], size.widths[layer + 2]
        columns = 1 + 2 * sum(size.widths[layer + 2 :])
        rows += 20 * width + (above + 3 * width) * columns + 3 * width * above
        rows += 6 * width * (above if in_factors and layer == last - 1 else width)
    return rows


def _rows_of_pairs(size: Size) -> int:
    return term_rows(size, in_factors=size.last_in_factors)


def _factor_rows(size: Size) -> int:
    """Rows of what is made of one sample's terms for the largest block."""

    def rows(block: Piece) -> int:
        total = sum(blocks.shape(size, block))
        if block.left < block.right:
            total += (
                size.rows[block.right] * size.widths[block.left + 1] * size.widths[block.right + 1]
            )
        return total

    return max(rows(block) for block in blocks.blocks(size))


def _rows(size: Size) -> int:
    """Rows of temporaries per sample and network in the order "parameters"."""
    return term_rows(size) + 3 * _factor_rows(size) // 2


def _row_bytes(size: Size) -> int:
    return _rows(size) * size.itemsize


def _inner(size: Size, outputs: int = 1) -> int:
    """Rows whose products are formed for each pair of samples.

    Times ``outputs`` where each is multiplied by as many: then the multiply-adds, once forward.
    """
    total = 0
    for block in blocks.blocks(size):
        width, other = size.widths[block.left + 1], size.widths[block.right + 1]
        if size.last_in_factors and block.left == block.right == size.depth - 2:
            total += size.rows[block.left] + 2 * width * (size.widths[-1] * outputs + 1)
        elif block.left == block.right:
            total += size.rows[block.left] + width * (width + 1) // 2
        else:
            beyond = size.widths[block.right]
            extra = (
                2 * width * other if block.right == block.left + 1 else 2 * width * (other + beyond)
            )
            total += width * other + extra
    return total


def _smallest_parameters(size: Size) -> int:
    return 2 * max(_matrix_bytes(size, _smallest_piece(size)), _row_bytes(size))


def _smallest_samples(size: Size) -> int:
    return 2 * (_pair_rows(size) + _kernels(size) + 6 * _weights(size)) * size.itemsize


def _smallest_piece(size: Size) -> int:
    """Entries of the largest row of any block."""
    return max(
        math.prod(blocks.shape(size, Piece(block.left, block.right, 0, 1)))
        for block in blocks.blocks(size)
    )


def _matrix_bytes(size: Size, entries: int) -> int:
    """Pieces of ``H``, what is added to them, and some copies of the weights."""
    return (3 * entries + 6 * _weights(size)) * size.itemsize


def _weights(size: Size) -> int:
    return sum((a + 1) * b for a, b in pairwise(size.widths))


def _too_small(size: Size, budget: int, order: Order) -> ValueError:
    smallest = {"samples": _smallest_samples(size), "parameters": _smallest_parameters(size)}
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


def _plan_parameters(size: Size, budget: int, *, on_cpu: bool) -> Plan:
    if _smallest_parameters(size) > budget:
        raise _too_small(size, budget, "parameters")
    matrices = budget // 2
    limit = (matrices // size.itemsize - 6 * _weights(size)) // 3
    entries = min(blocks.entries(size), limit)
    pieces = blocks.cut(size, limit)
    if pieces is None:
        raise _too_small(size, budget, "parameters")
    piece = _row_bytes(size)
    longest = LONGEST_RUN if on_cpu else size.samples
    run = _evenly(size.samples, max(1, min(longest, matrices // piece)))
    networks = max(
        1, min(size.networks, matrices // _matrix_bytes(size, entries), matrices // (piece * run))
    )
    kept = size.networks * blocks.entries(size) * size.itemsize
    return Plan("parameters", networks, run, pieces, keep=len(pieces) == 1 and kept <= budget // 4)


def _evenly(samples: int, longest: int) -> int:
    """The length of runs that are about equal."""
    return -(-samples // -(-samples // longest))


def _kernels(size: Size) -> int:
    """Numbers for each pair of samples, in both passes."""
    total = 6 + _pairs_of_outputs(size)
    for block in blocks.blocks(size):
        total += 6
        if block.right > block.left + 1:
            total += 6 * size.widths[block.left + 1]
    return total


def _pairs_of_outputs(size: Size) -> int:
    return 5 * size.widths[-1] ** 2 if size.last_in_factors else 0


def _pair_rows(size: Size) -> int:
    """Rows of one sample's terms and of their products in a pair of runs."""
    return 4 * _rows_of_pairs(size) // 3 + 4 * _inner(size)


def _kernel_run(size: Size, limit: float) -> int:
    """The run whose kernels and terms fill the limit."""
    rows, kernels = _pair_rows(size), _kernels(size)
    return int(((rows * rows + 4 * kernels * limit / size.itemsize) ** 0.5 - rows) / (2 * kernels))


def _plan_samples(size: Size, budget: int, *, on_cpu: bool) -> Plan:
    if _smallest_samples(size) > budget:
        raise _too_small(size, budget, "samples")
    room = budget // 2 - 6 * _weights(size) * size.itemsize
    longest = LONGEST_RUN if on_cpu else size.samples
    run = _evenly(size.samples, max(1, min(longest, _kernel_run(size, room))))
    piece = (_kernels(size) * run + _pair_rows(size)) * run * size.itemsize
    networks = max(1, min(size.networks, room // piece))
    kept = networks * size.samples * _rows_of_pairs(size) * size.itemsize
    return Plan("samples", networks, run, keep=kept <= budget // 4)

"""How to run a computation: order of summation, and sizes that respect memory and cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lowland.exact.compiled import choose_block, packed_entries
from lowland.exact.size import Size

Order = Literal["samples", "parameters"]

MEBIBYTE = 1 << 20
DEFAULT_MEMORY_BUDGET = 256 * MEBIBYTE


@dataclass(frozen=True)
class Plan:
    """The chosen order and the sizes of its pieces.

    Attributes:
        order: ``"samples"`` or ``"parameters"``.
        networks: Networks handled together.
        run: Samples handled together.
        block: Rows of ``W`` whose part of ``H`` is held at a time (order ``"parameters"``); for
            the compiled code the samples in a block.
        keep: Whether the backward pass may keep what the forward pass has built: ``H`` in the
            order ``"parameters"``, the terms of all runs in the order ``"samples"``.
        compiled: Whether the order ``"parameters"`` takes the compiled code.
    """

    order: Order
    networks: int
    run: int
    block: int
    keep: bool
    compiled: bool = False


# Pieces of about this size stay in the second-level cache between the operations on them.
CACHE_BYTES = 4 * MEBIBYTE

Path = Literal["samples", "parameters", "compiled"]

# Seconds for each unit of `work`, as fitted by `python benchmarks/cost_model.py` on two cores in
# float64. Only their ratios matter to the choice.
PRICES: dict[Path, tuple[float, float, float]] = {
    "samples": (4.3e-11, 2.2e-10, 5.7e-6),
    "parameters": (2.8e-11, 4.7e-10, 5.8e-6),
    "compiled": (2.7e-11, 2.1e-8, 2.3e-4),
}


def work(size: Size, path: Path) -> tuple[float, float, float]:
    """The work of the moments and their gradient, for one network.

    Returns:
        Multiply-adds in matrix products, elements touched between them, and operations launched
        (for the compiled path: multiply-adds, hidden units evaluated, and calls).
    """
    n, d, h, p = size.samples, size.inputs, size.hidden, size.dim
    if path == "compiled":
        return 2.0 * n * packed_entries(d, h, size.outputs), float(n * h), 1.0
    if path == "parameters":
        runs = max(1.0, n * _row_count(size) * size.itemsize / CACHE_BYTES)
        return n * (2.0 * p * p + 2 * d * d * h), n * (5.0 * p + 2 * d * d + 60 * h), 120 * runs
    runs = max(1.0, n / _kernel_run(size, CACHE_BYTES))
    return n * n * (1.5 * d + 9 * h), n * (9.0 * n + 60 * h), 60 * runs * (runs + 1)


def cost(size: Size, path: Path) -> float:
    """Predicted seconds for the moments and their gradient, one network."""
    return sum(amount * price for amount, price in zip(work(size, path), PRICES[path], strict=True))


def make_plan(
    size: Size,
    order: Literal["auto", "samples", "parameters"],
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
    room = budget // 4 // threads
    compiled_block = choose_block(size, room) if compiled else 0
    compiled_networks = budget // 2 // _packed_bytes(size, threads)
    compiled = compiled_block > 0 and compiled_networks > 0
    if order == "auto":
        fits = _smallest_parameters(size) <= budget
        path: Path = "compiled" if compiled else "parameters"
        dear = cost(size, path) > cost(size, "samples")
        order = "samples" if dear or not (fits or compiled) else "parameters"
    if order == "samples":
        return _plan_samples(size, budget, on_cpu=on_cpu)
    if compiled:
        networks = min(size.networks, compiled_networks)
        kept = size.networks * packed_entries(size.inputs, size.hidden, size.outputs)
        keep = kept * size.itemsize <= budget // 4
        return Plan("parameters", networks, size.samples, compiled_block, keep=keep, compiled=True)
    return _plan_parameters(size, budget, on_cpu=on_cpu)


def make_linear_plan(size: Size, budget: int, *, on_cpu: bool, compiled: bool) -> Plan:
    """The plan of what one pass over the samples gives, ``Tr H`` alone: no matrix is formed.

    Raises:
        ValueError: If the budget is too small for one sample.
    """
    piece = 2 * _term_rows(size) * size.itemsize  # a run's terms, and what is made of them
    if piece > budget:
        raise ValueError(
            f"a memory budget of {budget / MEBIBYTE:.3g} MiB is too small: one sample's terms take "
            f"{piece / MEBIBYTE:.3g} MiB; raise memory_budget"
        )
    if compiled:
        room = budget // torch.get_num_threads()
        block = choose_block(size, room, linear=True)
        if block:
            return Plan("parameters", size.networks, size.samples, block, keep=False, compiled=True)
    limit = min(budget, CACHE_BYTES) if on_cpu else budget
    run = max(1, min(size.samples, max(32, limit // piece), budget // piece))
    networks = max(1, min(size.networks, limit // (piece * run)))
    return Plan("parameters", networks, run, 0, keep=False)


def _packed_bytes(size: Size, threads: int) -> int:
    """One network's packed Hessian, a copy a thread and one that is kept."""
    return (threads + 1) * packed_entries(size.inputs, size.hidden, size.outputs) * size.itemsize


def _smallest_parameters(size: Size) -> int:
    return 2 * max(_matrix_bytes(size, rows=1), _row_count(size) * size.itemsize)


def _row_count(size: Size) -> int:
    """Rows of temporaries per sample and network in the order "parameters"."""
    return 2 * size.dim + size.inputs * size.inputs + 24 * size.hidden + size.features + 16


def _term_rows(size: Size) -> int:
    return 30 * size.hidden + 2 * size.features + 16


def _matrix_bytes(size: Size, rows: int) -> int:
    """A block of ``H`` with that many rows of ``W``, its multiple ``C`` and one product."""
    return 3 * (rows * size.hidden + size.outputs) * size.dim * size.itemsize


def _too_small(budget: int, needed: int, order: Order) -> ValueError:
    other = "samples" if order == "parameters" else "parameters"
    return ValueError(
        f"a memory budget of {budget / MEBIBYTE:.3g} MiB is too small for order={order!r}, whose "
        f"smallest piece here takes {needed / MEBIBYTE:.3g} MiB; raise memory_budget or try "
        f"order={other!r}"
    )


def _plan_parameters(size: Size, budget: int, *, on_cpu: bool) -> Plan:
    smallest = _smallest_parameters(size)
    if smallest > budget:
        raise _too_small(budget, smallest, "parameters")
    matrices = runs = budget // 2
    if on_cpu:
        runs = min(runs, CACHE_BYTES)
    per_row = _matrix_bytes(size, rows=1)
    block = max(1, min(size.inputs, matrices // per_row))
    per_network = _matrix_bytes(size, rows=block)
    piece = _row_count(size) * size.itemsize
    run = max(1, min(size.samples, max(32, runs // piece), budget // 2 // piece))
    networks = max(1, min(size.networks, matrices // per_network, runs // (piece * run)))
    kept = size.networks * size.dim * size.dim * size.itemsize
    return Plan("parameters", networks, run, block, keep=kept <= budget // 4)


def _kernel_run(size: Size, limit: float) -> int:
    """The run whose kernels (four, run by run) and terms (two runs) fill the limit."""
    terms = 2 * _term_rows(size)
    return int(((terms * terms + 16 * limit / size.itemsize) ** 0.5 - terms) / 8)


def _plan_samples(size: Size, budget: int, *, on_cpu: bool) -> Plan:
    limit = budget // 2
    if on_cpu:
        limit = min(limit, CACHE_BYTES)
    smallest = 2 * (2 * _term_rows(size) + 4) * size.itemsize
    if smallest > budget:
        raise _too_small(budget, smallest, "samples")
    run = max(
        1, min(size.samples, max(32, _kernel_run(size, limit)), _kernel_run(size, budget / 2))
    )
    piece = (4 * run + 2 * _term_rows(size)) * run * size.itemsize
    networks = max(1, min(size.networks, limit // piece))
    kept = networks * size.samples * _term_rows(size) * size.itemsize
    return Plan("samples", networks, run, 0, keep=kept <= budget // 4)

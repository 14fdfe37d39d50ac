"""Interleaved timing: what is compared runs in turn, so that a busy machine slows both alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def interleaved(jobs: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each job in each round; every job runs twice beforehand."""
    for job in jobs.values():
        job()
        job()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            times[name].append(seconds(job))
    return times


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median of the ratios taken round by round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """Of the power of the size that the time grows with."""
    return statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(each) for each in times]
    ).slope

"""What the paper's table says, each decided by a statistic of our runs, never by eye."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pandas as pd

from lowland.studies.flatness.preset import Task, Way
from lowland.studies.flatness.run import Results
from lowland.studies.flatness.tables import Array, multiples, networks, values
from lowland.studies.reporting.numbers import number, p_value
from lowland.studies.reporting.reproduction import Claim
from lowland.studies.reporting.statistics import (
    SIGNIFICANCE,
    holm,
    largest,
    paired_greater,
    sign_test,
)

LEAST_MULTIPLE = 36.0
"""The smallest of the published ratios of training times."""


def judge(results: Results) -> list[Claim]:
    """Every claim, for each task."""
    table = networks(results)
    return [
        claim
        for task in results.tasks
        for claim in (
            _flatness(results, task, table),
            _end(results, task, table),
            _moderate(results, task, table),
            _gain(results, task, table),
            _cost(results, task),
        )
    ]


def greater(left: Array, right: Array, task: Task) -> float:
    """The one-sided p-value that ``left`` exceeds ``right``, seed by seed; NaN where one failed.

    Where seeds are splits of the same samples, the test is corrected for their overlap.
    """
    return paired_greater(left, right, task.test_size / (1 - task.test_size))


def _by_weight(results: Results, task: Task, table: pd.DataFrame, measure: str) -> dict[Way, Array]:
    return {way: values(table, task, way, measure) for way in results.weights(task)}


def _list(found: dict[Way, Array], scale: float = 1.0) -> str:
    return ", ".join(number(scale * value.mean()) for value in found.values())


def _weights(found: dict[Way, Array]) -> str:
    return ", ".join(f"{way.strength:g}" for way in found)


def _claim(task: Task, text: str, published: str, found: str, *, holds: bool) -> Claim:
    return Claim(None, f"{task.name}: {text}", published, found, holds, place="table")


def _p(value: float) -> str:
    return p_value(value) + (", since networks failed" if math.isnan(value) else "")


def _flatness(results: Results, task: Task, table: pd.DataFrame) -> Claim:
    found = _by_weight(results, task, table, "average_flatness")
    penalized = [value for way, value in found.items() if way.strength]
    p = largest([greater(left, right, task) for left, right in pairwise(penalized)])
    return _claim(
        task,
        "average flatness falls with every step of λ > 0",
        "23.050, 10.739, 4.144, 1.550",
        f"{_list(found)} at λ = {_weights(found)}; every λ > 0 below the one before, largest "
        f"{_p(p)}",
        holds=p < SIGNIFICANCE,
    )


def _end(results: Results, task: Task, table: pd.DataFrame) -> Claim:
    found = _by_weight(results, task, table, "final_trace_sq")
    each = list(found.values())
    p = greater(np.log(each[0]), np.log(each[-1]), task)
    return _claim(
        task,
        "the trained network is flatter at the largest λ than without the penalty",
        "",
        f"Tr H² {number(each[0].mean())} at λ = 0, {number(each[-1].mean())} at the largest, "
        f"{_p(p)} for the logarithms",
        holds=p < SIGNIFICANCE,
    )


def _moderate(results: Results, task: Task, table: pd.DataFrame) -> Claim:
    found = _by_weight(results, task, table, "final_accuracy")
    first, *middle, last = found.values()
    # Better than both ends: the larger p-value. Any moderate weight may be it: adjusted for these.
    p = _best([largest([greater(values, end, task) for end in (first, last)]) for values in middle])
    return _claim(
        task,
        "final accuracy is best at a moderate λ",
        "26.33, 26.33, 27.00, 26.67, 25.83 %",
        f"{_list(found, 100)} % at λ = {_weights(found)}; one between the ends above both, "
        f"{_p(p)}, adjusted for {len(middle)} weights",
        holds=p < SIGNIFICANCE,
    )


def _gain(results: Results, task: Task, table: pd.DataFrame) -> Claim:
    found = _by_weight(results, task, table, "best_accuracy")
    first, *rest = found.values()
    p = _best([greater(values, first, task) for values in rest])
    gain = 100 * max(float(values.mean()) - float(first.mean()) for values in rest)
    return _claim(
        task,
        "some λ > 0 gives a better best accuracy than λ = 0",
        "28.00 against up to 29.83 %",
        f"{_list(found, 100)} % at λ = {_weights(found)}; largest gain {gain:+.2f} points, "
        f"{_p(p)}, adjusted for {len(rest)} weights",
        holds=p < SIGNIFICANCE,
    )


def _best(p_values: list[float]) -> float:
    """The smallest, adjusted for their number; weights at which networks failed do not count."""
    known = [1.0 if math.isnan(p) else p for p in p_values]
    return min(holm(known))


def _cost(results: Results, task: Task) -> Claim:
    found = {
        name: ratio
        for name, ratio in multiples(results, task).items()
        if name.startswith("flatness-aware")
    }
    below = [int((ratio < LEAST_MULTIPLE).sum()) for ratio in found.values()]
    p = largest([sign_test(count, results.preset.rounds) for count in below])
    medians = [float(np.median(ratio)) for ratio in found.values()]
    return _claim(
        task,
        "the penalty costs less than the paper's smallest multiple, 36",
        "36 to 40 times",
        f"a step takes {min(medians):.1f} to {max(medians):.1f} times the baseline's: below in "
        f"{sum(below)} of {len(found) * results.preset.rounds} rounds, sign test for each λ, "
        f"largest {_p(p)}",
        holds=p < SIGNIFICANCE,
    )

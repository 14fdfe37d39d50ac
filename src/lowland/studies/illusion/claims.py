"""The paper's claims, each decided by a test on our networks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from lowland.studies.illusion.preset import LARGE, SMALL, Task
from lowland.studies.illusion.published import published
from lowland.studies.illusion.run import Results
from lowland.studies.illusion.tables import (
    MEASURES,
    asked,
    correlation,
    hsr_correlation,
    hsr_networks,
    networks,
    varies,
)
from lowland.studies.reporting.numbers import number, p_value, plus_minus
from lowland.studies.reporting.reproduction import Claim
from lowland.studies.reporting.statistics import (
    SIGNIFICANCE,
    Array,
    Correlation,
    lead,
    shrinks,
    welch,
)
from lowland.studies.runs.jobs import Tensors

FIGURES_OF = {"pairs": 2, "selection": 3, "advantage": 4}
_VERBS = {1: "rises", -1: "falls"}

SMALL_RHO = 0.2
"""A correlation that is surely smaller says nothing about single networks."""

ORDERS = 10.0
"""A trace that has moved by more has moved by orders of magnitude."""

TABLES_OF = {"pairs": "tables 4 and 5", "selection": "table 3", "advantage": "tables 1 and 2"}


def judge(results: Results) -> list[Claim]:
    """Every claim about every task, and the two questions that join in."""
    table = networks(results)
    claims: list[Claim] = []
    for task in results.tasks("pairs"):
        claims += _pairs(results, table, task)
    for task in results.tasks("selection"):
        claims += _selection(results, table, task)
    for task in results.tasks("advantage"):
        claims += _advantage(results, table, task)
    claims += _rescaled(results)
    claims += _hsr(results)
    return claims


def _claim(task: Task, text: str, told: str, found: str, *, holds: bool) -> Claim:
    place = TABLES_OF[task.kind]
    return Claim(FIGURES_OF[task.kind], f"{task.name}: {text}", told, found, holds, place=place)


def _signed(found: Correlation, sign: int) -> bool:
    """Whether a correlation has a sign, and not by chance."""
    return found.p < SIGNIFICANCE and found.rho * sign > 0


def _correlates(
    results: Results, part: pd.DataFrame, task: Task, measure: str, *, sign: int
) -> Claim:
    told = published(task, task.sizes[0])
    found = correlation(results, part, measure)
    return _claim(
        task,
        f"test accuracy {_VERBS[sign]} with the {MEASURES[measure]}",
        told.of(measure),
        f"{found}, {found.count} networks",
        holds=_signed(found, sign),
    )


def _pairs(results: Results, table: pd.DataFrame, task: Task) -> Iterator[Claim]:
    told = published(task, task.sizes[0])
    ((_, part),) = asked(results, table, task)
    if not varies(part, "pair_proxy"):
        return
    for measure, sign in (("pair_proxy", 1), ("trace", -1)):
        yield _correlates(results, part, task, measure, sign=sign)
    values = {name: part[name].to_numpy(np.float64) for name in ("pair_proxy", "trace", "accuracy")}
    margin, low, high = lead(*values.values(), resamples=results.preset.resamples)
    yield _claim(
        task,
        "the pair proxy predicts test accuracy better than the Hessian trace",
        told.lead("pair_proxy", "trace"),
        f"|ρ| larger by {margin:+.2f} [{low:+.2f}, {high:+.2f}]",
        holds=low > 0,
    )
    if varies(part, "joint"):
        joint, proxy = (part[name].to_numpy(np.float64) for name in ("joint", "pair_proxy"))
        margin, low, high = lead(
            joint, proxy, values["accuracy"], resamples=results.preset.resamples
        )
        if math.isnan(margin):
            return
        yield _claim(
            task,
            "the joint weakness, future work in the paper, predicts better than the pair proxy",
            "",
            f"{correlation(results, part, 'joint')}; |ρ| larger by {margin:+.2f} [{low:+.2f}, "
            f"{high:+.2f}]",
            holds=low > 0,
        )


def _selection(results: Results, table: pd.DataFrame, task: Task) -> Iterator[Claim]:
    told = published(task, task.sizes[0])
    ((_, part),) = asked(results, table, task)
    yield _correlates(results, part, task, "free_regions", sign=1)
    found = correlation(results, part, "trace")
    yield _claim(
        task,
        "the Hessian trace says nothing about which network to choose",
        told.of("trace"),
        f"{found}, {found.count} networks; nothing is an interval within ±{SMALL_RHO:g}",
        holds=-SMALL_RHO < found.low <= found.high < SMALL_RHO,
    )


def _advantage(results: Results, table: pd.DataFrame, task: Task) -> Iterator[Claim]:
    parts = dict(asked(results, table, task))
    each = {size: advantage(part) for size, part in parts.items()}
    shown = ", ".join(
        f"{plus_minus(100 * gain, 100 * error)} at {size:,}"
        for size, (gain, error, _) in each.items()
    )
    told = {size: published(task, size) for size in parts}
    first, last = min(each), max(each)
    yield _claim(
        task,
        "with few training points one regime, of lower Hessian trace, is ahead in test accuracy",
        told[first].gain,
        f"large minus small batch, points: {shown}; Welch's {p_value(each[first][2])} at {first:,}"
        f"; trace {_traces(parts[first])}",
        holds=each[first][2] < SIGNIFICANCE
        and (each[first][0] > 0) == (_trace(parts[first], LARGE) < _trace(parts[first], SMALL)),
    )
    if len(each) > 1:
        (gain, error, _), (other, other_error, _) = each[first], each[last]
        p = shrinks((gain, error), (other, other_error))
        yield _claim(
            task,
            "the advantage shrinks with more training points",
            f"{told[first].gain} at {first:,}, {told[last].gain} at {last:,}"
            if told[last].gain
            else "",
            f"points: {shown}; one-sided {p_value(p)}",
            holds=p < SIGNIFICANCE,
        )
    for size, part in parts.items():
        for measure, sign in (("trace", -1), ("patterns_2", 1), ("agreement", -1)):
            found = correlation(results, part, measure)
            within = "; ".join(
                f"{name} batches alone {correlation(results, own, measure)}"
                for name, own in part.groupby("batch", sort=False)
            )
            yield _claim(
                task,
                f"n = {size:,}, both regimes: test accuracy {_VERBS[sign]} with the "
                f"{MEASURES[measure]}",
                told[size].of(measure),
                f"{found}; {within}",
                holds=_signed(found, sign),
            )


def advantage(part: pd.DataFrame) -> tuple[float, float, float]:
    """How far large batches are ahead in test accuracy, its standard error, and Welch's p."""
    small, large = (part[part["batch"] == name]["accuracy"].to_numpy() for name in (SMALL, LARGE))
    return welch(large, small)


def _trace(part: pd.DataFrame, batch: str) -> float:
    return float(part[part["batch"] == batch]["trace"].mean())


def _traces(part: pd.DataFrame) -> str:
    return f"{number(_trace(part, LARGE))} against {number(_trace(part, SMALL))}"


def _rescaled(results: Results) -> Iterator[Claim]:
    for task, regime, found in results.rescalings():
        ratio, layers = rise(found), found["layer"][0].numpy()
        moved = ", ".join(
            f"{number(ratio[kind])} times with factor {factor:g} on layer {layer + 1:g}"
            for kind, (layer, factor) in enumerate(
                zip(found["layer"][0].tolist(), found["factor"][0].tolist(), strict=True)
            )
            if factor in (max(task.factors, default=0), max(task.second_factors, default=0))
        )
        steady = [name for name in found if name.startswith("patterns")] + ["accuracy"]
        kept = all(bool((found[name] == found[name][:, :1]).all()) for name in steady)
        changed = int(found["changed"].sum())
        yield Claim(
            6,
            f"{task.name}: n = {regime.size:,}: a rescaling moves the Hessian trace by orders "
            "of magnitude, and no prediction and no pattern",
            published(task, regime.size).rescaled,
            f"trace {moved}; {changed} predictions changed, accuracy and pattern counts "
            f"{'the same' if kept else 'not the same'}",
            holds=all(float(ratio[layers == own].max()) > ORDERS for own in set(layers))
            and kept
            and not changed,
            place="table 6",
        )


def rise(found: Tensors) -> Array:
    """The trace under each rescaling over that before, the geometric mean over networks."""
    trace = found["trace"].numpy()
    ratio: Array = np.exp(np.log(trace / trace[:, :1]).mean(0))
    return ratio


def _hsr(results: Results) -> Iterator[Claim]:
    if not results.hsr:
        return
    table = hsr_networks(results)
    values = {
        name: table[name].to_numpy(np.float64)
        for name in ("pair_proxy", "lambda_max", "macro_f1", "seed")
    }
    margin, low, high = lead(
        values["pair_proxy"],
        values["lambda_max"],
        values["macro_f1"],
        resamples=results.preset.resamples,
        clusters=values["seed"],
    )
    proxy, sharp = (
        hsr_correlation(results, table, name, together=True)
        for name in ("pair_proxy", "lambda_max")
    )
    yield Claim(
        7,
        "weakness explains the test F1 of the HSR study's networks better than λ_max does",
        "",
        f"pair proxy {proxy}, λ_max {sharp}; |ρ| larger by {margin:+.2f} [{low:+.2f}, {high:+.2f}]",
        low > 0,
        place="our question",
    )

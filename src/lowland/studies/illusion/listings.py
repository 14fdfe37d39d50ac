"""The tables of the page: ours, with the paper's beside them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy import stats

from lowland.studies.illusion.claims import advantage, rise
from lowland.studies.illusion.preset import LARGE, SMALL, Task
from lowland.studies.illusion.published import published
from lowland.studies.illusion.run import Results
from lowland.studies.illusion.tables import (
    ASKED,
    HSR_MEASURES,
    MEASURES,
    asked,
    correlation,
    hsr_correlation,
    hsr_networks,
    networks,
    varies,
)
from lowland.studies.reporting.numbers import number, plus_minus
from lowland.studies.reporting.reproduction import Listing

BRACKETS = "In brackets the middle 95 % of bootstrap samples of networks."


def listings(results: Results) -> list[Listing]:
    """One for each task, then the rescalings, then the HSR study's networks."""
    table = networks(results)
    found = [
        *(_correlations(results, table, task) for kind in ASKED for task in results.tasks(kind)),
        *(_advantage(results, table, task) for task in results.tasks("advantage")),
        *_rescalings(results),
    ]
    return [*found, _hsr(results)] if results.hsr else found


def _correlations(results: Results, table: pd.DataFrame, task: Task) -> Listing:
    rows = []
    for size, part in asked(results, table, task):
        told = published(task, size)
        for measure in ASKED[task.kind]:
            if varies(part, measure):
                place = [f"{size:,}"] if len(task.sizes) > 1 else []
                ours = str(correlation(results, part, measure))
                rows.append((MEASURES[measure], *place, ours, told.of(measure)))
    header = ["measure", *(["n"] if len(task.sizes) > 1 else []), "with test accuracy", "published"]
    if not any(row[-1] for row in rows):
        rows, header = [row[:-1] for row in rows], header[:-1]
    return Listing(
        f"{task.name}: {results.titles[task.name]}",
        f"Spearman's rank correlation with test accuracy. {BRACKETS} "
        f"{_facts(results, table, task)}",
        header,
        rows,
    )


def _facts(results: Results, table: pd.DataFrame, task: Task) -> str:
    """Sentences that say which networks a table is about."""
    own = table[table["task"] == task.name]
    learnt = int((own["learnt"] >= results.preset.enough).sum())
    units = "-".join(map(str, task.hidden))
    facts = (
        f"{len(own)} networks with {units} hidden units, {learnt} of which learnt all of their "
        "training points"
    )
    compared = own[own["learnt"] >= results.preset.enough] if task.kind == "pairs" else own
    if not len(compared):
        return f"{facts}: nothing can be compared."
    right, trace = 100 * compared["accuracy"], compared["trace"]
    facts += (
        f"; of those compared test accuracy {right.min():.1f} to {right.max():.1f} %, mean "
        f"{right.mean():.1f} %; Hessian trace {number(trace.min())} to {number(trace.max())}."
    )
    if varies(own, "pair_proxy"):
        proxies = own["pair_proxy"].dropna()
        facts += (
            f" Pair proxy {proxies.min():.0f} to {proxies.max():.0f} of {10 * task.unseen:,}, "
            f"{own['undecided'].sum():.0f} pairs undecided."
        )
    if task.joint_unseen and "joint_r_hat" in own:
        poor = int((own["joint_r_hat"] > 1.05).sum())
        facts += (
            f" Joint weakness: the logarithm of the effective number of labelings of "
            f"{task.joint_unseen} unseen points; R-hat above 1.05 for {poor} of "
            f"{int(own['joint_r_hat'].notna().sum())} networks."
        )
    return facts


def _advantage(results: Results, table: pd.DataFrame, task: Task) -> Listing:
    rows = []
    for size, part in asked(results, table, task):
        told = published(task, size)
        sides = [part[part["batch"] == name] for name in (SMALL, LARGE)]
        gain, error, _ = advantage(part)
        rows.append(
            (
                f"{size:,}",
                " / ".join(_mean(100 * side["accuracy"]) for side in sides),
                plus_minus(100 * gain, 100 * error),
                f"{_slash(told.accuracy)}, {told.gain}" if told.accuracy else "",
                " / ".join(_mean(side["trace"]) for side in sides),
                _slash(told.trace),
                " / ".join(f"{side['epochs'].median():.0f}" for side in sides),
            )
        )
    return Listing(
        f"{task.name}: the advantage of a batch size",
        f"{task.seeds} networks with small / large batches: means and standard errors of the test "
        "accuracy in per cent, of how far large batches are ahead, and of the Hessian trace; the "
        "median number of epochs.",
        (
            *("n", "test accuracy", "ahead by", "published"),
            *("Hessian trace", "published", "epochs"),
        ),
        rows,
    )


def _mean(values: pd.Series[float]) -> str:
    return plus_minus(values.mean(), stats.sem(values))


def _slash(values: tuple[float, ...]) -> str:
    return " / ".join(f"{value:g}" for value in values)


def _rescalings(results: Results) -> Iterator[Listing]:
    for task, regime, found in results.rescalings():
        rows = []
        trace = found["trace"].numpy()
        for kind, ratio in enumerate(rise(found)):
            layer, factor = found["layer"][0, kind].item(), found["factor"][0, kind].item()
            before = factor == 1
            rows.append(
                (
                    "as trained" if before else f"layer {layer + 1:g} × {factor:g}",  # noqa: RUF001
                    number(float(np.exp(np.log(trace[:, kind]).mean()))),
                    "1" if before else number(float(ratio)),
                    f"{100 * found['accuracy'][:, kind].mean():.2f}",
                    " / ".join(
                        f"{found[name][:, kind].mean().item():,.5g}"
                        for name in ("patterns_1", "patterns_2")
                    ),
                    f"{found['changed'][:, kind].sum():.0f}",
                )
            )
        yield Listing(
            f"{task.name}, n = {regime.size:,}: rescaled",
            f"{len(trace)} networks with small batches, one layer multiplied and the next divided: "
            "geometric mean of the Hessian trace, and of its multiples; means of the rest.",
            (
                *("rescaling", "Hessian trace", "multiple", "test accuracy, %"),
                *("patterns, layers 1 / 2", "predictions changed"),
            ),
            rows,
        )


def _hsr(results: Results) -> Listing:
    table = hsr_networks(results)
    methods = list(dict.fromkeys(table["method"]))
    rows = []
    for measure, title in HSR_MEASURES.items():
        each = [
            hsr_correlation(results, table[table["method"] == method], measure, together=False)
            for method in methods
        ]
        whole = hsr_correlation(results, table, measure, together=True)
        rows.append((title, *map(str, (whole, *each))))
    return Listing(
        "The HSR study's networks: sharpness, weakness, and test F1",
        f"Spearman's rank correlation with macro F1 on the test samples, {len(table)} networks "
        f"from sharp and flat seeds. {BRACKETS} Networks from one seed by several methods hang "
        "together: of all of them seeds are drawn, and there is no p-value. The classes overlap, "
        "so that the pair proxy is that of the labels which the network itself gives to its "
        f"training points, over {results.preset.hsr_unseen:,} test points.",
        ("measure", "all", *methods),
        rows,
    )

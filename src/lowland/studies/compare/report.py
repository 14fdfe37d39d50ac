"""One self-contained page from a comparison: words, table, figures, settings, versions."""

from __future__ import annotations

from collections.abc import Sequence

from lowland.studies.compare.comparison import METRICS, Cell, Comparison, Metric, layer_sizes
from lowland.studies.compare.settings import DEFAULTS
from lowland.studies.ensembles.training import Method
from lowland.studies.reporting.numbers import p_value, plus_minus
from lowland.studies.reporting.pages import data_uri, render
from lowland.studies.reporting.statistics import SIGNIFICANCE

NOTEWORTHY = 0.1
"""P-values below this are shown in the table."""


def with_error(metric: Metric, cell: Cell) -> str:
    """``mean ± standard error``, to the digits that the error leaves; shares in percent."""
    return plus_minus(cell.mean * metric.scale, cell.stderr * metric.scale)


def findings(comparison: Comparison) -> list[str]:
    """What the tests say about each method, in words, and what that adds up to."""
    compared = comparison.settings.methods[1:]
    if not compared:
        return [
            *_warning(comparison),
            "Only the baseline was trained, so there is nothing to compare it with.",
        ]
    sentences = [*_warning(comparison), *(_finding(comparison, method) for method in compared)]
    return sentences + _verdict(comparison)


def _verdict(comparison: Comparison) -> list[str]:
    """A conclusion from the methods by which every network learned something, or none."""
    failed = set(comparison.networks.loc[~comparison.networks["learned"], "method"])
    baseline, *compared = comparison.settings.methods
    sound = [method for method in compared if method.name not in failed]
    if baseline.name in failed or not sound:
        return []
    if any(_direction(comparison, method, "accuracy") > 0 for method in sound):
        return []
    if any(_direction(comparison, method, "lambda_max") < 0 for method in sound):
        said = "a flatter minimum did not come with a measurably better test accuracy"
    else:
        other = "other " if len(sound) < len(compared) else ""
        said = f"no {other}method improved test accuracy measurably"
    return [f"On this data, with these settings, {said}."]


def _warning(comparison: Comparison) -> list[str]:
    """A sentence where training failed, or none."""
    networks = comparison.networks
    failed = networks.loc[~networks["learned"], "method"].value_counts()
    told = [
        f"{failed[method.name]} of {comparison.settings.seeds} networks by {method.title}"
        for method in comparison.settings.methods
        if method.name in failed
    ]
    if not told:
        return []
    sentence = (
        f"Warning: {_join(told, ' and ')} learned nothing: the training loss did not fall, or not "
        "below what the shares of the classes alone make it. Flatness says nothing there, and "
        "nothing is concluded from these methods; try another learning rate, more steps or smaller "
        "weights of the penalties."
    )
    return [sentence]


def _direction(comparison: Comparison, method: Method, metric: str) -> int:
    """The sign of an effect; 0 if the test does not call it one."""
    cell = comparison.cell(method.name, metric)
    if not cell.p < SIGNIFICANCE:
        return 0
    return 1 if cell.effect > 0 else -1


def _finding(comparison: Comparison, method: Method) -> str:
    """``HSR lowered λ_max (… → …, p = …). It did not measurably change test accuracy (…) or …``."""
    said: dict[int, list[str]] = {-1: [], 1: [], 0: []}
    metrics = {metric.name: metric for metric in METRICS}
    for name in ("lambda_max", "accuracy", "log_loss"):
        metric = metrics[name]
        base, cell = (comparison.cell(which, name) for which in ("baseline", method.name))
        said[_direction(comparison, method, name)].append(
            f"{metric.symbol} ({with_error(metric, base)} → {with_error(metric, cell)}"
            f"{metric.unit}, {p_value(cell.p)})"
        )
    verbs = {-1: "lowered {}", 1: "raised {}", 0: "did not measurably change {}"}
    words = {-1: " and ", 1: " and ", 0: " or "}
    clauses = [verbs[sign].format(_join(told, words[sign])) for sign, told in said.items() if told]
    return f"{method.title} {'. It '.join(clauses)}."


def _join(items: Sequence[str], last: str) -> str:
    """``a, b and c``."""
    return last.join(filter(None, (", ".join(items[:-1]), items[-1])))


def table(comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """Rows ``(metric, [(value, p) per method])`` for the terminal and the page alike.

    A p-value of ``NOTEWORTHY`` or more is left out; all of them are in :meth:`Comparison.to_frame`.
    """
    methods = comparison.settings.methods
    rows = []
    for metric in METRICS:
        cells = [comparison.cell(method.name, metric.name) for method in methods]
        rows.append(
            (
                metric.title + (f", {metric.unit.strip()}" if metric.unit else ""),
                [
                    (with_error(metric, cell), p_value(cell.p) if cell.p < NOTEWORTHY else "")
                    for cell in cells
                ],
            )
        )
    if comparison.networks["converged"].any():
        count = comparison.networks.groupby("method")["converged"].sum()
        stopped = [f"{count[method.name]} of {comparison.settings.seeds}" for method in methods]
        rows.append(("Converged", [(cell, "") for cell in stopped]))
    seconds = [(f"{comparison.seconds[method.name]:.1f}", "") for method in methods]
    return [*rows, ("Seconds", seconds)]


def render_page(comparison: Comparison, figures: dict[str, bytes], *, command: str) -> str:
    """The page as HTML that needs no other file.

    Args:
        comparison: What to report.
        figures: SVG files by name: ``curves``, ``spectrum`` and ``bound``.
        command: What reproduces it.
    """
    networks = comparison.networks
    images = {name: data_uri(svg) for name, svg in figures.items()}
    return render(
        "compare/templates/page.html",
        command=command,
        comparison=comparison,
        dataset=comparison.dataset,
        settings=comparison.settings,
        schedule=comparison.settings.schedule,
        classes=_join(
            [
                f"{name} ({count})"
                for name, count in zip(
                    comparison.dataset.classes, comparison.dataset.counts, strict=True
                )
            ],
            " and ",
        ),
        logits=layer_sizes(comparison.dataset, comparison.settings)[-1],
        metrics=METRICS,
        rows=table(comparison),
        findings=findings(comparison),
        images=images,
        converged=int(networks["converged"].sum()),
        trained=len(networks),
        significance=SIGNIFICANCE,
        noteworthy=NOTEWORTHY,
        tuned_on=next(
            (
                name
                for name, default in DEFAULTS.items()
                if set(comparison.settings.methods) <= set(default.methods)
            ),
            None,
        ),
        ratio=float((networks["upper_bound"] / networks["lambda_max"]).median()),
    )

"""The study's figures, drawn from its results alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lowland.display import plain_log_ticks, styled
from lowland.studies.ensembles.training import METHODS
from lowland.studies.illusion.claims import advantage, rise
from lowland.studies.illusion.preset import LARGE, SMALL
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
from lowland.studies.reporting import look
from lowland.studies.reporting.reproduction import StudyFigure
from lowland.studies.reporting.statistics import Correlation
from lowland.studies.runs.presets import PresetError

SHARP, WEAK, PALE, INK = "#d55e00", "#0072b2", "#bdbdbd", "#000000"
"""Sharpness is drawn in one color throughout, what rescaling cannot move in another."""

COLORS = dict.fromkeys(("trace", "bound", "lambda_max"), SHARP) | dict.fromkeys(
    ("l2_norm", "l1_norm"), "#4d4d4d"
)
BATCH = {SMALL: ("#009e73", "o"), LARGE: ("#cc79a7", "s")}
METHOD_COLORS = look.COLORS | {"a-sam": "#cc79a7"}
METHOD_TITLES = {name: method.title for name, method in METHODS.items()} | {"a-sam": "A-SAM"}
METHOD_MARKERS = look.MARKERS | {"a-sam": "v"}

WIDTH, HEIGHT = 3.3, 3.0  # inches of a panel


def color(measure: str) -> str:
    """The color of a measure in every figure."""
    return COLORS.get(measure, WEAK)


def _label(title: str) -> str:
    return title.replace("λ_max", r"$\lambda_{\max}$")


def figure_1(results: Results) -> Figure:
    """Every correlation with its interval, and the paper's."""
    table = networks(results)
    groups: list[tuple[str, list[tuple[str, Correlation, float | None]]]] = []
    for task in results.tasks():
        for size, part in asked(results, table, task):
            told = published(task, size)
            lines = [
                (measure, correlation(results, part, measure), told.rho.get(measure))
                for measure in ASKED[task.kind]
                if varies(part, measure)
            ]
            title = f"{task.name}, n = {size:,}" if task.kind == "advantage" else task.name
            if lines:
                groups.append((title, lines))
    count = sum(len(lines) + 1 for _, lines in groups)
    with _panels(min(1, count), 1) as (figure, axes):
        figure.set_size_inches(8.4, 0.245 * count + 1.2)
        ax = axes[0, 0]
        place, ticks, names = 0.0, [], []
        for title, lines in groups:
            ax.text(-1.0, place, title, fontsize=9, fontweight="bold", va="center")
            place += 1
            for measure, found, told_rho in lines:
                ax.plot([found.low, found.high], [place, place], color=color(measure), linewidth=2)
                ax.plot(found.rho, place, "o", color=color(measure), markersize=6)
                if told_rho is not None:
                    ax.plot(told_rho, place, "D", color=INK, markerfacecolor="none", markersize=6)
                ticks.append(place)
                names.append(_label(MEASURES[measure]))
                place += 1
        ax.set(xlim=(-1.03, 1.03), ylim=(place, -1), xlabel="rank correlation ρ with test accuracy")
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.set_yticks(ticks, names)
        ax.tick_params(axis="y", length=0)
        ax.grid(visible=False, axis="y")
        handles = [
            Line2D([], [], color=SHARP, marker="o", linewidth=2, label="sharpness"),
            Line2D([], [], color=COLORS["l2_norm"], marker="o", linewidth=2, label="norms"),
            Line2D([], [], color=WEAK, marker="o", linewidth=2, label="invariant measures"),
            Line2D(
                [],
                [],
                color=INK,
                marker="D",
                markerfacecolor="none",
                linewidth=0,
                label="the paper's",
            ),
        ]
        if all(told_rho is None for _, lines in groups for *_, told_rho in lines):
            handles.pop()
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def figure_2(results: Results) -> Figure:
    """Test accuracy over the Hessian trace, the pair proxy, and the joint weakness."""
    return _scatters(results, "pairs", ("trace", "pair_proxy", "joint"))


def figure_3(results: Results) -> Figure:
    """Test accuracy over the Hessian trace, the L2 norm and the free regions."""
    return _scatters(results, "selection", ("trace", "l2_norm", "free_regions"))


def _scatters(results: Results, kind: str, measures: Sequence[str]) -> Figure:
    """A row of panels for each task."""
    table = networks(results)
    tasks = results.tasks(kind)
    parts = {task.name: next(asked(results, table, task))[1] for task in tasks}
    shown = [
        measure for measure in measures if any(varies(part, measure) for part in parts.values())
    ]
    with _panels(len(tasks), len(shown)) as (figure, axes):
        for row, task in zip(axes, tasks, strict=True):
            part = parts[task.name]
            for ax, measure in zip(row, shown, strict=True):
                if not varies(part, measure):
                    ax.set_axis_off()
                    continue
                _cloud(ax, part, measure, str(correlation(results, part, measure)))
            row[0].set_ylabel(f"{task.name}\ntest accuracy, %")
    return figure


def _cloud(ax: Axes, part: pd.DataFrame, measure: str, title: str) -> None:
    ax.plot(
        part[measure],
        100 * part["accuracy"],
        "o",
        color=color(measure),
        markersize=4,
        alpha=0.7,
        markeredgewidth=0,
    )
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(_label(MEASURES[measure]))


def figure_4(results: Results) -> Figure:
    """Accuracy and Hessian trace with small and large batches over the training points."""
    table = networks(results)
    tasks = results.tasks("advantage")
    with _panels(len(tasks), 3) as (figure, axes):
        for (left, middle, right), task in zip(axes, tasks, strict=True):
            parts = dict(asked(results, table, task))
            for batch, (shade, marker) in BATCH.items():
                for ax, column, scale in ((left, "accuracy", 100), (middle, "trace", 1)):
                    values = [
                        scale * part[part["batch"] == batch][column] for part in parts.values()
                    ]
                    ax.errorbar(
                        list(parts),
                        [each.mean() for each in values],
                        [each.sem() for each in values],
                        color=shade,
                        marker=marker,
                        markersize=5,
                        capsize=2.5,
                        label=f"{batch} batches",
                    )
            gains = [_gains(part) for part in parts.values()]
            right.errorbar(
                list(parts),
                *zip(*gains, strict=True),
                color=INK,
                marker="o",
                markersize=5,
                capsize=2.5,
                label="here",
            )
            told = {size: published(task, size).gain for size in parts}
            known = {size: float(gain) for size, gain in told.items() if gain}
            if known:
                right.plot(
                    list(known),
                    list(known.values()),
                    "D",
                    color=INK,
                    markerfacecolor="none",
                    label="the paper's",
                )
                right.legend(loc="lower left")
                right.set_ylim(min(0, right.get_ylim()[0]), None)
            right.axhline(0, color=PALE, linewidth=1)
            for ax in (left, middle, right):
                ax.set_xscale("log")
                ax.set_xticks(list(parts), [f"{size:,}" for size in parts])
                ax.set_xticks([], minor=True)
                ax.set_xlabel("training points")
            left.set(ylabel=f"{task.name}\ntest accuracy, %")
            middle.set(ylabel="Hessian trace", ylim=(0, None))
            right.set(ylabel="large − small, points")  # noqa: RUF001
            left.legend(loc="lower right")
    return figure


def _gains(part: pd.DataFrame) -> tuple[float, float]:
    gain, error, _ = advantage(part)
    return 100 * gain, 100 * error


def figure_5(results: Results) -> Figure:
    """Test accuracy over the Hessian trace and the ensemble agreement, both regimes."""
    table = networks(results)
    rows = [
        (task, size, part)
        for task in results.tasks("advantage")
        for size, part in asked(results, table, task)
    ]
    measures = ("trace", "patterns_2", "agreement")
    with _panels(len(rows), len(measures)) as (figure, axes):
        for row, (task, size, part) in zip(axes, rows, strict=True):
            for ax, measure in zip(row, measures, strict=True):
                for batch, (shade, marker) in BATCH.items():
                    own = part[part["batch"] == batch]
                    ax.plot(
                        own[measure],
                        100 * own["accuracy"],
                        marker,
                        color=shade,
                        markersize=4,
                        alpha=0.7,
                        markeredgewidth=0,
                        label=f"{batch} batches",
                    )
                ax.set_title(str(correlation(results, part, measure)), fontsize=9)
                ax.set_xlabel(_label(MEASURES[measure]))
            row[0].set_ylabel(f"{task.name}, n = {size:,}\ntest accuracy, %")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def figure_6(results: Results) -> Figure:
    """The Hessian trace under rescalings, and what they leave alone."""
    with _panels(1, len(results.rescaled)) as (figure, axes):
        for ax, (task, regime, found) in zip(axes[0], results.rescalings(), strict=False):
            layers, factors = (found[key][0].numpy() for key in ("layer", "factor"))
            ratio = rise(found)
            for layer, marker in ((0, "o"), (1, "s")):
                own = (layers == layer) | (factors == 1)
                order = np.argsort(factors[own])
                if own.sum() < 2:
                    continue
                ax.plot(
                    factors[own][order],
                    ratio[own][order],
                    marker=marker,
                    color=SHARP,
                    markersize=5,
                    linestyle="-" if layer == 0 else "--",
                    label=f"Hessian trace, layer {layer + 1} rescaled",
                )
            for key, marker, title in (
                ("patterns_2", "o", "unseen patterns"),
                ("accuracy", "x", "test accuracy"),
            ):
                values = found[key].numpy()
                kept = (values / values[:, :1]).mean(0)
                ax.plot(
                    factors,
                    kept,
                    marker,
                    color=WEAK,
                    markersize=8 if marker == "o" else 5,
                    markerfacecolor="none",
                    label=title,
                )
            ax.set(xscale="log", yscale="log", xlabel="factor")
            ax.set_title(f"{task.name}, n = {regime.size:,}", fontsize=9)
            plain_log_ticks(ax)
            ticks = np.unique(factors)
            ax.set_xticks(ticks, [f"{value:g}" for value in ticks])
            ax.set_xticks([], minor=True)
        axes[0, 0].set_ylabel("multiple of the value as trained")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def figure_7(results: Results) -> Figure:
    """Test F1 of the HSR study's networks over sharpness and over weakness."""
    measures = ("lambda_max", "pair_proxy", "free_regions")
    with _panels(min(1, len(results.hsr)), len(measures)) as (figure, axes):
        table = hsr_networks(results)
        for ax, measure in zip(axes[0], measures, strict=True):
            for kind, method in results.hsr:
                own = table[(table["kind"] == kind) & (table["method"] == method)]
                ax.plot(
                    own[measure],
                    own["macro_f1"],
                    METHOD_MARKERS[method],
                    color=METHOD_COLORS[method],
                    markersize=4.5,
                    alpha=0.8,
                    markerfacecolor=METHOD_COLORS[method] if kind == "sharp" else "none",
                )
            ax.set_title(str(hsr_correlation(results, table, measure, together=True)), fontsize=9)
            ax.set_xlabel(_label(HSR_MEASURES[measure]))
            if measure == "lambda_max":
                ax.set_xscale("log")
                plain_log_ticks(ax)
            else:
                ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes[0, 0].set_ylabel("macro F1 on test samples")
        handles = [
            Line2D(
                [],
                [],
                color=METHOD_COLORS[name],
                marker=METHOD_MARKERS[name],
                linewidth=0,
                markerfacecolor=METHOD_COLORS[name] if kind == "sharp" else "none",
                label=f"{METHOD_TITLES[name]}, {kind} seeds",
            )
            for kind in dict.fromkeys(table["kind"])
            for name in dict.fromkeys(table["method"])
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


class NothingToDrawError(PresetError):
    """A figure of networks that the run does not have."""


@contextmanager
def _panels(rows: int, columns: int) -> Iterator[tuple[Figure, NDArray[np.object_]]]:
    with styled():
        if not rows or not columns:
            raise NothingToDrawError(
                "the figure is of networks that this run does not have: the preset has no task of "
                "that kind, its data are not there, or no network learnt its training points"
            )
        size = (WIDTH * columns + 0.4, HEIGHT * rows + 0.5)
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False)


FIGURES = {
    figure.number: figure
    for figure in (
        StudyFigure(
            1,
            "Every correlation",
            "Spearman's rank correlation of each measure with test accuracy, and the middle 95 % "
            "of bootstrap samples of networks; diamonds, where there are any, are the paper's. "
            "Ensemble agreement is "
            "computed from the test labels: it explains accuracy, and cannot foretell it.",
            figure_1,
            "pairs joint selection advantage",
        ),
        StudyFigure(
            2,
            "Sharpness and weakness of networks with the same training points",
            "Each point is a network that learnt all of its training points. The pair proxy counts "
            "the classes into which some last layer that is right on the training points puts each "
            "unseen point; the joint weakness, where it was estimated, is the logarithm of the "
            "effective number of labelings of a few unseen points together.",
            figure_2,
            "pairs joint",
        ),
        StudyFigure(
            3,
            "Model selection",
            "Each point is a network. Free regions are patterns of the last hidden layer that "
            "occur at test points and at no training point.",
            figure_3,
            "selection",
        ),
        StudyFigure(
            4,
            "The advantage of a batch size",
            "Means and standard errors over networks; at the right the difference in accuracy.",
            figure_4,
            "advantage",
        ),
        StudyFigure(
            5,
            "Within and across batch sizes",
            "Each point is a network. A correlation over both regimes may come from the distance "
            "between the two clouds alone.",
            figure_5,
            "advantage",
        ),
        StudyFigure(
            6,
            "Rescaled networks",
            "One layer multiplied by a factor, the next divided by it, as multiples of the values "
            "before: the Hessian trace (geometric mean over networks), and what stays.",
            figure_6,
            "rescaling",
        ),
        StudyFigure(
            7,
            "Sharpness and weakness of the HSR study's networks",
            "Each point is a network from a sharp seed (filled) or a flat one (hollow), trained by "
            "one of four methods. The pair proxy is that of the labels which the network itself "
            "gives to its training points.",
            figure_7,
            "hsr",
        ),
    )
}

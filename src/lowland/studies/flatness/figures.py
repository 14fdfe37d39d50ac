"""The study's figures, each drawn from its results alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lowland.display import plain_log_ticks
from lowland.studies.flatness.preset import BASELINE, KINDS, Task, Way
from lowland.studies.flatness.run import Results
from lowland.studies.flatness.tables import Array, multiples, networks, values
from lowland.studies.reporting import look
from lowland.studies.reporting.reproduction import StudyFigure

COLORS = look.COLORS | {"sam": "#cc79a7", "adaptive-sam": "#d55e00"}
MARKERS = look.MARKERS | {"sam": "v", "adaptive-sam": "P"}
TITLES = {BASELINE: "Baseline", **KINDS}
WIDTH, HEIGHT = 3.5, 3.1
INK, SECOND = "#000000", "#56b4e9"
Grid = npt.NDArray[np.object_]  # of axes, a column for each task

PAPER = (36.0, 40.0)
"""The published multiples."""

GAINS = ("average_flatness", "final_accuracy")


def figure_1(results: Results) -> Figure:
    """Flatness and accuracy over the weight."""
    table = networks(results)
    with _panels(results, 2) as (figure, axes):
        for (top, bottom), task in zip(axes.T, results.tasks, strict=True):
            ways = results.weights(task)
            place = np.arange(len(ways), dtype=np.float64)
            for measure, color, marker, label in (
                ("average_flatness", COLORS["flatness-aware"], "D", "average over training"),
                (
                    "final_trace_sq",
                    COLORS[BASELINE],
                    "o",
                    "at the end: Tr H²/B of the training part",
                ),
            ):
                scale = 1 / task.batch if measure == "final_trace_sq" else 1.0
                _line(
                    top,
                    place,
                    [scale * values(table, task, w, measure) for w in ways],
                    color=color,
                    marker=marker,
                    label=label,
                )
            for measure, color, marker, label in (
                ("final_accuracy", COLORS["flatness-aware"], "D", "final accuracy"),
                ("best_accuracy", SECOND, "s", "best accuracy"),
            ):
                _line(
                    bottom,
                    place + (0.08 if marker == "s" else 0),  # beside each other
                    [100 * values(table, task, w, measure) for w in ways],
                    color=color,
                    marker=marker,
                    label=label,
                )
            top.set_yscale("log")
            plain_log_ticks(top)
            top.set_title(task.name)
            bottom.set_xlabel("weight  λ")
            for ax in (top, bottom):
                ax.set_xticks(place, [f"{way.strength:g}" for way in ways])
        axes[0, 0].set_ylabel("Tr(H²) / B")
        axes[1, 0].set_ylabel("test accuracy, %")
        _line_legend(figure, [axes[0, 0], axes[1, 0]])
    return figure


def figure_2(results: Results) -> Figure:
    """Gain in accuracy and price over the change in flatness, for every method."""
    table = networks(results)
    with _panels(results, 2) as (figure, axes):
        for (top, bottom), task in zip(axes.T, results.tasks, strict=True):
            cost = multiples(results, task)
            start = {m: values(table, task, Way(BASELINE), m) for m in GAINS}
            for kind in TITLES:
                ways = [way for way in results.preset.ways(task).values() if way.kind == kind]
                if not ways:
                    continue
                flat = [values(table, task, way, GAINS[0]) / start[GAINS[0]] for way in ways]
                gain = [
                    100 * (values(table, task, way, GAINS[1]) - start[GAINS[1]]) for way in ways
                ]
                prices = [float(np.median(cost[way.name])) for way in ways]
                x, dx = _mean_and_error(flat)
                y, dy = _mean_and_error(gain)
                look: dict[str, Any] = {
                    "color": COLORS[kind],
                    "marker": MARKERS[kind],
                    "markersize": 5,
                }
                look |= {"linewidth": 1, "elinewidth": 0.9}
                top.errorbar(x, y, dy, dx, **look)
                bottom.errorbar(x, prices, xerr=dx, **look)
            top.set_title(task.name)
            bottom.axhspan(*PAPER, color="#f4f1e8", zorder=0, linewidth=0)
            bottom.set_yscale("log")
            plain_log_ticks(bottom)
            bottom.set_xlabel("average flatness, of the baseline's")
            for ax in (top, bottom):
                ax.axvline(1, color=INK, linewidth=0.8, linestyle="--")
            top.axhline(0, color=INK, linewidth=0.8, linestyle="--")
            bottom.annotate(
                "the paper's",
                (0.02, PAPER[0]),
                xycoords=("axes fraction", "data"),
                xytext=(0, -2),
                textcoords="offset points",
                va="top",
                color="#8a8063",
            )
        axes[0, 0].set_ylabel("gain in final test accuracy, points")
        axes[1, 0].set_ylabel("cost of a step, in the baseline's")
        _kind_legend(figure, results)
    return figure


def figure_3(results: Results) -> Figure:
    """Flatness and accuracy over training, for each weight."""
    with _panels(results, 2) as (figure, axes):
        for (top, bottom), task in zip(axes.T, results.tasks, strict=True):
            ways = results.weights(task)
            for way, color in zip(ways, _shades(len(ways)), strict=True):
                look: dict[str, Any] = {"color": color}
                if way.kind == BASELINE:  # small weights change little: on top, and broken
                    look |= {"linestyle": (0, (2, 2)), "zorder": 3}
                part = results.trained[task.name, way.name]
                looks = part["looks"][0].numpy()
                count = part["accuracy"].shape[-1]
                begin = looks * count / (looks[-1] + looks[1] - looks[0])  # in epochs
                _band(top, begin, part["flatness"].numpy(), look, way.title)
                _band(
                    bottom,
                    np.arange(1.0, count + 1),
                    100 * part["accuracy"].numpy(),
                    look,
                    way.title,
                )
            top.set_yscale("log")
            plain_log_ticks(top)
            top.set_title(task.name)
            bottom.set_xlabel("epoch")
            low = min(
                float(results.trained[task.name, way.name]["accuracy"][:, count // 5 :].min())
                for way in ways
            )
            bottom.set_ylim(100 * low - 1, None)
        axes[0, 0].set_ylabel("Tr(H²) / B of a batch")
        axes[1, 0].set_ylabel("test accuracy, %")
        _line_legend(figure, [axes[0, 0]])
    return figure


def figure_4(results: Results) -> Figure:
    """What a step costs by each method."""
    with _panels(results, 1) as (figure, axes):
        for ax, task in zip(axes[0], results.tasks, strict=True):
            ways, cost = results.preset.ways(task), multiples(results, task)
            for row, (name, way) in enumerate(ways.items()):
                low, middle, high = np.quantile(cost[name], (0.25, 0.5, 0.75))
                color = COLORS[way.kind]
                ax.plot([low, high], [row, row], color=color, linewidth=2)
                ax.plot(middle, row, MARKERS[way.kind], color=color, markersize=6)
            ax.axvspan(*PAPER, color="#f4f1e8", zorder=0, linewidth=0)
            ax.annotate(
                "the paper's",
                (PAPER[0], 0.98),
                xycoords=("data", "axes fraction"),
                xytext=(-3, 0),
                textcoords="offset points",
                ha="right",
                va="top",
                color="#8a8063",
            )
            ax.set_xscale("log")
            plain_log_ticks(ax)
            ax.set_xlim(0.8, 60)
            ax.invert_yaxis()
            ax.set_title(task.name)
            ax.set_xlabel("cost of a step, in the baseline's")
            ax.set_yticks(range(len(ways)), [way.title for way in ways.values()])
            if ax is not axes[0, 0]:
                ax.tick_params(
                    labelleft=_titles(results, task) != _titles(results, results.tasks[0])
                )
    return figure


FIGURES = {
    figure.number: figure
    for figure in (
        StudyFigure(
            1,
            "Flatness and accuracy over the weight",
            "The paper's table as a figure: Tr(H²)/B over training and at its end, final and best "
            "test accuracy; means over seeds with standard errors. λ = 0 is plain SGD.",
            figure_1,
            "training",
        ),
        StudyFigure(
            2,
            "Accuracy, flatness and cost of all methods",
            "Each point is a method at one strength, against the baseline from the same seed: "
            "average flatness over its, and accuracy minus its; means over seeds with standard "
            "errors. Lines join the strengths of one method; the shaded band is the cost that the "
            "paper reports.",
            figure_2,
            "timing training",
        ),
        StudyFigure(
            3,
            "Over training",
            "Tr(H²)/B of batches and test accuracy over training by λ: means over seeds with "
            "standard errors.",
            figure_3,
            "training",
        ),
        StudyFigure(
            4,
            "What a step costs",
            "Time of a step over that of the baseline, the methods taking turns: medians and "
            "quartiles over rounds. The shaded band is what the paper reports of the penalty.",
            figure_4,
            "timing",
        ),
    )
}


@contextmanager
def _panels(results: Results, rows: int) -> Iterator[tuple[Figure, Grid]]:
    """A column of panels for each task."""
    columns = len(results.tasks)
    with look.canvas(max(WIDTH * columns, 5.0), HEIGHT * rows + 0.5) as figure:
        yield figure, figure.subplots(rows, columns, squeeze=False)


def _titles(results: Results, task: Task) -> list[str]:
    return [way.title for way in results.preset.ways(task).values()]


def _mean_and_error(groups: list[Array]) -> tuple[Array, Array]:
    stacked = np.array(groups)
    return stacked.mean(1), stacked.std(1, ddof=1) / np.sqrt(stacked.shape[1])


def _line(ax: Axes, x: Array, groups: list[Array], *, color: str, marker: str, label: str) -> None:
    """Means joined by a line, with standard errors."""
    mean, error = _mean_and_error(groups)
    ax.errorbar(
        x,
        mean,
        error,
        color=color,
        marker=marker,
        markersize=5,
        linewidth=1.6,
        elinewidth=1,
        capsize=2.5,
        label=label,
    )


def _band(ax: Axes, x: Array, rows: Array, look: dict[str, Any], label: str) -> None:
    """The mean over seeds, and a band of its standard error."""
    mean = rows.mean(0)
    error = rows.std(0, ddof=1) / np.sqrt(len(rows))
    ax.fill_between(x, mean - error, mean + error, color=look["color"], alpha=0.2, linewidth=0)
    ax.plot(x, mean, linewidth=1.6, label=label, **look)


def _shades(count: int) -> list[str]:
    """From the baseline's gray over light to dark green."""
    ramp = mpl.colors.LinearSegmentedColormap.from_list("weights", ["#a6dcc9", "#003d2c"])
    return [COLORS[BASELINE], *(mpl.colors.to_hex(ramp(v)) for v in np.linspace(0, 1, count - 1))]


def _line_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    handles = [handle for ax in axes for handle in ax.get_legend_handles_labels()[0]]
    columns = len(handles) if len(handles) > 4 else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def _kind_legend(figure: Figure, results: Results) -> None:
    """The methods, outside the axes, where no data can be."""
    shown = {way.kind for task in results.tasks for way in results.preset.ways(task).values()}
    handles = [
        Line2D([], [], color=COLORS[kind], marker=MARKERS[kind], markersize=5, label=title)
        for kind, title in TITLES.items()
        if kind in shown
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6)

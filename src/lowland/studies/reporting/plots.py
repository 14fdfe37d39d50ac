"""Figures of a comparison, drawn from its tables alone."""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from lowland.studies.ensembles.training import METHODS

COLORS = {
    "baseline": "#4d4d4d",
    "hsr": "#0072b2",
    "hessian-trace": "#e69f00",
    "flatness-aware": "#009e73",
}
"""One color per method in every figure: from the set of Okabe and Ito, told apart by everyone."""

MARKERS = {"baseline": "o", "hsr": "s", "hessian-trace": "^", "flatness-aware": "D"}

STYLE: dict[Any, Any] = {  # rcParams, whose names matplotlib types one by one
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "xtick.minor.pad": 5,  # on a level with the labels of major ticks, whose marks are longer
    "ytick.minor.pad": 5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",  # the same picture wherever it is opened
    "svg.hashsalt": "lowland",  # the same bytes whenever it is drawn
}


def training_curves(history: pd.DataFrame, *, active_steps: int) -> Figure:
    """Training loss and largest eigenvalue over the steps: median and quartiles over seeds.

    Args:
        history: Columns method, seed, step, loss, lambda_max.
        active_steps: Where the penalty ends; shaded up to there.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        axes = figure.subplots(1, 2)
        for ax, column, title in zip(
            axes,
            ("loss", "lambda_max"),
            ("Training loss  $L$", r"Largest eigenvalue  $\lambda_{\max}$"),
            strict=True,
        ):
            for method, rows in history.groupby("method", sort=False):
                low, middle, high = (
                    rows.groupby("step")[column].quantile(q) for q in (0.25, 0.5, 0.75)
                )
                color = COLORS[str(method)]
                ax.fill_between(low.index, low, high, color=color, alpha=0.15, linewidth=0)
                ax.plot(middle.index, middle, color=color, linewidth=1.8)
            ax.set_yscale("log")
            plain_log_ticks(ax)
            ax.set_xlim(0, history["step"].max())
            ax.set_xlabel("step")
            ax.set_title(title)
            if active_steps:
                ax.axvspan(0, active_steps, color="#f4f1e8", zorder=0, linewidth=0)
        if active_steps:
            axes[0].annotate(
                "penalty active",
                (active_steps, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-5, -4),
                textcoords="offset points",
                ha="right",
                va="top",
                color="#8a8063",
            )
        _legend(figure, history["method"].unique(), line=True)
    return figure


def spectrum_boxes(networks: pd.DataFrame) -> Figure:
    """Box plots over seeds: both ends of the final spectrum, its bounds, trace, and accuracy.

    Args:
        networks: Columns method, lambda_max, upper_bound, trace, lambda_min, lower_bound, accuracy.
    """
    panels = (
        ("lambda_max", r"$\lambda_{\max}$"),
        ("upper_bound", r"upper bound  $m + s\sqrt{P-1}$"),
        ("trace", r"trace  $\mathrm{Tr}\,H$"),
        ("lambda_min", r"$\lambda_{\min}$"),
        ("lower_bound", r"lower bound  $m - s\sqrt{P-1}$"),
        ("accuracy", "test accuracy"),
    )
    names = [str(name) for name in networks["method"].unique()]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 5.6), layout="constrained")
        for ax, (column, title) in zip(figure.subplots(2, 3).flat, panels, strict=True):
            groups = [networks.loc[networks["method"] == name, column] for name in names]
            boxes = ax.boxplot(
                groups,
                widths=0.55,
                patch_artist=True,
                showfliers=False,  # every network is drawn as a point anyway
                medianprops={"color": "black"},
            )
            for position, (name, patch, values) in enumerate(
                zip(names, boxes["boxes"], groups, strict=True), start=1
            ):
                patch.set(facecolor=COLORS[name], alpha=0.35, edgecolor=COLORS[name])
                offsets = np.linspace(-0.16, 0.16, len(values))
                ax.plot(
                    position + offsets,
                    values,
                    MARKERS[name],
                    color=COLORS[name],
                    markersize=3.2,
                    markeredgewidth=0,
                )
            ax.set_title(title)
            ax.set_xticks([])
            ax.grid(visible=False, axis="x")
            if column in ("lambda_min", "lower_bound"):
                ax.axhline(0, color="black", linewidth=0.8)
        _legend(figure, names)
    return figure


def bound_against_eigenvalue(networks: pd.DataFrame) -> Figure:
    """The upper bound against the eigenvalue it bounds, one point per network.

    Args:
        networks: Columns method, lambda_max, upper_bound. Where either is not positive, as at
            saturated networks, there is no point.
    """
    names = networks["method"].unique()
    networks = networks[(networks["lambda_max"] > 0) & (networks["upper_bound"] > 0)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 4.9), layout="constrained")
        ax = figure.subplots()
        low, high = 0.1, 1.0
        if len(networks):
            low, high = networks["lambda_max"].min(), networks["upper_bound"].max()
        line = np.array([low / 1.2, high * 1.2])
        ax.plot(line, line, color="black", linewidth=0.9, linestyle="--")
        ax.annotate(
            "bound = eigenvalue",
            (np.sqrt(low * high),) * 2,
            xytext=(6, -10),
            textcoords="offset points",
            color="#4d4d4d",
        )
        for method, rows in networks.groupby("method", sort=False):
            ax.plot(
                rows["lambda_max"],
                rows["upper_bound"],
                MARKERS[str(method)],
                color=COLORS[str(method)],
                markersize=5,
                alpha=0.75,
                markeredgewidth=0,
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlim(*line)
        ax.set_ylim(*line)
        plain_log_ticks(ax)
        ax.set_xlabel(r"largest eigenvalue  $\lambda_{\max}$")
        ax.set_ylabel(r"upper bound  $m + s\sqrt{P-1}$")
        _legend(figure, names, columns=2)
    return figure


def render(figure: Figure, kind: str) -> bytes:
    """The figure as the bytes of a file, ``"png"`` or ``"svg"``."""
    buffer = BytesIO()
    with mpl.rc_context(STYLE):
        # Without a date the same numbers give the same file.
        figure.savefig(
            buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None
        )
    return buffer.getvalue()


def _legend(figure: Figure, names: Iterable[str], *, line: bool = False, columns: int = 4) -> None:
    """The methods, outside the axes, where no data can be."""
    handles = [
        Line2D(
            [],
            [],
            color=COLORS[name],
            marker="" if line else MARKERS[name],
            linestyle="-" if line else "",
            linewidth=2,
            label=METHODS[name].title,
        )
        for name in names
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)))


def plain_log_ticks(ax: Axes) -> None:
    """Write 0.05 rather than 5 x 10^-2."""
    for axis in (ax.xaxis, ax.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(
                FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
            )

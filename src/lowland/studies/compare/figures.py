"""Figures of a comparison, drawn from its tables alone."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lowland.display import plain_log_ticks, styled
from lowland.studies.ensembles.training import METHODS
from lowland.studies.reporting.look import COLORS, MARKERS


def training_curves(history: pd.DataFrame, *, active_steps: int) -> Figure:
    """Training loss and largest eigenvalue over the steps: median and quartiles over seeds.

    Args:
        history: Columns method, seed, step, loss, lambda_max.
        active_steps: Where the penalty ends; shaded up to there.
    """
    with styled():
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
    with styled():
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
    with styled():
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

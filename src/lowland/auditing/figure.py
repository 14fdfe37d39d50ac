"""The picture of an audit: what moves with the factor, beside what stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowland.auditing.findings import Findings
from lowland.auditing.words import change, shown
from lowland.display import plain_log_ticks, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # optional; annotations are looked at in the tests
    Axes = Figure = Any

_INK, _STAYED, _MOVED = "#4d4d4d", "#0072b2", "#d55e00"
_LABELS = 9  # of factors, beside one another without touching
_LINES = {  # from the set of Okabe and Ito, and told apart without colors too
    "lambda_max": ("#0072b2", "o", "-"),
    "trace": ("#d55e00", "s", "-"),
    "upper": ("#009e73", "^", "-"),
    "l2": ("#4d4d4d", "D", "--"),
    "l1": ("#cc79a7", "v", "--"),
}


def draw(audit: Findings) -> Figure:
    """Two panels: what moves with the factor, and what stays."""
    with styled():
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional

        figure = Figure(figsize=(10.4, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        _draw_scales(audit, left)
        _draw_invariants(audit, right)
        for ax in (left, right):
            ax.set_xscale("log")
            if len(audit.factors) <= _LABELS:
                ax.set_xticks(audit.factors, [f"{factor:g}" for factor in audit.factors])
                ax.set_xticks([], minor=True)
            else:
                plain_log_ticks(ax)
            ax.set_xlabel(f"factor on layer {audit.layer}, divisor of layer {audit.layer + 1}")
    return figure


def _draw_scales(audit: Findings, ax: Axes) -> None:
    """Sharpness and norms, each relative to its value at factor 1."""
    ax.axhline(1, color=_INK, linewidth=0.8)
    drawn = []
    for measure in audit.measures:
        row = audit.values[measure.name]
        if measure.invariant or not min(row) > 0:
            continue
        color, marker, line = _LINES[measure.name]
        drawn.append(measure.symbol)
        ax.plot(
            audit.factors,
            [value / row[audit.base] for value in row],
            color=color,
            marker=marker,
            linestyle=line,
            markersize=8 if measure.name == "lambda_max" else 5,  # the bound often covers it
            linewidth=1.6,
            label=measure.symbol,
        )
    ax.set_yscale("log")
    plain_log_ticks(ax)
    ax.set_title("Sharpness and norms, relative to factor 1")
    missing = [m.symbol for m in audit.measures if not m.invariant and m.symbol not in drawn]
    # On a logarithmic scale there is no place for them.
    ax.legend(loc="best", title=f"not positive: {', '.join(missing)}" if missing else None)


def _draw_invariants(audit: Findings, ax: Axes) -> None:
    """A row of dots for each measure that should stay, and its value beside it."""
    measures = [measure for measure in audit.measures if measure.invariant]
    for place, measure in enumerate(measures):
        row = audit.values[measure.name]
        ax.axhline(place, color="#e6e6e6", linewidth=0.8, zorder=0)
        for factor, value, stays in zip(
            audit.factors, row, audit.stays_at(measure.name), strict=True
        ):
            ax.plot(
                factor,
                place,
                "o" if stays else "D",
                color=_STAYED if stays else _MOVED,
                markerfacecolor=_STAYED if stays else "white",
                markersize=6,
            )
            if not stays:
                ax.annotate(
                    shown(measure, value),
                    (factor, place),
                    xytext=(0, 6),
                    textcoords="offset points",
                    ha="center",
                    color=_MOVED,
                    fontsize=8,
                )
        moves = not audit.stays(measure.name)
        kept = max(row) if measure.is_change else row[audit.base]
        ax.annotate(
            change(audit, measure) if moves else shown(measure, kept),
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            color=_MOVED if moves else _INK,
            annotation_clip=False,
        )
    ax.set_ylim(len(measures) - 0.5, -0.5)
    ax.set_yticks(range(len(measures)), [measure.symbol for measure in measures])
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False)
    ax.spines["left"].set_visible(False)
    broken = any(not audit.stays(measure.name) for measure in measures)
    ax.set_title(
        "Invariant measures: open marks moved" if broken else "Invariant measures: all stay"
    )

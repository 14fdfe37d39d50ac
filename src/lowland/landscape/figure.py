"""The pictures of a loss surface."""

from __future__ import annotations

import textwrap
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lowland.display import number, plain_log_ticks, styled
from lowland.landscape.losses import GridLosses
from lowland.landscape.scales import Scale, is_logarithmic, levels, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:  # optional; annotations are looked at in the tests
    Axes = Any

Kind = Literal["contour", "surface"]

COLORS = "viridis"  # even steps of lightness, told apart by everyone and in gray
_BLUE, _ORANGE, _INK = "#0072b2", "#d55e00", "#4d4d4d"
_EQUAL = 3.0  # the sides' ratio up to which lengths along both axes are drawn alike
_WIDTH = 96  # letters of the caption in a line


def draw(surface: GridLosses, kind: Kind, scale: Scale, ax: Axes | None) -> Axes:
    """A curve, contours, or a view in three dimensions.

    Raises:
        ValueError: If the kind or the scale is unknown, there is nothing to draw, or ``ax`` has
            another number of dimensions.
    """
    if kind not in get_args(Kind):
        raise ValueError(
            f"unknown kind {kind!r}: expected one of {', '.join(map(repr, get_args(Kind)))}"
        )
    flat = surface.losses.ndim == 1 or kind == "contour"
    if ax is not None and (ax.name == "3d") == flat:
        raise ValueError(
            "kind='surface' is drawn on axes of three dimensions and everything else on plain ones:"
            f" make them with projection={None if flat else '3d'!r}"
        )
    logarithmic = is_logarithmic(surface.losses, scale)
    with styled():
        from matplotlib import pyplot as plt  # noqa: PLC0415 - optional

        if ax is None:
            size = (6.8, 4.4) if surface.losses.ndim == 1 else (7.0, 6.4)
            figure = plt.figure(figsize=size, layout="constrained")
            ax = figure.add_subplot(projection=None if flat else "3d")
            figure.supxlabel(
                textwrap.fill(surface.caption, _WIDTH), fontsize=8, color=_INK, x=0.02, ha="left"
            )
        if surface.losses.ndim == 1:
            _draw_curve(surface, ax, logarithmic=logarithmic)
        elif flat:
            _draw_contours(surface, ax, logarithmic=logarithmic)
        else:
            _draw_surface(surface, ax, logarithmic=logarithmic)
    return ax


def _draw_curve(surface: GridLosses, ax: Axes, *, logarithmic: bool) -> None:
    places, losses = surface.coordinates[0].numpy(), surface.losses.numpy()
    finite = np.isfinite(losses)
    ax.plot(places, np.where(finite, losses, np.nan), color=_BLUE, linewidth=1.8)
    if logarithmic:
        ax.set_yscale("log")
        plain_log_ticks(ax)
    if places[0] <= 0 <= places[-1] and np.isfinite(surface.center_loss):
        ax.plot(0, surface.center_loss, "P", color=_INK, markersize=8, label="the model")
    if surface.path is not None:
        on = surface.path.coordinates[:, 0].numpy()
        ax.plot(
            on,
            np.interp(on, places, losses, left=np.nan, right=np.nan),
            ".-",
            color=_ORANGE,
            linewidth=1,
            label="checkpoints, projected",
        )
    if not finite.all():
        ax.plot(
            places[~finite],
            np.zeros((~finite).sum()),
            "x",
            color=_ORANGE,
            transform=ax.get_xaxis_transform(),
            clip_on=False,
            label="no finite loss",
        )
    ax.set_xlabel(surface.labels[0])
    ax.set_ylabel("loss")
    ax.legend(loc="best")


def _draw_contours(surface: GridLosses, ax: Axes, *, logarithmic: bool) -> None:
    from matplotlib.colors import LogNorm, Normalize  # noqa: PLC0415 - optional
    from matplotlib.patches import Patch, Rectangle  # noqa: PLC0415
    from matplotlib.patheffects import Normal, Stroke  # noqa: PLC0415

    x, y = (axis.numpy() for axis in surface.coordinates)
    losses = np.ma.masked_invalid(surface.losses.numpy().T)
    low, high = span(surface.losses)
    steps = levels(low, high, logarithmic=logarithmic)
    norm = (LogNorm if logarithmic else Normalize)(steps[0], steps[-1])
    ax.grid(visible=False)
    handles = []
    if losses.mask.any():  # what no color covers
        ground: dict[str, Any] = {
            "facecolor": "#ececec",
            "edgecolor": "#a0a0a0",
            "hatch": "////",
            "linewidth": 0,
        }
        ax.add_patch(Rectangle((x[0], y[0]), x[-1] - x[0], y[-1] - y[0], zorder=0, **ground))
        handles.append(Patch(label="no finite loss", **ground))
    fine = _between(steps, logarithmic=logarithmic)
    filled = ax.contourf(x, y, losses, levels=fine, norm=norm, cmap=COLORS)
    if high > low:
        lines = ax.contour(
            x, y, losses, levels=steps[1:-1], norm=norm, colors="white", linewidths=0.8
        )
        texts = ax.clabel(
            lines, fontsize=8, fmt=lambda value: number(value, zeros=False), colors="white"
        )
        for text in texts:  # to be read on light colors, too
            text.set_path_effects([Stroke(linewidth=1.2, foreground="#404040"), Normal()])
    alone = _alone(surface.losses)
    if alone.any():
        at = np.argwhere(alone)
        ax.scatter(
            *(x[at[:, 0]], y[at[:, 1]], 14, surface.losses.numpy()[alone]), norm=norm, cmap=COLORS
        )
    bar = ax.figure.colorbar(filled, ax=ax, ticks=steps, shrink=0.8)
    bar.ax.set_yticklabels([number(value, zeros=False) for value in steps])
    bar.ax.minorticks_off()
    bar.set_label("loss, logarithmic scale" if logarithmic else "loss")
    _draw_path(surface, ax, handles)
    ax.set_xlim(x[0], x[-1])
    ax.set_ylim(y[0], y[-1])
    width, height = x[-1] - x[0], y[-1] - y[0]
    if max(width, height) <= _EQUAL * min(width, height) and surface.kind != "given":
        ax.set_aspect("equal")
    ax.set_xlabel(surface.labels[0])
    ax.set_ylabel(surface.labels[1])
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=9)


def _between(steps: list[float], *, logarithmic: bool, parts: int = 6) -> Any:
    """Levels of the colors, finer than those of the lines."""
    turn, back = (np.log, np.exp) if logarithmic else (np.asarray, np.asarray)
    ends = turn(np.array(steps))
    fine = np.unique(np.concatenate([np.linspace(*pair, parts) for pair in pairwise(ends)]))
    found = back(fine)
    found[0], found[-1] = steps[0], steps[-1]  # which rounding should not leave out
    return found


def _draw_path(surface: GridLosses, ax: Axes, handles: list[Any]) -> None:
    from matplotlib.patheffects import Normal, Stroke  # noqa: PLC0415 - optional

    if surface.path is not None:
        handles += ax.plot(
            *surface.path.coordinates.numpy().T,
            ".-",
            color=_ORANGE,
            linewidth=1.4,
            markersize=7,
            path_effects=[Stroke(linewidth=3.2, foreground="white"), Normal()],
            label="checkpoints, projected",
        )
    handles += ax.plot(
        *([0], [0]),
        "P",
        color="white",
        markeredgecolor="black",
        markersize=10,
        linestyle="none",
        label="the model",
    )


def _draw_surface(surface: GridLosses, ax: Any, *, logarithmic: bool) -> None:
    """Three dimensions; where the scale is logarithmic, the height is the logarithm."""
    x, y = (axis.numpy() for axis in surface.coordinates)
    losses = surface.losses.numpy()
    low, high = span(surface.losses)
    turn = np.log10 if logarithmic else np.asarray
    heights = turn(np.where(np.isfinite(losses), losses, np.nan))
    ends = turn(np.array([low, high]))
    room = 0.04 * (float(ends[1] - ends[0]) or abs(float(ends[0])) or 1.0)
    floor = float(ends[0]) - room
    ax.computed_zorder = False  # else the path would be drawn behind the surface it lies on
    ax.plot_surface(
        *np.meshgrid(x, y, indexing="ij"),
        heights,
        cmap=COLORS,
        vmin=float(ends[0]),
        vmax=float(ends[1]) if high > low else float(ends[1]) + room,
        rcount=len(x),
        ccount=len(y),
        linewidth=0.15,
        edgecolor=(0, 0, 0, 0.25),
        zorder=1,
    )
    alone, missing = (np.argwhere(each) for each in (_alone(surface.losses), ~np.isfinite(losses)))
    if len(alone):
        ax.scatter(
            *(x[alone[:, 0]], y[alone[:, 1]], heights[*alone.T]),
            c=heights[*alone.T],
            cmap=COLORS,
            vmin=float(ends[0]),
            vmax=float(ends[1]),
        )
    if len(missing):
        ax.plot(
            *(x[missing[:, 0]], y[missing[:, 1]], np.full(len(missing), floor)),
            linestyle="none",
            marker="x",
            color=_ORANGE,
            markersize=4,
            label="no finite loss",
            zorder=0,
        )
    if surface.path is not None:
        places = surface.path.coordinates
        on = turn(surface.between(places).numpy())
        ax.plot(
            *places.numpy().T,
            on,
            ".-",
            color=_ORANGE,
            label="checkpoints, projected",
            zorder=3,
        )
    center = turn(surface.between(torch.zeros(1, 2, dtype=torch.float64)).numpy())
    ax.plot(
        *([0], [0], center),
        "P",
        color="white",
        markeredgecolor="black",
        markersize=9,
        linestyle="none",
        label="the model",
        zorder=4,
    )
    ax.set_zlim(floor, float(ends[1]) + room)
    if logarithmic:
        ticks = levels(low, high, logarithmic=True, count=5)[1:-1] or [low, high]
        ax.set_zticks(np.log10(ticks), [number(tick, zeros=False) for tick in ticks])
    ax.set_xlabel(surface.labels[0], fontsize=9, labelpad=8)
    ax.set_ylabel(surface.labels[1], fontsize=9, labelpad=8)
    ax.set_zlabel("loss, logarithmic scale" if logarithmic else "loss", labelpad=8)
    ax.view_init(elev=32, azim=-60)
    ax.set_box_aspect(None, zoom=0.88)  # room for the caption
    ax.legend(loc="upper left", bbox_to_anchor=(0, 1), ncols=3, fontsize=9)


def _alone(losses: Tensor) -> Any:
    """Points with a finite loss in no square of four, which neither contours nor a surface show."""
    finite = torch.isfinite(losses)
    square = finite[:-1, :-1] & finite[1:, :-1] & finite[:-1, 1:] & finite[1:, 1:]
    within = torch.zeros_like(finite)
    for i in (slice(None, -1), slice(1, None)):
        for j in (slice(None, -1), slice(1, None)):
            within[i, j] |= square
    return (finite & ~within).numpy()

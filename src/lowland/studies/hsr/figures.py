"""Figures 2 to 15 of the study and two of ours, each drawn from its results alone.

Every number shown is a result of the run; only what is cheap, such as the loss along a line, is
computed on the spot. Source of the figures' subjects: arXiv:2606.28662.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse, Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lowland.display import plain_log_ticks
from lowland.studies.hsr import theory
from lowland.studies.hsr.boundary import chances, window
from lowland.studies.hsr.landscape import REACH, rise
from lowland.studies.hsr.run import KINDS, Results
from lowland.studies.hsr.sweep import gains
from lowland.studies.hsr.task import samples
from lowland.studies.reporting import look
from lowland.studies.reporting.reproduction import StudyFigure
from lowland.studies.reporting.statistics import interval
from lowland.studies.runs.jobs import Tensors

Array = npt.NDArray[np.float64]

COLORS = look.COLORS | {"a-sam": "#cc79a7", "lambda-max": "#a50026"}
MARKERS = look.MARKERS | {"a-sam": "v", "lambda-max": "P"}
LINES: dict[str, Literal["-", "--"]] = {
    "lambda-max": "--"
}  # not the paper's, whose methods have whole lines

# What is not a method has none of the methods' colors.
FIRST, SECOND, INK, PALE = "#d55e00", "#56b4e9", "#000000", "#bdbdbd"
KIND_COLORS = {"sharp": FIRST, "flat": SECOND}
SHADE = "#f4f1e8"

_PLACES = {
    "random": "random parameters",
    "training": "along training",
    "critical": "critical points",
}

_FIFTH = "Dark red, ours and not the paper's: descent on the largest eigenvalue itself."

BOUNDARIES = 5  # networks in figure 15
SHOWN = 100  # samples of either class in each of its panels


def figure_2(results: Results) -> Figure:
    """Time of one gradient of ``Tr H^2``, over the samples and over the parameters."""
    timing = results.theory["timing"]
    ways = (
        ("numerical", FIRST, "^"),
        ("analytic, pairs of samples", SECOND, "o"),
        ("analytic, pairs of parameters", INK, "s"),
    )
    with look.canvas(9.6, 4.4) as figure:
        panels = (("samples", "samples  $n$"), ("parameters", "parameters  $P$"))
        for ax, (name, label) in zip(figure.subplots(1, 2), panels, strict=True):
            size, *columns = timing[name].numpy().T
            for seconds, (title, color, marker) in zip(columns, ways, strict=True):
                known = ~np.isnan(seconds)
                slope = np.polyfit(np.log(size[known][-3:]), np.log(seconds[known][-3:]), 1)[0]
                ax.plot(
                    size[known],
                    1e3 * seconds[known],
                    color=color,
                    marker=marker,
                    markersize=5,
                    label=f"{title}:  slope {slope:.2f}",
                )
            ax.set(xscale="log", yscale="log", xlabel=label, ylabel="milliseconds per gradient")
            plain_log_ticks(ax)
            ax.set_xticks(size, [f"{value:g}" for value in size])
            ax.set_xticks([], minor=True)
            ax.set_title(f"over the {name}")
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))
    return figure


def figure_3(results: Results) -> Figure:
    """Distance of the numerical from the analytic gradient against the gradient's size."""
    with look.canvas(9.6, 4.4) as figure:
        axes = figure.subplots(1, 2, sharex=True, sharey=True)
        titles = {"trace": r"$t_1 = \mathrm{Tr}\,H$", "trace_sq": r"$t_2 = \mathrm{Tr}\,H^2$"}
        for ax, (moment, title) in zip(axes, titles.items(), strict=True):
            table = results.theory["agreement"][moment].numpy()
            for column, (name, color, marker) in enumerate((("W", FIRST, "o"), ("v", SECOND, "s"))):
                ax.plot(
                    table[:, column + 2],
                    table[:, column],
                    marker,
                    color=color,
                    markersize=5,
                    alpha=0.8,
                    markeredgewidth=0,
                    label=f"${name}$",
                )
            ax.set(xscale="log", yscale="log", title=title)
            ax.set_xlabel("norm of the analytic gradient")
        axes[0].set_ylabel("norm of the difference")
        limits = np.array(axes[0].get_xlim())
        low, high = axes[0].get_ylim()
        for ratio in (1e-6, 1e-8, 1e-10, 1e-12):
            if low < ratio * limits[1] < high:
                for ax in axes:
                    ax.plot(limits, ratio * limits, color="#8c8c8c", linewidth=0.8, linestyle="--")
                axes[1].annotate(
                    rf"$10^{{{np.log10(ratio):.0f}}}$",
                    (limits[1], ratio * limits[1]),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    color="#6e6e6e",
                    annotation_clip=False,
                )
        axes[0].set_xlim(*limits)
        axes[0].set_ylim(low, high)
        handles = [*axes[0].get_legend_handles_labels()[0]]
        handles.append(
            Line2D([], [], color="#8c8c8c", linestyle="--", label="equal relative difference")
        )
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def figure_4(results: Results) -> Figure:
    """Each sample's share in the bound's gradient against how well it is fitted."""
    fit = results.theory["fit"]
    residual, norm = fit["residual"].flatten().numpy(), fit["norm"].flatten().numpy()
    keep = (residual > 0) & (norm > 0)
    residual, norm = residual[keep], norm[keep]
    with look.canvas(6.4, 4.6) as figure:
        ax = figure.subplots()
        ax.plot(
            residual,
            norm,
            ".",
            color=PALE,
            markersize=3,
            markeredgewidth=0,
            rasterized=True,
            label="a sample in a network",
        )
        edges = np.geomspace(residual.min(), residual.max() * (1 + 1e-9), 21)
        groups = [
            (np.sqrt(low * high), norm[(residual >= low) & (residual < high)])
            for low, high in pairwise(edges)
        ]
        filled = [(middle, values) for middle, values in groups if len(values) >= 30]
        if filled:
            where = np.array([middle for middle, _ in filled])
            _band(ax, where, [values for _, values in filled], INK, label="median and quartiles")
        ax.set(xscale="log", yscale="log")
        ax.set_xlabel(r"misfit of the sample  $|p_i - y_i|$")
        ax.set_ylabel(r"norm of its share in $\nabla U$")
        figure.legend(loc="outside lower center", ncols=2, markerscale=4)
    return figure


def figure_5(results: Results) -> Figure:
    """Gradient of ``Tr H^2`` against the covariance of the inputs."""
    result = results.theory["covariance"]
    covariance = result["covariance"].numpy()
    middle = int(np.abs(covariance).argmin())
    looks = {"identity": ("linear units", FIRST, "o"), "sigmoid": ("sigmoid units", SECOND, "s")}
    with look.canvas(9.6, 4.2) as figure:
        axes = figure.subplots(1, 2)
        for name, (title, color, marker) in looks.items():
            norms = result[name].numpy()
            _band(axes[0], covariance, list(norms), color, marker=marker, label=title)
            _band(axes[1], covariance, list(norms / norms[middle]), color, marker=marker)
        axes[1].axhline(1, color=INK, linewidth=0.8, linestyle="--")
        axes[0].set_yscale("log")
        plain_log_ticks(axes[0])
        axes[1].set_ylim(bottom=0)
        for ax in axes:
            ax.set_xticks(covariance)
            ax.set_xlabel("covariance of the two inputs")
        axes[0].set_title(r"$\|\nabla t_2\|$")
        axes[1].set_title(r"$\|\nabla t_2\|$ relative to uncorrelated inputs")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def figure_6(results: Results) -> Figure:
    """The mean part and the spread part of the direction at random parameters."""
    mean, spread = (results.theory["parts"][name].numpy() for name in ("mean", "spread"))
    keep = (mean > 0) & (spread > 0)
    mean, spread = mean[keep], spread[keep]
    ratio = spread / mean
    with look.canvas(9.6, 4.2) as figure:
        left, right = figure.subplots(1, 2)
        low, high = min(mean.min(), spread.min()) / 1.3, max(mean.max(), spread.max()) * 1.3
        left.plot([low, high], [low, high], color=INK, linewidth=0.9, linestyle="--")
        left.annotate(
            "equal",
            (np.sqrt(low * high),) * 2,
            xytext=(6, -10),
            textcoords="offset points",
            color="#4d4d4d",
        )
        left.plot(mean, spread, "o", color=FIRST, markersize=4, alpha=0.5, markeredgewidth=0)
        left.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        left.set_xlabel("norm of the mean part")
        left.set_ylabel("norm of the spread part")
        plain_log_ticks(left)
        edges = np.geomspace(min(ratio.min(), 0.8), max(ratio.max(), 1.25) * (1 + 1e-9), 31)
        right.hist(ratio, edges, color=FIRST, alpha=0.6)
        right.axvline(1, color=INK, linewidth=0.9, linestyle="--")
        right.set_xscale("log")
        plain_log_ticks(right)
        right.set_xlabel("spread part / mean part")
        right.set_ylabel("draws")
        right.set_title(f"spread part larger in {(ratio > 1).mean():.1%} of {len(ratio)} draws")
    return figure


def figure_7(results: Results) -> Figure:
    """Descent on the bound alone: both ends of the spectrum, and all of it."""
    result = results.theory["descent"]
    values = result["eigenvalues"].numpy()
    steps = np.linspace(0, theory.DESCENT_STEPS, len(values))
    with look.canvas(9.6, 4.2) as figure:
        ends, spectrum = figure.subplots(1, 2)
        pairs = (
            (result["upper_bound"].numpy(), FIRST, ":", "upper bound  $U$"),
            (values[..., -1], FIRST, "-", r"$\lambda_{\max}$"),
            (values[..., 0], SECOND, "-", r"$\lambda_{\min}$"),
            (result["lower_bound"].numpy(), SECOND, ":", "lower bound"),
        )
        for curve, color, line, label in pairs:
            _band(ends, steps, list(curve), color, linestyle=line, label=label)
        ends.axhline(0, color=INK, linewidth=0.8)
        ends.set_xlim(0, theory.DESCENT_STEPS)
        ends.set_xlabel("step of descent on $U$ alone")
        ends.set_title("both ends of the spectrum")
        ends.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        rank = np.arange(1, values.shape[-1] + 1)
        for row, color, label in ((0, PALE, "at the start"), (-1, INK, "at the end")):
            _band(spectrum, rank, list(values[row, :, ::-1].T), color, marker="o", label=label)
        spectrum.axhline(0, color=INK, linewidth=0.8)
        spectrum.xaxis.set_major_locator(MaxNLocator(integer=True))
        spectrum.set_xlabel("rank $k$ of the eigenvalue")
        spectrum.set_title(r"the whole spectrum  $\lambda_k$")
        spectrum.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    return figure


def figure_8(results: Results) -> Figure:
    """The samples of both classes."""
    preset = results.preset
    with look.canvas(9.2, 5.4) as figure:
        axes = figure.subplots(1, 2, sharex=True, sharey=True)
        sets = (("training", preset.train_size, False), ("test", preset.test_size, True))
        for ax, (name, count, test) in zip(axes, sets, strict=True):
            (x,), (y,) = (part.numpy() for part in samples(preset, count, test=test))
            order = np.random.default_rng(0).permutation(count)  # so that no class hides the other
            shade = np.where(y[order, None] > 0, *(mpl.colors.to_rgb(c) for c in (FIRST, SECOND)))
            size = 9 if count <= 2000 else 2
            ax.scatter(*x[order].T, s=size, c=shade, alpha=0.5, linewidth=0, rasterized=True)
            for sign in (-1, 1):
                for radius in (1, 2):
                    ax.add_patch(
                        Ellipse(
                            (sign * preset.mean,) * 2,
                            *(2 * radius * preset.variance**0.5,) * 2,
                            fill=False,
                            linewidth=1,
                            edgecolor=INK,
                        )
                    )
            ax.axline((0, 0), slope=-1, color=INK, linewidth=1, linestyle="--")
            ax.set_aspect("equal")
            ax.set(xlabel="$x_1$", title=f"{count:,} {name} samples")
        axes[0].set_ylabel("$x_2$")
        handles = [
            Line2D([], [], color=SECOND, marker="o", linestyle="", label="class 0"),
            Line2D([], [], color=FIRST, marker="o", linestyle="", label="class 1"),
            Line2D([], [], color=INK, label="1 and 2 standard deviations"),
            Line2D([], [], color=INK, linestyle="--", label="best boundary"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def figure_9(results: Results) -> Figure:
    """The bound at the distinct critical points: against the eigenvalue, and its histogram."""
    found, selection = results.found, results.selection
    with look.canvas(9.6, 4.4) as figure:
        left, right = figure.subplots(1, 2)
        groups = (
            (selection.distinct, PALE, "all distinct points"),
            (selection.flat, SECOND, "flat"),
            (selection.sharp, FIRST, "sharp"),
        )
        bound = found["upper_bound"][selection.distinct].numpy()
        value = found["lambda_max"][selection.distinct].numpy()
        ends = np.array([value[value > 0].min(initial=bound.max()) / 1.2, bound.max() * 1.2])
        left.plot(ends, ends, color=INK, linewidth=0.9, linestyle="--")
        edges = np.linspace(bound.min(), bound.max() * (1 + 1e-9), 31)
        for index, color, label in groups:
            x, y = found["lambda_max"][index].numpy(), found["upper_bound"][index].numpy()
            left.plot(x, y, "o", color=color, markersize=4, markeredgewidth=0, label=label)
            right.hist(y, edges, color=color)
        left.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        left.set_xlabel(r"largest eigenvalue  $\lambda_{\max}$")
        left.set_ylabel(r"upper bound  $U$")
        plain_log_ticks(left)
        for threshold, name in ((selection.low, "lower"), (selection.high, "upper")):
            right.axvline(threshold, color=INK, linewidth=0.9, linestyle=":")
            right.annotate(
                f"{name} {results.preset.share:.0%}\n{threshold:.3g}",
                (threshold, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-4 if name == "lower" else 4, 0),
                textcoords="offset points",
                ha="right" if name == "lower" else "left",
                va="bottom",
                fontsize=9,
            )
        right.set_xlabel(r"upper bound  $U$")
        right.set_ylabel("critical points")
        handles = [
            *left.get_legend_handles_labels()[0],
            Line2D([], [], color=INK, linestyle="--", linewidth=0.9, label="bound = eigenvalue"),
            Line2D([], [], color=INK, linestyle=":", linewidth=0.9, label="threshold"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure


def figure_10(results: Results) -> Figure:
    """Loss and largest eigenvalue over training."""
    panels = (
        ("loss", "training loss  $L$"),
        ("lambda_max", r"largest eigenvalue  $\lambda_{\max}$"),
    )
    with look.canvas(9.6, 6.6) as figure:
        axes = figure.subplots(2, 2, sharex=True, sharey="col")
        for row, kind in zip(axes, KINDS, strict=True):
            for ax, (name, title) in zip(row, panels, strict=True):
                for method in results.methods:
                    result = results.controlled[kind, method]
                    steps = np.array(results.preset.schedule.checkpoint_steps)
                    curves = result[f"curve_{name}"].T.numpy()
                    line = LINES.get(method, "-")
                    _band(ax, steps, list(curves), COLORS[method], linestyle=line)
                ax.axvspan(0, results.preset.active * steps[-1], color=SHADE, zorder=0, linewidth=0)
                ax.set_title(f"{kind} seeds:  {title}")
                ax.set_xlim(0, steps[-1])
        late = torch.cat([r["curve_loss"][:, 1:].flatten() for r in results.controlled.values()])
        # The first steps from far away would press all that follows into one line.
        axes[0, 0].set_ylim(float(late.min()) * 0.998, float(late.quantile(0.99)) * 1.005)
        axes[0, 1].set_ylim(bottom=0)
        for ax in axes[1]:
            ax.set_xlabel("step")
        axes[0, 0].annotate(
            "method active", (0.49, 0.98), xycoords="axes fraction", ha="right", va="top",
            color="#8a8063",
        )  # fmt: skip
        _legend(figure, results, line=True)
    return figure


def figure_11(results: Results) -> Figure:
    """Loss along the top eigenvector at the points where training ended."""
    reach = np.linspace(-REACH, REACH, 41)
    with look.canvas(9.6, 4.2) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for ax, kind in zip(axes, KINDS, strict=True):
            for method in results.methods:
                result = results.controlled[kind, method]
                change = rise(results.preset, result["parameters"], result["top"], list(reach))
                # An eigenvector has no sign; turned so that the loss rises faster to the right.
                change = torch.where(change[0] > change[-1], change.flip(0), change)
                line = LINES.get(method, "-")
                _band(ax, reach, list(change.numpy()), COLORS[method], linestyle=line)
            ax.set_title(f"{kind} seeds")
            ax.set_xlabel(r"distance $\alpha$ along the top eigenvector $e_1$")
        axes[0].set_ylabel(r"$L(\theta + \alpha e_1) - L(\theta)$")
        _legend(figure, results, line=True)
    return figure


def figure_12(results: Results) -> Figure:
    """Box plots of the final spectrum."""
    quantities: tuple[tuple[str, Callable[[Tensors], Tensor]], ...] = (
        (r"largest eigenvalue  $\lambda_{\max}$", lambda result: result["eigenvalues"][:, -1]),
        ("mean  $m$", lambda result: result["eigenvalues"].mean(1)),
        ("standard deviation  $s$", lambda result: result["eigenvalues"].std(1, correction=0)),
        (r"smallest eigenvalue  $\lambda_{\min}$", lambda result: result["eigenvalues"][:, 0]),
    )
    with look.canvas(9.6, 6.6) as figure:
        for ax, (title, quantity) in zip(figure.subplots(2, 2).flat, quantities, strict=True):
            values = _boxes(ax, results, quantity)
            ax.set_title(title)
            low, high = ax.get_ylim()
            middle = float(np.median(values))
            if low < 0:
                ax.axhline(0, color=INK, linewidth=0.8)
                ax.set_ylim(low, max(high, -0.05 * low))
                if values.min() < 30 * middle < 0:  # a tail would flatten all boxes
                    ax.set_yscale("symlog", linthresh=-middle)
            else:
                ax.set_ylim(bottom=0)
        _legend(figure, results)
    return figure


def figure_13(results: Results) -> Figure:
    """Loss along both extreme eigenvectors where A-SAM and HSR have their smallest eigenvalue."""
    reach = np.linspace(-REACH, REACH, 81)
    with look.canvas(9.6, 4.6) as figure:
        axes = figure.subplots(1, 2)
        for method in ("a-sam", "hsr"):
            kind, worst = results.most_negative(method)
            result = results.controlled[kind, method]
            one = slice(worst, worst + 1)
            for ax, end, index in ((axes[0], "top", -1), (axes[1], "bottom", 0)):
                value = float(result["eigenvalues"][worst, index])
                line = rise(
                    results.preset, result["parameters"][one], result[end][one], list(reach)
                )
                title = results.preset.methods[method].title
                label = f"{title}, {kind} seed {int(result['seed'][worst])}:"
                name = r"\max" if index else r"\min"
                label += rf"  $\lambda_{{{name}}} = {value:.3g}$"
                color = COLORS[method]
                ax.plot(reach, line[:, 0].numpy(), color=color, linewidth=1.8, label=label)
                ax.plot(reach, value * reach**2 / 2, color=color, linewidth=1, linestyle=":")
        for ax, name, end in zip(axes, ("e_1", "e_P"), ("top", "bottom"), strict=True):
            ax.axhline(0, color=INK, linewidth=0.8)
            ax.set_title(f"along the {end} eigenvector")
            ax.set_xticks((-1, -0.5, 0, 0.5, 1))
            ax.set_xlabel(rf"distance $\alpha$ along ${name}$")
            ax.set_ylabel(rf"$L(\theta + \alpha {name}) - L(\theta)$")
            ax.plot([], [], ":", color="#6e6e6e", linewidth=1, label=r"$\lambda \alpha^2 / 2$")
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))
    return figure


def figure_14(results: Results) -> Figure:
    """Box plots of the macro-F1 on the test samples."""
    with look.canvas(7.2, 4.4) as figure:
        ax = figure.subplots()
        _boxes(ax, results, lambda result: result["macro_f1"])
        ax.set_ylabel("macro-F1 on test samples")
        _legend(figure, results)
    return figure


def figure_15(results: Results) -> Figure:
    """Decision boundaries of the baseline and of HSR from the same seeds."""
    seeds = results.controlled["sharp", "baseline"]["seed"].tolist()
    # The selection goes from the least to the most sharp.
    shown = list(range(len(seeds)))[: -BOUNDARIES - 1 : -1]
    (x,), (y,) = (part.numpy() for part in samples(results.preset, results.preset.train_size))
    axis = window(results.preset, 61)
    line, half = axis.numpy(), float(axis[-1])
    pale = mpl.colormaps["RdBu_r"](np.linspace(0.22, 0.78, 10)).tolist()  # samples stay visible
    with look.canvas(1.4 + 2.1 * len(shown), 4.9) as figure:
        axes = figure.subplots(2, len(shown), sharex=True, sharey=True, squeeze=False)
        for row, method in zip(axes, ("baseline", "hsr"), strict=True):
            result = results.controlled["sharp", method]
            maps = chances(results.preset, result["parameters"][shown], axis).numpy()
            for ax, index, values in zip(row, shown, maps, strict=True):
                field = ax.contourf(line, line, values.T, np.linspace(0, 1, 11), colors=pale)
                field.set_rasterized(True)
                ax.contour(line, line, values.T, [0.5], colors="black")
                for label, color in ((0, "#08519c"), (1, "#a50f15")):
                    ax.plot(
                        *x[y == label][:SHOWN].T,
                        ".",
                        color=color,
                        markersize=3,
                        markeredgewidth=0,
                        rasterized=True,
                    )
                value = float(result["eigenvalues"][index, -1])
                ax.set_title(rf"seed {seeds[index]}:  $\lambda_{{\max}}$ = {value:.2f}", fontsize=9)
                ax.set(aspect="equal", xlim=(-half, half), ylim=(-half, half))
                ax.grid(visible=False)
            row[0].set_ylabel(f"{results.preset.methods[method].title}\n$x_2$")
        for ax in axes[1]:
            ax.set_xlabel("$x_1$")
        figure.colorbar(field, ax=axes, label="probability of class 1", shrink=0.7, aspect=30)
    return figure


def figure_16(results: Results) -> Figure:
    """Gain in macro-F1 over the training size, one panel a width."""
    preset = results.preset
    sizes = np.array(preset.sweep_train_sizes)
    names = list(preset.sweep_methods)
    handles = []
    with look.canvas(max(6.4, 1.2 + 2.8 * len(preset.sweep_hidden)), 4.2) as figure:
        axes = figure.subplots(1, len(preset.sweep_hidden), sharey=True, squeeze=False)[0]
        for ax, hidden in zip(axes, preset.sweep_hidden, strict=True):
            ax.axhline(0, color=COLORS["baseline"], linewidth=1)
            for index, name in enumerate(names):
                method = preset.sweep_methods[name]
                own = method == preset.methods[method.name]  # the study's own strength
                cells = [gains(results.sweep[hidden, size], name) for size in sizes.tolist()]
                middle, low, high = np.array([interval(cell) for cell in cells]).T
                # Side by side, or intervals would hide each other.
                where = sizes * 1.06 ** (2 * index - len(names) + 1)
                symbol, value = ("w", method.weight) if method.weight else (r"\rho", method.radius)
                drawn = ax.errorbar(
                    where,
                    middle,
                    (middle - low, high - middle),
                    color=COLORS[method.name],
                    marker=MARKERS[method.name],
                    markersize=4.5,
                    markerfacecolor="white" if own else COLORS[method.name],
                    linestyle=":" if own else "-",
                    linewidth=1.4,
                    elinewidth=1,
                    capsize=2,
                    label=f"{method.title},  ${symbol}$ = {value:g}",
                )
                handles += [drawn] if ax is axes[0] else []
            ax.set_xscale("log")
            ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
            ax.set_xticks([], minor=True)
            ax.set_xlabel("training samples  $n$")
            ax.set_title(f"{hidden} hidden units")
        axes[0].set_ylabel("gain in macro-F1, percentage points")
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, 2 * len(axes)))
    return figure


def _apart(count: int) -> Array:
    """Where points stand beside their box: in no order, as they may come sorted by their values."""
    places: Array = np.random.default_rng(0).permutation(np.linspace(-0.1, 0.1, count))
    return places


def figure_17(results: Results) -> Figure:
    """How closely closed-form directions follow the steepest descent of the largest eigenvalue."""
    found = {name: part.numpy() for name, part in results.theory["alignment"].items()}
    gaps = np.concatenate([found[f"{place}_gap"].ravel() for place in _PLACES])
    most = np.quantile(gaps[np.isfinite(gaps)], 0.95) if np.isfinite(gaps).any() else 1.0
    most = max(float(most), 1.1)  # so that there are colors to tell apart
    colors = mpl.colors.LogNorm(1, most)
    titles = {"bound": r"$-\nabla U$", "trace": r"$-\nabla\,\mathrm{Tr}\,H$"}
    with look.canvas(10.4, 6.4) as figure:
        # Columns share an axis, so that both directions can be compared; the last is a close-up.
        axes = figure.subplots(2, 3, sharex="col", sharey="col")
        for row, (name, title) in zip(axes, titles.items(), strict=True):
            for ax, (place, heading) in zip(row, _PLACES.items(), strict=True):
                cosines, gap = (np.atleast_2d(found[f"{place}_{each}"]) for each in (name, "gap"))
                middles = _swarms(ax, cosines, gap.clip(max=most), colors)
                median = f":  median {middles[0]:.3f}" if len(middles) == 1 else ""
                ax.set_title(heading + median, fontsize=10)
            row[0].set_ylabel(f"{title}:\n" + r"cosine with $-\nabla \lambda_{\max}$")
        steps = found["steps"]
        axes[1, 1].set_xticks(range(len(steps)), [f"{step}" for step in steps], fontsize=9)
        axes[1, 1].set_xlabel("step of plain descent")
        for ax in axes[0, :2]:
            ax.set_ylim(top=1.04)
        mappable = mpl.cm.ScalarMappable(colors, "viridis")
        label = r"gap  $\lambda_1 / \lambda_2$"
        bar = figure.colorbar(mappable, ax=axes, label=label, shrink=0.7, aspect=30, extend="max")
        plain_log_ticks(bar.ax)
        line = Line2D([], [], color=FIRST, linewidth=2, label="median")
        figure.legend(handles=[line], loc="outside lower center")
    return figure


FIGURES = {
    figure.number: figure
    for figure in (
        StudyFigure(
            2,
            "Cost of a gradient",
            "Time of one gradient of Tr H², numerically, analytically by pairs of samples as in "
            "the paper, and analytically by pairs of parameters as here by default. Slopes are "
            "exponents fitted to the three largest sizes.",
            figure_2,
            "timing",
        ),
        StudyFigure(
            3,
            "Analytic and numerical gradients agree",
            "Norm of the difference between the analytic gradient and central differences against "
            "the gradient's own norm, one point per random network.",
            figure_3,
            "agreement",
        ),
        StudyFigure(
            4,
            "Fitted samples leave the gradient",
            "Norm of each sample's share in the gradient of the bound against the sample's misfit, "
            "at converged networks.",
            figure_4,
            "fit",
        ),
        StudyFigure(
            5,
            "Similar inputs, large gradients",
            "Norm of the gradient of Tr H² against the covariance of the inputs, whose variances "
            "stay the same: medians and quartiles over random networks.",
            figure_5,
            "covariance",
        ),
        StudyFigure(
            6,
            "Which part leads",
            "Norms of the two parts of the bound's gradient, from the mean and from the spread of "
            "the eigenvalues, at random parameters.",
            figure_6,
            "parts",
        ),
        StudyFigure(
            7,
            "Descent on the bound alone",
            "Bounds and extreme eigenvalues while only the bound is descended, and all eigenvalues "
            "before and after: medians and quartiles over starting points.",
            figure_7,
            "descent",
        ),
        StudyFigure(
            8,
            "The data",
            "Samples of two Gaussians in the plane, with the boundary that classifies best.",
            figure_8,
        ),
        StudyFigure(
            9,
            "Critical points and their bound",
            "The bound against the eigenvalue it bounds at all distinct critical points, and the "
            "bound's histogram with the thresholds below which a point is called flat, and above "
            "which sharp.",
            figure_9,
            "search",
        ),
        StudyFigure(
            10,
            "Training by four methods",
            "Loss and largest eigenvalue from sharp and flat seeds: medians and quartiles. Methods "
            "act while shaded, then plain descent; the first steps' loss lies above the panel. "
            f"{_FIFTH}",
            figure_10,
            "control ours",
        ),
        StudyFigure(
            11,
            "Loss along the top eigenvector",
            "Rise of the loss away from the final networks along the eigenvector of the largest "
            "eigenvalue: medians and quartiles, the steeper side on the right. "
            f"{_FIFTH}",
            figure_11,
            "control ours",
        ),
        StudyFigure(
            12,
            "Spectra at the end",
            "Largest and smallest eigenvalue, mean and standard deviation of the spectrum after "
            f"training; each point is a network, boxes hold the middle half. {_FIFTH}",
            figure_12,
            "control ours",
        ),
        StudyFigure(
            13,
            "The most negative eigenvalues",
            "Loss along the top and bottom eigenvectors where A-SAM and HSR have their smallest "
            "eigenvalue of all; dotted, what the eigenvalue alone predicts.",
            figure_13,
            "control",
        ),
        StudyFigure(
            14,
            "Test performance",
            "Macro-F1 on the test samples after training; each point is a network, boxes hold the "
            f"middle half. {_FIFTH}",
            figure_14,
            "control ours",
        ),
        StudyFigure(
            15,
            "Decision boundaries",
            "Probability of class 1 and its boundary after training from the sharpest seeds, by "
            "plain descent above and by HSR below; 100 training samples of either class are shown.",
            figure_15,
            "control",
        ),
        StudyFigure(
            16,
            "Where flatter minima classify better",
            "Ours, not the paper's: gain in test macro-F1 over plain descent from sharp seeds, "
            "against the number of training samples; means over data sets with 95 % intervals. "
            "Open markers, dotted: the strengths of the study. Of each data set the sharpest "
            "converged network counts; sweep.csv says how many of its seeds converged.",
            figure_16,
            "sweep",
        ),
        StudyFigure(
            17,
            "The bound's direction, and the steepest one",
            "Ours, not the paper's: cosine between the steepest descent of the largest eigenvalue "
            "and that of the bound (above) and of the trace (below), each point a network. It is "
            "what a short step along the one takes of the most that a step of this length could. "
            "Colors: how far the largest eigenvalue stands above the second.",
            figure_17,
            "alignment",
        ),
    )
}


def _band(
    ax: Axes,
    x: npt.NDArray[np.generic],
    groups: Sequence[Array],
    color: str,
    *,
    label: str | None = None,
    linestyle: str = "-",
    marker: str = "",
) -> None:
    """Median of each group, and a band from the first to the third quartile."""
    low, middle, high = np.array([np.nanquantile(group, (0.25, 0.5, 0.75)) for group in groups]).T
    ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    ax.plot(
        x,
        middle,
        color=color,
        linewidth=1.8,
        linestyle=linestyle,
        marker=marker,
        markersize=4,
        label=label,
    )


def _swarms(ax: Axes, groups: Array, shades: Array, colors: mpl.colors.Normalize) -> Array:
    """All points of some groups side by side, shaded, with medians, which are returned."""
    spread = np.random.default_rng(0)
    for index, (values, own) in enumerate(zip(groups, shades, strict=True)):
        ax.scatter(
            index + spread.uniform(-0.32, 0.32, len(values)),
            values,
            s=8,
            c=own,
            cmap="viridis",
            norm=colors,
            linewidth=0,
            rasterized=True,
        )
    middles: Array = np.nanmedian(groups, 1)
    where = np.arange(len(groups))
    ax.hlines(middles, where - 0.42, where + 0.42, color=FIRST, linewidth=2)
    ax.set_xlim(-0.5, len(groups) - 0.5)
    ax.set_xticks([])
    ax.grid(visible=False, axis="x")
    return middles


def _boxes(ax: Axes, results: Results, measure: Callable[[Tensors], Tensor]) -> Array:
    """A box and all points per method, sharp seeds at the left, flat ones at the right."""
    methods = list(results.methods)
    everything = []
    centers = [index * (len(methods) + 1) + (len(methods) - 1) / 2 for index in range(len(KINDS))]
    for index, kind in enumerate(KINDS):
        for offset, method in enumerate(methods):
            position = index * (len(methods) + 1) + offset
            values = measure(results.controlled[kind, method]).numpy()
            everything.append(values)
            color = COLORS[method]
            ax.boxplot(
                [values],
                positions=[position - 0.15],
                widths=0.4,
                patch_artist=True,
                showfliers=False,  # every network is drawn as a point anyway
                manage_ticks=False,
                medianprops={"color": INK},
                boxprops={"facecolor": mpl.colors.to_rgba(color, 0.35), "edgecolor": color},
                whiskerprops={"color": color},
                capprops={"color": color},
            )
            ax.plot(
                position + 0.26 + _apart(len(values)),
                values,
                MARKERS[method],
                color=color,
                markersize=2.8,
                alpha=0.8,
                markeredgewidth=0,
            )
    ax.axvline(len(methods), color=PALE, linewidth=0.8)
    ax.set_xticks(centers, [f"{kind} seeds" for kind in KINDS])
    ax.tick_params(axis="x", length=0)
    ax.grid(visible=False, axis="x")
    return np.concatenate(everything)


def _legend(figure: Figure, results: Results, *, line: bool = False) -> None:
    """The methods, outside the axes, where no data can be."""
    handles: Iterable[Line2D | Patch] = [
        Line2D([], [], color=COLORS[name], linestyle=LINES.get(name, "-"), linewidth=2, label=label)
        if line
        else Patch(
            facecolor=mpl.colors.to_rgba(COLORS[name], 0.35),
            edgecolor=COLORS[name],
            label=label,
        )
        for name, method in results.methods.items()
        for label in [method.title.replace("λ_max", r"$\lambda_{\max}$")]
    ]
    figure.legend(handles=list(handles), loc="outside lower center", ncols=5)

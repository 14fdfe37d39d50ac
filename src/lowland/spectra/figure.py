"""The picture of a spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from lowland.display import styled
from lowland.spectra.solve import Density

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:  # optional; annotations are looked at in the tests
    Axes = Any

_BLUE, _ORANGE, _INK = "#0072b2", "#d55e00", "#4d4d4d"
_FEW = 80  # eigenvalues, each of which is seen by itself
_LABELS = 12  # of ranks, beside one another without touching


def draw(
    eigenvalues: Float[Tensor, " k"],
    ranks: Int[Tensor, " k"],
    density: Density | None,
    ax: Axes | None,
    *,
    dim: int,
    title: str,
) -> Axes:
    """The density if it is known, and some of the ``dim`` eigenvalues with their ranks.

    Args:
        eigenvalues: Descending.
        ranks: Which of all each is; 1 is the largest.
        density: Of all of them.
        ax: Where to draw; by default on a figure of its own.
        dim: How many there are.
        title: Above the axes.
    """
    with styled():
        from matplotlib import pyplot as plt  # noqa: PLC0415 - optional

        if ax is None:
            _, ax = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
        if density is None:
            _draw_eigenvalues(eigenvalues, ranks, ax, dim=dim)
        else:
            _draw_density(eigenvalues, density, ax, dim=dim)
        ax.set_title(title)
    return ax


def _draw_eigenvalues(eigenvalues: Tensor, rank: Tensor, ax: Axes, *, dim: int) -> None:
    """Each eigenvalue over its rank, from the largest on; ranks that are not known are left out."""
    values, ranks = eigenvalues.numpy(), rank.numpy()
    gaps = np.diff(ranks, prepend=ranks[0] - 1) > 1
    places = np.arange(len(ranks)) + gaps.cumsum()
    ax.axhline(0, color=_INK, linewidth=0.8)
    size, width = (5.0, 1.2) if len(values) <= _FEW else (2.0, 0.6)
    for own, color in ((values >= 0, _BLUE), (values < 0, _ORANGE)):
        ax.vlines(places[own], 0, values[own], color=color, linewidth=width)
        ax.plot(places[own], values[own], "o", color=color, markersize=size, markeredgewidth=0)
    for place in places[gaps]:
        ax.axvline(place - 1, color=_INK, linewidth=0.8, linestyle=":")
    shown = slice(None, None, -(-len(ranks) // _LABELS))
    ax.set_xticks(places[shown], [f"{rank:,}" for rank in ranks[shown]])
    ax.set_xlabel(f"rank of {dim:,} (1 is the largest)")
    ax.set_ylabel(r"eigenvalue  $\lambda$")
    ax.grid(visible=False, axis="x")


def _draw_density(eigenvalues: Tensor, density: Density, ax: Axes, *, dim: int) -> None:
    """The density on a logarithmic scale, and a mark below it for each eigenvalue."""
    grid, mean, error = (part.numpy() for part in (density.grid, density.mean, density.stderr))
    # Below a tenth of what a single eigenvalue shows there is nothing but the Gaussian's tails.
    floor = 0.1 / (dim * density.width * np.sqrt(2 * np.pi))
    low, high = (np.clip(part, floor, None) for part in (mean - error, mean + error))
    ax.set_yscale("log")
    ax.fill_between(grid, low, high, color=_BLUE, alpha=0.25, linewidth=0)
    ax.plot(grid, np.where(mean > floor, mean, np.nan), color=_BLUE, linewidth=1.6)
    ax.set_ylim(bottom=floor)
    ax.plot(
        eigenvalues.numpy(),
        np.full(len(eigenvalues), 0.03),
        "|",
        color=_ORANGE,
        markersize=9,
        markeredgewidth=1.2,
        transform=ax.get_xaxis_transform(),
        label=f"{len(eigenvalues)} eigenvalues",
    )
    ax.set_xlabel(r"eigenvalue  $\lambda$")
    ax.set_ylabel(r"density  $\rho(\lambda)$")
    ax.legend(loc="upper right")

"""The picture of a spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lowland.spectra.result import Spectrum
    from lowland.spectra.solve import Density
else:  # matplotlib is optional, and the result draws itself
    Axes = Density = Spectrum = Any

_BLUE, _ORANGE, _INK = "#0072b2", "#d55e00", "#4d4d4d"
_FEW = 80  # eigenvalues, each of which is seen by itself
_LABELS = 12  # of ranks, beside one another without touching


def draw(spectrum: Spectrum, ax: Axes | None) -> Axes:
    """As :meth:`lowland.Spectrum.plot`."""
    try:
        import matplotlib as mpl  # noqa: PLC0415 - optional
        from matplotlib import pyplot as plt  # noqa: PLC0415 - optional

        from lowland.studies.reporting.plots import STYLE  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError(f"plot needs matplotlib ({error}): pip install 'lowland[cli]'") from error
    with mpl.rc_context(STYLE):
        if ax is None:
            _, ax = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
        if spectrum.density is None:
            _draw_eigenvalues(spectrum, ax)
        else:
            _draw_density(spectrum, spectrum.density, ax)
        ax.set_title(_title(spectrum))
    return ax


def _draw_eigenvalues(spectrum: Spectrum, ax: Axes) -> None:
    """Each eigenvalue over its rank, from the largest on; ranks that are not known are left out."""
    values, ranks = spectrum.eigenvalues.numpy(), spectrum.ranks.numpy()
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
    ax.set_xlabel(f"rank of {spectrum.dim:,} (1 is the largest)")
    ax.set_ylabel(r"eigenvalue  $\lambda$")
    ax.grid(visible=False, axis="x")


def _draw_density(spectrum: Spectrum, density: Density, ax: Axes) -> None:
    """The density on a logarithmic scale, and a mark below it for each eigenvalue."""
    grid, mean, error = (part.numpy() for part in (density.grid, density.mean, density.stderr))
    # Below a tenth of what a single eigenvalue shows there is nothing but the Gaussian's tails.
    floor = 0.1 / (spectrum.dim * density.width * np.sqrt(2 * np.pi))
    low, high = (np.clip(part, floor, None) for part in (mean - error, mean + error))
    ax.set_yscale("log")
    ax.fill_between(grid, low, high, color=_BLUE, alpha=0.25, linewidth=0)
    ax.plot(grid, np.where(mean > floor, mean, np.nan), color=_BLUE, linewidth=1.6)
    ax.set_ylim(bottom=floor)
    ax.plot(
        spectrum.eigenvalues.numpy(),
        np.full(len(spectrum.eigenvalues), 0.03),
        "|",
        color=_ORANGE,
        markersize=9,
        markeredgewidth=1.2,
        transform=ax.get_xaxis_transform(),
        label=f"{len(spectrum.eigenvalues)} eigenvalues",
    )
    ax.set_xlabel(r"eigenvalue  $\lambda$")
    ax.set_ylabel(r"density  $\rho(\lambda)$")
    ax.legend(loc="upper right")


def _title(spectrum: Spectrum) -> str:
    error = "" if spectrum.method == "dense" else f" ± {spectrum.trace_stderr:.2g}"
    matrix = r"|\theta|\,H\,|\theta|" if spectrum.adaptive else "H"
    return rf"{spectrum.dim:,} parameters,  $\mathrm{{Tr}}\,{matrix}$ = {spectrum.trace:.4g}{error}"

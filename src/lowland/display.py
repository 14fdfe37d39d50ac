"""How results are shown: numbers, and tables and figures where pandas and matplotlib are there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame
else:  # optional; annotations are looked at in the tests
    Axes = DataFrame = Any

__all__ = ["STYLE", "DataFrame", "frame", "number", "plain_log_ticks", "styled"]

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
"""The look of every figure."""


def number(value: float, digits: int = 3, *, zeros: bool = True) -> str:
    """A number for people, without an exponent where they would not write one.

    Args:
        value: Any number.
        digits: Significant ones; 3 where there is an exponent.
        zeros: Whether to keep those at the end, which say how exact the number is.
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    if not decimals:
        return f"{float(f'{value:.{digits}g}'):,.0f}"
    text = f"{value:,.{decimals}f}"
    return text if zeros else text.rstrip("0").rstrip(".")


def frame(columns: Mapping[str, Any]) -> DataFrame:
    """A data frame of columns of one length, by their names.

    Raises:
        ImportError: Without pandas, ``pip install 'lowland[cli]'``.
    """
    try:
        import pandas as pd  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError(f"to_frame needs pandas ({error}): pip install 'lowland[cli]'") from error
    return pd.DataFrame(columns)


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the look of every figure.

    Raises:
        ImportError: Without matplotlib, ``pip install 'lowland[cli]'``.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError(f"plot needs matplotlib ({error}): pip install 'lowland[cli]'") from error
    with mpl.rc_context(STYLE):
        yield


def plain_log_ticks(ax: Axes) -> None:
    """Write 0.05 rather than 5 x 10^-2 along logarithmic axes."""
    from matplotlib.ticker import FuncFormatter  # noqa: PLC0415 - optional

    for axis in (ax.xaxis, ax.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(
                FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
            )

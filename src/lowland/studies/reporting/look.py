"""The look of studies' figures: a color and a mark for each method, and the files of figures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lowland.display import styled

COLORS = {
    "baseline": "#4d4d4d",
    "hsr": "#0072b2",
    "hessian-trace": "#e69f00",
    "flatness-aware": "#009e73",
}
"""One color per method in every figure: from the set of Okabe and Ito, told apart by everyone."""

MARKERS = {"baseline": "o", "hsr": "s", "hessian-trace": "^", "flatness-aware": "D"}


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of so many inches, and the look while it is drawn on."""
    with styled():
        layout = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.08)
        yield Figure(figsize=(width, height), layout=layout)


def render(figure: Figure, kind: str) -> bytes:
    """The figure as the bytes of a file, ``"png"`` or ``"svg"``."""
    buffer = BytesIO()
    with styled():
        # Without a date the same numbers give the same file.
        figure.savefig(
            buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None
        )
    return buffer.getvalue()

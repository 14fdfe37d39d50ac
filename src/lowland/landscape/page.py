"""A page with the surface to turn: one file with its own script, which needs no other."""

from __future__ import annotations

import json
import math
from html import escape
from importlib.resources import files
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lowland.display import number
from lowland.landscape.losses import GridLosses
from lowland.landscape.scales import Scale, is_logarithmic, span

# Rows and columns of the table of values; of finer grids it has every second, third ... of them.
_TABLE = 51


def page(surface: GridLosses, scale: Scale, title: str) -> str:
    """The page.

    Raises:
        ValueError: Along one direction; or as :func:`lowland.landscape.scales.is_logarithmic`.
    """
    if surface.losses.ndim == 1:
        raise ValueError(
            "a curve has no surface to turn: use plot(), or directions of two dimensions"
        )
    logarithmic = is_logarithmic(surface.losses, scale)
    content = {
        "title": escape(title),
        "caption": escape(surface.caption),
        "summary": escape(_summary(surface)),
        "table": _table(surface),
        "data": _json(_data(surface, logarithmic=logarithmic)),
    }
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    head, *pieces = template.split("{{")
    found = [head]
    for piece in pieces:
        name, _, rest = piece.partition("}}")
        found += [content[name.strip()], rest]
    return "".join(found)


def _data(surface: GridLosses, *, logarithmic: bool) -> dict[str, Any]:
    low, _ = span(surface.losses)
    path = None
    if surface.path is not None:
        path = {
            "points": _rounded(surface.path.coordinates),
            "on": _rounded(surface.between(surface.path.coordinates)),
            "losses": _rounded(surface.path.losses),
        }
    middle = torch.zeros(1, 2, dtype=torch.float64)
    return {
        "x": _rounded(surface.coordinates[0]),
        "y": _rounded(surface.coordinates[1]),
        "z": _rounded(surface.losses),
        "labels": surface.labels,
        "center": _rounded(surface.between(middle))[0],
        "log": logarithmic,
        "canLog": low > 0,
        "path": path,
    }


def _summary(surface: GridLosses) -> str:
    """The surface in words, for those who do not see it."""
    losses = surface.losses
    low, high = span(losses)
    place = int(torch.where(torch.isfinite(losses), losses, math.inf).argmin())
    i, j = divmod(place, losses.shape[1])
    a, b = (float(axis[k]) for axis, k in zip(surface.coordinates, (i, j), strict=True))
    return (
        f"A surface of the loss over two directions, {surface.labels[0]} and {surface.labels[1]}. "
        f"The loss is {number(surface.center_loss, 4)} at the center. On the grid of "
        f"{losses.shape[0]} by {losses.shape[1]} points it goes from {number(low, 4)}, at "
        f"{a:.3g} and {b:.3g}, to {number(high, 4)}."
    )


def _table(surface: GridLosses) -> str:
    """Values by both coordinates, as HTML."""
    rows, columns = (
        list(range(0, len(axis), math.ceil(len(axis) / _TABLE))) for axis in surface.coordinates
    )
    x, y = surface.coordinates
    head = "".join(f'<th scope="col">{float(y[j]):.3g}</th>' for j in columns)
    body = "".join(
        f'<tr><th scope="row">{float(x[i]):.3g}</th>'
        + "".join(f"<td>{_value(float(surface.losses[i, j]))}</td>" for j in columns)
        + "</tr>\n"
        for i in rows
    )
    left_out = ""
    if (len(rows), len(columns)) != tuple(surface.losses.shape):
        left_out = f", {len(rows)} by {len(columns)} of its points"
    caption = f"The loss by {surface.labels[0]} (down) and {surface.labels[1]} (across){left_out}."
    return (
        f"<table><caption>{escape(caption)}</caption>\n<thead><tr><td></td>{head}</tr></thead>\n"
        f"<tbody>{body}</tbody></table>"
    )


def _value(loss: float) -> str:
    return number(loss, 4) if math.isfinite(loss) else f"<em>{loss:g}</em>"


def _rounded(values: Float[Tensor, "*any"]) -> Any:
    """Nested lists of numbers to six digits, of words where they are not finite."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(each) for each in value]
        return float(f"{value:.6g}") if math.isfinite(value) else f"{value:g}"

    return plain(values.tolist())


def _json(data: dict[str, Any]) -> str:
    """JSON that may stand in a script: nothing in it ends the element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")

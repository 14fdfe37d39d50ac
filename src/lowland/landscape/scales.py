"""How the loss is measured off in a picture: in even steps or in even factors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lowland.display import number

Scale = Literal["auto", "linear", "log"]

# The largest loss over the smallest from which on even steps would show the largest ones alone.
_DECADES = 100.0

# Of the scale's length, between a level and either end.
_ROOM = 0.04


def is_logarithmic(losses: Float[Tensor, "*any"], scale: Scale) -> bool:
    """Whether to measure in factors: where it was asked for, or where losses span decades.

    Raises:
        ValueError: If the name is unknown, no loss is finite, or one is not positive and the scale
            is to be logarithmic.
    """
    if scale not in get_args(Scale):
        raise ValueError(
            f"unknown scale {scale!r}: expected one of {', '.join(map(repr, get_args(Scale)))}"
        )
    low, high = span(losses)
    if scale == "log" and low <= 0:
        raise ValueError(
            f"a logarithmic scale has no place for losses of zero or less; the smallest one is "
            f"{number(low)}: use scale='linear'"
        )
    return scale == "log" or (scale == "auto" and low > 0 and high >= _DECADES * low)


def span(losses: Float[Tensor, "*any"]) -> tuple[float, float]:
    """The smallest and the largest finite loss.

    Raises:
        ValueError: If none is finite.
    """
    finite = losses[torch.isfinite(losses)]
    if not len(finite):
        raise ValueError(
            "no loss on this grid is finite, so there is nothing to draw: use a smaller extent"
        )
    return float(finite.min()), float(finite.max())


def levels(low: float, high: float, *, logarithmic: bool, count: int = 9) -> list[float]:
    """Round losses from one end to the other, about ``count`` of them, both ends included.

    Args:
        low: The smallest loss.
        high: The largest.
        logarithmic: Whether they are to be apart by even factors rather than by even steps.
        count: How many there are at most, besides the ends.
    """
    if not high > low:  # a flat surface
        room = abs(low) * 1e-3 or 1e-3
        return [low - room, low + room]
    if logarithmic:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            found = _inside([d * 10.0**e for e in decades for d in digits], low, high, math.log)
            if len(found) <= count:
                break
        return [low, *found[:: math.ceil(max(len(found), 1) / count)], high]
    exponent = math.floor(math.log10((high - low) / count))
    for digit in (1, 2, 2.5, 5, 10, 20):
        step = digit * 10.0**exponent
        places = range(math.floor(low / step), math.ceil(high / step) + 1)
        found = _inside([place * step for place in places], low, high, float)
        if len(found) <= count:
            break
    return [low, *found, high]


def _inside(
    values: list[float], low: float, high: float, turn: Callable[[float], float]
) -> list[float]:
    """Those far enough from both ends for either's label to have its place."""
    room = _ROOM * (turn(high) - turn(low))
    return [v for v in values if low < v < high and turn(low) + room < turn(v) < turn(high) - room]

"""In which part of training something is applied."""

from __future__ import annotations

import math
from typing import Any

from lowland.validation import is_number


def window(active: Any, total_steps: int | None = None) -> tuple[float, float]:
    """The first step with it, and the first without it again, of ``active=`` and ``total_steps=``.

    Args:
        active: A pair of whole numbers of steps, of which the second may be infinite; with
            ``total_steps`` a pair of shares of these. A share of 1 has no end, so that training may
            go on for longer than was said. ``(0, math.inf)`` is always, in both.
        total_steps: How many steps training takes.

    Raises:
        ValueError: If these are no such pair, or there is no step in between.

    Example:
        >>> window((100, 200)), window((0.25, 0.5), 1000), window((0.75, 1.0), 1000)
        ((100, 200), (250, 500), (750, inf))
    """
    if total_steps is not None and not (_whole(total_steps) and total_steps >= 1):
        raise ValueError(f"total_steps must be a whole number of at least 1; got {total_steps!r}")
    pair = isinstance(active, tuple) and len(active) == 2 and all(map(is_number, active))
    if not (pair and 0 <= active[0] < active[1]):
        raise ValueError(
            f"active must be (start, stop), the first step with it and the first without it again, "
            f"0 <= start < stop; got {active!r}"
        )
    start, stop = active
    if total_steps is None:
        if not (_whole(start) and (_whole(stop) or stop == math.inf)):
            raise ValueError(
                f"active counts steps in whole numbers; got {active!r}: for shares of training, "
                "give total_steps= too"
            )
        return start, stop
    if (start, stop) == (0, math.inf):
        return start, stop
    if stop > 1:
        raise ValueError(
            f"with total_steps, active is a pair of shares of it, from 0 to 1; got {active!r}"
        )
    first, last = round(start * total_steps), round(stop * total_steps)
    if first == last:
        raise ValueError(f"no step of {total_steps} lies within active={active!r}")
    return first, math.inf if stop == 1 else last


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""In which of the steps of a training something acts."""

from __future__ import annotations

import math
from typing import NamedTuple

from lowland.validation import is_number


class Span(NamedTuple):
    """The first step in which it acts, and the first in which it no longer does; counted from 0."""

    start: float
    stop: float

    def holds(self, step: int) -> bool:
        """Whether it acts in a step."""
        return self.start <= step < self.stop


def span(active: object, total_steps: int | None = None) -> Span:
    """The steps that ``active=(start, stop)`` says: numbers of them, or shares of a total.

    Raises:
        TypeError: If the total is no whole number.
        ValueError: If the pair is none, or not in its order.
    """
    if total_steps is None:
        if not _is_pair(active) or not 0 <= active[0] < active[1]:  # type: ignore[index]
            raise ValueError(
                "active must be (start, stop), the first step in which it acts and the first in "
                f"which it no longer does, 0 <= start < stop; got {active!r}"
            )
        return Span(float(active[0]), float(active[1]))  # type: ignore[index]
    if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
        raise ValueError(f"total_steps must be a whole number of at least 1; got {total_steps!r}")
    if active == (0, math.inf):
        return Span(0, math.inf)
    if not _is_pair(active) or not 0 <= active[0] < active[1] <= 1:  # type: ignore[index]
        raise ValueError(
            "with total_steps, active must be (start, stop) as shares of these, "
            f"0 <= start < stop <= 1; got {active!r}"
        )
    start, stop = float(active[0]), float(active[1])  # type: ignore[index]
    # The last share goes on where a training takes more steps than it was said to.
    return Span(round(start * total_steps), math.inf if stop == 1 else round(stop * total_steps))


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(is_number, value))

"""What the paper reports (arXiv:2605.05209), by data, kind of task and size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lowland.studies.illusion.preset import Task


@dataclass(frozen=True)
class Published:
    """What is published of networks of one size; empty where there is nothing.

    Attributes:
        rho: Spearman's correlation with the test accuracy, by measure.
        p: Its p-value, where the paper gives one.
        accuracy: Mean test accuracy with small and with large batches, in per cent.
        trace: The Hessian trace with small and with large batches.
        gain: The second of ``accuracy`` over the first, in percentage points.
        rescaled: How the trace moves when layers are rescaled.
    """

    rho: Mapping[str, float] = field(default_factory=dict)
    p: Mapping[str, float] = field(default_factory=dict)
    accuracy: tuple[float, ...] = ()
    trace: tuple[float, ...] = ()
    gain: str = ""
    rescaled: str = ""

    def of(self, measure: str) -> str:
        """A correlation, for people."""
        if measure not in self.rho:
            return ""
        p = f", p = {self.p[measure]:.2g}" if measure in self.p else ""
        return f"ρ = {self.rho[measure]:+.3f}{p}"

    def lead(self, measure: str, rival: str) -> str:
        """By how much one correlation is stronger, for people."""
        if measure not in self.rho or rival not in self.rho:
            return ""
        return f"|ρ| larger by {abs(self.rho[measure]) - abs(self.rho[rival]):+.3f}"


NOTHING = Published()

_HIDDEN = {"pairs": (64, 8), "selection": (64, 16), "advantage": (256, 128)}
_SIZE = 250

_PAIRS = {
    "mnist": Published(
        {"trace": -0.226, "l2_norm": 0.019, "pair_proxy": 0.374},
        {"trace": 0.024, "l2_norm": 0.848, "pair_proxy": 1.2e-4},
    ),
    "fashion-mnist": Published(
        {"trace": -0.241, "l2_norm": -0.226, "pair_proxy": 0.384},
        {"trace": 0.016, "l2_norm": 0.024, "pair_proxy": 8.15e-5},
    ),
}

_SELECTION = Published(
    {
        "trace": -0.079,
        "l2_norm": -0.061,
        "l1_norm": 0.011,
        "patterns_2": 0.113,
        "free_parameters": 0.067,
        "free_regions": 0.117,
    },
    {"trace": 0.174, "patterns_2": 0.050, "free_regions": 0.043},
)


def _row(
    accuracy: tuple[float, float],
    gain: str,
    trace: tuple[float, float],
    rho: tuple[float, float | None, float, float],
    rescaled: str = "",
) -> Published:
    names = ("trace", "patterns_1", "patterns_2", "agreement")
    known = {name: value for name, value in zip(names, rho, strict=True) if value is not None}
    return Published(known, {}, accuracy, trace, gain, rescaled)


_ADVANTAGE = {
    500: _row(
        (85.3, 86.5),
        "+1.2",
        (52.5, 20.6),
        (-0.75, 0.11, 0.76, -0.85),
        "97 times (48.9 to 4,751) with factor 20",
    ),
    2_000: _row((90.4, 92.0), "+1.6", (59.5, 23.1), (-0.82, 0.08, 0.73, -0.88)),
    6_000: _row(
        (94.0, 94.9),
        "+1.0",
        (61.9, 25.9),
        (-0.78, 0.40, 0.78, -0.86),
        "99 times (66.1 to 6,525.9) with factor 20 on layer 1, 54 times (62.9 to 3,378.9) on "
        "layer 2",
    ),
    12_000: _row((96.0, 96.5), "+0.5", (44.8, 23.9), (-0.84, 0.22, 0.77, -0.90)),
    24_000: _row((97.0, 97.1), "+0.08", (39.1, 38.2), (0.01, 0.06, 0.39, -0.40)),
    60_000: _row((98.0, 98.0), "+0.02", (30.1, 26.0), (0.05, None, 0.05, -0.81)),
}


def published(task: Task, size: int) -> Published:
    """What the paper reports of such networks and sizes; MNIST's, whatever part is at hand."""
    data = "mnist" if task.data == "mnist-full" else task.data
    if task.hidden != _HIDDEN[task.kind] or (task.kind != "advantage" and size != _SIZE):
        return NOTHING
    if task.kind == "pairs":
        return _PAIRS.get(data, NOTHING)
    if data != "mnist":
        return NOTHING
    return _SELECTION if task.kind == "selection" else _ADVANTAGE.get(size, NOTHING)

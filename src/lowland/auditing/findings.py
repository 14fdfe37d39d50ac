"""What an audit found, as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lowland.auditing.measures import MEASURES, Measure
from lowland.auditing.readings import LANCZOS
from lowland.display import DataFrame, frame


@dataclass(frozen=True, eq=False)
class Findings:
    """Measures of one network over rescalings.

    Attributes:
        layer: Which layer was multiplied, and the next one divided, by each factor.
        layers: All linear and convolutional layers, in words.
        parameters: How many are trainable.
        samples: How many training points there were.
        unseen: How many unseen points.
        dtype: Of the parameters.
        probes: Behind each estimate.
        factors: Ascending, with 1 among them.
        values: Of each measure, by its name, one number a factor.
        stderr: Standard errors of those that are estimates.
        limits: As much as counts can come to on so many unseen points, by their names.
        left_out: Why a measure is missing, by its name.
        notes: What else a reader should know.
    """

    layer: int
    layers: tuple[str, ...]
    parameters: int
    samples: int
    unseen: int
    dtype: torch.dtype
    probes: int
    factors: tuple[float, ...]
    values: dict[str, tuple[float, ...]] = field(repr=False)
    stderr: dict[str, tuple[float, ...]] = field(repr=False)
    limits: dict[str, float]
    left_out: dict[str, str]
    notes: tuple[str, ...]

    @property
    def tolerance(self) -> float:
        """Up to which relative difference a number that is no count stays.

        That of rounding: the root of the type's precision, since derivatives of networks that fit
        their data lose digits. For adaptive sharpness by Lanczos 0.001.
        """
        return float(torch.finfo(self.dtype).eps ** 0.5)

    @property
    def measures(self) -> list[Measure]:
        """The measures that were taken, in the table's order."""
        return [measure for name, measure in MEASURES.items() if name in self.values]

    @property
    def base(self) -> int:
        """The index of factor 1, the network itself."""
        return self.factors.index(1.0)

    def change(self, name: str) -> float:
        """The largest value of a measure over its smallest; NaN if one is not positive.

        Raises:
            KeyError: If that measure was not taken.
        """
        row = self._row(name)
        return max(row) / min(row) if min(row) > 0 else float("nan")

    def stays(self, name: str) -> bool:
        """Whether a measure is the same at all factors: a count exactly, others but for rounding.

        Raises:
            KeyError: If that measure was not taken.
        """
        return all(self.stays_at(name))

    def stays_at(self, name: str) -> list[bool]:
        """Whether a measure at each factor is what it is at factor 1.

        Raises:
            KeyError: If that measure was not taken.
        """
        row, measure = self._row(name), MEASURES[name]
        if measure.is_count:
            return [value == row[self.base] for value in row]
        by_lanczos = measure.kind == "adaptive" and "adaptive_trace" in self.stderr
        room = max(self.tolerance, LANCZOS) if by_lanczos else self.tolerance
        size = 1.0 if measure.is_change else max(map(abs, row))
        return [abs(value - row[self.base]) <= room * size for value in row]

    def saturated(self, name: str) -> bool:
        """Whether a count is zero or as large as the unseen points allow.

        Raises:
            KeyError: If that measure was not taken.
        """
        row = self._row(name)
        return name in self.limits and set(row) in ({0.0}, {self.limits[name]})

    def to_frame(self) -> DataFrame:
        """A row for each measure and factor.

        Columns: ``layer``, ``factor``, ``measure``, ``kind``, ``unit``, ``value``, and ``stderr``,
        NaN where the value is no estimate.

        Raises:
            ImportError: Without pandas, ``pip install 'lowland[cli]'``.
        """
        unknown = (float("nan"),) * len(self.factors)
        rows = [
            (self.layer, factor, measure.name, measure.kind, measure.unit, value, error)
            for measure in self.measures
            for factor, value, error in zip(
                self.factors,
                self.values[measure.name],
                self.stderr.get(measure.name, unknown),
                strict=True,
            )
        ]
        columns = ["layer", "factor", "measure", "kind", "unit", "value", "stderr"]
        return frame(dict(zip(columns, zip(*rows, strict=True), strict=True)))

    def _row(self, name: str) -> tuple[float, ...]:
        if name not in self.values:
            why = self.left_out.get(name, "there is no such measure")
            raise KeyError(f"{name!r} was not measured ({why}); see measures")
        return self.values[name]

"""What the search asks of HiGHS, in arrays."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float, Int

Vector = Float[np.ndarray, " n"]
Matrix = Float[np.ndarray, "rows columns"]

TIGHT = 1e-10
"""The smallest tolerance that HiGHS accepts."""


def highs() -> ModuleType:
    """The solver's module.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import highspy  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError(
            f"pair_proxy solves linear programs with HiGHS ({error}): "
            "pip install 'lowland[weakness]'"
        ) from error
    return highspy


class Program:
    """A linear program in HiGHS that keeps its basis while rows, columns and costs change."""

    def __init__(self) -> None:
        self._module = highs()
        self.model: Any = self._module.Highs()
        for name, value in (
            ("output_flag", False),
            ("threads", 1),
            ("presolve", "off"),  # it would drop the basis of the program before
            ("solver", "simplex"),
            ("simplex_scale_strategy", 0),  # features come at one scale already
            ("simplex_strategy", 1),
        ):
            self.model.setOptionValue(name, value)

    def add_rows(self, rows: Matrix, lower: Vector, upper: Vector) -> None:
        """``lower <= rows @ x <= upper``."""
        starts, places, values = _sparse(rows)
        self.model.addRows(len(rows), lower, upper, len(values), starts, places, values)

    def add_columns(self, columns: Matrix, cost: Vector) -> None:
        """Nonnegative variables, each with its coefficients as a row of ``columns``."""
        starts, places, values = _sparse(columns)
        count = len(columns)
        low, high = np.zeros(count), np.full(count, np.inf)
        self.model.addCols(count, cost, low, high, len(values), starts, places, values)

    def run(self) -> bool:
        """Solve from the last basis; whether an optimum was found."""
        self.model.run()
        return bool(self.model.getModelStatus() == self._module.HighsModelStatus.kOptimal)

    def run_again(self) -> bool:
        """Solve from scratch and as exactly as HiGHS does."""
        names = ("primal_feasibility_tolerance", "dual_feasibility_tolerance")
        before = [self.model.getOptionValue(name)[1] for name in names]
        for name in names:
            self.model.setOptionValue(name, TIGHT)
        self.model.clearSolver()
        found = self.run()
        for name, value in zip(names, before, strict=True):
            self.model.setOptionValue(name, value)
        return found

    @property
    def objective(self) -> float:
        """What was minimized, in the last solution."""
        return float(self.model.getInfo().objective_function_value)

    def values(self) -> Vector:
        """Of the variables, in the last solution."""
        return np.array(self.model.getSolution().col_value)

    def row_duals(self) -> Vector:
        """The multipliers of the rows there, in the signs of HiGHS."""
        return np.array(self.model.getSolution().row_dual)


def indices(start: int, stop: int) -> Int[np.ndarray, " n"]:
    """What HiGHS takes as indices."""
    return np.arange(start, stop, dtype=np.int32)


def _sparse(rows: Matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    present = rows != 0
    ends = present.sum(axis=1).cumsum()
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int32)
    return starts, np.nonzero(present)[1].astype(np.int32), rows[present]

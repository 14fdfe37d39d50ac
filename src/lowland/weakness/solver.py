"""What the search asks of HiGHS, in arrays."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float

Vector = Float[np.ndarray, " variables"]
Equations = Float[np.ndarray, " equations"]
Matrix = Float[np.ndarray, "variables equations"]

TIGHT = 1e-10
"""The smallest tolerance that HiGHS accepts."""


def need_highs() -> ModuleType:
    """The solver's module.

    Raises:
        ImportError: If it, or what comes with it, is not installed.
    """
    try:
        import highspy  # noqa: PLC0415 - optional
        import threadpoolctl  # noqa: F401, PLC0415 - optional
    except ImportError as error:
        raise ImportError(
            f"pair_proxy solves linear programs with HiGHS ({error}): "
            "pip install 'lowland[weakness]'"
        ) from error
    return highspy


class Program:
    """A linear program: ``min cost @ x`` over ``x >= 0`` with ``x @ columns = right``.

    Args:
        columns: A row for each variable.
        cost: Of each.
        right: What they add up to.
    """

    def __init__(self, columns: Matrix, cost: Vector, right: Equations) -> None:
        self._module = need_highs()
        self._model: Any = self._module.Highs()
        for name, value in (
            ("output_flag", False),
            ("threads", 1),
            ("presolve", "off"),  # of programs this small it costs more than it saves
            ("solver", "simplex"),
            ("simplex_scale_strategy", 0),  # features come at one scale already
        ):
            self._model.setOptionValue(name, value)
        none = np.zeros(0, np.int32)
        self._model.addRows(len(right), right, right, 0, none, none, np.zeros(0))
        present = columns != 0
        ends = present.sum(axis=1).cumsum()
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int32)
        places, values = np.nonzero(present)[1].astype(np.int32), columns[present]
        low, high = np.zeros(len(cost)), np.full(len(cost), np.inf)
        self._model.addCols(len(cost), cost, low, high, len(values), starts, places, values)

    def run(self) -> bool:
        """Solve; whether an optimum was found."""
        self._model.run()
        return bool(self._model.getModelStatus() == self._module.HighsModelStatus.kOptimal)

    def run_again(self) -> bool:
        """Solve from scratch and as exactly as HiGHS does."""
        for name in ("primal_feasibility_tolerance", "dual_feasibility_tolerance"):
            self._model.setOptionValue(name, TIGHT)
        self._model.clearSolver()
        return self.run()

    @property
    def objective(self) -> float:
        """What was minimized, in the last solution."""
        return float(self._model.getInfo().objective_function_value)

    def values(self) -> Vector:
        """Of the variables, in the last solution."""
        return np.array(self._model.getSolution().col_value)

    def multipliers(self) -> Equations:
        """The multipliers of the equations there, in the signs of HiGHS."""
        return np.array(self._model.getSolution().row_dual)

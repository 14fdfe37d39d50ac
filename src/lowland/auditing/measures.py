"""What is measured of a network, and what is known of each measure beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["sharpness", "size", "adaptive", "function", "weakness"]

HEADINGS: dict[Kind, str] = {
    "sharpness": "Sharpness",
    "size": "Norms of the weights",
    "adaptive": "Adaptive sharpness",
    "function": "Function",
    "weakness": "Last hidden layer",
}

COMPARABLE: tuple[Kind, ...] = ("adaptive", "weakness")
"""What can tell networks of the same training loss apart, whatever their parameters' scale."""


@dataclass(frozen=True)
class Measure:
    """One row of an audit.

    Attributes:
        name: In tables that are read by programs.
        title: In those that are read by people.
        symbol: In figures.
        unit: Of its values.
        kind: Sharpness and size depend on the parameters' scale; the others are functions of what
            rescaling leaves alone.
        is_change: Whether it is a difference from the network at factor 1 already.
        is_count: Whether its values are whole numbers.
    """

    name: str
    title: str
    symbol: str
    unit: str
    kind: Kind
    is_change: bool = False
    is_count: bool = False

    @property
    def invariant(self) -> bool:
        """Whether it should stay."""
        return self.kind not in ("sharpness", "size")


_CURVATURE = "loss/weight^2"

MEASURES = {
    measure.name: measure
    for measure in (
        Measure(
            "lambda_max", "largest eigenvalue", r"$\lambda_{\max}(H)$", _CURVATURE, "sharpness"
        ),
        Measure("trace", "trace", r"$\mathrm{Tr}\,H$", _CURVATURE, "sharpness"),
        Measure("upper", "upper bound", r"bound $m + s\sqrt{P-1}$", _CURVATURE, "sharpness"),
        Measure("l2", "L2 norm", "L2 norm", "weight", "size"),
        Measure("l1", "L1 norm", "L1 norm", "weight", "size"),
        Measure(
            "adaptive_lambda_max",
            "adaptive largest eigenvalue",
            r"adaptive $\lambda_{\max}$",
            "loss",
            "adaptive",
        ),
        Measure("adaptive_trace", "adaptive trace", "adaptive trace", "loss", "adaptive"),
        Measure(
            "outputs",
            "change of outputs",
            "change of outputs",
            "largest output",
            "function",
            is_change=True,
        ),
        Measure(
            "predictions",
            "predictions changed",
            "predictions changed",
            "predictions",
            "function",
            is_change=True,
            is_count=True,
        ),
        Measure("loss", "training loss", "training loss", "loss", "function"),
        Measure("accuracy", "training accuracy", "training accuracy", "fraction", "function"),
        Measure(
            "patterns",
            "patterns of unseen points",
            "activation patterns",
            "patterns",
            "weakness",
            is_count=True,
        ),
        Measure(
            "k_free",
            "free regions k_free",
            r"$k_{\mathrm{free}}$",
            "patterns",
            "weakness",
            is_count=True,
        ),
        Measure(
            "free_parameters",
            "free parameters",
            "free parameters",
            "parameters",
            "weakness",
            is_count=True,
        ),
        Measure("pair_proxy", "pair proxy", "pair proxy", "pairs", "weakness", is_count=True),
    )
}
"""All of them by name, in the order of tables."""

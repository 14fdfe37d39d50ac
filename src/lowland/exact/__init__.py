"""The closed form: exact moments, their gradient, and what contributes to it."""

from lowland.criteria import register_criterion
from lowland.exact.api import OrderChoice, hessian, loss_gradient, moments, trace
from lowland.exact.attribution import (
    Direction,
    direction,
    pair_contributions,
    sample_contributions,
)

__all__ = [
    "Direction",
    "OrderChoice",
    "direction",
    "hessian",
    "loss_gradient",
    "moments",
    "pair_contributions",
    "register_criterion",
    "sample_contributions",
    "trace",
]

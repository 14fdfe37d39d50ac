"""The closed form: exact moments, their gradient, and what contributes to it."""

from lowland.activations import register_activation
from lowland.criteria import register_criterion
from lowland.exact.api import diagonal, hessian, loss_gradient, moments, trace
from lowland.exact.attribution import (
    Direction,
    direction,
    pair_contributions,
    sample_contributions,
)
from lowland.exact.plan import OrderChoice

__all__ = [
    "Direction",
    "OrderChoice",
    "diagonal",
    "direction",
    "hessian",
    "loss_gradient",
    "moments",
    "pair_contributions",
    "register_activation",
    "register_criterion",
    "sample_contributions",
    "trace",
]

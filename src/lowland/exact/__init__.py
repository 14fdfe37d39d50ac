"""The closed form: exact moments, spectral functions, their gradients, and what they consist of."""

from lowland.activations import register_activation
from lowland.criteria import register_criterion
from lowland.exact.api import diagonal, hessian, loss_gradient, moments, trace
from lowland.exact.attribution import (
    Direction,
    direction,
    pair_contributions,
    sample_contributions,
)
from lowland.exact.eigenvalues import spectral
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
    "spectral",
    "trace",
]

"""Measure and control the curvature of neural-network losses."""

from lowland import exact
from lowland.engines import hessian_moments
from lowland.exact.modules import UnsupportedModelError
from lowland.moments import HessianMoments
from lowland.optimizers import SAM
from lowland.penalties import HSR, FlatnessAware, HessianTrace

__version__ = "0.1.0"

__all__ = [
    "HSR",
    "SAM",
    "FlatnessAware",
    "HessianMoments",
    "HessianTrace",
    "UnsupportedModelError",
    "exact",
    "hessian_moments",
]

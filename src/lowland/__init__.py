"""Measure and control the curvature of neural-network losses."""

from lowland import exact
from lowland.moments import HessianMoments

__all__ = ["HessianMoments", "exact"]

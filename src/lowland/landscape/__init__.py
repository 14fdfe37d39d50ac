"""The loss around a model's parameters, along one direction or on a plane through two."""

from lowland.landscape.api import surface
from lowland.landscape.path import TrainingPath
from lowland.landscape.result import LossSurface

__all__ = ["LossSurface", "TrainingPath", "surface"]

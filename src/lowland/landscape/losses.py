"""The loss on a grid, and what is known about it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from lowland.display import number
from lowland.landscape.directions import Kind, cosine
from lowland.landscape.path import TrainingPath
from lowland.landscape.statistics import Statistics
from lowland.spectra.surface import NamedVector

# Cosine of two directions up to which a drawing with perpendicular axes shows true angles.
_PERPENDICULAR = 1e-3

# Difference of two losses from which on it is worth a word, as a fraction of them.
_OTHER = 1e-3


@dataclass(frozen=True, eq=False)
class GridLosses:
    """Losses with their places; what a person may do with them adds :class:`LossSurface`."""

    losses: Float[Tensor, "*grid"]
    coordinates: tuple[Float[Tensor, " _"], ...] = field(repr=False)
    directions: list[NamedVector] = field(repr=False)
    labels: list[str]
    kind: Kind
    center_loss: float
    own_loss: float
    statistics: Statistics
    path: TrainingPath | None
    dim: int

    @property
    def caption(self) -> str:
        """What is drawn, and what a drawing does not show, in sentences."""
        where = "on a plane" if len(self.directions) == 2 else "along a line"
        center = number(self.center_loss, 4)
        parts = [f"Loss {where} through the model's {self.dim:,} parameters, where it is {center}."]
        if self.statistics == "running":
            parts.append(
                "Batch normalization uses the running statistics of the center at every point; "
                "away from it they are not those of the network there."
            )
        elif self.statistics == "recomputed":
            own = ""
            if abs(self.own_loss - self.center_loss) > _OTHER * abs(self.own_loss):
                own = (
                    f" The model's own running statistics give {number(self.own_loss, 4)} at the "
                    "center."
                )
            parts.append(
                "The statistics of batch normalization are computed anew at every point." + own
            )
        if len(self.directions) == 2 and abs(angle := cosine(*self.directions)) > _PERPENDICULAR:
            parts.append(
                f"The directions are not perpendicular (cosine {angle:.3f}), the axes are drawn so."
            )
        if self.path is not None:
            parts.append(
                f"Points: {len(self.path.distances)} checkpoints, projected; the drawing holds "
                f"{self.path.explained:.1%} of their squared distance from the center."
            )
            if outside := self._outside():
                parts.append(f"{outside} of them lie beyond its edge.")
        if missing := int((~torch.isfinite(self.losses)).sum()):
            parts.append(
                f"At {missing} of {self.losses.numel()} points the loss is not a finite number."
            )
        return " ".join(parts)

    def _outside(self) -> int:
        """How many checkpoints are not on the drawing."""
        if self.path is None:
            return 0
        low = torch.stack([axis[0] for axis in self.coordinates])
        high = torch.stack([axis[-1] for axis in self.coordinates])
        places = self.path.coordinates
        return int(((places < low) | (places > high)).any(1).sum())

    def between(self, places: Float[Tensor, "points 2"]) -> Float[Tensor, " points"]:
        """The loss between the grid's points, as a surface is drawn; NaN beyond them.

        What lies on a surface must lie on the one that is seen, with edges at the grid's points.
        """
        found = torch.full((len(places),), torch.nan, dtype=torch.float64)
        first, second = self.coordinates
        for index, place in enumerate(places):
            a, b = place
            if not (first[0] <= a <= first[-1] and second[0] <= b <= second[-1]):
                continue
            i = int(torch.searchsorted(first, a, right=True).clamp(1, len(first) - 1)) - 1
            j = int(torch.searchsorted(second, b, right=True).clamp(1, len(second) - 1)) - 1
            u = (a - first[i]) / (first[i + 1] - first[i])
            v = (b - second[j]) / (second[j + 1] - second[j])
            corners = self.losses[i : i + 2, j : j + 2]
            weights = torch.outer(torch.stack([1 - u, u]), torch.stack([1 - v, v]))
            # A corner that does not count may be infinite.
            found[index] = torch.where(weights > 0, weights * corners, 0.0).sum()
        return found

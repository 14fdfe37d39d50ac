"""The loss on a grid, and what a person may do with it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowland.display import DataFrame, frame
from lowland.landscape.figure import draw
from lowland.landscape.losses import GridLosses
from lowland.landscape.page import page
from lowland.landscape.scales import Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:  # optional; annotations are looked at in the tests
    Axes = Any


@dataclass(frozen=True, eq=False)
class LossSurface(GridLosses):
    r"""The loss on a grid around a model's parameters; from :func:`lowland.surface`.

    .. math:: L_{ij} = L(\theta + a_i d_1 + b_j d_2)

    Attributes:
        losses: Shape ``(points,)`` along one direction, ``(points_1, points_2)`` on a plane,
            float64 on the CPU. NaN or infinite where the network's outputs or its loss are.
        coordinates: ``a`` and ``b``, of each direction, shape ``(points,)``, float64; zero is the
            center, the parameters that the model had.
        directions: Tensors by the parameters' names in the model and of their shapes.
        labels: What each direction is.
        kind: ``"random"``, ``"eigenvectors"``, ``"path"`` or ``"given"``.
        center_loss: ``L(theta)``, in the same way as all others.
        own_loss: That of the model as it is. It is another one than ``center_loss`` where the
            statistics of batch normalization are computed anew.
        statistics: Which statistics batch normalization used: ``"running"``, those of the center;
            ``"recomputed"``, at each point its own; ``"none"``, there are none.
        path: Where training went, None unless it was asked for.
        dim: ``P``, the number of trainable parameters.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model, x, y = nn.Linear(3, 1), torch.randn(20, 3), torch.randn(20, 1)
        >>> surface = lowland.surface(model, nn.MSELoss(), (x, y), points=(5, 3))
        >>> surface.losses.shape, surface.to_frame().columns.tolist()
        (torch.Size([5, 3]), ['direction_1', 'direction_2', 'loss'])
        >>> bool(surface.losses[2, 1] == surface.center_loss)
        True
    """

    def to_frame(self) -> DataFrame:
        """A row for each point: ``direction_1`` and, on a plane, ``direction_2``; ``loss``.

        Raises:
            ImportError: Without pandas, ``pip install 'lowland[cli]'``.
        """
        places = torch.meshgrid(*self.coordinates, indexing="ij")
        columns = {f"direction_{i + 1}": place.reshape(-1) for i, place in enumerate(places)}
        columns["loss"] = self.losses.reshape(-1)
        return frame({name: column.numpy() for name, column in columns.items()})

    def plot(
        self,
        kind: Literal["contour", "surface"] = "contour",
        *,
        scale: Scale = "auto",
        ax: Axes | None = None,
    ) -> Axes:
        """The picture of it: along one direction a curve, on a plane one of two.

        Args:
            kind: ``"contour"`` for lines of equal loss with their values, ``"surface"`` for a view
                in three dimensions. Of a curve there is one picture.
            scale: Of the loss. ``"auto"`` is logarithmic where all finite losses are positive and
                the largest is 100 times the smallest or more, else linear.
            ax: Where to draw, with ``projection="3d"`` for ``"surface"``; by default on a figure of
                its own, where the caption stands below.

        Returns:
            The axes, whose ``figure`` can be saved.

        Raises:
            ImportError: Without matplotlib, ``pip install 'lowland[cli]'``.
            ValueError: If ``kind`` or ``scale`` is unknown, the scale is logarithmic and a loss is
                not positive, no loss is finite, or ``ax`` has not three dimensions.
        """
        return draw(self, kind, scale, ax)

    def html(self, *, scale: Scale = "auto", title: str = "Loss surface") -> str:
        """A page with the surface to turn: one file, which needs no other and no network.

        Args:
            scale: As for :meth:`plot`, to begin with; the page has a switch.
            title: Of the page.

        Raises:
            ValueError: Along one direction, where there is no surface; else as :meth:`plot`.
        """
        return page(self, scale, title)

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        scale: Scale = "auto",
        title: str = "Loss surface",
    ) -> None:
        """Write :meth:`html` to a file, in UTF-8.

        Raises:
            ValueError: As :meth:`html`.
        """
        Path(path).write_text(self.html(scale=scale, title=title), encoding="utf-8")

"""What is known about a spectrum, and what a person may do with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowland.display import DataFrame, frame
from lowland.matrices import SYMBOLS, Matrix
from lowland.spectra.figure import draw
from lowland.spectra.solve import Density
from lowland.spectra.surface import NamedVector, Surface

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:  # optional; annotations are looked at in the tests
    Axes = Any


@dataclass(frozen=True, eq=False)
class Spectrum:
    r"""Eigenvalues of the Hessian of a trained model's loss; from :func:`lowland.spectrum`.

    Attributes:
        dim: ``P``, the number of trainable parameters.
        eigenvalues: Descending, shape ``(k,)``, float64 on the CPU. Its unit is that of the loss
            over that of a parameter squared; of the loss where the spectrum is adaptive.
        residuals: ``|H v - lambda v|`` of each, shape ``(k,)``: within that distance of an
            eigenvalue given here there is one of ``H``.
        ranks: Which eigenvalue of all each is, shape ``(k,)``: 1 is the largest, ``P`` the
            smallest.
        tolerance: What the residuals are held to. For ``"lanczos"`` the argument of that name
            times the spectrum's largest magnitude; for ``"dense"`` rounding.
        eigenvectors: One for each eigenvalue: tensors by the parameters' names in the model and of
            their shapes, of length 1 together, and without a sign of their own. Where the spectrum
            is adaptive, the step ``|theta| v`` in the parameters, with ``v`` of length 1.
        trace: ``Tr H``.
        trace_stderr: Its standard error; zero where the trace is exact.
        density: The density of all eigenvalues, None unless it was asked for.
        method: ``"dense"`` or ``"lanczos"``, with ``", differences"`` behind it where PyTorch's
            second derivatives are missing or wrong.
        surface: The loss around the parameters that the model had then.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model, x, y = nn.Linear(3, 1), torch.randn(50, 3), torch.randn(50)
        >>> spectrum = lowland.spectrum(model, nn.MSELoss(), (x, y), k=2)
        >>> spectrum.to_frame().columns.tolist()
        ['rank', 'eigenvalue', 'residual']
        >>> spectrum.along(0, [-0.1, 0.0, 0.1]).shape  # the loss along the first eigenvector
        torch.Size([3])
    """

    dim: int
    eigenvalues: Float[Tensor, " k"]
    residuals: Float[Tensor, " k"]
    ranks: Int[Tensor, " k"]
    tolerance: float
    eigenvectors: list[NamedVector] = field(repr=False)
    trace: float
    trace_stderr: float
    density: Density | None = field(repr=False)
    method: str
    surface: Surface = field(repr=False)

    @property
    def adaptive(self) -> bool:
        """Whether it is the spectrum of ``D H D`` with ``D = diag(|theta|)``."""
        return self.surface.adaptive

    @property
    def matrix(self) -> Matrix:
        """Which matrix it is the spectrum of (:mod:`lowland.matrices`)."""
        return self.surface.objective.matrix

    def along(
        self,
        direction: int | Mapping[str, Tensor],
        distances: Sequence[float] | Float[Tensor, " distances"],
    ) -> Float[Tensor, " distances"]:
        r"""The loss along a line, ``L(theta + alpha v)``; the model is not changed.

        ``theta`` are the parameters that the model had when its spectrum was measured, whatever
        happened to it since; the data is gone through once for each distance.

        Args:
            direction: ``v``: the index of an eigenvector here, or a tensor for some of the model's
                parameters, by their names and of their shapes, of any length.
            distances: ``alpha``; along an eigenvector, the length of the step.

        Returns:
            The loss at each distance, float64 on the CPU. Along an eigenvector it is
            :math:`L(\theta) + \alpha v^T \nabla L + \frac12 \lambda \alpha^2` to second order.

        Raises:
            IndexError: If there is no such eigenvector.
            ValueError: If a name or a shape is not the model's, or the model is in training mode
                and behaves otherwise there.

        References:
            arXiv:2606.28662, figures 11 and 13.
        """
        parts = self._direction(direction)
        base = self.surface.state
        losses = [
            self.surface.loss({name: base[name] + float(d) * part for name, part in parts.items()})
            for d in distances
        ]
        return torch.tensor(losses, dtype=torch.float64)

    def to_frame(self) -> DataFrame:
        """A row for each eigenvalue: ``rank`` (1 is the largest), ``eigenvalue``, ``residual``.

        Raises:
            ImportError: Without pandas, ``pip install 'lowland[cli]'``.
        """
        return frame(
            {
                "rank": self.ranks.numpy(),
                "eigenvalue": self.eigenvalues.numpy(),
                "residual": self.residuals.numpy(),
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The density with its standard error if it is known, and the eigenvalues.

        Args:
            ax: Where to draw; by default on a figure of its own.

        Returns:
            The axes, whose ``figure`` can be saved.

        Raises:
            ImportError: Without matplotlib, ``pip install 'lowland[cli]'``.
        """
        error = "" if self.method.startswith("dense") else f" ± {self.trace_stderr:.2g}"
        matrix = SYMBOLS[self.matrix]
        if self.adaptive:
            matrix = rf"|\theta|\,{matrix}\,|\theta|"
        trace = rf"$\mathrm{{Tr}}\,{matrix}$ = {self.trace:.4g}{error}"
        return draw(
            self.eigenvalues,
            self.ranks,
            self.density,
            ax,
            dim=self.dim,
            title=f"{self.dim:,} parameters,  {trace}",
        )

    def _direction(self, direction: int | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if isinstance(direction, int):
            count = len(self.eigenvectors)
            if not -count <= direction < count:
                raise IndexError(
                    f"expected the index of one of {count} eigenvectors, from 0 (of the largest "
                    f"eigenvalue here) to {count - 1}; got {direction}"
                )
            return self.eigenvectors[direction]
        state = self.surface.state
        for name, part in direction.items():
            if name not in state:
                raise ValueError(
                    f"a direction has a tensor for each of some parameters of the model; got one "
                    f"for {name!r}, and the model has {', '.join(self.surface.names)}"
                )
            if part.shape != state[name].shape:
                raise ValueError(
                    f"the direction's tensor for {name!r} must have the parameter's shape "
                    f"{tuple(state[name].shape)}; got {tuple(part.shape)}"
                )
        return direction

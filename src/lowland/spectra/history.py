"""The largest eigenvalues over training, and what a person may do with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowland.display import DataFrame, frame, number, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:  # optional; annotations are looked at in the tests
    Axes = Any

_BLUE, _INK = "#0072b2", "#4d4d4d"
_LEGEND = 6  # ranks that are named beside their lines


@dataclass(frozen=True, eq=False)
class EigenvalueHistory:
    r"""Eigenvalues of the Hessian over training; from :func:`lowland.eigenvalues_over`.

    Attributes:
        eigenvalues: The largest ones, descending, shape ``(checkpoints, k)``, float64 on the CPU.
            NaN where parameters or loss are not finite.
        residuals: ``|H v - lambda v|`` of each, of the same shape: within that distance of an
            eigenvalue given here there is one of ``H``.
        losses: At each checkpoint, shape ``(checkpoints,)``.
        products: With the Hessian, at each checkpoint, shape ``(checkpoints,)``.
        steps: Where in training each checkpoint was, shape ``(checkpoints,)``.
        tolerance: To what fraction of the largest magnitude met residuals are held.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model, x, y = nn.Linear(3, 1), torch.randn(50, 3), torch.randn(50, 1)
        >>> states = [{n: c * p for n, p in model.state_dict().items()} for c in (1, 2)]
        >>> history = lowland.eigenvalues_over(model, nn.MSELoss(), (x, y), states)
        >>> history.to_frame().columns.tolist()
        ['step', 'rank', 'eigenvalue', 'residual', 'loss', 'products']
    """

    eigenvalues: Float[Tensor, "checkpoints k"]
    residuals: Float[Tensor, "checkpoints k"]
    losses: Float[Tensor, " checkpoints"]
    products: Int[Tensor, " checkpoints"]
    steps: Float[Tensor, " checkpoints"]
    tolerance: float

    def to_frame(self) -> DataFrame:
        """A row for each eigenvalue of each checkpoint; rank 1 is the largest.

        Raises:
            ImportError: Without pandas, ``pip install 'lowland[cli]'``.
        """
        checkpoints, k = self.eigenvalues.shape
        each = {"loss": self.losses, "products": self.products}
        return frame(
            {
                "step": self.steps.repeat_interleave(k).numpy(),
                "rank": torch.arange(1, k + 1).repeat(checkpoints).numpy(),
                "eigenvalue": self.eigenvalues.reshape(-1).numpy(),
                "residual": self.residuals.reshape(-1).numpy(),
                **{name: values.repeat_interleave(k).numpy() for name, values in each.items()},
            }
        )

    def plot(
        self,
        *,
        learning_rate: float | Sequence[float] | None = None,
        momentum: float = 0.0,
        ax: Axes | None = None,
    ) -> Axes:
        r"""The eigenvalues over training, and where gradient descent becomes unstable.

        Args:
            learning_rate: :math:`\eta`, one number or one for each checkpoint. A line shows
                :math:`2 (1 + \beta) / \eta`: on a quadratic, gradient descent diverges along
                eigenvectors of larger eigenvalues. Of full batches; small ones stay below it.
            momentum: :math:`\beta`, of the heavy ball (``torch.optim.SGD`` without ``nesterov``).
            ax: Where to draw; by default on a figure of its own.

        Returns:
            The axes, whose ``figure`` can be saved.

        Raises:
            ImportError: Without matplotlib, ``pip install 'lowland[cli]'``.
            ValueError: If a learning rate is not positive, there are not as many as checkpoints, or
                the momentum is not between 0 and 1.

        References:
            J. Cohen, S. Kaur, Y. Li, J. Z. Kolter and A. Talwalkar, Gradient descent on neural
            networks typically occurs at the edge of stability, ICLR 2021 (arXiv:2103.00065).
        """
        edge = None if learning_rate is None else self._edge(learning_rate, momentum)
        steps = self.steps.numpy()
        with styled():
            from matplotlib import pyplot as plt  # noqa: PLC0415 - optional

            if ax is None:
                _, ax = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
            k = self.eigenvalues.shape[1]
            for rank, values in enumerate(self.eigenvalues.T.numpy()):
                ax.plot(
                    steps,
                    values,
                    ".-",
                    color=_BLUE,
                    alpha=1 - 0.8 * rank / k,
                    linewidth=1.6,
                    label=rf"$\lambda_{{{rank + 1}}}$" if rank < _LEGEND else None,
                )
            if edge is not None:
                over = r"2\,/\,\eta" if momentum == 0 else rf"2 (1 + {momentum:g})\,/\,\eta"
                value = f" = {number(float(edge[0]))}" if len(set(edge.tolist())) == 1 else ""
                # From edge to edge if it is one number, also of a single checkpoint.
                line = (steps, edge) if value == "" else ([0, 1], edge[[0, 0]])
                transform = ax.transData if value == "" else ax.get_yaxis_transform()
                ax.plot(
                    *line, color=_INK, linestyle="--", label=f"${over}${value}", transform=transform
                )
            missing = np.isnan(self.eigenvalues[:, 0].numpy())
            if missing.any():
                ax.plot(
                    steps[missing],
                    np.zeros(missing.sum()),
                    "x",
                    color="#d55e00",
                    transform=ax.get_xaxis_transform(),
                    clip_on=False,
                    label="no finite loss",
                )
            ax.set_xlabel("step of training")
            ax.set_ylabel(r"eigenvalue  $\lambda$")
            ax.legend(loc="best")
        return ax

    def _edge(self, learning_rate: float | Sequence[float], momentum: float) -> Any:
        rates = np.atleast_1d(np.asarray(learning_rate, dtype=float))
        if len(rates) not in (1, len(self.steps)):
            raise ValueError(
                f"learning_rate must be one number or one for each of {len(self.steps)} "
                f"checkpoints; got {len(rates)}"
            )
        if not (rates > 0).all():
            raise ValueError(f"learning_rate must be positive; got {learning_rate}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be from 0 to below 1; got {momentum}")
        return np.broadcast_to(2 * (1 + momentum) / rates, (len(self.steps),))

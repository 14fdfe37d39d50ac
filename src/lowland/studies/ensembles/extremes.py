"""The two ends of the Hessian's spectrum, for ensembles of trained networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lowland._lanczos import Array, eigsh
from lowland._limits import DENSE_LIMIT
from lowland.exact import hessian
from lowland.objective import objective
from lowland.products import gradient_graph, product
from lowland.studies.ensembles.networks import (
    Inputs,
    PerNetwork,
    Targets,
    Weights,
    logits,
    mean_loss_of,
    one_by_one,
)
from lowland.threads import threads

_SMALL = 300  # parameters
_TOLERANCE = 1e-9  # of the Lanczos iteration


def extreme_eigenvalues(
    weights: Weights, x: Inputs, y: Targets, *, activation: str, loss: str
) -> tuple[PerNetwork, PerNetwork]:
    """The smallest and the largest eigenvalue of each network's Hessian of the mean loss.

    Args:
        weights: One tensor a layer, ``(networks, inputs + 1, outputs)``, biases in row 0.
        x: ``(networks, samples, inputs)``.
        y: ``(networks, samples)``, or ``(networks, samples, outputs)`` for one target an output.
        activation: A name that :func:`lowland.exact.moments` knows.
        loss: ``"bce"``, ``"ce"`` or ``"mse"``.

    Returns:
        ``(smallest, largest)``, each of shape ``(networks,)``; NaN where a Hessian of up to
        ``DENSE_LIMIT`` parameters has overflowed.

    Notes:
        Up to ``DENSE_LIMIT`` parameters these are eigenvalues of the whole matrix, to rounding.
        Beyond it the matrix would no longer fit into memory for an ensemble, and implicitly
        restarted Lanczos converges both ends to a relative 1e-9 of the spectrum's largest
        magnitude.
    """
    dim = sum(layer[0].numel() for layer in weights)
    parts = []
    for part, own_x, own_y in one_by_one(weights, x, y):
        if dim <= DENSE_LIMIT:
            # The decomposition of a small matrix only loses by a second thread.
            with threads(torch.get_num_threads() if dim > _SMALL else 1):
                matrix = hessian(part, own_x, own_y, activation=activation, loss=loss)
                if bool(matrix.isfinite().all()):
                    parts.append(torch.linalg.eigvalsh(matrix)[:, [0, -1]])
                else:
                    parts.append(x.new_full((1, 2), torch.nan))
        else:
            parts.append(x.new_tensor([_lanczos(part, own_x, own_y, activation, loss)]))
    smallest, largest = torch.cat(parts).unbind(1)
    return smallest, largest


def _lanczos(
    weights: Weights, x: Inputs, y: Targets, activation: str, loss: str
) -> tuple[float, float]:
    """Both ends of one network's spectrum, from Hessian-vector products alone."""
    target = objective(_Network(weights, activation), partial(_loss, loss=loss), x, y)

    with gradient_graph(target) as gradient:

        def image(vector: Array) -> Array:
            sizes = [p.numel() for p in target.parameters]
            parts = torch.as_tensor(vector, dtype=x.dtype, device=x.device).split(sizes)
            direction = [part.view_as(p) for part, p in zip(parts, target.parameters, strict=True)]
            found = product(target, gradient, direction, wanted=False)
            flat: Array = torch.cat([part.flatten() for part in found]).cpu().numpy()
            return flat

        # The far end of a spectrum is the largest in magnitude, after a shift by the near end.
        # Asked for directly, an end close to zero would converge slowly and relative to itself.
        near = _largest(image, target.dim)
        far = near + _largest(image, target.dim, shift=-near)
    return min(near, far), max(near, far)


def _largest(image: Callable[[Array], Array], dim: int, shift: float = 0.0) -> float:
    """The eigenvalue of largest magnitude."""
    (value,) = eigsh(
        image, dim, seed=0, shift=shift, k=1, which="LM", tol=_TOLERANCE, return_eigenvectors=False
    )
    return float(value)


class _Network(nn.Module):
    """One network of an ensemble, as a module with the ensemble's own tensors."""

    def __init__(self, weights: Weights, activation: str) -> None:
        super().__init__()
        self.layers = nn.ParameterList(layer.detach() for layer in weights)
        self.activation = activation

    def forward(self, x: Inputs) -> Tensor:
        return logits(tuple(self.layers), x, self.activation)


def _loss(s: Tensor, y: Targets, *, loss: str) -> Tensor:
    return mean_loss_of(s, y, loss).sum()

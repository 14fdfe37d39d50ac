"""The two ends of the Hessian's spectrum, for ensembles of trained networks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd import grad

from lowland.exact import hessian
from lowland.studies.ensembles.networks import (
    Inputs,
    PerNetwork,
    Targets,
    Weights,
    mean_loss,
    one_by_one,
)
from lowland.threads import threads

DENSE_LIMIT = 2000
"""Up to this many parameters the whole matrix is built: 32 MB and a second or two per network."""

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
        ``(smallest, largest)``, each of shape ``(networks,)``.

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
                parts.append(torch.linalg.eigvalsh(matrix)[:, [0, -1]])
        else:
            parts.append(x.new_tensor([_lanczos(part, own_x, own_y, activation, loss)]))
    smallest, largest = torch.cat(parts).unbind(1)
    return smallest, largest


def _lanczos(
    weights: Weights, x: Inputs, y: Targets, activation: str, loss: str
) -> tuple[float, float]:
    """Both ends of one network's spectrum, from Hessian-vector products alone."""
    from scipy.sparse.linalg import LinearOperator, eigsh  # noqa: PLC0415 - slow, rarely needed

    leaves = tuple(layer.detach().requires_grad_() for layer in weights)
    value = mean_loss(leaves, x, y, activation=activation, loss=loss).sum()
    gradient = torch.cat([part.flatten() for part in grad(value, leaves, create_graph=True)])
    dim = len(gradient)

    def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        direction = torch.as_tensor(vector.ravel(), dtype=x.dtype, device=x.device)
        parts = grad(gradient, leaves, direction, retain_graph=True)
        flat: NDArray[np.float64] = torch.cat([p.flatten() for p in parts]).cpu().numpy()
        return flat

    def end(matvec: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> float:
        operator = LinearOperator((dim, dim), matvec=matvec, dtype=np.dtype(np.float64))
        start = np.random.default_rng(0).standard_normal(dim)
        values = eigsh(
            operator, k=1, which="LM", v0=start, tol=_TOLERANCE, return_eigenvectors=False
        )
        return float(values[0])

    # The far end of a spectrum is the largest in magnitude, after a shift by the near end. Asked
    # for directly, an end close to zero would converge slowly and relative to itself.
    near = end(product)
    far = near + end(lambda vector: product(vector) - near * vector.ravel())
    return min(near, far), max(near, far)

"""Eigenvalues, trace and density from products with a Hessian."""

from __future__ import annotations

import inspect
import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lowland.spectra.surface import seeded

Which = Literal["LA", "SA", "both"]

_COLUMNS = 16  # multiplied together: many gain nothing more, and each takes a batch's memory
_FIRST = 8  # vectors of the first, rough look at a spectrum
_KEPT = {"LA": 20, "SA": 60}  # vectors: the smallest crowd at zero, where few of them stagnate
_GRID = 1024
_WIDTH = 0.01  # of the kernel of a density, as a fraction of the spectrum's range


@dataclass(frozen=True)
class Pairs:
    """Some eigenvalues, descending, in float64 on the CPU, and what belongs to each."""

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "parameters k"]
    ranks: Int[Tensor, " k"]
    residuals: Float[Tensor, " k"]
    tolerance: float


@dataclass(frozen=True)
class Density:
    r"""The spectral density, ``1 / P`` for each eigenvalue, seen through a Gaussian.

    .. math:: \rho(t) = \frac1P \sum_i N(t; \lambda_i, w^2)

    Attributes:
        grid: ``t``, eigenvalues to look at, shape ``(points,)``, ascending.
        mean: ``rho(t)``, shape ``(points,)``; its integral is 1.
        stderr: Its standard error over the probes, shape ``(points,)``; zero where it is exact.
        width: ``w``, the Gaussian's standard deviation.
    """

    grid: Float[Tensor, " points"]
    mean: Float[Tensor, " points"]
    stderr: Float[Tensor, " points"]
    width: float


def product(operator: Any, vectors: Tensor) -> Tensor:
    """``H V``.

    Raises:
        ValueError: If it has NaN or infinite values.
    """
    result: Tensor = operator @ vectors
    if not bool(torch.isfinite(result).all()):
        raise ValueError(
            "a product with the Hessian has NaN or infinite values, though the loss is finite: the "
            "second derivative does not exist here (as of sqrt or a norm at zero), or overflows in "
            f"{str(operator.dtype).removeprefix('torch.')}; use model.double() or a smooth form"
        )
    return result


def check_products(operator: Any, seed: int) -> None:
    """Look at two products before there are many.

    Raises:
        RuntimeError: If PyTorch cannot differentiate the model or the criterion twice, or comes to
            a matrix that is not symmetric.
        ValueError: As :func:`product`.
    """
    u, v = (_on(operator, _start(operator, seed + i)) for i in range(2))
    try:
        hu, hv = product(operator, u), product(operator, v)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # NotImplementedError is one
        raise RuntimeError(
            "PyTorch cannot differentiate this model and criterion twice, which a Hessian takes: "
            f"{str(error).strip().splitlines()[0]}\nUse layers and a criterion with second "
            "derivatives; a torch.autograd.Function of your own needs setup_context, a jvp, and a "
            "backward that can be differentiated"
        ) from error
    one, other = float(u @ hv), float(v @ hu)
    room = 10 * math.sqrt(torch.finfo(operator.dtype).eps)
    if abs(one - other) > room * float(torch.linalg.vector_norm(hu) + torch.linalg.vector_norm(hv)):
        raise RuntimeError(
            f"products with the Hessian are not symmetric: u'Hv = {one:.6g} and v'Hu = {other:.6g} "
            "for random u and v, so a layer's or the criterion's derivatives are wrong: those of a "
            "torch.autograd.Function of your own, or PyTorch's; write that layer out in plain "
            "operations"
        )


def dense_pairs(operator: Any) -> Pairs:
    """All eigenvalues, by forming the matrix."""
    dim = operator.shape[0]
    columns = [
        product(operator, part.to(operator.device))
        for part in torch.eye(dim, dtype=operator.dtype).split(_COLUMNS, dim=1)
    ]
    matrix = torch.cat(columns, dim=1).double().cpu()
    matrix = (matrix + matrix.T) / 2
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0), vectors.flip(1)
    residuals = torch.linalg.vector_norm(matrix @ vectors - vectors * values, dim=0)
    rounding = dim * torch.finfo(operator.dtype).eps * float(values.abs().max())
    ranks = torch.arange(1, dim + 1)
    return Pairs(values, vectors, ranks, residuals, rounding)


def choose(pairs: Pairs, k: int, which: Which) -> Pairs:
    """The ``k`` largest, the ``k`` smallest, or both, of all pairs."""
    dim = len(pairs.values)
    top = k if which != "SA" else 0
    bottom = min(k, dim - top) if which != "LA" else 0
    index = torch.cat([torch.arange(top), torch.arange(dim - bottom, dim)])
    return Pairs(
        pairs.values[index],
        pairs.vectors[:, index],
        pairs.ranks[index],
        pairs.residuals[index],
        pairs.tolerance,
    )


def lanczos_pairs(
    operator: Any, k: int, which: Which, *, tolerance: float, restarts: int, seed: int
) -> Pairs:
    """Eigenvalues at the ends of the spectrum, by SciPy's implicitly restarted Lanczos.

    Raises:
        RuntimeError: If they do not converge.
    """
    dim = operator.shape[0]
    ends = ("LA", "SA") if which == "both" else (which,)
    ranks = {"LA": torch.arange(1, k + 1), "SA": torch.arange(dim - k + 1, dim + 1)}
    scale = _scale(operator, seed)
    if scale == 0:  # every vector is an eigenvector, which ARPACK takes for an error
        count = k * len(ends)
        return Pairs(
            torch.zeros(count, dtype=torch.float64),
            torch.eye(dim, count, dtype=torch.float64),
            torch.cat([ranks[end] for end in ends]),
            torch.zeros(count, dtype=torch.float64),
            0.0,
        )
    found = [
        _one_end(operator, k, end, scale, tolerance=tolerance, restarts=restarts, seed=seed)
        for end in ends
    ]
    values = torch.cat([part for part, _ in found])
    vectors = torch.cat([part for _, part in found], dim=1)
    residuals = torch.stack(
        [_residual(operator, values[i], vectors[:, i]) for i in range(len(values))]
    )
    pairs = Pairs(
        values, vectors, torch.cat([ranks[end] for end in ends]), residuals, tolerance * scale
    )
    if bool((residuals > pairs.tolerance).any()):
        warnings.warn(
            f"residual norms reach {float(residuals.max()):.2g}, beyond the tolerance of "
            f"{tolerance:g} * {scale:.3g}, since products in "
            f"{str(operator.dtype).removeprefix('torch.')} are no more exact: use model.double() "
            "or a larger tolerance",
            RuntimeWarning,
            stacklevel=3,
        )
    return pairs


def trace_of(operator: Any, known: Pairs, *, probes: int, seed: int) -> tuple[float, float]:
    r"""``Tr H`` and its standard error, by Hutchinson's estimator beside known eigenvectors.

    .. math:: \mathrm{Tr} H = \sum_i \lambda_i + \mathrm{Tr} \, (I - V V^T) H (I - V V^T)

    The first term, often most of it, is known, and the second one's estimate varies less.
    """
    from curvlinops import hutchinson_trace  # noqa: PLC0415 - optional

    rest = _Rest(operator, known.vectors)
    with seeded(operator.device, seed):
        found = torch.stack([hutchinson_trace(rest, 1).double().cpu() for _ in range(probes)])
    trace = float(known.values.sum() + found.mean())
    return trace, float(found.std() / math.sqrt(probes))


class _Rest:
    """``(I - V V^T) H (I - V V^T)``, with as much of an operator as an estimate of its trace takes.

    Args:
        operator: ``H``.
        vectors: ``V``, orthonormal to within the tolerance of what found them.
    """

    def __init__(self, operator: Any, vectors: Float[Tensor, "parameters k"]) -> None:
        self.operator = operator
        self.shape, self.device, self.dtype = operator.shape, operator.device, operator.dtype
        self.basis = torch.linalg.qr(vectors)[0].to(operator.device, operator.dtype)

    def __matmul__(self, vectors: Float[Tensor, "parameters n"]) -> Float[Tensor, "parameters n"]:
        return self._outside(product(self.operator, self._outside(vectors)))

    def _outside(self, vectors: Float[Tensor, "parameters n"]) -> Float[Tensor, "parameters n"]:
        inside: Tensor = self.basis @ (self.basis.T @ vectors)
        return vectors - inside


def density_of(operator: Any, *, probes: int, steps: int, seed: int) -> Density:
    """The density by Lanczos quadrature from independent random vectors.

    Raises:
        ValueError: If there are fewer distinct eigenvalues than steps.
    """
    from curvlinops.papyan2020traces.spectrum import fast_lanczos  # noqa: PLC0415 - optional

    if not bool(product(operator, _on(operator, _start(operator, seed))).any()):
        zero = torch.zeros(1, dtype=torch.float64)
        return smooth([(zero, zero + 1)])
    steps = min(steps, operator.shape[0])
    try:
        with seeded(operator.device, seed):
            runs = [fast_lanczos(operator, steps) for _ in range(probes)]
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        # A vector that was left of no length was divided by it.
        raise ValueError(
            "the Lanczos quadrature of the density broke down, since the Hessian has few distinct "
            f"eigenvalues; use density_steps of fewer than {steps}"
        ) from error
    return smooth([(n.double().cpu(), v[0].double().cpu().square()) for n, v in runs])


def smooth(rules: list[tuple[Tensor, Tensor]]) -> Density:
    """A density from nodes and their weights, one rule for each probe; exact if there is one."""
    nodes = torch.cat([part for part, _ in rules])
    low, high = float(nodes.min()), float(nodes.max())
    width = _WIDTH * ((high - low) or abs(high) or 1.0)
    grid = torch.linspace(low - 5 * width, high + 5 * width, _GRID, dtype=torch.float64)
    norm = width * math.sqrt(2 * math.pi)
    curves = torch.stack(
        [
            torch.exp(-((grid[:, None] - part) ** 2) / (2 * width**2)) @ weights / norm
            for part, weights in rules
        ]
    )
    if len(rules) == 1:
        return Density(grid, curves[0], torch.zeros_like(grid), width)
    return Density(grid, curves.mean(0), curves.std(0) / math.sqrt(len(rules)), width)


def _start(operator: Any, seed: int) -> NDArray[np.float64]:
    dim: int = operator.shape[0]
    return np.random.default_rng(seed).standard_normal(dim)


def _on(operator: Any, vector: NDArray[np.float64]) -> Tensor:
    return torch.as_tensor(vector, dtype=operator.dtype, device=operator.device)


def _eigsh(operator: Any, shift: float, seed: int, **settings: Any) -> Any:
    from scipy.sparse.linalg import LinearOperator, eigsh  # noqa: PLC0415 - optional

    def shifted(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        flat = _on(operator, vector.ravel())
        image: NDArray[np.float64] = product(operator, flat).double().cpu().numpy()
        image += shift * vector.ravel()
        return image

    if "rng" in inspect.signature(eigsh).parameters:  # SciPy 1.17 or newer, else it draws nothing
        settings["rng"] = np.random.default_rng(seed)
    linear = LinearOperator(operator.shape, matvec=shifted, dtype=np.dtype(np.float64))
    return eigsh(linear, v0=_start(operator, seed), **settings)


def _scale(operator: Any, seed: int) -> float:
    """The largest magnitude of an eigenvalue, to within a few percent, never too large."""
    if not bool(product(operator, _on(operator, _start(operator, seed))).any()):
        return 0.0
    (value,) = _eigsh(
        operator, 0.0, seed, k=1, which="LM", ncv=_FIRST, tol=0.1, return_eigenvectors=False
    )
    return abs(float(value))


def _one_end(
    operator: Any,
    k: int,
    end: str,
    scale: float,
    *,
    tolerance: float,
    restarts: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """``k`` eigenvalues, descending, and their vectors."""
    from scipy.sparse.linalg import ArpackError, ArpackNoConvergence  # noqa: PLC0415 - optional

    # ARPACK stops when a residual is small beside its own eigenvalue, which those close to zero
    # hardly ever are; after the shift all that are asked for are about as large as the largest.
    shift = scale if end == "LA" else -scale
    try:
        values, vectors = _eigsh(
            operator,
            shift,
            seed,
            k=k,
            which=end,
            ncv=min(operator.shape[0], max(2 * k + 1, _KEPT[end])),
            tol=tolerance / 3,
            maxiter=restarts,
        )
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"{len(error.eigenvalues)} of {k} eigenvalues ({end!r}) converged to the tolerance "
            f"{tolerance:g} within {restarts} restarts; ask for fewer, or use a larger tolerance "
            "or more restarts"
        ) from error
    except ArpackError as error:
        raise RuntimeError(f"SciPy's eigsh failed on this Hessian: {error}") from error
    order = np.argsort(values)[::-1].copy()
    return torch.as_tensor(values[order] - shift), torch.as_tensor(vectors[:, order])


def _residual(operator: Any, value: Tensor, vector: Tensor) -> Tensor:
    image = product(operator, vector.to(operator.device, operator.dtype)).double().cpu()
    norm: Tensor = torch.linalg.vector_norm(image - value * vector)
    return norm

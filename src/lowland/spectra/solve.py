"""Eigenvalues, trace and density from products with a Hessian."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowland.probes import rademacher

Which = Literal["LA", "SA", "both"]

_COLUMNS = 256  # multiplied after one forward pass; each takes a vector's memory, twice
_CHUNK = 2**16  # entries that are taken to double precision at a time
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
class Space:
    """A space in which a matrix is known.

    Attributes:
        basis: Orthonormal, in rows; of the operator's type and on its device.
        trace: ``Tr Q^T H Q``.
    """

    basis: Float[Tensor, "m parameters"]
    trace: float


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


def inner(
    basis: Float[Tensor, "m parameters"], vector: Float[Tensor, " parameters"]
) -> Float[Tensor, " m"]:
    """Inner products in double precision: long sums in single precision lose four digits."""
    parts = zip(basis.split(_CHUNK, dim=1), vector.split(_CHUNK), strict=True)
    total = torch.zeros(len(basis), dtype=torch.float64, device=basis.device)
    for rows, part in parts:
        total += rows.double() @ part.double()
    return total


def check_products(operator: Any, seed: int) -> None:
    """Look at two products before there are many.

    Raises:
        RuntimeError: If PyTorch cannot differentiate the model or the criterion twice, or comes to
            a matrix that is not symmetric.
        ValueError: As :func:`product`.
    """
    u, v = (random_start(operator, seed + i) for i in range(2))
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
    size = float(torch.linalg.vector_norm(hu) + torch.linalg.vector_norm(hv))
    # Rounding in single precision alone leaves some percent where a network has converged.
    if abs(one - other) > max(room * size, 0.05 * max(abs(one), abs(other))):
        raise asymmetry(one, other)


def asymmetry(one: float, other: float) -> RuntimeError:
    """What to say of two products that contradict each other."""
    return RuntimeError(
        f"products with the Hessian are not symmetric: u'Hv = {one:.6g} and v'Hu = {other:.6g}, so "
        "a layer's or the criterion's derivatives are wrong: those of a torch.autograd.Function of "
        "your own, or PyTorch's; write that layer out in plain operations"
    )


def random_start(operator: Any, seed: int) -> Tensor:
    """Random numbers to begin with, the same for the same seed."""
    vector = np.random.default_rng(seed).standard_normal(operator.shape[0])
    return torch.as_tensor(vector, dtype=operator.dtype, device=operator.device)


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


def ends_of(pairs: Pairs, k: int, which: Which) -> Pairs:
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


def trace_of(operator: Any, space: Space, *, probes: int, seed: int) -> tuple[float, float]:
    r"""``Tr H`` and its standard error, by Hutchinson's estimator beside a known part.

    .. math:: \mathrm{Tr} H = \mathrm{Tr} \, Q^T H Q
        + \mathrm{Tr} \, (I - Q Q^T) H (I - Q Q^T)

    The first term, often most of it, is known, and the second one's estimate varies less.
    """
    generator = torch.Generator().manual_seed(seed)
    like = torch.empty(operator.shape[0], dtype=operator.dtype, device=operator.device)
    found = torch.empty(probes, dtype=torch.float64)
    for index in range(probes):
        (signs,) = rademacher([like], generator)
        outside = signs - inner(space.basis, signs).to(signs) @ space.basis
        found[index] = inner(outside[None], product(operator, outside))
    return space.trace + float(found.mean()), float(found.std() / math.sqrt(probes))


def density_of(operator: Any, *, probes: int, steps: int, seed: int) -> Density:
    """The density by Lanczos quadrature from independent random vectors."""
    generator = torch.Generator().manual_seed(seed)
    steps = min(steps, operator.shape[0])
    rules = []
    for _ in range(probes):
        start = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64)
        rules.append(_quadrature(operator, start, steps))
    return smooth(rules)


def _quadrature(
    operator: Any, start: Float[Tensor, " parameters"], steps: int
) -> tuple[Tensor, Tensor]:
    r"""Nodes and weights of the measure that a unit vector ``v`` gives the eigenvalues.

    .. math:: \sum_i (u_i^T v)^2 f(\lambda_i) \approx \sum_k w_k f(t_k)

    The Lanczos iteration makes of ``H`` a tridiagonal matrix, whose eigenvalues are the nodes and
    whose eigenvectors' first entries, squared, the weights. Without orthogonalization against all
    vectors before, rounding would bring copies of the nodes that have converged.
    """
    basis = (start / start.norm()).to(operator.device, operator.dtype)[:, None]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = product(operator, basis[:, -1])
        diagonal.append(float(image @ basis[:, -1]))
        for _ in range(2):  # once leaves as much as rounding times the part that is taken away
            image = image - basis @ (basis.T @ image)
        length = float(image.norm())
        scale = max(map(abs, [*diagonal, *beside]))
        # What is left of nothing but rounding: the rule is exact with as many nodes as there are.
        if len(diagonal) == steps or length <= 10 * torch.finfo(operator.dtype).eps * scale:
            break
        beside.append(length)
        basis = torch.cat([basis, image[:, None] / length], dim=1)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    tridiagonal += torch.diag(torch.tensor(beside, dtype=torch.float64), -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)  # of which it reads the lower triangle
    return nodes, vectors[0].square()


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

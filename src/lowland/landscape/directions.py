"""Directions in the space of a model's parameters, and what they are called."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from lowland.display import number
from lowland.spectra import Spectrum
from lowland.spectra.surface import NamedVector, Surface

Kind = Literal["random", "eigenvectors", "path", "given"]

_NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

# Cosine of two directions from which on they lie on one line, to single precision.
_PARALLEL = 1 - 1e-6


@dataclass(frozen=True)
class Directions:
    """One or two directions.

    Attributes:
        vectors: A tensor for each trainable parameter, of its type and on its device.
        labels: What each is, for people.
        kind: Where they come from.
    """

    vectors: list[NamedVector]
    labels: list[str]
    kind: Kind


def random_directions(surface: Surface, count: int, *, seed: int, biases: bool) -> Directions:
    r"""Gaussian directions, each filter of which has the norm of the model's own filter.

    .. math:: d_f \gets \frac{\lVert \theta_f \rVert}{\lVert g_f \rVert} g_f, \qquad g \sim N(0, I)

    Within each filter the second Gaussian's share along the first one is taken off before it is
    scaled. Either direction is as random as before, and where filters have more than one weight
    the two are orthogonal.

    Raises:
        ValueError: If all of them are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors: list[NamedVector] = [{} for _ in range(count)]
    for name, own in surface.parameters.items():
        view = _filters_of(surface.objective.model, name, own, biases=biases)
        if view is None:
            for vector in vectors:
                vector[name] = torch.zeros_like(own)
            continue
        as_rows, as_before = view
        rows = as_rows(own.double().cpu())
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        first: Tensor | None = None
        for vector in vectors:
            drawn = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
            if first is not None and rows.shape[1] > 1:
                share = (drawn * first).sum(1, keepdim=True) / first.square().sum(1, keepdim=True)
                drawn = drawn - share * first
            first = drawn if first is None else first
            scaled = drawn * (lengths / torch.linalg.vector_norm(drawn, dim=1, keepdim=True))
            vector[name] = as_before(scaled).to(own.device, own.dtype)
    if not any(bool(part.any()) for part in vectors[0].values()):
        raise ValueError(
            "the model has no weight of two dimensions or more that is not zero, so a "
            "filter-normalized direction is zero: use biases=True, or directions of your own"
        )
    labels = [f"random direction {i + 1}, in norms of the filters" for i in range(count)]
    return Directions(vectors, labels, "random")


def eigenvectors_of(spectrum: Spectrum, surface: Surface, count: int | None) -> Directions:
    """The first eigenvectors of a spectrum, which belong to its largest eigenvalues.

    Raises:
        ValueError: If the spectrum has fewer, or was measured elsewhere.
    """
    found = len(spectrum.eigenvectors)
    count = min(2, found) if count is None else count
    if count > found:
        raise ValueError(
            f"the spectrum has {found} eigenvector, and a surface of two dimensions takes 2: "
            "measure it with k=2, or use dimensions=1"
        )
    there = spectrum.surface.parameters
    here = surface.parameters
    if there.keys() != here.keys() or not all(torch.equal(there[n], here[n]) for n in here):
        raise ValueError(
            "the spectrum is of other parameters than the model has now, so its eigenvectors are "
            "not those of the Hessian here: measure it again, or give spectrum.eigenvectors[:2] as "
            "directions of your own"
        )
    eigenvalues = spectrum.eigenvalues[:count].tolist()
    ranks = spectrum.ranks[:count].tolist()
    what = "adaptive eigenvector" if spectrum.adaptive else "eigenvector"
    labels = [
        f"{what} {rank}, λ = {number(value)}"
        for rank, value in zip(ranks, eigenvalues, strict=True)
    ]
    return Directions(spectrum.eigenvectors[:count], labels, "eigenvectors")


def given_directions(vectors: Sequence[Mapping[str, Tensor]], surface: Surface) -> Directions:
    """One or two vectors of the caller's own; zero for the parameters that they leave out.

    Raises:
        TypeError: If one is no mapping of tensors.
        ValueError: If a name or a shape is not that of a trainable parameter, a value is not
            finite, one is zero, or both lie on one line.
    """
    own = surface.parameters
    complete = []
    for index, vector in enumerate(vectors):
        what = f"direction {index + 1}"
        if not isinstance(vector, Mapping):
            raise TypeError(
                f"{what} must be a mapping from parameters' names to tensors; got "
                f"{type(vector).__module__}.{type(vector).__name__}"
            )
        _check_named(vector, own, what)
        complete.append(
            {
                name: vector[name].detach().to(part.device, part.dtype)
                if name in vector
                else torch.zeros_like(part)
                for name, part in own.items()
            }
        )
    lengths = [norm(vector) for vector in complete]
    for index, length in enumerate(lengths):
        if length == 0:
            raise ValueError(f"direction {index + 1} is zero, so there is nowhere to go")
    if len(complete) == 2 and abs(cosine(*complete)) > _PARALLEL:
        raise ValueError(
            "both directions lie on one line, so there is no plane; give one of them for a curve"
        )
    labels = [f"direction {i + 1}, of length {number(length)}" for i, length in enumerate(lengths)]
    return Directions(complete, labels, "given")


def dot(left: NamedVector, right: NamedVector) -> float:
    """The scalar product, summed in double precision."""
    return sum(float((left[n].double() * right[n].double()).sum()) for n in left)


def norm(vector: NamedVector) -> float:
    """The length."""
    return math.sqrt(dot(vector, vector))


def cosine(left: NamedVector, right: NamedVector) -> float:
    """Of the angle between two directions."""
    return dot(left, right) / (norm(left) * norm(right))


def _check_named(vector: Mapping[str, Any], own: NamedVector, what: str) -> None:
    for name, part in vector.items():
        if name not in own:
            raise ValueError(
                f"{what} has a tensor for {name!r}, which is no trainable parameter of the model: "
                "leave it out (of a state dict the buffers, too)"
            )
        if not isinstance(part, Tensor):
            raise TypeError(f"{what} must have tensors; got {type(part).__name__} for {name!r}")
        if part.shape != own[name].shape:
            raise ValueError(
                f"{what} must have the parameter's shape {tuple(own[name].shape)} for {name!r}; "
                f"got {tuple(part.shape)}"
            )
        if not bool(torch.isfinite(part).all()):
            raise ValueError(f"{what} has NaN or infinite values for {name!r}")


_View = tuple[
    Callable[[Tensor], Float[Tensor, "filters weights"]],
    Callable[[Float[Tensor, "filters weights"]], Tensor],
]


def _filters_of(model: nn.Module, name: str, own: Tensor, *, biases: bool) -> _View | None:
    """How to see a parameter as rows, one for each filter, and back; None for what stays."""
    module = model.get_submodule(name.rpartition(".")[0])
    if own.ndim < 2 or isinstance(module, _NORMALIZATIONS):
        return ((lambda t: t.reshape(1, -1)), (lambda rows: rows.view_as(own))) if biases else None
    if isinstance(module, _ConvTransposeNd):
        # (inputs, outputs of a group, *kernel): the weights of one output stand in a column.
        groups, outputs, shape = module.groups, own.shape[1], own.shape
        return (
            lambda t: (
                t.reshape(groups, -1, outputs, shape[2:].numel())
                .transpose(1, 2)
                .reshape(groups * outputs, -1)
            ),
            lambda rows: (
                rows.reshape(groups, outputs, -1, shape[2:].numel()).transpose(1, 2).reshape(shape)
            ),
        )
    return (lambda t: t.flatten(1)), (lambda rows: rows.view_as(own))

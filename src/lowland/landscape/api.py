"""One call for the loss around a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from lowland._checkpoints import Checkpoint
from lowland._weights import Count
from lowland.landscape.directions import (
    eigenvectors_of,
    given_directions,
    random_directions,
)
from lowland.landscape.grid import (
    Extent,
    around,
    coordinates_of,
    evaluate,
    intervals,
)
from lowland.landscape.path import principal_directions, project, steps_to
from lowland.landscape.result import LossSurface
from lowland.landscape.statistics import Statistics, batch_normalizations, loss_with
from lowland.objective import unwrap
from lowland.passes import frozen_statistics
from lowland.spectra import Spectrum, spectrum
from lowland.spectra.surface import own_randomness, survey

Named = Literal["random", "eigenvectors", "path"]
BatchNorm = Literal["auto", "running", "recomputed"]
Progress = Callable[[str, int, int], None]

_EXTENT = 1.0


def surface(
    model: nn.Module,
    criterion: Callable[..., Any],
    data: Any,
    directions: Named
    | Spectrum
    | Mapping[str, Tensor]
    | Sequence[Mapping[str, Tensor]]
    | None = None,
    *,
    path: Iterable[Checkpoint] | None = None,
    dimensions: Literal[1, 2] | None = None,
    extent: Extent | None = None,
    points: int | Sequence[int] = 25,
    biases: bool = False,
    batch_norm: BatchNorm = "auto",
    count: Count | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> LossSurface:
    r"""The loss on a grid around a model's parameters, along one direction or on a plane.

    .. math:: L_{ij} = L(\theta + a_i d_1 + b_j d_2)

    Args:
        model: Any module, in evaluation mode where it has layers that draw random numbers or keep
            statistics.
        criterion: As for :func:`lowland.spectrum`.
        data: As for :func:`lowland.spectrum`. It is gone through once for each point, and once more
            where the statistics of batch normalization are computed anew.
        directions: What ``d`` is.

            ``"random"``, the default: Gaussian, each filter of the norm of the model's own, that is
            each row of a weight of two dimensions or more (each output's weights). They are zero
            for biases and for the parameters of normalizations.

            ``"eigenvectors"``: those of the Hessian's largest eigenvalues, of length 1.

            ``"path"``, the default if there is a path: its principal directions, of length 1. They
            span the plane through the center that is closest to the checkpoints.

            A :class:`~lowland.spectra.Spectrum` for its first eigenvectors; or one or two vectors
            of your own, each a tensor for some of the trainable parameters, by their names.
        path: Checkpoints of training, which are shown where they lie nearest to: state dicts,
            modules, files that ``torch.save`` or safetensors wrote, or functions that give one of
            these, read one after the other. Differences from all of them are kept on the CPU.
        dimensions: 1 for a curve, 2 for a plane; by default as many as there are directions, at
            most 2.
        extent: How far to go, in units of the directions: ``r`` for coordinates from -r to r,
            ``(low, high)``, or such a pair for each direction. By default 1, and as far as the path
            goes if there is one.
        points: How many along each direction; the center is one of them if the number is odd and
            the extent symmetric.
        biases: Let random directions change biases and the parameters of normalizations too, each
            tensor as one filter.
        batch_norm: Which statistics batch normalization in evaluation mode uses at each point.
            ``"running"``: the model's own, which belong to the center. The loss is then the
            function whose Hessian :func:`lowland.spectrum` looks at. ``"recomputed"``: those of one
            pass over the data with the parameters of the point, averaged over the batches (as by
            ``torch.optim.swa_utils.update_bn``); a step that training would normalize away is then
            none. ``"auto"``: the first along eigenvectors, the second everywhere else. The caption
            says which.
        count: What the criterion's mean over a batch divides by, as for :func:`lowland.spectrum`.
        seed: Of random directions, and of the spectrum. No global generator is touched.
        on_progress: Called with a title and how many of its pieces are done and in all.

    Returns:
        The losses with their coordinates and directions, and the path, to plot or to turn.

    Raises:
        TypeError: If data, directions or a checkpoint have another form.
        ValueError: If an argument is out of range, the directions do not fit the model, are zero or
            lie on one line, a checkpoint is of another model, the path spans fewer directions; or
            as :func:`lowland.spectrum`, for model, criterion and data.
        RuntimeError: As :func:`lowland.spectrum`, for eigenvectors.

    Notes:
        The model does not change: each point's parameters stand in its place for one pass, whatever
        ends this. Beside the model there are its parameters as they were, the directions and the
        point, in memory four models altogether.

        Filter-normalized directions make pictures of networks comparable whose layers are scaled
        differently: multiplying a layer in front of a ReLU and dividing the next one
        (:func:`lowland.rescale`) leaves the picture as it is. Of two random directions the second
        is made orthogonal to the first within each filter. They say little about the worst
        directions: those of the largest eigenvalues are hardly ever hit by chance.

    References:
        H. Li, Z. Xu, G. Taylor, C. Studer and T. Goldstein, Visualizing the loss landscape of
        neural nets, NeurIPS 2018 (arXiv:1712.09913); there the principal directions of a path are
        those about the checkpoints' mean, here about the center, through which the plane goes.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x, y = torch.randn(50, 3), torch.ones(50, dtype=torch.long)
        >>> surface = lowland.surface(model, nn.CrossEntropyLoss(), (x, y), points=7)
        >>> surface.losses.shape, surface.kind
        (torch.Size([7, 7]), 'random')
        >>> curve = lowland.surface(
        ...     model, nn.CrossEntropyLoss(), (x, y), "eigenvectors", dimensions=1, extent=(-2, 2)
        ... )
        >>> curve.losses.shape
        torch.Size([25])
    """
    chosen = directions if directions is not None else ("random" if path is None else "path")
    _check(chosen, path, dimensions, batch_norm)
    bounds = None if extent is None else intervals(extent, _dimensions(chosen, dimensions))
    coordinates_of(bounds or [(-1, 1)] * _dimensions(chosen, dimensions), points)  # at the door
    tell = on_progress or _silence
    inside = unwrap(model)
    with frozen_statistics(inside):
        around_model = survey(model, criterion, data, count)
        with own_randomness(around_model.device, seed):
            statistics = _statistics(inside, batch_norm, chosen)
            loss = loss_with(around_model, statistics)
            center, center_loss = around_model.parameters, loss(around_model.parameters)
            own_loss = center_loss
            if statistics == "recomputed":
                own_loss = loss_with(around_model, "running")(center)
            steps = None if path is None else steps_to(path, around_model, loss, tell)
            if chosen == "eigenvectors":
                # The trace is not asked for, and two probes are the fewest that it takes.
                chosen = spectrum(
                    model,
                    criterion,
                    data,
                    k=dimensions or 2,
                    trace_probes=2,
                    count=count,
                    seed=seed,
                )
            if chosen == "path":
                found = principal_directions(steps, around_model, dimensions or 2)  # type: ignore[arg-type]  # as _check saw
            elif chosen == "random":
                found = random_directions(around_model, dimensions or 2, seed=seed, biases=biases)
            elif isinstance(chosen, Spectrum):
                found = eigenvectors_of(chosen, around_model, dimensions)
            else:
                vectors = [chosen] if isinstance(chosen, Mapping) else chosen
                found = given_directions(vectors, around_model)
            walked = None if steps is None else project(steps, found, around_model)
            if bounds is None:
                least = 0.0 if chosen == "path" else _EXTENT
                bounds = (
                    [(-_EXTENT, _EXTENT)] * len(found.vectors)
                    if walked is None
                    else around(walked.coordinates, least)
                )
            coordinates = coordinates_of(bounds, points)
            losses = evaluate(loss, center, found.vectors, coordinates, tell)
    return LossSurface(
        losses=losses,
        coordinates=coordinates,
        directions=found.vectors,
        labels=found.labels,
        kind=found.kind,
        center_loss=center_loss,
        own_loss=own_loss,
        statistics=statistics,
        path=walked,
        dim=around_model.dim,
    )


def _silence(title: str, done: int, total: int) -> None:
    """Tell nobody."""
    del title, done, total


def _check(chosen: Any, path: Any, dimensions: Any, batch_norm: Any) -> None:
    """Look at what was asked for, before any work is done.

    Raises:
        TypeError: If the directions are none.
        ValueError: If a name is unknown, or two of the arguments do not go together.
    """
    if isinstance(chosen, str):
        if chosen not in get_args(Named):
            raise ValueError(
                f"unknown directions {chosen!r}: expected one of "
                f"{', '.join(map(repr, get_args(Named)))}, a Spectrum, or one or two mappings from "
                "parameters' names to tensors"
            )
    elif not isinstance(chosen, Spectrum | Mapping | Sequence):
        raise TypeError(
            "directions must be a name, a Spectrum, or one or two mappings from parameters' names "
            f"to tensors; got {type(chosen).__module__}.{type(chosen).__name__}"
        )
    if chosen == "path" and path is None:
        raise ValueError("directions='path' are those of checkpoints: give them as path=[...]")
    if dimensions not in (None, 1, 2):
        raise ValueError(f"dimensions must be 1 for a curve or 2 for a plane; got {dimensions!r}")
    if batch_norm not in get_args(BatchNorm):
        raise ValueError(
            f"unknown batch_norm {batch_norm!r}: expected one of "
            f"{', '.join(map(repr, get_args(BatchNorm)))}"
        )


def _dimensions(chosen: Any, dimensions: int | None) -> int:
    """How many directions there will be.

    Raises:
        ValueError: If another number was given than asked for, or than can be drawn.
    """
    if isinstance(chosen, str):
        return dimensions or 2
    if isinstance(chosen, Spectrum):
        return dimensions or min(2, len(chosen.eigenvectors))
    given = 1 if isinstance(chosen, Mapping) else len(chosen)
    if given not in (1, 2):
        raise ValueError(
            f"directions must be one or two vectors, each a tensor by each parameter's name; got "
            f"{given}: checkpoints of training go to path="
        )
    if dimensions is not None and dimensions != given:
        raise ValueError(f"dimensions={dimensions} takes as many directions; got {given}")
    return given


def _statistics(model: nn.Module, batch_norm: BatchNorm, chosen: Any) -> Statistics:
    if not batch_normalizations(model):
        return "none"
    if batch_norm != "auto":
        return batch_norm
    along_eigenvectors = chosen == "eigenvectors" or isinstance(chosen, Spectrum)
    return "running" if along_eigenvectors else "recomputed"

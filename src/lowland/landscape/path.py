"""The way that training took, projected on a plane."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lowland._checkpoints import Checkpoint, read_all
from lowland.landscape.directions import Directions, dot
from lowland.spectra.surface import NamedVector, Surface

_CHUNK = 1 << 20  # parameters, of which as many in double precision are held for each checkpoint

# Of a squared singular value, as a fraction of the largest one: below it single precision's
# rounding is all that there is.
_RANK = 1e-10


@dataclass(frozen=True, eq=False)
class TrainingPath:
    r"""Checkpoints of training, as points on the plane or the line that is drawn.

    Attributes:
        coordinates: Of each checkpoint's projection, the nearest point of the plane, shape
            ``(checkpoints, directions)``, float64, in units of the directions.
        distances: From each checkpoint to its projection, shape ``(checkpoints,)``: what a drawing
            leaves out, a length in the space of all parameters.
        losses: At each checkpoint itself, not at its projection, shape ``(checkpoints,)``. Its own
            running statistics are used where those of batch normalization are not computed anew.
        explained: The share of the checkpoints' squared distance from the center that lies in the
            plane, from 0 to 1.
        shares: That of each direction alone where they are principal directions; else None.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model, x, y = nn.Linear(3, 1), torch.randn(20, 3), torch.randn(20, 1)
        >>> path = [{n: p + torch.randn_like(p) for n, p in model.named_parameters()} for _ in "ab"]
        >>> surface = lowland.surface(model, nn.MSELoss(), (x, y), path=path, points=5)
        >>> surface.path.coordinates.shape, round(surface.path.explained, 6)
        (torch.Size([2, 2]), 1.0)
    """

    coordinates: Float[Tensor, "checkpoints directions"]
    distances: Float[Tensor, " checkpoints"]
    losses: Float[Tensor, " checkpoints"]
    explained: float
    shares: tuple[float, ...] | None


@dataclass(frozen=True, eq=False)
class Steps:
    """What lies between the center and each checkpoint.

    Attributes:
        rows: Differences of all trainable parameters, on the CPU and of their type.
        losses: At each checkpoint.
    """

    rows: Float[Tensor, "checkpoints parameters"]
    losses: Float[Tensor, " checkpoints"]


def steps_to(
    checkpoints: Iterable[Checkpoint],
    surface: Surface,
    loss: Callable[[NamedVector], float],
    tell: Callable[[str, int, int], None],
) -> Steps:
    """Read checkpoints, each once.

    Raises:
        TypeError, ValueError: As :func:`lowland._checkpoints.read_all`; or if a value is not
            finite.
    """
    total = len(checkpoints) if isinstance(checkpoints, Sequence) else 0
    rows, losses = [], []
    for number, values in enumerate(read_all(checkpoints, surface.objective.model)):
        row = (surface.flatten(values) - surface.flatten(surface.parameters)).cpu()
        if not bool(torch.isfinite(row).all()):
            raise ValueError(
                f"checkpoint {number} has NaN or infinite parameters, so it has no place on a "
                "plane: leave it out"
            )
        rows.append(row)
        losses.append(loss(values))
        tell("checkpoints", number + 1, max(total, number + 1))
    return Steps(torch.stack(rows), torch.tensor(losses, dtype=torch.float64))


def principal_directions(steps: Steps, surface: Surface, count: int) -> Directions:
    r"""The plane through the center to which the checkpoints are closest.

    .. math:: \sum_t \lVert (I - V V^T) (\theta_t - \theta) \rVert^2 \to \min, \qquad V^T V = I

    Raises:
        ValueError: If the checkpoints do not span that many directions.
    """
    gram = _products(steps.rows, steps.rows)
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    rank = int((values > _RANK * values[0]).sum()) if float(values[0]) > 0 else 0
    if rank < count:
        spans = "no direction: they are the model's own parameters" if not rank else "a line"
        raise ValueError(
            f"the {len(values)} checkpoints of the path and the model span {spans}; "
            f"{'use dimensions=1, or ' if rank else ''}give checkpoints from earlier in training"
        )
    kept, scales = vectors[:, :count], values[:count].sqrt()
    # The first checkpoint, most often the start of training, lies on the positive side.
    kept = kept * torch.where(kept[0] < 0, -1.0, 1.0)
    flat = [
        torch.cat([weights @ part.double() for part in steps.rows.split(_CHUNK, dim=1)])
        for weights in (kept / scales).T
    ]
    shares = (values[:count] / values.sum()).tolist()
    like = surface.flatten(surface.parameters)
    return Directions(
        [surface.unflatten(each.to(like.device, like.dtype)) for each in flat],
        [
            f"principal direction {i + 1}, {share:.1%} of the squared distance"
            for i, share in enumerate(shares)
        ],
        "path",
    )


def project(steps: Steps, directions: Directions, surface: Surface) -> TrainingPath:
    """The nearest point of the plane to each checkpoint."""
    vectors = directions.vectors
    basis = torch.stack([surface.flatten(vector).cpu() for vector in vectors])
    metric = torch.tensor([[dot(u, v) for v in vectors] for u in vectors], dtype=torch.float64)
    inner = _products(steps.rows, basis)
    coordinates = torch.linalg.solve(metric, inner.T).T
    squared = torch.stack([row.double().square().sum() for row in steps.rows])
    within = (coordinates * inner).sum(1)
    total = float(squared.sum())
    shares = None
    if directions.kind == "path":
        parts = coordinates.square() * metric.diagonal()
        shares = tuple((parts.sum(0) / total).tolist())
    return TrainingPath(
        coordinates=coordinates,
        distances=(squared - within).clamp_min(0).sqrt(),
        losses=steps.losses,
        explained=float(within.sum()) / total if total else 1.0,
        shares=shares,
    )


def _products(
    left: Float[Tensor, "m parameters"], right: Float[Tensor, "n parameters"]
) -> Float[Tensor, "m n"]:
    """All scalar products, summed in double precision, some columns after the other."""
    pairs = zip(left.split(_CHUNK, dim=1), right.split(_CHUNK, dim=1), strict=True)
    return torch.stack([one.double() @ other.double().T for one, other in pairs]).sum(0)

"""Joint weakness: how many labelings of unseen points the training points leave open together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowland.display import DataFrame, frame
from lowland.weakness.cone import Cone, build_cone
from lowland.weakness.findings import Findings
from lowland.weakness.polytope import Polytope, analytic_center, billiard, split_r_hat

_CONVERGED = 1.05  # the largest split R-hat that passes
_OUTSIDE = 1e-9  # relative distance from the training points' affine hull beyond rounding


@dataclass(frozen=True, eq=False)
class JointWeakness:
    r"""The labelings of unseen points that occur; from :func:`joint_weakness`.

    Attributes:
        labelings: The distinct ones that occurred, most frequent first.
        shares: The estimated volume share of each.
        log_effective: :math:`-\log \sum_l p_l^2`, the logarithm of the effective number of
            completions: as many labelings of equal share would agree by chance as often. Infinite
            where no two samples agreed; then there are more labelings than samples can tell.
        stderr: Its standard error, by leaving out one chain after another.
        entropy: :math:`-\sum p_l \log p_l` of the shares, after Miller and Madow: a lower bound on
            average, far too low where most labelings occurred once.
        r_hat: The largest split R-hat over all coordinates; near 1 where chains agree.
        chains: Independent chains.
        samples: Kept from each.

    Example:
        >>> import torch
        >>> from lowland.weakness import joint_weakness
        >>> train, labels = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> unseen = torch.tensor([[2.0], [0.0]])  # beyond both of them, and between
        >>> generator = torch.Generator().manual_seed(0)
        >>> joint = joint_weakness(train, labels, unseen, 2, generator=generator, chains=4)
        >>> joint.converged, round(joint.log_effective, 2)  # log 2: two labelings of equal share
        (True, 0.69)
    """

    labelings: Int[Tensor, "labelings unseen"] = field(repr=False)
    shares: Float[Tensor, " labelings"] = field(repr=False)
    log_effective: float
    stderr: float
    entropy: float
    r_hat: float
    chains: int
    samples: int

    @property
    def converged(self) -> bool:
        """Whether the chains agree with one another."""
        return self.r_hat <= _CONVERGED

    def to_frame(self) -> DataFrame:
        """A row for each labeling: ``labeling`` (its classes, joined by spaces) and ``share``.

        Raises:
            ImportError: Without pandas, ``pip install 'lowland[cli]'``.
        """
        labelings = [" ".join(map(str, row)) for row in self.labelings.tolist()]
        return frame({"labeling": labelings, "share": self.shares.numpy()})


def joint_weakness(
    features_train: Float[Tensor, "train features"],
    y_train: Tensor,
    features_unseen: Float[Tensor, "unseen features"],
    num_classes: int,
    *,
    generator: torch.Generator,
    chains: int = 32,
    samples: int = 200,
    thinning: int = 50,
    burn_in: int = 2000,
) -> JointWeakness:
    r"""Estimate how many labelings of unseen points are left open, and how large each one is.

    Sampled are last layers, uniformly from those that classify the training points correctly with
    a mean margin of 1. Margins do not depend on the features' coordinates, so neither do volume
    shares: invertible affine maps of the features, such as rescaling and permuting hidden units,
    change nothing, sample by sample up to rounding.

    Args:
        features_train: The last hidden layer's outputs at the training points.
        y_train: Their classes, shape ``(train,)``.
        features_unseen: Its outputs at a sample of unseen points; of more than a dozen points
            every sample may be another labeling.
        num_classes: ``K``, at least 2.
        generator: Where chance comes from, on the CPU.
        chains: Independent chains, at least 2.
        samples: How many to keep from each.
        thinning: Reflections from one to the next, about.
        burn_in: Reflections before the first, about.

    Warns:
        UserWarning: If the chains do not agree with one another.

    Raises:
        TypeError: If features are no floating-point tensors of one type.
        ValueError: If shapes or values are wrong, the training points cannot be classified
            correctly, or unseen points leave the affine hull of the training points, where
            nothing bounds a last layer.
        ImportError: Without HiGHS, ``pip install 'lowland[weakness]'``.

    References:
        B. T. Polyak and E. N. Gryazina, European Journal of Operational Research 238 (2014),
        billiard walk; A. Vehtari et al., Bayesian Analysis 16 (2021), split R-hat.

    Example:
        >>> import torch
        >>> from lowland.weakness import joint_weakness
        >>> train, labels = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> unseen = torch.tensor([[2.0], [0.0]])  # beyond both of them, and between
        >>> generator = torch.Generator().manual_seed(0)
        >>> joint = joint_weakness(train, labels, unseen, 2, generator=generator, chains=4)
        >>> sorted(joint.labelings.tolist())
        [[1, 0], [1, 1]]
    """
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator, such as torch.Generator().manual_seed(0); got "
            f"{type(generator).__name__}"
        )
    _check_counts({"samples": samples, "thinning": thinning, "burn_in": burn_in}, least=1)
    _check_counts({"chains": chains, "samples": samples}, least=2)
    cone = build_cone(features_train, y_train, features_unseen, num_classes)
    polytope, to_scores = _slice(cone, generator)
    points = billiard(
        polytope,
        analytic_center(polytope),
        chains=chains,
        samples=samples,
        thinning=thinning,
        burn_in=burn_in,
        generator=generator,
    )
    r_hat = float(split_r_hat(points).max()) if points.shape[-1] else 1.0
    labels = _labels(points, to_scores, cone)
    labelings, index, counts = torch.unique(
        labels.flatten(0, 1), dim=0, return_inverse=True, return_counts=True
    )
    order = counts.argsort(descending=True, stable=True)
    log_effective, stderr = _collisions(index.view(chains, samples), len(labelings))
    shares = counts.double() / (chains * samples)
    if r_hat > _CONVERGED:
        warnings.warn(
            f"chains disagree: split R-hat {r_hat:.3f} where at most {_CONVERGED} is expected; "
            "raise burn_in and thinning",
            stacklevel=2,
        )
    return JointWeakness(
        labelings=labelings[order],
        shares=shares[order],
        log_effective=log_effective,
        stderr=stderr,
        entropy=float(-(shares * shares.log()).sum())
        + (len(labelings) - 1) / (2 * chains * samples),
        r_hat=r_hat,
        chains=chains,
        samples=samples,
    )


def _check_counts(counts: Mapping[str, int], *, least: int) -> None:
    for name, value in counts.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def _slice(
    cone: Cone, generator: torch.Generator
) -> tuple[Polytope, tuple[Float[Tensor, "unseen classes"], Float[Tensor, "unseen classes d"]]]:
    """The layers of mean margin 1, and the unseen points' scores as functions of a point there.

    Coordinates are those of the training points' scores, in a basis that the generator chooses
    among these: they are the same whatever the features' own coordinates were.
    """
    from lowland.weakness.programs import find_layer  # noqa: PLC0415 - needs HiGHS

    train, unseen = torch.from_numpy(cone.train), torch.from_numpy(cone.unseen)
    left, sizes, right = torch.linalg.svd(train, full_matrices=False)
    rank = int((sizes > sizes[0] * max(train.shape) * torch.finfo(sizes.dtype).eps).sum())
    left, right = left[:, :rank], right[:rank]
    size = unseen.abs().amax(dim=1)  # at least 1
    outside = (unseen - unseen @ right.T @ right).abs().amax(dim=1) > _OUTSIDE * size
    if bool(outside.any()):
        count = int(outside.sum())
        raise ValueError(
            f"{count} of {len(unseen)} unseen points lie outside the affine hull of the training "
            "points' features, where no training point bounds the last layer and volumes are "
            "infinite; leave out features that are constant over the training points, or these "
            "unseen points"
        )
    layer = find_layer(Findings(cone))
    if layer is None:
        raise ValueError(
            "no last layer was found that classifies all training points correctly, so there is "
            "nothing to sample; see pair_proxy(...).separable"
        )
    chosen = torch.randn(len(train), rank, generator=generator, dtype=train.dtype)
    basis, _ = torch.linalg.qr(left @ (left.T @ chosen))
    unseen = unseen @ right.T / sizes[:rank] @ (left.T @ basis)
    start = basis.T @ (train @ torch.from_numpy(layer).T)  # (rank, classes)
    start = start[:, :-1] - start[:, -1:]
    free = torch.eye(cone.classes, dtype=train.dtype)[:, :-1]
    own = torch.from_numpy(cone.labels)
    # Scores are free in all classes but the last; differences of the last from others remain.
    difference = free[own][:, None] - free[None]  # (train, classes, classes - 1)
    rows = torch.einsum("nr,nkc->nkrc", basis, difference)
    keep = torch.arange(cone.classes) != own[:, None]
    rows = rows[keep].flatten(1)
    mean = rows.mean(dim=0)
    point = start.flatten() / (mean @ start.flatten())
    plane = torch.linalg.qr(
        torch.cat([mean[:, None], torch.eye(len(mean), dtype=mean.dtype)], dim=1)
    )[0][:, 1:]
    polytope = Polytope(rows @ plane, rows @ point)
    score = torch.einsum("nr,kc->nkrc", unseen, free).flatten(2)
    return polytope, (score @ point, score @ plane)


def _labels(
    points: Float[Tensor, "chains samples d"],
    to_scores: tuple[Float[Tensor, "unseen classes"], Float[Tensor, "unseen classes d"]],
    cone: Cone,
) -> Int[Tensor, "chains samples unseen"]:
    offset, slope = to_scores
    scores = points @ slope.flatten(0, 1).T + offset.flatten()
    return scores.view(*points.shape[:2], len(cone.unseen), cone.classes).argmax(dim=-1)


def _collisions(index: Int[Tensor, "chains samples"], labelings: int) -> tuple[float, float]:
    """``-log sum p^2`` and its standard error, from pairs of samples of different chains.

    Within a chain samples resemble their neighbors; of two chains they are independent, and then
    the fraction of pairs that agree is right on average.
    """
    chains, samples = index.shape
    counts = torch.zeros(chains, labelings, dtype=torch.float64)
    counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float64))
    total = counts.sum(dim=0)
    within = counts.square().sum(dim=1)
    agreeing = float(total.square().sum() - within.sum())
    # The same without each chain in turn.
    others = agreeing - 2 * ((total - counts) * counts).sum(dim=1)
    if agreeing <= 0:
        return math.inf, math.inf
    estimate = -math.log(agreeing / (chains * (chains - 1) * samples**2))
    if chains < 3 or bool((others <= 0).any()):
        return estimate, math.inf
    without = -(others / ((chains - 1) * (chains - 2) * samples**2)).log()
    spread = (without - without.mean()).square().sum() * (chains - 1) / chains
    return estimate, float(spread.sqrt())

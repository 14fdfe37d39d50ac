"""The cone of last layers that classify the training points correctly."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from lowland.validation import check_features, check_labels, check_one_per_sample, check_tensor

Points = Float[np.ndarray, "points coordinates"]
Layer = Float[np.ndarray, "classes coordinates"]


@dataclass(frozen=True, eq=False)
class Cone:
    r"""Last layers ``W`` with ``(W_y - W_k) z > 0`` for every training point and class k != y.

    ``z`` is a point's features, shifted and scaled, with a one for the bias behind them. The shift
    is a float and the scales are powers of two, so that every coordinate is right to one rounding
    *relative to itself*, whatever offset the features had: what is verified with these coordinates
    is true of the features.

    Attributes:
        train: ``z`` of the training points.
        labels: Their classes.
        unseen: ``z`` of the unseen points.
        classes: ``K``.
        raw_train: The features themselves, with the one behind them.
        raw_unseen: The same of the unseen points.
        center: What was subtracted from each feature.
        scale: What each was divided by then.
    """

    train: Float[np.ndarray, "train coordinates"] = field(repr=False)
    labels: Int[np.ndarray, " train"] = field(repr=False)
    unseen: Float[np.ndarray, "unseen coordinates"] = field(repr=False)
    classes: int
    raw_train: Float[np.ndarray, "train coordinates"] = field(repr=False)
    raw_unseen: Float[np.ndarray, "unseen coordinates"] = field(repr=False)
    center: Float[np.ndarray, " features"] = field(repr=False)
    scale: Float[np.ndarray, " features"] = field(repr=False)

    @property
    def coordinates(self) -> int:
        """Features and the bias."""
        return int(self.train.shape[1])

    def inequalities(
        self, label: int | None = None
    ) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
        """Of each inequality the training point and the class that it is against.

        Those of an unseen point in the class ``label`` follow behind, with -1 for the point.
        """
        point, against = np.nonzero(self.labels[:, None] != np.arange(self.classes))
        if label is None:
            return point, against
        rivals = np.flatnonzero(np.arange(self.classes) != label)
        return np.append(point, np.full(len(rivals), -1)), np.append(against, rivals)


def difference_rows(
    points: Points, own: Int[np.ndarray, " points"], against: Int[np.ndarray, " p"], classes: int
) -> Float[np.ndarray, "points unknowns"]:
    """``(W_own - W_against) z`` as rows in the weights of all classes but the last.

    Adding the same to all classes changes no difference, so that the last one's may be zero.
    """
    rows = np.zeros((len(points), classes, points.shape[1]))
    index = np.arange(len(points))
    rows[index, own] = points
    rows[index, against] = -points
    return rows[:, :-1].reshape(len(points), -1)


def build_cone(
    features_train: Tensor, y_train: Tensor, features_unseen: Tensor, num_classes: int
) -> Cone:
    """Check features and labels, and bring them to one scale.

    Raises:
        TypeError: If something is no tensor, or features are not floating-point.
        ValueError: If shapes do not match, or labels or values are out of range.
    """
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"num_classes must be a whole number of at least 2; got {num_classes!r}")
    for features, name in (
        (features_train, "features_train"),
        (features_unseen, "features_unseen"),
    ):
        check_features(features, like=features_train, name=name)
        if features.ndim != 2:
            raise ValueError(
                f"{name} must have shape (points, features); got {tuple(features.shape)}: flatten "
                "each point's features into one row"
            )
    if features_train.shape[1] != features_unseen.shape[1]:
        raise ValueError(
            "features of training and of unseen points must be as many; got shapes "
            f"{tuple(features_train.shape)} and {tuple(features_unseen.shape)}"
        )
    check_tensor(y_train, "y_train")
    check_one_per_sample(y_train)
    if y_train.shape != features_train.shape[:1]:
        raise ValueError(
            f"y_train must hold one label for each of {len(features_train)} training points; got "
            f"shape {tuple(y_train.shape)}"
        )
    check_labels(y_train, num_classes)
    train, unseen = (_float64(part) for part in (features_train, features_unseen))
    center = train.mean(axis=0)
    spread, wider = (np.abs(part - center).max(axis=0) for part in (train, unseen))
    spread = np.where(spread > 0, spread, wider)
    _, exponent = np.frexp(np.where(spread > 0, spread, 1.0))
    scale = np.ldexp(1.0, exponent)
    return Cone(
        train=_with_one((train - center) / scale),
        labels=y_train.detach().cpu().numpy().astype(np.int64),
        unseen=_with_one((unseen - center) / scale),
        classes=num_classes,
        raw_train=_with_one(train),
        raw_unseen=_with_one(unseen),
        center=center,
        scale=scale,
    )


def _float64(features: Tensor) -> Float[np.ndarray, "points features"]:
    return features.detach().cpu().numpy().astype(np.float64)


def _with_one(features: Float[np.ndarray, "points features"]) -> Points:
    return np.concatenate([features, np.ones((len(features), 1))], axis=1)

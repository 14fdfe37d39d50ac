"""Random splits of a data set, each standardized by its own training part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Num
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lowland.studies.data.dataset import DataError, Dataset, some


@dataclass(frozen=True)
class Splits:
    """A stack of splits of one data set, each standardized by its own training part.

    Attributes:
        x_train: Features in standard deviations from the training part's mean: each in its own, or
            those of one unit in that of all of them together.
        y_train: Labels, as in the data set.
        x_test: Features on the same scale as ``x_train``.
        y_test: Labels.
    """

    x_train: Float[Tensor, "splits train features"]
    y_train: Num[Tensor, "splits train"]
    x_test: Float[Tensor, "splits test features"]
    y_test: Num[Tensor, "splits test"]


def stratified_splits(dataset: Dataset, seeds: range, *, test_size: float) -> Splits:
    """One random split per seed, classes in equal proportion on both sides.

    A seed's split depends on nothing but the data and that seed. Features are standardized with
    the mean and standard deviation of the training part alone, so that the test part stays unseen;
    features of one unit share the standard deviation, or a pixel that is dark in all images but one
    would outshine the others in that one.

    Args:
        dataset: The data.
        seeds: One seed per split.
        test_size: Fraction of the samples to test on, between 0 and 1.

    Raises:
        DataError: If a class has too few samples to be on both sides, or a feature cannot be
            standardized, since it is constant in a training part.
    """
    parts = [_split(dataset, seed, test_size) for seed in seeds]
    return Splits(*(torch.from_numpy(np.stack(part)) for part in zip(*parts, strict=True)))


def _split(dataset: Dataset, seed: int, test_size: float) -> tuple[NDArray[Any], ...]:
    """``(x_train, y_train, x_test, y_test)``."""
    x, y = dataset.x.numpy(), dataset.y.numpy()
    try:
        x_train, x_test, y_train, y_test = train_test_split(
            x, y, test_size=test_size, stratify=y, random_state=seed
        )
        possible = all(len(np.unique(part)) == len(dataset.classes) for part in (y_train, y_test))
    except ValueError:  # as scikit-learn puts it, the user cannot know what to do
        possible = False
    if not possible:
        counts = [
            f"{count} of class {name!r}"
            for count, name in sorted(zip(dataset.counts, dataset.classes, strict=True))
        ]
        raise DataError(
            f"{len(y)} rows ({some(counts)}) are too few to train and test on every class with a "
            f"fraction of {test_size:g} for testing; add rows or change the fraction"
        )
    if dataset.one_unit:
        center = x_train.mean(0)
        scale = np.sqrt(np.square(x_train - center).mean())
        return (x_train - center) / scale, y_train, (x_test - center) / scale, y_test
    with np.errstate(over="ignore", invalid="ignore"):
        scaler = StandardScaler().fit(x_train)
        x_train, x_test = scaler.transform(x_train), scaler.transform(x_test)
        # What scikit-learn leaves as it is, or cannot scale, has no standard deviation of one.
        odd = ~(np.abs(x_train.std(0) - 1) < 1e-3)
    if odd.any():
        raise DataError(
            f"column {dataset.features[int(odd.argmax())]!r} cannot be standardized: in the "
            f"training part of seed {seed} it is all but constant, or too large for float64; drop "
            "it or rescale it"
        )
    return x_train, y_train, x_test, y_test

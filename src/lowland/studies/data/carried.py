"""Data that scikit-learn carries, which need no file."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lowland.studies.data.dataset import Dataset


def breast_cancer() -> Dataset:
    """Breast Cancer Wisconsin (Diagnostic): 569 patients, 30 features of cell nuclei.

    References:
        W. H. Wolberg, W. N. Street and O. L. Mangasarian, UCI Machine Learning Repository (1995);
        carried by scikit-learn.
    """
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415 - slow

    bunch = load_breast_cancer()
    negative, positive = bunch.target_names
    return Dataset(
        "Breast Cancer Wisconsin",
        torch.from_numpy(np.ascontiguousarray(bunch.data)),
        torch.from_numpy(bunch.target.astype(np.float64)),
        tuple(map(str, bunch.feature_names)),
        (str(negative), str(positive)),
    )


def digits() -> Dataset:
    """Optical Recognition of Handwritten Digits: 1,797 images of 8 x 8 pixels, ten classes.

    References:
        E. Alpaydin and C. Kaynak, UCI Machine Learning Repository (1998); the test part, carried by
        scikit-learn.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415 - slow

    bunch = load_digits()
    return Dataset(
        "Handwritten digits",
        torch.from_numpy(np.ascontiguousarray(bunch.data)),
        torch.from_numpy(bunch.target.astype(np.int64)),
        tuple(map(str, bunch.feature_names)),
        tuple(map(str, bunch.target_names)),
        one_unit=True,
    )


CARRIED: dict[str, Callable[[], Dataset]] = {"breast-cancer": breast_cancer, "digits": digits}
"""What needs no file, by its name on the command line."""

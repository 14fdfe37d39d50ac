"""Two-class tables: the one that scikit-learn carries, your own, and their splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor


class DataError(ValueError):
    """A table that cannot be used as it is; the message says where and what to do."""


@dataclass(frozen=True)
class Dataset:
    """Samples of two classes.

    Attributes:
        name: For titles.
        x: Features in their own units, float64.
        y: 0 or 1, float64.
        features: One name per column of ``x``.
        classes: The names of class 0 and class 1.
    """

    name: str
    x: Float[Tensor, "samples features"]
    y: Float[Tensor, " samples"]
    features: tuple[str, ...]
    classes: tuple[str, str]


@dataclass(frozen=True)
class Splits:
    """A stack of splits of one data set, each standardized by its own training part.

    Attributes:
        x_train: Features in standard deviations from the training part's mean.
        y_train: 0 or 1.
        x_test: Features on the same scale as ``x_train``.
        y_test: 0 or 1.
    """

    x_train: Float[Tensor, "splits train features"]
    y_train: Float[Tensor, "splits train"]
    x_test: Float[Tensor, "splits test features"]
    y_test: Float[Tensor, "splits test"]


def breast_cancer() -> Dataset:
    """Breast Cancer Wisconsin (Diagnostic): 569 patients, 30 features of cell nuclei.

    References:
        W. H. Wolberg, W. N. Street and O. L. Mangasarian, UCI Machine Learning Repository (1995);
        carried by scikit-learn.
    """
    bunch = load_breast_cancer()
    negative, positive = bunch.target_names
    return Dataset(
        "Breast Cancer Wisconsin",
        torch.from_numpy(np.ascontiguousarray(bunch.data)),
        torch.from_numpy(bunch.target.astype(np.float64)),
        tuple(map(str, bunch.feature_names)),
        (str(negative), str(positive)),
    )


def read_csv(path: Path, target: str) -> Dataset:
    """Read a table with a header line, numeric features and one column of two classes.

    Args:
        path: The file.
        target: The name of the column to predict, of any type with two values. The class that
            sorts first becomes 0.

    Raises:
        DataError: If the file cannot be read as such a table. Rows are counted from 1, without the
            header.
    """
    try:
        frame = pd.read_csv(path)
    except FileNotFoundError:
        raise DataError(f"there is no file {str(path)!r}") from None
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (ValueError, pd.errors.ParserError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{str(path)!r} is not a CSV table: {reason}") from None
    frame.columns = frame.columns.map(str)
    if target not in frame.columns:
        known = ", ".join(frame.columns)
        raise DataError(f"no column {target!r} in {str(path)!r}; its columns are {known}")
    labels, features = frame[target], frame.drop(columns=target)
    y, classes = _encode(labels)
    if features.columns.empty:
        raise DataError(f"{str(path)!r} has no column beside the target {target!r}")
    columns = [_numbers(features[name]) for name in features.columns]
    return Dataset(
        path.stem,
        torch.from_numpy(np.stack(columns, axis=1)),
        torch.from_numpy(y),
        tuple(features.columns),
        classes,
    )


def _rows(bad: np.ndarray) -> str:
    """``row 3`` or ``rows 3, 7, 9 and 5 more``, counted from 1."""
    numbers = [str(row + 1) for row in np.flatnonzero(bad)]
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:3])}{more}"


def _encode(labels: pd.Series) -> tuple[np.ndarray, tuple[str, str]]:
    """Labels as 0 and 1, and the names of the two classes."""
    missing = labels.isna().to_numpy()
    if missing.any():
        raise DataError(f"the target {labels.name!r} is missing in {_rows(missing)}")
    codes, found = pd.factorize(labels, sort=True)
    if len(found) != 2:
        shown = ", ".join(map(str, found[:5])) + (", …" if len(found) > 5 else "")
        raise DataError(
            f"the target {labels.name!r} must have two classes; it has {len(found)}"
            + (f" ({shown})" if len(found) else "")
        )
    return codes.astype(np.float64), (str(found[0]), str(found[1]))


def _numbers(column: pd.Series) -> np.ndarray:
    """A feature as float64."""
    missing = column.isna().to_numpy()
    if missing.any():
        raise DataError(
            f"column {column.name!r} is empty or NaN in {_rows(missing)}; "
            "impute or drop those rows first"
        )
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    text = np.isnan(values)
    if text.any():
        example = column[text].iloc[0]
        raise DataError(
            f"column {column.name!r} has text in {_rows(text)}, such as {example!r}; "
            "encode it as numbers or drop the column"
        )
    infinite = np.isinf(values)
    if infinite.any():
        raise DataError(f"column {column.name!r} is infinite in {_rows(infinite)}")
    if values.min() == values.max():
        raise DataError(
            f"column {column.name!r} is constant ({column.iloc[0]}), so it cannot be standardized; "
            "drop it"
        )
    return values


def stratified_splits(dataset: Dataset, seeds: range, *, test_size: float) -> Splits:
    """One random split per seed, classes in equal proportion on both sides.

    A seed's split depends on nothing but the data and that seed. Features are standardized with
    the mean and standard deviation of the training part alone, so that the test part stays unseen.

    Args:
        dataset: The data.
        seeds: One seed per split.
        test_size: Fraction of the samples to test on, between 0 and 1.

    Raises:
        DataError: If a class has too few samples to be on both sides.
    """
    x, y = dataset.x.numpy(), dataset.y.numpy()
    parts = []
    for seed in seeds:
        try:
            x_train, x_test, y_train, y_test = train_test_split(
                x, y, test_size=test_size, stratify=y, random_state=seed
            )
        except ValueError as error:
            counts = [int((y == label).sum()) for label in (0, 1)]
            raise DataError(
                f"cannot split {len(y)} rows ({counts[0]} of class {dataset.classes[0]!r}, "
                f"{counts[1]} of {dataset.classes[1]!r}) with {test_size:g} for testing: {error}"
            ) from None
        scaler = StandardScaler().fit(x_train)
        parts.append((scaler.transform(x_train), y_train, scaler.transform(x_test), y_test))
    return Splits(*(torch.from_numpy(np.stack(part)) for part in zip(*parts, strict=True)))

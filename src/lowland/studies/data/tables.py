"""Labelled tables: two that scikit-learn carries, your own, and their splits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Num
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lowland.errors import UserError

_BOOLEANS = {"false": 0.0, "true": 1.0}  # in any case
_MANY_CLASSES = 20  # unusually many, though not too many
_MISSING = ("", "na", "n/a", "nan", "null", "none", "?")  # as people write it, in any case


class DataError(UserError, ValueError):
    """A table that cannot be used as it is; the message says where and what to do."""


@dataclass(frozen=True)
class Dataset:
    """Samples of two classes or more.

    Attributes:
        name: For titles.
        x: Features in their own units, float64.
        y: Labels: the place of each sample's class in ``classes``; of two classes in float64, of
            more in int64.
        features: One name per column of ``x``.
        classes: The names of the classes, at least two.
        one_unit: Whether all features are in one unit, as pixels are, so that the spread of each
            means something beside that of the others.
    """

    name: str
    x: Float[Tensor, "samples features"]
    y: Num[Tensor, " samples"]
    features: tuple[str, ...]
    classes: tuple[str, ...]
    one_unit: bool = False

    @property
    def counts(self) -> list[int]:
        """Samples of each class."""
        found: list[int] = torch.bincount(self.y.long(), minlength=len(self.classes)).tolist()
        return found


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


def digits() -> Dataset:
    """Optical Recognition of Handwritten Digits: 1,797 images of 8 x 8 pixels, ten classes.

    References:
        E. Alpaydin and C. Kaynak, UCI Machine Learning Repository (1998); the test part, carried by
        scikit-learn.
    """
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


def read_csv(path: Path, target: str) -> Dataset:
    """Read a comma-separated table with a header line, numeric features and a few classes.

    Args:
        path: The file, in UTF-8. True and false in a feature are read as 1 and 0.
        target: The name of the column to predict: text, numbers or booleans of at least two values.
            Classes are numbered in their order; the one that sorts first becomes 0.

    Raises:
        DataError: If the file cannot be read as such a table. Rows are counted from 1, without the
            header and empty lines.
    """
    table = _read_table(path)
    if target not in table.columns:
        hint = ""
        if len(table.columns) == 1 and any(mark in table.columns[0] for mark in ";\t|"):
            hint = "; columns must be separated by commas"
        elif any(name.isdecimal() for name in table.columns):
            hint = "; if that is data, add a header line"
        raise DataError(
            f"no column {target!r} in {str(path)!r}; its columns are {_list(table.columns)}{hint}"
        )
    y, classes = _encode(table[target])
    features = table.drop(columns=target)
    if features.columns.empty:
        raise DataError(
            f"{str(path)!r} has no column beside the target {target!r}; add numeric features"
        )
    columns = [_numbers(features[name]) for name in features.columns]
    return Dataset(
        path.stem,
        torch.from_numpy(np.stack(columns, axis=1)),
        torch.from_numpy(y),
        tuple(features.columns),
        classes,
    )


def _read_table(path: Path) -> pd.DataFrame:
    """All cells as text, under the names in the header.

    pandas would otherwise rename columns of one name, take a surplus column for an index, and read
    True as 1, each without a word.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        cells = pd.read_csv(StringIO(text), header=None, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise DataError(f"there is no file {str(path)!r}") from None
    except UnicodeDecodeError:
        raise DataError(f"{str(path)!r} is not text in UTF-8; save it as a CSV in UTF-8") from None
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except pd.errors.EmptyDataError:
        raise DataError(f"{str(path)!r} is empty; it needs a header line and rows") from None
    except pd.errors.ParserError as error:
        reason = " ".join(str(error).split()).removeprefix("Error tokenizing data. C error: ")
        raise DataError(f"{str(path)!r} is not a comma-separated table: {reason}") from None
    cells = cells.apply(lambda column: column.str.strip())
    header = cells.iloc[0].tolist()
    if "" in header:
        raise DataError(
            f"column {header.index('') + 1} of {str(path)!r} has no name in the header; name it, "
            "or drop it if it only counts rows"
        )
    number = next(filter(_looks_like_data, header), None)
    if number is not None:
        raise DataError(
            f"the first line of {str(path)!r} must name the columns, but holds the number "
            f"{number!r}; add a header line, or give that column another name"
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(
            f"{str(path)!r} has several columns named {_list(twice)}; give each its own name, or "
            "add a header line if there is none"
        )
    if len(cells) == 1:
        raise DataError(f"{str(path)!r} has a header line but no rows")
    rows: pd.DataFrame = cells.iloc[1:].set_axis(header, axis="columns").reset_index(drop=True)
    return rows


def _looks_like_data(name: str) -> bool:
    """Whether it is a number such as no column is named; whole ones may count the columns."""
    try:
        return math.isfinite(float(name)) and not name.isdecimal()
    except ValueError:
        return False


def _list(names: Iterable[str]) -> str:
    """The first names, quoted."""
    return _some([repr(name) for name in names])


def _some(items: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(items) - 8} more" if len(items) > 8 else ""
    return ", ".join(items[:8]) + more


def _rows(bad: NDArray[np.bool_]) -> str:
    """``row 3`` or ``rows 3, 7, 9 and 5 more``, counted from 1."""
    numbers = [str(row + 1) for row in np.flatnonzero(bad)]
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:3])}{more}"


def _refuse_missing(column: pd.Series[str]) -> None:
    missing = column.str.lower().isin(_MISSING).to_numpy()
    if missing.any():
        raise DataError(
            f"column {column.name!r} is empty or NaN in {_rows(missing)}; "
            "impute those cells or drop those rows first"
        )


def _encode(labels: pd.Series[str]) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Labels as numbers from 0, and the names of the classes."""
    _refuse_missing(labels)
    numbers = pd.to_numeric(labels, errors="coerce")
    # As numbers 1 and 1.0 are one class, and 2 sorts before 10.
    codes, found = pd.factorize(labels if numbers.isna().any() else numbers, sort=True)
    if len(found) < 2:
        raise DataError(
            f"the target {labels.name!r} must have two classes or more; it has one: "
            f"{_list(map(str, found))}"
        )
    if _is_quantity(numbers, len(found)):
        raise DataError(
            f"the target {labels.name!r} must name the class of each row; it has {len(found)} "
            f"different values in {len(labels)} rows, such as {labels.iloc[0]!r}, like a quantity "
            "or an identifier; choose a column of classes, or divide the values into a few"
        )
    _, first = np.unique(codes, return_index=True)
    return codes.astype(np.float64 if len(found) == 2 else np.int64), tuple(labels.iloc[first])


def _is_quantity(numbers: pd.Series[float], different: int) -> bool:
    """Whether a target of so many different values, NaN where they are text, is no class."""
    signs = (
        different > _MANY_CLASSES,
        2 < different > len(numbers) / 2,
        bool((numbers % 1 > 0).any()),
    )
    return sum(signs) >= 2


def _numbers(column: pd.Series[str]) -> NDArray[np.float64]:
    """A feature as float64."""
    _refuse_missing(column)
    booleans = column.str.lower().map(_BOOLEANS)
    numbers = pd.to_numeric(column, errors="coerce") if booleans.isna().any() else booleans
    values = np.asarray(numbers, dtype=np.float64)
    text = np.isnan(values)
    if text.any():
        raise DataError(
            f"column {column.name!r} must hold numbers; it has text in {_rows(text)}, such as "
            f"{column[text].iloc[0]!r}; encode it as numbers or drop the column"
        )
    infinite = np.isinf(values)
    if infinite.any():
        raise DataError(
            f"column {column.name!r} must hold finite numbers; it is infinite in "
            f"{_rows(infinite)}; correct or drop those rows"
        )
    if values.min() == values.max():
        raise DataError(
            f"column {column.name!r} is constant ({column.iloc[0]}), so it cannot be standardized; "
            "drop it"
        )
    return values


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
            f"{len(y)} rows ({_some(counts)}) are too few to train and test on every class with a "
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

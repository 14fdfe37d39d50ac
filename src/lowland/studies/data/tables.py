"""Tables of your own, from CSV files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lowland.studies.data.dataset import DataError, Dataset, some

_BOOLEANS = {"false": 0.0, "true": 1.0}  # in any case
_MANY_CLASSES = 20  # unusually many, though not too many
_MISSING = ("", "na", "n/a", "nan", "null", "none", "?")  # as people write it, in any case
_NOTHING = ("", "nan")  # of these, what names no class of any kind


def read_csv(path: Path, target: str) -> Dataset:
    """Read a comma-separated table with a header line, numeric features and a few classes.

    Args:
        path: The file, in UTF-8. True and false in a feature are read as 1 and 0.
        target: The name of the column to predict: text, numbers or booleans of at least two values.
            Classes are numbered in their order; the one that sorts first becomes 0. Beside other
            text ``NA``, ``None``, ``null`` and ``?`` are classes of these names.

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
    return some([repr(name) for name in names])


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


def _refuse_unlabelled(labels: pd.Series[str]) -> None:
    """Refuse what names no class: an empty cell, or a word for nothing beside numbers."""
    lower = labels.str.lower()
    others = pd.to_numeric(labels[~lower.isin(_MISSING)], errors="coerce")
    numeric = len(others) > 0 and not others.isna().any()
    missing = lower.isin(_MISSING if numeric else _NOTHING).to_numpy()
    if missing.any():
        cell = labels[missing].iloc[0]
        shown = f"{cell!r} where other classes are numbers" if cell and numeric else "empty or NaN"
        raise DataError(
            f"the target {labels.name!r} is {shown}, in {_rows(missing)}; if that is a class, give "
            "it another name, such as 'no label', and otherwise drop those rows"
        )


def _encode(labels: pd.Series[str]) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Labels as numbers from 0, and the names of the classes."""
    _refuse_unlabelled(labels)
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

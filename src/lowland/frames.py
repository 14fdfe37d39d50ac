"""Tables of results, where pandas is installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame
else:  # optional; annotations are looked at in the tests
    DataFrame = Any

__all__ = ["DataFrame", "frame"]


def frame(columns: Mapping[str, Any]) -> DataFrame:
    """A data frame of columns of one length, by their names.

    Raises:
        ImportError: Without pandas, ``pip install 'lowland[cli]'``.
    """
    try:
        import pandas as pd  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError(f"to_frame needs pandas ({error}): pip install 'lowland[cli]'") from error
    return pd.DataFrame(columns)

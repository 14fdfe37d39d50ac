"""Labelled samples, as every source gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor

from lowland.errors import UserError


class DataError(UserError, ValueError):
    """Data that cannot be used as it is; the message says where and what to do."""


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


def some(items: Sequence[str]) -> str:
    """The first few of a list, and how many more there are, for messages."""
    more = f" and {len(items) - 8} more" if len(items) > 8 else ""
    return ", ".join(items[:8]) + more

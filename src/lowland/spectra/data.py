"""What may stand for a data set, and how its batches add up to one loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from lowland.criteria import mass, scalar_loss
from lowland.validation import check_tensor, check_values


def as_batches(data: object) -> Iterable[Any]:
    """One batch of a pair of tensors; anything else that can be iterated over twice as it is.

    Raises:
        TypeError: If it is neither, or would be used up by its first pass.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor):
        x, y = data
        return [(x, y)]
    if isinstance(data, Iterator):
        raise TypeError(
            f"data must give its batches again and again; got {_kind(data)}, which is used up "
            "after one pass: use the DataLoader itself, or list(data)"
        )
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(
            "data must be a pair (x, y) of tensors, a DataLoader, or a list of such pairs; got "
            f"{_kind(data)}"
        )
    return data


def checked(batches: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
    """One pass over the data, with a look at each batch.

    Raises:
        TypeError: If a batch is no pair ``(x, y)``.
        ValueError: If there is no batch, or one is empty or has NaN or infinite values.
    """
    index = -1
    for index, batch in enumerate(batches):
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            length = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
            raise TypeError(
                f"each batch of data must be a pair (x, y); batch {index} is {_kind(batch)}{length}"
            )
        x, y = batch
        check_tensor(y, f"y of batch {index}")
        for name, part in (("x", x), ("y", y)):
            if isinstance(part, Tensor):
                check_values(part, f"{name} of batch {index}")
        yield x, y
    if index < 0:
        raise ValueError("data is empty: got no batch; a loss needs at least one sample")


def digest(value: object) -> object:
    """Something small that two batches share if, and only if, they hold the same numbers."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            value = value.to_dense()
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return value.dtype, value.shape, blake2b(raw.data, digest_size=16).digest()
    if isinstance(value, Mapping):
        return {key: digest(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [digest(part) for part in value]
    return type(value)  # nothing more is known; what it does to the loss is looked at by itself


class Weighed(nn.Module):
    r"""A criterion whose sum over batches is the loss of the data set.

    A criterion of reduction ``"mean"`` counts a batch by what its own mean divides by: samples, or
    for classes of different weight their weights, so that

    .. math:: L = \sum_b \frac{m_b}{m} \ell_b, \qquad m = \sum_b m_b

    is the mean over the data set however it is cut.

    Args:
        criterion: Maps the model's output and the targets to a scalar.
        total: ``m``.
    """

    def __init__(self, criterion: Callable[..., Any], total: float | Tensor = 1.0) -> None:
        super().__init__()
        self.criterion = criterion
        self.total = total

    def forward(self, output: Any, y: Tensor) -> Any:
        """What a batch adds to the loss."""
        loss = scalar_loss(self.criterion, output, y)
        if isinstance(self.total, float) and self.total == 1.0:
            return loss
        share = torch.as_tensor(mass(self.criterion, y) / self.total)
        return loss * share.to(loss.device, loss.dtype)


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__name__}"

"""What may stand for data, and what is looked at in its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from lowland.validation import check_tensor, check_values

Batch = tuple[Any, Any]


def as_pair(data: object) -> Batch | None:
    """``(x, y)`` if the data are one batch, a pair with a tensor of targets; else None."""
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor):
        return data[0], data[1]
    return None


def as_batches(data: object) -> Iterable[Any]:
    """One batch of a pair of tensors; anything else that can be iterated over twice as it is.

    Raises:
        TypeError: If it is neither, or would be used up by its first pass.
    """
    if (pair := as_pair(data)) is not None:
        return [pair]
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
    if isinstance(value, bool | int | float | str | None):
        return value
    return type(value)  # nothing more is known; what it does to the loss is looked at by itself


def rows(*values: object) -> int:
    """How many samples there are: rows of the first tensor that the values hold, at any depth.

    Raises:
        TypeError: If they hold no tensor with rows.
    """
    for value in values:
        for tensor in tensors(value):
            if tensor.ndim:
                return len(tensor)
    raise TypeError(
        "the number of samples is that of the rows of the first tensor in x, then in y; got "
        f"{' and '.join(map(_kind, values))}, which hold none"
    )


def to_device(value: Any, device: torch.device) -> Any:
    """The data on a device: tensors, what has a ``to``, and containers of these."""
    if isinstance(value, Tensor) or hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, Mapping) and type(value) is dict:
        return {key: to_device(part, device) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(to_device(part, device) for part in value)
    return value


def any_requires_grad(values: Iterable[object]) -> bool:
    """Whether a tensor in them asks for a gradient."""
    return any(tensor.requires_grad for value in values for tensor in tensors(value))


def tensors(value: object) -> Iterator[Tensor]:
    """All tensors that a value holds, at any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__name__}"


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A value with another tensor in the place of each that it holds; itself if it holds none."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) is dict:
        return {key: mapped(function, part) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(mapped(function, part) for part in value)
    return value


def head(value: Any, count: int) -> Any:
    """The first rows of each tensor that a value holds; sparse ones may refuse."""
    return mapped(lambda tensor: tensor[:count] if tensor.ndim else tensor, value)

"""What may stand for data: the one reader of batches for all calls.

A batch is ``(x, y)``: what the model takes, and what the criterion takes beside its output. One
that holds both in itself, a mapping, a named tuple or an object with tensors, stands for either:
the model is called on it, and the criterion is given the output and the whole batch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from hashlib import blake2b
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lowland.validation import check_tensor, check_values

Batch = tuple[Any, Any]

# Samples of a data set that comes without a loader: in the memory of one such batch it is measured.
_SAMPLES = 64

# What is never looked into, whatever tensors it holds.
_CLOSED = (Tensor, type, ModuleType, FunctionType, MethodType, nn.Module, DataLoader, Dataset)

_FORMS = (
    "a pair (x, y), one batch that holds both (a mapping, or an object with tensors), a "
    "DataLoader, a Dataset, or a list of such batches"
)
_ALONE = (
    "a tensor alone leaves open what the targets are: give (x, y), or (x, x) where inputs are "
    "their own targets, or (x, None) where the criterion takes none"
)


# What is data


def one_batch(x: Any, y: Any = None) -> Batch:
    """The batch that a call for one batch was given, as ``x`` and ``y`` or without ``y``.

    Raises:
        TypeError: If it is several.
    """
    if y is not None:
        return x, y
    if (batch := as_batch(x)) is not None:
        return batch
    several = type(x) is list and all(_is_pair(each) or isinstance(each, Mapping) for each in x)
    if isinstance(x, DataLoader | Dataset | Iterator) or several:
        raise TypeError(
            f"this takes one batch, (x, y) or one that holds both; got {_kind(x)}: go through its "
            "batches, or use lowland.hessian_moments or lowland.spectrum for all of them"
        )
    return x, None


def as_batch(data: object) -> Batch | None:
    """``(x, y)`` if the data are one batch, None if they are several, or none.

    Raises:
        TypeError: If they could be one as well as several.
    """
    if isinstance(data, tuple | list):
        return _as_pair(data)
    if isinstance(data, _CLOSED):
        return None
    # What can be iterated over and has no keys is somebody's own loader, whatever it holds.
    if (_keys(data) is not None or not isinstance(data, Iterable)) and holds_tensors(data):
        return data, data
    return None


def _as_pair(data: tuple[Any, ...] | list[Any]) -> Batch | None:
    if hasattr(data, "_fields") and len(data) > 2:  # named, as one batch is
        return (data, data) if holds_tensors(data) else None
    if len(data) != 2:
        return None
    x, y = data
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        return x, y
    if isinstance(data, list):
        return None
    if isinstance(x, tuple | list) and isinstance(y, tuple | list):
        raise TypeError(
            "a tuple of two sequences may be one batch of several inputs and several targets, or "
            "two batches: give a list, [(x, y)] for one batch, [(x, y), (x, y)] for two"
        )
    return x, y


class Batches:
    """Data as batches ``(x, y)``, as often as they are gone through."""

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        """One pass.

        Raises:
            TypeError: If a batch is no pair and holds no tensor.
        """
        for index, given in enumerate(self.data):
            batch = tuple(given) if _is_pair(given) else as_batch(given)
            if batch is None:
                raise TypeError(_no_batch(given, index))
            x, y = batch
            yield x, y


def as_batches(data: object, *, again: bool = True) -> Batches:
    """Batches that can be gone through, more than once if asked for.

    Raises:
        TypeError: If the data have none, or would be used up by their first pass.
    """
    if (batch := as_batch(data)) is not None:
        return Batches([batch])
    if isinstance(data, Dataset):
        return Batches(DataLoader(data, batch_size=_SAMPLES))
    # An iterator of some length starts anew each time, if its author meant it to.
    if again and isinstance(data, Iterator) and not hasattr(data, "__len__"):
        raise TypeError(
            f"data must give its batches again and again; got {_kind(data)}, which is used up "
            "after one pass: use the DataLoader itself, or list(data)"
        )
    if isinstance(data, Tensor):
        raise TypeError(f"data must be {_FORMS}; got {_kind(data)}: {_ALONE}")
    if isinstance(data, tuple) and any(isinstance(part, Tensor) for part in data):
        raise TypeError(f"data must be {_FORMS}; got {_kind(data)}{_of_length(data)}")
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise TypeError(f"data must be {_FORMS}; got {_kind(data)}")
    return Batches(data)


def checked(batches: Batches) -> Iterator[Batch]:
    """One pass over the data, with a look at each batch.

    Raises:
        TypeError: If a batch is no pair ``(x, y)``, or there is no tensor in one.
        ValueError: If there is no batch, or one is empty or has NaN or infinite values.
    """
    index = -1
    for index, (x, y) in enumerate(batches):
        if y is not None and not holds_tensors(y):
            check_tensor(y, f"y of batch {index}")
        for name, part in (("x", x), ("y", y)):
            if isinstance(part, Tensor):
                check_values(part, f"{name} of batch {index}")
        yield x, y
    if index < 0:
        raise ValueError(
            "data is empty: got no batch; a loss needs at least one sample, and an iterator, which "
            "can be gone through once, may be used up"
        )


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _no_batch(given: object, index: int) -> str:
    what = (
        f"each batch of data must be a pair (x, y), or hold both; batch {index} is {_kind(given)}"
    )
    if isinstance(given, Tensor):
        return f"{what}: {_ALONE}"
    if isinstance(given, tuple | list):
        return what + _of_length(given)
    return what + ", in which there is no tensor"


def _of_length(given: tuple[Any, ...] | list[Any]) -> str:
    length = f" of length {len(given)}"
    if len(given) > 2:
        return length + (
            ": put all that the criterion takes beside the output into y, as in "
            "((x, (y, weight)) for x, y, weight in loader), and all that the model takes into x"
        )
    return f"{length}: {_ALONE}" if given and isinstance(given[0], Tensor) else length


# What is in it


def parts_of(value: object) -> dict[Any, Any] | None:
    """What a container holds, by its keys, places or attributes; None for what is none."""
    if isinstance(value, _CLOSED):
        return None
    if (keys := _keys(value)) is not None:
        container: Any = value
        return {key: container[key] for key in keys}
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    else:
        slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
        names = [name for each in slots for name in ([each] if isinstance(each, str) else each)]
        names += vars(value) if hasattr(value, "__dict__") else []
    found = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return found or None


def _keys(value: object) -> list[Any] | None:
    """Of a mapping, also one that does not say that it is one."""
    if isinstance(value, Mapping):
        return list(value)
    if isinstance(value, _CLOSED) or not hasattr(type(value), "__getitem__"):
        return None
    keys = getattr(value, "keys", None)
    keys = keys() if callable(keys) else keys
    return list(keys) if isinstance(keys, Iterable) else None


def with_parts(value: Any, parts: Mapping[Any, Any]) -> Any:
    """A container like this one with other things in it; this one is not changed."""
    if isinstance(value, tuple | list):
        if hasattr(value, "_fields"):
            return type(value)(*parts.values())
        return type(value)(parts.values())
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        return dict(parts)
    other = copy.copy(value)
    if _keys(value) is not None:
        for key, part in parts.items():
            other[key] = part
    else:
        for key, part in parts.items():
            object.__setattr__(other, key, part)  # also of a frozen dataclass
    return other


def tensors(value: object) -> Iterator[Tensor]:
    """All tensors that a value holds, at any depth."""
    return _tensors(value, ())


def _tensors(value: object, around: tuple[int, ...]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in around and (parts := parts_of(value)) is not None:
        for part in parts.values():
            yield from _tensors(part, (*around, id(value)))


def holds_tensors(value: object) -> bool:
    """Whether it is a tensor, or there is one in it."""
    return next(tensors(value), None) is not None


def numbers(value: object, around: tuple[int, ...] = ()) -> bool:
    """Whether it holds, at any depth, a number that is none of one sample."""
    if isinstance(value, Tensor):
        return not value.ndim
    if isinstance(value, int | float) and not isinstance(value, bool):
        return True
    if isinstance(value, list) and not holds_tensors(value):  # of a sample each
        return False
    if id(value) in around:
        return False
    around = *around, id(value)
    return any(numbers(part, around) for part in (parts_of(value) or {}).values())


def any_requires_grad(values: Iterable[object]) -> bool:
    """Whether a tensor in them asks for a gradient."""
    return any(tensor.requires_grad for value in values for tensor in tensors(value))


def rows(x: object, y: object = None) -> int:
    """How many samples there are: the rows that the tensors of ``x`` and of ``y`` have in common.

    Raises:
        TypeError: If they have none in common, or several.
    """
    ours, theirs = _leading(x), _leading(y)
    shared = ours & theirs if ours and theirs else ours | theirs
    if len(shared) == 1:
        return shared.pop()
    raise TypeError(
        "the number of samples is that of the rows which tensors of x and of y have in common; got "
        f"{described(x)} and {described(y)}, where it is "
        + (f"one of {', '.join(map(str, sorted(shared)))}" if shared else "none")
    )


def _leading(value: object, around: tuple[int, ...] = ()) -> set[int]:
    """The first dimensions of tensors; none of samples in a list, each with a size of its own."""
    if isinstance(value, Tensor):
        return {value.shape[0]} if value.ndim else set()
    parts = parts_of(value)
    if parts is None or id(value) in around:
        return set()
    if isinstance(value, list) and any(
        not isinstance(part, Tensor) and holds_tensors(part) for part in value
    ):
        return set()
    return set().union(*(_leading(part, (*around, id(value))) for part in parts.values()))


def digest(value: object) -> object:
    """Something small that two batches share if, and only if, they hold the same numbers."""
    return _digest(value, {})


def _digest(value: object, seen: dict[int, int]) -> object:
    if isinstance(value, Tensor):
        plain = [_bytes(each) for each in _stored(value.detach())]
        return value.dtype, value.shape, value.layout, plain
    if isinstance(value, bool | int | float | str | None):
        return value
    if id(value) in seen:
        return "seen", seen[id(value)]
    if (parts := parts_of(value)) is not None:
        seen[id(value)] = len(seen)
        return {key: _digest(part, seen) for key, part in parts.items()}
    return type(value)  # nothing more is known; what it does to the loss is looked at by itself


def _stored(value: Tensor) -> list[Tensor]:
    """The dense tensors that hold a tensor's numbers."""
    if value.layout == torch.strided:
        return [value]
    if value.layout == torch.sparse_coo:
        value = value.coalesce()
        return [value.indices(), value.values()]
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [value.crow_indices(), value.col_indices(), value.values()]
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [value.ccol_indices(), value.row_indices(), value.values()]
    return [each.to_dense() for each in value.unbind()] if value.is_nested else [value.to_dense()]


def _bytes(value: Tensor) -> bytes:
    raw = value.cpu().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy()
    return blake2b(raw.data, digest_size=16).digest()


# What is done with it


def mapped(function: Callable[[Tensor], Tensor], value: Any, around: tuple[int, ...] = ()) -> Any:
    """A value with another tensor in the place of each that it holds; itself if none is."""
    if isinstance(value, Tensor):
        return function(value)
    parts = parts_of(value)
    if parts is None or id(value) in around or not holds_tensors(value):
        return value
    around = *around, id(value)
    found = {key: mapped(function, part, around) for key, part in parts.items()}
    if all(found[key] is part for key, part in parts.items()):
        return value
    return with_parts(value, found)


def spread(value: Any, count: int) -> Any:
    """So many rows of each tensor that a value holds, evenly spread; sparse ones may refuse."""

    def some(tensor: Tensor) -> Tensor:
        if not tensor.ndim or len(tensor) <= count:
            return tensor
        return tensor[torch.linspace(0, len(tensor) - 1, count).long().to(tensor.device)]

    return mapped(some, value)


def part_of(value: Any, count: int, start: int, stop: int) -> Any:
    """Some rows of each tensor that a value holds, of those that have so many."""

    def some(tensor: Tensor) -> Tensor:
        return tensor[start:stop] if tensor.ndim and len(tensor) == count else tensor

    return mapped(some, value)


def to_device(value: Any, device: torch.device) -> Any:
    """The data on a device; what is not there already is moved in a copy."""
    if isinstance(value, Tensor):
        return value.to(device)
    held = list(tensors(value))
    if held and all(tensor.device == device for tensor in held):
        return value
    if hasattr(value, "to"):
        return copy.copy(value).to(device)  # some move themselves
    if isinstance(value, dict | list | tuple):  # what is in it may have a way of its own
        parts = parts_of(value) or {}
        return with_parts(value, {key: to_device(part, device) for key, part in parts.items()})
    return mapped(lambda tensor: tensor.to(device), value)


class CannotJoinError(TypeError):
    """Two batches cannot be made one by putting the rows of their tensors together."""


def join(first: Any, second: Any, around: tuple[int, ...] = ()) -> Any:
    """Two batches as one: rows of tensors one after another, all else as in the first.

    Raises:
        CannotJoinError: If they differ in more than rows.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.ndim and first.shape[1:] == second.shape[1:] and first.ndim == second.ndim:
            return torch.cat([first, second])
        if not first.ndim and not second.ndim:
            return first
        raise CannotJoinError(
            f"tensors of shape {tuple(first.shape)} and {tuple(second.shape)} have no common rows"
        )
    if type(first) is not type(second):
        raise CannotJoinError(f"they hold {_kind(first)} and {_kind(second)}")
    parts, others = parts_of(first), parts_of(second)
    if parts is None or others is None or id(first) in around:
        return first
    if not (holds_tensors(first) or holds_tensors(second)):
        return first + second if type(first) is list else first
    if parts.keys() != others.keys():
        raise CannotJoinError(f"they hold {described(first)} and {described(second)}")
    around = *around, id(first)
    return with_parts(first, {key: join(part, others[key], around) for key, part in parts.items()})


# Words


def described(value: object) -> str:
    """A value in a few words, for messages."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    parts = parts_of(value)
    if not parts or len(parts) > 12:
        return _kind(value)
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return f"a {type(value).__name__} of {len(parts)}"
    names = getattr(value, "_fields", parts)
    return f"{type(value).__name__} with {', '.join(map(str, names))}"


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__name__}"

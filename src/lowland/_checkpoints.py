"""The parameters and buffers of a model at other times of its training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from lowland._batches import tensors

# A state dict, the path of a file with one, a module, or a function that gives one of these.
Checkpoint = Mapping[str, Any] | nn.Module | str | os.PathLike[str] | Callable[[], Any]

_WRAPPERS = ("module.", "_orig_mod.")  # of data-parallel and compiled modules


def read_all(checkpoints: Iterable[Checkpoint], model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What each checkpoint says of a model's parameters and buffers, one after the other.

    Args:
        checkpoints: Of a list all are looked at together, of anything else one at a time.
        model: Without wrappers.

    Yields:
        Tensors by the names of ``named_parameters()``, all of them, and ``named_buffers()``, those
        that are there; of the model's types and on its devices.

    Raises:
        TypeError: If a checkpoint is none.
        ValueError: If there is none, a parameter is missing, a shape is another, a frozen parameter
            differs, or two of a list are the same tensors.
    """
    if isinstance(checkpoints, Mapping | str | os.PathLike | nn.Module):
        raise TypeError(
            "checkpoints must be a list, or anything else that gives one after the other; got a "
            f"single {_kind(checkpoints)}: use [checkpoint]"
        )
    if isinstance(checkpoints, Sequence):
        _check_apart(checkpoints)
    number = -1
    for number, checkpoint in enumerate(checkpoints):
        yield _read(checkpoint, f"checkpoint {number}", model)
    if number < 0:
        raise ValueError("there is no checkpoint: got none of them; give at least one")


def _read(checkpoint: Checkpoint, what: str, model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = _inside(_load(checkpoint, what), what, set(parameters))
    values = {}
    for name, own in {**parameters, **dict(model.named_buffers())}.items():
        part = found.get(name)
        if part is None:
            continue
        if part.shape != own.shape:
            raise ValueError(
                f"{what} has shape {tuple(part.shape)} for {name!r}, and the model "
                f"{tuple(own.shape)}: it is of another model"
            )
        part = part.detach().to(own.device, own.dtype)
        is_frozen = name in parameters and not own.requires_grad
        if is_frozen and not torch.equal(part, own):
            raise ValueError(
                f"{what} differs from the model in {name!r}, which is frozen: call "
                f"requires_grad_() on the parameter to let it differ"
            )
        values[name] = part
    return values


def _load(checkpoint: Any, what: str) -> Mapping[str, Any]:
    if isinstance(checkpoint, nn.Module):
        checkpoint = checkpoint.state_dict()
    elif callable(checkpoint):
        checkpoint = _load(checkpoint(), what)
    elif isinstance(checkpoint, str | os.PathLike):
        checkpoint = _load_file(Path(checkpoint), what)
    if not isinstance(checkpoint, Mapping):
        raise TypeError(
            f"{what} must be a state dict, a module, the path of a file that torch.save or "
            f"safetensors wrote, or a function that gives one of these; got {_kind(checkpoint)}"
        )
    return checkpoint


def _load_file(path: Path, what: str) -> Any:
    """What a file holds.

    Raises:
        ImportError: Without safetensors, for a file of this name.
        ValueError: If it holds more than tensors and plain values, or is of another form.
    """
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError  # noqa: PLC0415 - optional
            from safetensors.torch import load_file  # noqa: PLC0415
        except ImportError as error:
            raise ImportError(
                f"{what} needs safetensors, which is not installed ({error}): "
                "pip install 'lowland[cli]'"
            ) from error
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{what}, {str(path)!r}, is no safetensors file: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, EOFError, KeyError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{what}, {str(path)!r}, is no file of tensors alone, as torch.save writes for a "
            "state_dict(); of a whole module it would run code when it is read: save "
            "model.state_dict(), or load it yourself and give the module"
        ) from error


def _inside(found: Mapping[str, Any], what: str, wanted: set[str]) -> Mapping[str, Tensor]:
    """The mapping itself, or the one in it, that has all of the parameters.

    Trainers save a state dict beside those of optimizer and schedule.
    """
    candidates = [
        {_plain(str(name)): part for name, part in each.items()} if wanted - each.keys() else each
        for each in (found, *(part for part in found.values() if isinstance(part, Mapping)))
    ]
    fitting = [each for each in candidates if wanted <= each.keys()]
    if len(fitting) > 1:
        raise ValueError(
            f"{what} holds {len(fitting)} state dicts of the model; give the one that is meant"
        )
    if not fitting:
        missing = min((sorted(wanted - each.keys()) for each in candidates), key=len)
        raise ValueError(
            f"{what} lacks {len(missing)} of the model's {len(wanted)} parameters, such as "
            f"{missing[0]!r}; it has {', '.join(repr(str(name)) for name in list(found)[:4])}"
            f"{' and others' if len(found) > 4 else ''}: give the model's own state_dict()"
        )
    return {name: part for name, part in fitting[0].items() if isinstance(part, Tensor)}


def _plain(name: str) -> str:
    """A parameter's name in the module inside of data-parallel and compiled ones."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _check_apart(checkpoints: Sequence[Any]) -> None:
    """Refuse state dicts that are views of the same parameters, all as they are now.

    Raises:
        ValueError: If two of them share a tensor's memory.
    """
    seen: dict[int, int] = {}
    for number, checkpoint in enumerate(checkpoints):
        state = checkpoint.state_dict() if isinstance(checkpoint, nn.Module) else checkpoint
        if not isinstance(state, Mapping):
            continue
        part = next((each for each in tensors(state) if each.is_floating_point()), None)
        if part is None or not part.numel():
            continue
        other = seen.setdefault(part.data_ptr(), number)
        if other != number:
            raise ValueError(
                f"checkpoints {other} and {number} are the same tensors, with the values that they "
                "have now: a state_dict() refers to the model's parameters and changes with them. "
                "Keep copies, {name: part.clone() for name, part in model.state_dict().items()}, "
                "and give each once"
            )


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__name__}"

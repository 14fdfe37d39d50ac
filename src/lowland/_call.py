"""How a model is called on what a batch gives it: one way, for every engine.

A mapping is a model's named arguments (``model(**x)``, as Hugging Face's models take their batches)
or its only argument (``model(x)``), by the signature of its ``forward``. A tuple or list is several
arguments where ``forward`` cannot do with one. All else is the only argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from inspect import Parameter
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_BY_PLACE = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def call(model: nn.Module, x: Any) -> Any:
    """The model's output for ``x``.

    Raises:
        TypeError: As :func:`arguments`.
    """
    places, names = arguments(model, x)
    return model(*places, **names)


def arguments(model: nn.Module, x: Any) -> Arguments:
    """What the model is called with, by place and by name.

    Raises:
        TypeError: If the signature of its ``forward`` leaves open which, or neither fits.
    """
    if isinstance(x, Tensor) or not isinstance(x, Mapping | tuple | list):
        return (x,), {}
    try:
        takes = list(inspect.signature(_inside(model).forward).parameters.values())
    except (TypeError, ValueError):  # of compiled code, which does not say
        return (x,), {}
    if not isinstance(x, Mapping):
        return (tuple(x) if len(x) > 1 and _fits(takes, len(x)) else (x,)), {}
    names = [each.name for each in takes if each.kind in _BY_NAME]
    required = [each for each in takes if each.default is each.empty and each.kind not in _ANY]
    lacking = [each.name for each in required if each.name not in x or each.kind not in _BY_NAME]
    unknown = [] if _has(takes, Parameter.VAR_KEYWORD) else [key for key in x if key not in names]
    named = [key for key in x if key in names]
    alone = _fits(takes, 1)
    whose = f"forward of {type(_inside(model)).__name__} takes ({', '.join(map(str, takes))})"
    if not lacking and not unknown:
        explicit = any(each.kind in _BY_PLACE for each in takes)
        if named or not explicit or not alone:
            return (), {str(key): x[key] for key in x}
        raise TypeError(
            f"{whose}, so that it may be meant to take the batch's keys "
            f"{', '.join(map(str, x))} by name, or the batch as {takes[0].name!r}: name the keys "
            "in forward, or let it have no further named arguments"
        )
    if alone and (lacking or not named):
        return (x,), {}
    wrong = [f"lacks {', '.join(lacking)}"] if lacking else []
    wrong += [f"has {', '.join(map(str, unknown))} too"] if unknown else []
    raise TypeError(
        f"{whose}, and the batch {' and '.join(wrong)}: give a batch (x, y) whose x has just what "
        "forward takes, and put what the criterion takes into y"
    )


_ANY = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def _has(takes: list[Parameter], kind: Any) -> bool:
    return any(each.kind == kind for each in takes)


def _fits(takes: list[Parameter], count: int) -> bool:
    """Whether so many arguments by place are a call; of more than one, whether only they are."""
    places = [each for each in takes if each.kind in _BY_PLACE]
    least = sum(each.default is each.empty for each in places)
    most = float("inf") if _has(takes, Parameter.VAR_POSITIONAL) else len(places)
    by_name = [each for each in takes if each.kind == Parameter.KEYWORD_ONLY]
    if any(each.default is each.empty for each in by_name):
        return False
    return least <= count <= most and (count == 1 or least > 1)


def _inside(model: nn.Module) -> Any:
    """The module in wrappers whose ``forward`` takes anything."""
    inside: Any = model
    while True:
        if isinstance(inside, DistributedDataParallel | nn.DataParallel):
            inside = inside.module
        elif "_orig_mod" in inside._modules:  # noqa: SLF001 - as PyTorch marks compiled modules
            inside = inside._modules["_orig_mod"]  # noqa: SLF001
        else:
            return inside

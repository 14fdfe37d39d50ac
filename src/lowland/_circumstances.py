"""What a look at a loss holds for, so that nothing is looked at twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

from torch import nn

from lowland.objective import Objective

T = TypeVar("T")


def circumstances(target: Objective) -> tuple[object, ...]:
    """What a look at a loss holds for: the model's layers and mode, parameters and criterion."""
    layers = hash(tuple((type(module), module.training) for module in target.model.modules()))
    return layers, tuple(target.names), target.matrix, _identity(target.criterion)


def _identity(criterion: Any) -> object:
    """The same for functions that are made anew for each call."""
    if isinstance(criterion, partial):
        return _identity(criterion.func)
    if isinstance(criterion, MethodType):
        return _identity(criterion.__func__)
    if isinstance(criterion, nn.Module):
        return ref(criterion)
    return getattr(criterion, "__code__", type(criterion))


def once_a_model(function: Callable[[Objective], T]) -> Callable[[Objective], T]:
    """A function whose result is kept for a model under :func:`circumstances`."""
    known: WeakKeyDictionary[nn.Module, dict[object, T]] = WeakKeyDictionary()

    @wraps(function)
    def looked_at(target: Objective) -> T:
        results, now = known.setdefault(target.model, {}), circumstances(target)
        if now not in results:
            results[now] = function(target)
        return results[now]

    return looked_at

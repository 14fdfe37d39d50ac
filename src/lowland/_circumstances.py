"""What a look at a loss holds for, so that nothing is looked at twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from types import FunctionType, MethodType, NoneType
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary, ref

from torch import nn

from lowland.objective import Objective
from lowland.passes import content

P = ParamSpec("P")
T = TypeVar("T")


def circumstances(target: Objective) -> tuple[object, ...]:
    """What a look at a loss holds for: the model's layers and mode, parameters and criterion."""
    layers = hash(tuple(map(_kind_of, target.model.modules())))
    criterion = target.criterion
    # Of a module what it is, not which: it may be made anew for each call.
    kind = (
        tuple(map(_kind_of, criterion.modules()))
        if isinstance(criterion, nn.Module)
        else _identity(criterion)
    )
    return layers, tuple(target.names), target.matrix, kind


def _kind_of(module: nn.Module) -> object:
    """Its class, its switches, the functions that it holds, and its hooks."""
    held = vars(module)
    switches = tuple(
        [
            (name, value if isinstance(value, _SWITCHES) else _identity(value))
            for name, value in held.items()
            if name not in _COLLECTIONS and (isinstance(value, _SWITCHES) or callable(value))
        ]
    )
    hooks = (held.get("_forward_hooks"), held.get("_forward_pre_hooks"))
    return type(module), switches, *(tuple(map(id, each.values())) for each in hooks if each)


_SWITCHES = (bool, str, NoneType)
# What each module has of parameters, buffers, hooks and modules within: neither of both.
_COLLECTIONS = frozenset(
    name for name, value in vars(nn.Module()).items() if hasattr(value, "__len__")
)


def _identity(function: Any) -> object:
    """The same for functions that are made anew for each call, of the same functions."""
    if isinstance(function, partial):
        inside = [*function.args, *function.keywords.values()]
        held = tuple(_identity(each) for each in inside if callable(each))
        return _identity(function.func), held
    if isinstance(function, MethodType):
        return _identity(function.__func__), id(function.__self__)
    if isinstance(function, FunctionType):
        cells = map(content, function.__closure__ or ())
        defaults = function.__defaults__ or ()
        held = tuple(_identity(each) for each in (*cells, *defaults) if callable(each))
        return function.__code__, held
    try:
        return ref(function)
    except TypeError:
        return id(function)


def once_a_model(
    function: Callable[Concatenate[Objective, P], T],
) -> Callable[Concatenate[Objective, P], T]:
    """A function whose result is kept for a model under :func:`circumstances`, and for the rest."""
    known: WeakKeyDictionary[nn.Module, dict[object, T]] = WeakKeyDictionary()

    @wraps(function)
    def looked_at(target: Objective, /, *args: P.args, **options: P.kwargs) -> T:
        results, now = known.setdefault(target.model, {}), (circumstances(target), args)
        if now not in results:
            results[now] = function(target, *args, **options)
        return results[now]

    return looked_at

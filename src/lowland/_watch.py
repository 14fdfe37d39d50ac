"""Operations of a model that nobody has looked at yet: those of other experts, branches, switches.

A look at a model's derivatives holds for the operations that it has met. Which these are is told
by the graph of a loss: which operation follows which one. Who has looked at a model leaves a word
here, and is asked again as soon as a loss is made in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

# An operation, which of its inputs (the third and all beyond are one), and where that comes from.
Step = tuple[type, int, type]


@dataclass(eq=False)
class _Watch:
    met: set[Step] = field(default_factory=set)
    look: Callable[[Any, frozenset[Step]], None] | None = None


_watches: WeakKeyDictionary[nn.Module, _Watch] = WeakKeyDictionary()


@contextmanager
def meeting(model: nn.Module, look: Callable[[Any, frozenset[Step]], None]) -> Iterator[None]:
    """Whatever losses of a model are made of meanwhile is known from then on.

    Args:
        model: The model.
        look: What is called, with a loss and its steps, when that is made of others.
    """
    watch = _watches.setdefault(model, _Watch())
    watch.look = None
    try:
        yield
    finally:
        watch.look = look


def notice(model: nn.Module, nodes: Iterable[Any], loss: Any) -> None:
    """Let a loss be looked at if it is made of operations that have not been met."""
    watch = _watches.get(model)
    if watch is None:
        return
    steps = steps_of(nodes)
    if watch.look is None:
        watch.met |= steps
    elif not steps <= watch.met:
        watch.look(loss, steps)


def met_by(model: nn.Module) -> set[Step]:
    """What losses of a model have been made of whenever they were looked at."""
    return _watches[model].met


def steps_of(nodes: Iterable[Any]) -> frozenset[Step]:
    """Which operations follow which ones in a graph, conversions of types aside."""
    return frozenset(
        (type(node), min(place, 2), type(_beyond_casts(before)))
        for node in nodes
        if not _is_cast(node)
        for place, (before, _) in enumerate(node.next_functions)
    )


def _beyond_casts(node: Any) -> Any:
    while node is not None and _is_cast(node):
        node = node.next_functions[0][0]
    return node


def _is_cast(node: Any) -> bool:
    return type(node).__name__ == "ToCopyBackward0"

"""Whether gradients are still what a backward pass made of them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import Variable

from lowland._leftovers import _mark, _node, _same


class Untouched:
    """Watches, until it is closed, whether gradients are changed after backward passes.

    As by clipping, after which the difference of two gradients says nothing about curvature.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowland._untouched import Untouched
        >>> layer, x = nn.Linear(2, 2), torch.ones(1, 2)
        >>> untouched = Untouched(layer.parameters())
        >>> layer(x).sum().backward()
        >>> bool(untouched)
        True
        >>> _ = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        >>> bool(untouched)
        False
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self._left: dict[Tensor, Any] = {}
        self._waiting = False
        self._nodes = [_node(p) for p in self._parameters if p.requires_grad]
        self._handles = [node.register_prehook(self._arrive) for node in self._nodes]

    def close(self) -> Untouched:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._nodes.clear()
        return self

    def __bool__(self) -> bool:
        """Whether there was a backward pass, and every gradient is as the last one left it."""
        return bool(self._left) and all(_same(_mark(p), left) for p, left in self._left.items())

    def _arrive(self, _gradients: Any) -> None:
        if not self._waiting:
            self._waiting = True
            # Twice, so that it comes after the means over processes, which are queued in between.
            later = Variable._execution_engine.queue_callback  # noqa: SLF001 - has no public name
            later(partial(later, self._leave))

    def _leave(self) -> None:
        self._waiting = False
        self._left = {p: _mark(p) for p in self._parameters}

"""Gradients that were there before others come, and whether these are added to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowland._sharding import is_sharded, layout, local, sum_over_parts

_Mark = tuple[Tensor | None, int]


class Leftovers:
    """Watches, until it is closed, which gradients are not zeroed before others are added to them.

    It cannot be seen afterwards, for ``zero_()`` and ``+=`` both change a gradient in place. So
    each parameter is looked at when the first gradient arrives at it: what is still the same tensor
    in the same version has not been zeroed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowland._leftovers import Leftovers
        >>> layer, x = nn.Linear(2, 2), torch.ones(1, 2)
        >>> layer(x).sum().backward()
        >>> leftovers = Leftovers(layer.parameters())
        >>> _ = layer.weight.grad.zero_()
        >>> layer(x).sum().backward()
        >>> [p is layer.bias for p in leftovers.close().kept]
        [True]
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._before = {p: _mark(p) for p in parameters}
        # To shards theirs are added elsewhere, and it is too late when one looks afterwards.
        self._there = {
            p: amount(gradient)
            for p, (gradient, _) in self._before.items()
            if gradient is not None and is_sharded(p)
        }
        self._arrived: set[Tensor] = set()
        self._left: dict[Tensor, _Mark] = {}  # as the last gradient left those that were untouched
        self._amounts: dict[Tensor, Tensor] = {}  # of what was there and was not zeroed
        # At the nodes, since compiled code would depend on hooks of the parameters themselves.
        self._nodes = {p: _node(p) for p in self._before if p.requires_grad}
        self._handles = [
            node.register_prehook(partial(self._arrive, p)) for p, node in self._nodes.items()
        ]

    def close(self) -> Leftovers:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._nodes.clear()
        for p in self._before:
            if p not in self._arrived:
                self._look(p)
        return self

    @property
    def kept(self) -> list[Tensor]:
        """The parameters whose gradients were not zeroed."""
        return list(self._amounts)

    @property
    def arrived(self) -> bool:
        """Whether gradients came, as far as can be seen: shards get theirs in another way."""
        return bool(self._arrived) or any(map(is_sharded, self._before))

    def added_to(self) -> bool:
        """Whether others were added to a gradient other than zero; may wait for the device.

        If no gradient came by way of PyTorch's engine they were written in another way, as by a
        replayed CUDA graph, over what was there.
        """
        return self.arrived and nonzero(self._amounts)

    def zeroed_late(self) -> bool:
        """Whether all gradients that came were zeroed, and not before; may wait for the device."""
        return (
            bool(self._arrived)
            and self._arrived <= self._left.keys()
            and not any(_same(_mark(p), left) for p, left in self._left.items())
            and not nonzero({p: amount(p.grad) for p in self._arrived if p.grad is not None})
        )

    def _arrive(self, p: Tensor, _gradients: Any) -> None:
        if p not in self._arrived:
            self._arrived.add(p)
            if self._look(p):
                self._handles.append(self._nodes[p].register_hook(partial(self._leave, p)))

    def _leave(self, p: Tensor, *_: Any) -> None:
        self._left[p] = _mark(p)

    def _look(self, p: Tensor) -> bool:
        """Whether the gradient is as it was."""
        untouched = _same(_mark(p), self._before[p])
        if untouched and p.grad is not None:
            self._amounts[p] = self._there[p] if p in self._there else amount(p.grad)
        return untouched


def _node(p: Tensor) -> Any:
    """Where its gradients arrive; ``get_gradient_edge`` would take twice the time."""
    with torch.enable_grad():
        return p.view_as(p).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


def _mark(p: Tensor) -> _Mark:
    """The gradient, and how often it was written to."""
    return p.grad, -1 if p.grad is None else p.grad._version  # noqa: SLF001 - has no public name


def _same(one: _Mark, other: _Mark) -> bool:
    return one[0] is other[0] and one[1] == other[1]


def amount(gradient: Tensor) -> Tensor:
    """How many numbers other than zero there are here, without waiting for the device."""
    values = local(gradient.detach())
    return (values._values() if values.is_sparse else values).count_nonzero()  # noqa: SLF001


def nonzero(amounts: Mapping[Tensor, Tensor]) -> bool:
    """Whether there are any, of the parameters' gradients, in any process; waits for the device."""
    return any(bool(sum_over_parts(count, layout(p))) for p, count in amounts.items())

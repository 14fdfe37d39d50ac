"""Gradients that were there before others come, and whether these are added to them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lowland._sharding import is_sharded


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
        self._marks = {p: (p.grad, _version(p.grad)) for p in parameters if p.grad is not None}
        self._arrived: set[Tensor] = set()
        self._amounts: dict[Tensor, Tensor] = {}
        # At the nodes, since compiled code would depend on hooks of the parameters themselves.
        nodes = {p: get_gradient_edge(p).node for p in self._marks if p.requires_grad}
        self._nodes = list(nodes.values())  # nobody else may keep them
        self._handles = [
            node.register_prehook(partial(self._arrive, p)) for p, node in nodes.items()
        ]

    def close(self) -> Leftovers:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._nodes.clear()
        for p in self._marks.keys() - self._arrived:
            self._look(p)
        return self

    @property
    def kept(self) -> list[Tensor]:
        """The parameters whose gradients were not zeroed."""
        return list(self._amounts)

    def added_to(self) -> bool:
        """Whether others were added to a gradient other than zero; may wait for the device.

        If no gradient came by way of PyTorch's engine they were written in another way, as by a
        replayed CUDA graph, over what was there; only shards get theirs from elsewhere.
        """
        if not self._arrived and not any(map(is_sharded, self._marks)):
            return False
        return any(bool(amount) for amount in self._amounts.values())

    def _arrive(self, p: Tensor, _gradients: Any) -> None:
        if p not in self._arrived:
            self._arrived.add(p)
            self._look(p)

    def _look(self, p: Tensor) -> None:
        gradient, version = self._marks[p]
        if p.grad is gradient and _version(gradient) == version:
            values = gradient.detach()
            self._amounts[p] = (values._values() if values.is_sparse else values).count_nonzero()  # noqa: SLF001


def _version(tensor: Tensor) -> int:
    """How often it was written to."""
    return tensor._version  # noqa: SLF001 - PyTorch has no public name for it

"""Two gradients side by side, in all that they are asked for in: a loss's and a penalty's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from lowland._batches import tensors
from lowland.objective import Objective, leaves, without_hooks
from lowland.probes import average_over_processes
from lowland.products import norm

# Numbers stay on the device where they are found, so that no host waits for them; on a processor
# they are plain ones, since each operation on a tensor costs as much as some hundred of those.
Number = float | Tensor
Inputs = list[Tensor]


@dataclass
class Gradients:
    """The gradients of a loss and of a quantity; None where one does not depend on an input.

    Attributes:
        inputs: What they are asked for in: parameters, and whatever else leads there.
        of_loss: As many parts.
        of_quantity: As many parts.
        loss: Its value.
        quantity: Its value.
        means: Both gradients over all processes of a data-parallel model, if it is one. What is
            handed out are each process's own, which are averaged as the loss's are.
    """

    inputs: Inputs
    of_loss: list[Tensor | None]
    of_quantity: list[Tensor | None]
    loss: Tensor
    quantity: Tensor
    means: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None

    def lengths(self) -> Tensor:
        """Those of both gradients, two numbers."""
        parts = self.means or (self.of_loss, self.of_quantity)
        return torch.stack([self._length(each) for each in parts])

    def sum(self, factor: Number) -> tuple[Inputs, Inputs]:
        """The inputs that either depends on, and the loss's gradient plus so much of the other."""
        found = [_plus(*pair, factor) for pair in zip(self.of_loss, self.of_quantity, strict=True)]
        return self._kept(found)

    def times(self, factor: Number) -> tuple[Inputs, Inputs]:
        """The inputs that the quantity depends on, and so much of its gradient."""
        return self._kept([None if part is None else part * factor for part in self.of_quantity])

    def without_overflows(self) -> tuple[Gradients, Tensor]:
        """With a quantity and gradient of zero where these are not finite; whether all was."""
        lengths = self.lengths()
        finite = lengths[1].isfinite() & self.quantity.isfinite()
        everything = finite & lengths[0].isfinite()
        if finite.device.type == "cpu" and finite:
            return self, everything

        def zeroed(parts: Sequence[Tensor | None]) -> list[Any]:
            return [None if part is None else torch.where(finite, part, 0) for part in parts]

        means = self.means and (self.means[0], zeroed(self.means[1]))
        quantity = torch.where(finite, self.quantity, 0)
        new = replace(self, of_quantity=zeroed(self.of_quantity), quantity=quantity, means=means)
        return new, everything

    def _kept(self, parts: Sequence[Tensor | None]) -> tuple[Inputs, Inputs]:
        pairs = [(i, part) for i, part in zip(self.inputs, parts, strict=True) if part is not None]
        return [each for each, _ in pairs], [part for _, part in pairs]

    def _length(self, parts: Sequence[Tensor | None]) -> Tensor:
        known = [part for part in parts if part is not None]
        return norm(known) if known else torch.zeros_like(self.loss)


def both_gradients(
    target: Objective, loss: Tensor, quantity: Tensor, scale: Number = 1.0
) -> Gradients:
    """The gradients of a loss and of a quantity of it, whose graphs are given up.

    Args:
        target: What they are of.
        loss: With its graph.
        quantity: With its graph.
        scale: Of the gradients on their way, against underflow.
    """
    inputs, shared = _inputs(target, (loss, quantity))
    with without_hooks(inputs), torch.autocast(target.device.type, enabled=False):
        first = _gradient(loss, inputs, scale, keep=True)
        # What a model keeps from pass to pass, as cached weights, may hold a part of the graph.
        second = _gradient(quantity, inputs, scale, keep=not target.is_ordinary)
    # What the loss does not depend on, no quantity of it does: some engines have zeros there.
    second = [None if one is None else other for one, other in zip(first, second, strict=True)]
    means = None
    if average := average_over_processes(target.outer):
        means = _filled(inputs[:shared], first), _filled(inputs[:shared], second)
        average([*means[0], *means[1]])
    return Gradients(inputs, first, second, loss.detach(), quantity.detach(), means)


def _filled(parameters: Inputs, parts: Sequence[Tensor | None]) -> list[Tensor]:
    """Copies of a gradient's parts, with zeros for those that are missing."""
    return [
        torch.zeros_like(p) if part is None else part.clone()
        for p, part in zip(parameters, parts, strict=False)
    ]


def _inputs(target: Objective, values: Iterable[Tensor]) -> tuple[Inputs, int]:
    """The model's trainable parameters, how many, and behind them what else values depend on."""
    parameters = [p for p in target.model.parameters() if p.requires_grad]
    given = [each for each in tensors(target.batch) if each.requires_grad]
    if target.is_ordinary:
        return [*parameters, *given], len(parameters)
    known = {id(each) for each in (*parameters, *given)}
    found = leaves(*values, until=[each.grad_fn for each in given])
    others = [each for each in found if id(each) not in known]
    return [*parameters, *given, *others], len(parameters)


def _gradient(value: Tensor, inputs: Inputs, scale: Number, *, keep: bool) -> list[Tensor | None]:
    if not value.requires_grad:
        return [None] * len(inputs)
    scaled = scale if isinstance(scale, Tensor) or scale != 1 else None
    start = None if scaled is None else torch.ones_like(value) * scaled
    found = grad(value, inputs, start, retain_graph=keep, allow_unused=True)
    parts: list[Tensor | None] = list(found)
    for index, part in enumerate(parts):
        if part is not None and part.is_sparse:
            parts[index] = part.to_dense()
    return parts if scaled is None else [None if p is None else p / scaled for p in parts]


def _plus(one: Tensor | None, other: Tensor | None, factor: Number) -> Tensor | None:
    if other is None:
        return one
    if one is None:
        return other * factor
    if isinstance(factor, Tensor):
        return torch.addcmul(one, other, factor)
    return torch.add(one, other, alpha=factor)

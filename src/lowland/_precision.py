"""A loss in double precision, whatever the precision of its model, while its model stays itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import grad

from lowland._batches import mapped
from lowland.errors import UnsupportedModelError
from lowland.objective import Objective, differentiating, graph, is_scripted, places_of, replacing


@contextmanager
def in_double(target: Objective) -> Iterator[Objective]:
    """The same loss in double precision, without autocast.

    Meanwhile the model and the criterion hold copies of all their floating-point numbers; what a
    ``forward`` casts to another type by itself is of that type still.

    Args:
        target: A loss on one batch.

    Raises:
        UnsupportedModelError: If the model is scripted, and so keeps the parameters that it has.
        TypeError: If the device has no such numbers.
    """
    modules = target.modules
    if any(map(is_scripted, modules)):
        raise UnsupportedModelError("scripted modules keep the parameters that they have")
    held = [t for m in modules for t in (*m.parameters(), *m.buffers()) if t.is_floating_point()]
    wide = {id(t): t.detach().double().requires_grad_(t.requires_grad) for t in held}
    places = [place for m in modules for place in places_of(m, held)]
    x, y = target.batch
    with replacing(places, wide), torch.autocast(target.device.type, enabled=False):
        yield replace(
            target,
            batches=((mapped(_doubled, x), mapped(_doubled, y)),),
            parameters=[wide[id(p)] for p in target.parameters],
            others=[wide[id(p)] for p in target.others],
        )


@contextmanager
def best_precision(target: Objective) -> Iterator[Objective]:
    """:func:`in_double` where the model goes along with it, else the loss as it is."""
    with ExitStack() as stack:
        wide = target
        if any(p.dtype != torch.float64 for p in target.parameters):
            try:
                wide = stack.enter_context(in_double(target))
                with wide.remember()(), differentiating():
                    loss = wide.value()
                    _check_reached(target, loss)
                    grad(loss, wide.parameters, allow_unused=True)
            except (RuntimeError, TypeError, ValueError):  # something within is of another type
                stack.close()
                wide = target
        yield wide


def _check_reached(target: Objective, loss: Tensor) -> None:
    """Require a loss that does not see the parameters which copies have taken the place of.

    Raises:
        UnsupportedModelError: If the model or the criterion holds some elsewhere: in a tuple, or a
            function.
    """
    originals = {id(p) for p in target.parameters}
    if any(id(getattr(node, "variable", None)) in originals for node in graph(loss)):
        raise UnsupportedModelError("a parameter is held where it cannot be replaced")


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor

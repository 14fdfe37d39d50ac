"""What a product with a Hessian takes: counted rather than timed, for choices that stay."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lowland._batches import tensors
from lowland._circumstances import once_a_model
from lowland.objective import Objective
from lowland.products import curvature_of

# Of one core, for small convolutions; and what PyTorch takes to begin an operation.
_OPERATIONS_A_SECOND = 1e10
_SECONDS_A_CALL = 5e-6


def seconds_a_product(target: Objective) -> float:
    """Roughly how long one product takes on a processor, by its arithmetic."""
    return _counted(target, tuple(tuple(each.shape) for each in tensors(target.batch)))


@once_a_model
def _counted(target: Objective, shapes: object) -> float:  # noqa: ARG001 - other data, other work
    direction = [torch.ones_like(p) for p in target.parameters]
    with target.remember()(), target.others_frozen():
        try:
            with curvature_of(target) as curvature, _Count() as count:
                curvature.product(direction, wanted=False)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):
            # There is none, or no finite one: differences of two gradients stand for it.
            with _Count() as count:
                target.gradient()
            count.calls, count.operations = 2 * count.calls, 2 * count.operations
    seconds: float = count.operations / _OPERATIONS_A_SECOND + count.calls * _SECONDS_A_CALL
    return seconds


class _Count(TorchDispatchMode):
    """Counts calls of kernels, and the arithmetic of those that do most of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0
        self.operations = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        formula = flop_registry.get(func._overloadpacket)  # noqa: SLF001 - as PyTorch's counter does
        if formula is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=out)
        return out

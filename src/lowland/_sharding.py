"""Parameters of which each process holds a part."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, distributed


def is_flattened(p: Tensor) -> bool:
    """Whether it is in a vector that ``FullyShardedDataParallel`` cuts anywhere."""
    return bool(getattr(p, "_fsdp_flattened", False))


def is_spread(p: Tensor) -> bool:
    """Whether it is a tensor that knows how it lies on several processes."""
    # Where nobody loaded the module there is none, and to load it takes time.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(p, module.DTensor)


def is_sharded(p: Tensor) -> bool:
    """Whether its numbers may be other ones in other processes."""
    return is_flattened(p) or is_spread(p)


def layout(p: Any) -> Any:
    """What parameters share that lie on the processes in the same way; None if all is here."""
    return (p.device_mesh, p.placements) if is_spread(p) else None


def local(tensor: Any) -> Tensor:
    """The part that lies here, in the tensor's own memory."""
    part: Tensor = tensor.to_local() if is_spread(tensor) else tensor
    return part


def like(tensor: Any, p: Any) -> Any:
    """A tensor as it lies where a parameter does."""
    if layout(tensor) != layout(p):
        tensor = tensor.redistribute(p.device_mesh, p.placements)
    return tensor


def local_like(tensor: Any, p: Any) -> Tensor:
    """The part that lies here of a tensor when it lies as a parameter does."""
    return local(like(tensor, p))


def sum_over_parts(here: Tensor, how: Any) -> Tensor:
    """The sum of a number over the processes that hold different parts in a layout."""
    if how is None:
        return here
    mesh, placements = how
    total = here.clone()
    for dim, placement in enumerate(placements):
        if placement.is_shard():
            distributed.all_reduce(total, group=mesh.get_group(dim))
    return total

"""Norms of a network's weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def weight_norm(parameters: Iterable[Tensor], order: float = 2.0) -> float:
    """The norm of all parameters together, in float64.

    Args:
        parameters: Such as ``model.parameters()``.
        order: 2 for the length, 1 for the sum of absolute values.

    Raises:
        ValueError: If there are no parameters.

    Example:
        >>> import torch
        >>> from lowland.weakness import weight_norm
        >>> weight_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        5.0
        >>> weight_norm([torch.tensor([3.0]), torch.tensor([[-4.0]])], order=1)
        7.0
    """
    parts = [part.detach().double().flatten() for part in parameters]
    if not parts:
        raise ValueError("expected at least one parameter, such as model.parameters()")
    return float(torch.linalg.vector_norm(torch.cat(parts), ord=order))

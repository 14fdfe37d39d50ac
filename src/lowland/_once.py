"""Functions that can be differentiated once only, in the graphs of what is differentiated again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.autograd.function import once_differentiable

from lowland.objective import function_of

# The code of every backward pass that is marked so.
_ONCE = once_differentiable(print).__code__


def any_once(nodes: Iterable[Any]) -> bool:
    """Whether one of the nodes of a loss's or a gradient's graph is of such a function.

    Their gradient has no way back to the parameters, so PyTorch leaves it out of the product rather
    than run into the error at its end; and where they are handed a constant, as at the end of a
    loss, there is not even that error in the gradient's graph.
    """
    return any(
        _is_once(function_of(node)) or node.name() == "torch::autograd::Error" for node in nodes
    )


def _is_once(function: Any) -> bool:
    """Whether a function's backward pass is marked so, also beneath other decorators."""
    backward = getattr(function, "backward", None)
    while backward is not None and getattr(backward, "__code__", None) is not _ONCE:
        backward = getattr(backward, "__wrapped__", None)
    return backward is not None

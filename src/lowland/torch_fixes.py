"""Kernels of PyTorch that can be differentiated as often as a Hessian takes, and correctly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, no_type_check

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from lowland._layers import has_backward_hooks, has_hooks
from lowland._plain_operations import PLAIN


@contextmanager
def differentiable_operations(model: nn.Module) -> Iterator[None]:
    """Run where second and third derivatives of a model exist and are right.

    Fused attention and the recurrent layers of oneDNN and cuDNN have no second derivative; the
    plain kernels do. Some other operations have none, or a wrong one, and are written out: see
    :mod:`lowland._plain_operations`.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(_without_onednn())
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(_WrittenOut())
        yield


def is_ordinary(*models: object) -> bool:
    """Whether they are made of modules of PyTorch alone whose derivatives are right as they are.

    Of functions nothing is known. Where all are ordinary no operation needs to be looked at.
    """
    return all(
        isinstance(model, nn.Module)
        and all(
            _is_ordinary(type(each)) and not has_hooks(each)  # type: ignore[arg-type]
            for each in model.modules()
        )
        for model in models
    )


def leaves_no_trace(*models: nn.Module) -> bool:
    """Whether passes of ordinary models write to nothing that these keep, and draw no numbers."""
    return not any(
        isinstance(module, _DRAWING) or has_backward_hooks(module)
        for model in models
        for module in model.modules()
    )


@cache
def _is_ordinary(kind: type[nn.Module]) -> bool:
    return (
        kind is getattr(nn, kind.__name__, None)
        and kind.__module__.rpartition(".")[2] in _ORDINARY
        and not issubclass(kind, nn.MultiheadAttention | nn.Hardsigmoid)
    )


_ORDINARY = frozenset(
    ("activation", "container", "conv", "dropout", "flatten", "linear", "loss", "pooling")
)
# In training mode; in which they may be next time.
_DRAWING = (_DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


@contextmanager
def _without_onednn() -> Iterator[None]:
    # Not by the context manager that PyTorch has: it sets other flags too, some of which warn.
    set_flags: Callable[..., tuple[Any, ...]] = torch.backends.mkldnn.set_flags
    (enabled, *_) = set_flags(_enabled=False, _fp32_precision=None)
    try:
        yield
    finally:
        set_flags(_enabled=enabled, _fp32_precision=None)


class _WrittenOut(TorchFunctionMode):
    @no_type_check  # called for each operation of PyTorch
    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return PLAIN.get(func, func)(*args, **(kwargs or {}))

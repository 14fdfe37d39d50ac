"""Kernels of PyTorch that can be differentiated as often as a Hessian takes, and correctly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, no_type_check

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lowland._layers import has_hooks


@contextmanager
def differentiable_operations(model: nn.Module) -> Iterator[None]:
    """Run where second and third derivatives of a model exist and are right.

    Fused attention and the recurrent layers of oneDNN and cuDNN have no derivative in forward mode,
    or no second one; the plain kernels do. Normalization by statistics of its own inputs has them,
    but under ``torch.func.vmap`` they come out wrong, without a sign of it: the mean and the
    variance are taken for constants (pytorch/functorch#534). So do third derivatives everywhere.
    Written out they are right.
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
        type(module) is getattr(nn, type(module).__name__, None)
        and type(module).__module__.rpartition(".")[2] in _ORDINARY
        and not isinstance(module, nn.MultiheadAttention)
        and not has_hooks(module)
        for model in models
        for module in (model.modules() if isinstance(model, nn.Module) else [nn.Module()])
    )


_ORDINARY = frozenset(
    ("activation", "container", "conv", "dropout", "flatten", "linear", "loss", "pooling", "sparse")
)


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
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,  # noqa: A002 - PyTorch's name
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _normalized(input, range(-len(normalized_shape), 0), weight, bias, eps)


def _batch_norm(  # noqa: PLR0917 - PyTorch's order
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,  # noqa: FBT001, FBT002
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:  # it is linear, and right
        return functional.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    if running_mean is not None:
        with torch.no_grad():  # to update them
            functional.batch_norm(
                input, running_mean, running_var, training=True, momentum=momentum
            )
    others = [0, *range(2, input.ndim)]
    return _normalized(input, others, _by_channel(weight, input), _by_channel(bias, input), eps)


def _instance_norm(  # noqa: PLR0917 - PyTorch's order
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,  # noqa: FBT001, FBT002
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return functional.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    if running_mean is not None:
        with torch.no_grad():
            functional.instance_norm(input, running_mean, running_var, momentum=momentum)
    others = range(2, input.ndim)
    return _normalized(input, others, _by_channel(weight, input), _by_channel(bias, input), eps)


def _normalized(
    x: Tensor, dims: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    # Statistics of 16-bit numbers need more digits than these have.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = wide - wide.mean(tuple(dims), keepdim=True)
    result = centered * torch.rsqrt(centered.square().mean(tuple(dims), keepdim=True) + eps)
    if weight is not None:
        result = result * weight
    return (result if bias is None else result + bias).to(x.dtype)


def _by_channel(values: Tensor | None, x: Tensor) -> Tensor | None:
    return None if values is None else values.view(-1, *[1] * (x.ndim - 2))


_PLAIN: dict[Callable[..., Any], Callable[..., Tensor]] = {
    functional.layer_norm: _layer_norm,
    functional.batch_norm: _batch_norm,
    functional.instance_norm: _instance_norm,
}

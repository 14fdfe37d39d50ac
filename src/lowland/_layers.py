"""What a model is made of, as far as the classes of its layers tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeGuard

from torch import nn
from torch.nn.modules import module as _modules


def is_plain_sequence(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether it runs its layers one behind the other, and does nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def has_hooks(module: nn.Module) -> bool:
    """Whether its output may be another one than its class computes.

    Pruning and the older weight normalization are hooks of this kind.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks  # noqa: SLF001 - no public name
    everywhere = _modules._global_forward_hooks or _modules._global_forward_pre_hooks  # noqa: SLF001
    return bool(hooks or everywhere) or "forward" in vars(module)


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a backward pass through it runs something beside."""
    hooks = module._backward_hooks or module._backward_pre_hooks  # noqa: SLF001
    everywhere = _modules._global_backward_hooks or _modules._global_backward_pre_hooks  # noqa: SLF001
    return bool(hooks or everywhere)


def has_parameters(module: nn.Module) -> bool:
    """Whether there is a parameter in it, or in a module within."""
    # Most activations have neither, which is told without a walk.
    inside = module._parameters or module._modules  # noqa: SLF001 - no public name
    return bool(inside) and next(module.parameters(), None) is not None


def is_as_inherited(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is of that class, or of one that leaves its forward pass alone."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A sequence and its layers in order, each with its path; of other modules themselves alone.

    Sequences within are given too, each before its own layers: hooks may stand on any of them.
    """
    yield path, module
    if is_plain_sequence(module):
        # Not named_children(): a layer that stands in a sequence twice would be given once.
        for name, layer in module._modules.items():  # noqa: SLF001
            if layer is not None:
                yield from walk(layer, f"{path}.{name}" if path else name)

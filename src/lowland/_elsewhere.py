"""A loss as a function of a batch's inputs, or of what a layer gives, in place of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowland._batches import mapped, tensors
from lowland._call import call
from lowland.errors import UnsupportedModelError
from lowland.objective import Objective
from lowland.passes import frozen_statistics

INPUTS = "inputs"


def with_respect_to(target: Objective, wrt: str) -> Objective:
    """The same loss on the same batch, as a function of something else.

    The model's parameters are no constants: moments of such a loss carry gradients to them.

    Args:
        target: The loss, on one batch.
        wrt: ``"inputs"``, or the name of a layer whose output is meant.

    Raises:
        TypeError: If it is no word, or there are no floating-point numbers there.
        ValueError: If the model has no such layer, or runs it never or several times.
        UnsupportedModelError: If the model is trained by several processes.
    """
    if target.parallel:
        raise UnsupportedModelError(
            "wrt= looks at one batch in one process; give model.module of a "
            "DistributedDataParallel model"
        )
    if not isinstance(wrt, str):
        raise TypeError(f"wrt must be 'inputs' or the name of a layer; got {wrt!r}")
    x, _ = target.batch
    layer = None
    if wrt == INPUTS:
        values = x
    else:
        named = dict(target.model.named_modules())
        if wrt not in named or not wrt:
            raise ValueError(
                f"wrt must be 'inputs' or the name of a layer of the model; got {wrt!r}, and the "
                f"layers are {', '.join(name for name in named if name)}"
            )
        layer = named[wrt]
        values = _output_of(layer, target)
    model = _Elsewhere(target.model, layer, values)
    if not model.places:
        raise TypeError(f"wrt={wrt!r} has no floating-point numbers to differentiate in")
    variables = dict(model.named_parameters(recurse=False))
    return replace(
        target,
        outer=model,
        model=model,
        names=list(variables),
        parameters=list(variables.values()),
        others=[],
        beside=any(p.requires_grad for p in target.model.parameters()),
    )


class Given(nn.Module):
    """A module with parameters for all floating-point tensors that a value holds.

    Args:
        value: Whatever holds them.
        name: Of the parameter, or of several with their numbers.
    """

    def __init__(self, value: Any, name: str) -> None:
        super().__init__()
        # In a tuple, of which no copies are made: the tensors are known by their identity.
        self.given, self.places = (value,), {}
        floating = {id(t): t for t in tensors(value) if t.is_floating_point()}
        for index, (key, tensor) in enumerate(floating.items()):
            self.places[key] = f"{name}_{index}" if len(floating) > 1 else name
            self.register_parameter(self.places[key], nn.Parameter(tensor.detach().clone()))

    def value(self) -> Any:
        """The value with the parameters in it."""
        (value,) = mapped(self._own, self.given)
        return value

    def _own(self, tensor: Tensor) -> Tensor:
        name = self.places.get(id(tensor))
        # No leaf, to which operations in place may not write.
        return tensor if name is None else getattr(self, name).clone()


class _Elsewhere(Given):
    """A model that is given its inputs, or a layer's output, as parameters."""

    def __init__(self, model: nn.Module, layer: nn.Module | None, values: Any) -> None:
        super().__init__(values, INPUTS if layer is None else "activations")
        self.model, self.training = model, model.training
        # Not registered: it is within the model already.
        self.layer = (layer,)

    def forward(self, x: Any, /) -> Any:
        values = self.value()
        (layer,) = self.layer
        if layer is None:
            return call(self.model, values)
        hook = layer.register_forward_hook(lambda *_: values)
        try:
            return call(self.model, x)
        finally:
            hook.remove()


def _output_of(layer: nn.Module, target: Objective) -> Any:
    """What a layer gives, which must run once."""
    outputs: list[Any] = []
    with _hooked(layer, outputs), torch.no_grad(), frozen_statistics(*target.holders):
        call(target.model, target.batch[0])
    if len(outputs) != 1:
        raise ValueError(
            f"wrt= names a layer that the model runs {len(outputs)} times, so that its output is "
            "no one thing; name a layer that it runs once"
        )
    return outputs[0]


@contextmanager
def _hooked(layer: nn.Module, outputs: list[Any]) -> Iterator[None]:
    def keep(_: nn.Module, __: Any, output: Any) -> None:
        # A copy, as the next layer may write to it.
        outputs.append(mapped(Tensor.clone, output))

    hook = layer.register_forward_hook(keep)
    try:
        yield
    finally:
        hook.remove()

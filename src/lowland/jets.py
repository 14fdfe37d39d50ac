r"""A loss's second derivative along a direction, from one pass through a model's layers.

Along :math:`\theta + t v` each layer's output is :math:`y + t y' + \tfrac{1}{2} t^2 y''` and more,
and follows from its input's. Of a linear layer with the weights ``W`` and their direction ``V``

.. math:: y = W x, \qquad y' = W x' + V x, \qquad y'' = W x'' + 2 V x',

of an element-wise function :math:`\phi`

.. math:: y = \phi(x), \qquad y' = \phi'(x) x', \qquad y'' = \phi'(x) x'' + \phi''(x) x'^2,

and at the end stands :math:`L'' = v^T H v`. One backward pass from there gives
:math:`\nabla^3 L[v, v]`, and as its gradient in ``v`` twice ``H v``: each bilinear operation of the
forward pass becomes some 16, and 5 where it is the first one, of which derivatives of derivatives
take 27 and 7.

References:
    A. Griewank and A. Walther, Evaluating Derivatives (2008), chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn import functional

from lowland._layers import walk
from lowland.activations import read_activation
from lowland.criteria import scalar_loss
from lowland.objective import Objective


class Jet(NamedTuple):
    """A value, and its first two derivatives along the way; None for zero."""

    value: Tensor
    first: Tensor | None = None
    second: Tensor | None = None

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Jet:
        """What a linear function without parameters makes of it."""
        value, *others = self
        return Jet(function(value), *(None if part is None else function(part) for part in others))


def covers(part: Objective) -> bool:
    """Whether a loss is one of PyTorch's own on a plain sequence of layers that are known here."""
    return (
        part.matrix == "hessian"
        and part.shares is None
        and part.leaves_no_trace
        and isinstance(part.batch[0], Tensor)
        and not torch.is_autocast_enabled(part.device.type)
        and all(map(_is_known, part.model.modules()))
        and _bends(part)
    )


def _bends(part: Objective) -> bool:
    """Whether the form depends on the parameters for sure: there are products of two weights."""
    wanted = {id(p) for p in part.parameters}
    layers = (each for each in part.model.modules() if isinstance(each, _LINEAR))
    return sum(id(each.weight) in wanted for each in layers) > 1


def along(part: Objective, direction: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A loss and its second derivative along a direction, both with their graphs.

    Args:
        part: The loss, which :func:`covers` is true of.
        direction: One tensor for each of its parameters; all others are constants.

    Raises:
        ValueError: As :meth:`Objective.loss`.
    """
    x, y = part.batch
    ways = {id(p): way for p, way in zip(part.parameters, direction, strict=True)}
    jet = Jet(x)
    for _, layer in walk(part.model):
        if not isinstance(layer, nn.Sequential):
            jet = _through(layer, jet, ways)
    loss = part.checked(scalar_loss(part.criterion, jet.value, y))
    (slope,) = grad(loss, jet.value, create_graph=True)
    form = torch.zeros_like(loss)
    if jet.second is not None:
        form = form + _dot(slope, jet.second)
    if jet.first is not None and slope.requires_grad:
        (bent,) = grad(slope, jet.value, jet.first, create_graph=True, materialize_grads=True)
        form = form + _dot(bent, jet.first)
    return loss, form


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum()


_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_AVERAGES = tuple(getattr(nn, f"{kind}AvgPool{d}d") for kind in ("", "Adaptive") for d in (1, 2, 3))
_SAME = (nn.Flatten, nn.Unflatten, nn.Identity, *_AVERAGES)  # linear, without parameters
_LARGEST = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, _LARGEST):
        return not module.return_indices
    return isinstance(module, (nn.Sequential, *_LINEAR, *_SAME)) or (
        read_activation(module) is not None
    )


def _through(layer: nn.Module, jet: Jet, ways: dict[int, Tensor]) -> Jet:
    if isinstance(layer, _LINEAR):
        return _linear(layer, jet, ways)
    if isinstance(layer, _SAME):
        return jet.mapped(layer)
    if isinstance(layer, _LARGEST):
        return _largest(layer, jet)
    return _elementwise(layer, jet)


def _linear(layer: Any, jet: Jet, ways: dict[int, Tensor]) -> Jet:
    weight, bias = layer.weight, layer.bias
    by_weight, by_bias = ways.get(id(weight)), ways.get(id(bias))

    def times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if isinstance(layer, nn.Linear):
            return functional.linear(x, weight, bias)
        found: Tensor = layer._conv_forward(x, weight, bias)  # noqa: SLF001
        return found

    value, first, second = times(jet.value, weight, bias), None, None
    if by_weight is not None:
        first = times(jet.value, by_weight, by_bias)
        second = None if jet.first is None else times(2 * jet.first, by_weight)
    elif by_bias is not None:
        spatial = 0 if isinstance(layer, nn.Linear) else weight.ndim - 2
        first = by_bias.view(-1, *[1] * spatial).expand_as(value)
    if jet.first is not None:
        first = _plus(times(jet.first, weight), first)
    if jet.second is not None:
        second = _plus(times(jet.second, weight), second)
    return Jet(value, first, second)


def _plus(one: Tensor, other: Tensor | None) -> Tensor:
    return one if other is None else one + other


def _elementwise(layer: nn.Module, jet: Jet) -> Jet:
    activation = read_activation(layer)
    assert activation is not None  # noqa: S101 - it is known
    x, first, second = jet
    if activation.negative_slope is not None:
        ones = torch.ones_like(x)
        gain = torch.where(x.detach() > 0, ones, activation.negative_slope)
        return jet.mapped(lambda part: part * gain)
    value, slope, bend, _ = activation(x)
    if first is None:
        return Jet(value)
    bent = bend * first.square()
    return Jet(value, slope * first, bent if second is None else bent + slope * second)


def _largest(layer: nn.Module, jet: Jet) -> Jet:
    """The largest in each window, and what is in the same places of the derivatives."""
    spatial = int(type(layer).__name__[-2])
    pool = getattr(functional, f"max_pool{spatial}d_with_indices")
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    _, places = pool(jet.value, *(getattr(layer, name) for name in names))
    flat = places.flatten(-spatial)
    return jet.mapped(lambda part: part.flatten(-spatial).gather(-1, flat).view_as(places))

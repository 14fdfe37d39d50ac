"""Element-wise activations and their first three derivatives.

The Hessian of a network needs two derivatives of its activation, the gradient of a function of
that Hessian needs a third. Every form below is free of overflow and of the cancellation in
``1 - sigmoid(a)``: derivatives keep their relative accuracy far into the saturated range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from lowland._layers import has_parameters, is_as_inherited

Derivatives = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Activation:
    """An element-wise function phi together with phi', phi'' and phi'''.

    Attributes:
        name: The name used in ``activation="..."`` arguments.
        function: Maps pre-activations of any shape to ``(phi, phi', phi'', phi''')``, each of that
            shape.
        negative_slope: For a piecewise linear phi its slope below zero (the one above is 1), else
            None. Then phi'' = phi''' = 0 wherever they exist, and moments are exact for almost
            every parameter vector; on a kink they are those of the piece that PyTorch's own
            derivative picks.

    Example:
        >>> import torch
        >>> from lowland.activations import Activation
        >>> def derivatives(a):
        ...     return torch.sin(a), torch.cos(a), -torch.sin(a), -torch.cos(a)
        >>> sine = Activation("sine", derivatives)
        >>> sine(torch.zeros(2))[1]  # the slope
        tensor([1., 1.])
    """

    name: str
    function: Callable[[Tensor], Derivatives]
    negative_slope: float | None = None

    def __call__(self, a: Tensor) -> Derivatives:
        """``(phi, phi', phi'', phi''')`` at ``a``."""
        return self.function(a)


def _sigmoid_family(a: Tensor) -> Derivatives:
    high, low = torch.sigmoid(a), torch.sigmoid(-a)  # low = 1 - high, without the cancellation
    slope = high * low
    # slope' = slope (low - high), and (low - high)^2 = 1 - 4 slope.
    return high, slope, slope * (low - high), slope * (1 - 6 * slope)


def _identity(a: Tensor) -> Derivatives:
    zero = torch.zeros_like(a)
    return a, torch.ones_like(a), zero, zero


def _tanh(a: Tensor) -> Derivatives:
    value = torch.tanh(a)
    # sech(a)^2 as a product of sigmoids: 1 - tanh(a)^2 has no digits left for |a| > 20.
    twice = a + a
    slope = 4 * (torch.sigmoid(twice) * torch.sigmoid(-twice))
    # slope' = -2 value slope, and value^2 = 1 - slope.
    return value, slope, -2 * value * slope, slope * (4 - 6 * slope)


def _softplus(a: Tensor) -> Derivatives:
    high, slope, bend, _ = _sigmoid_family(a)
    return torch.logaddexp(a, torch.zeros_like(a)), high, slope, bend


def _gelu(a: Tensor) -> Derivatives:
    cdf = 0.5 * torch.special.erfc(a * -math.sqrt(0.5))  # erfc keeps the left tail's digits
    square = a * a
    pdf = torch.exp(-0.5 * square) * (1 / math.sqrt(2 * math.pi))  # pdf' = -a pdf
    return a * cdf, cdf + a * pdf, pdf * (2 - square), pdf * a * (square - 4)


def _silu(a: Tensor) -> Derivatives:
    high, slope, bend, twist = _sigmoid_family(a)
    # The k-th derivative of a f is a f^(k) + k f^(k - 1).
    return a * high, high + a * slope, 2 * slope + a * bend, 3 * bend + a * twist


def _leaky_relu(a: Tensor, slope: float) -> Derivatives:
    zero = torch.zeros_like(a)
    gain = torch.where(a > 0, torch.ones_like(a), zero + slope)
    return a * gain, gain, zero, zero


def leaky_relu(negative_slope: float = 0.01) -> Activation:
    """``max(a, 0) + negative_slope * min(a, 0)``; zero slope is the ReLU.

    Example:
        >>> import torch
        >>> from lowland.activations import leaky_relu
        >>> leaky_relu(0.1)(torch.tensor([-2.0, 3.0]))[0]
        tensor([-0.2000,  3.0000])
    """
    name = "relu" if negative_slope == 0 else "leaky_relu"
    return Activation(name, partial(_leaky_relu, slope=negative_slope), negative_slope)


def compose(outer: Activation, inner: Activation | None) -> Activation:
    """``outer(inner(a))`` by the chain rule; ``outer`` alone if there is no ``inner``.

    Example:
        >>> import torch
        >>> from lowland.activations import compose, get_activation
        >>> twice = compose(get_activation("tanh"), get_activation("tanh"))
        >>> twice(torch.tensor(0.5))[0] == torch.tanh(torch.tanh(torch.tensor(0.5)))
        tensor(True)
    """
    if inner is None:
        return outer

    def function(a: Tensor) -> Derivatives:
        value, slope, bend, twist = inner(a)
        result, by_value, second, third = outer(value)
        return (
            result,
            by_value * slope,
            second * slope.square() + by_value * bend,
            third * slope**3 + 3 * second * slope * bend + by_value * twist,
        )

    return Activation(f"{outer.name}({inner.name})", function)


ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation("identity", _identity, negative_slope=1.0),
        Activation("sigmoid", _sigmoid_family),
        Activation("tanh", _tanh),
        Activation("softplus", _softplus),
        Activation("gelu", _gelu),
        Activation("silu", _silu),
        leaky_relu(0.0),
        leaky_relu(),
    )
}


def get_activation(activation: str | Activation) -> Activation:
    """Look an activation up by name; an :class:`Activation` passes through.

    Raises:
        ValueError: If the name is not one of ``ACTIVATIONS``.

    Example:
        >>> import torch
        >>> from lowland.activations import get_activation
        >>> value, slope, bend, twist = get_activation("tanh")(torch.zeros(1))
        >>> slope, twist
        (tensor([1.]), tensor([-2.]))
    """
    if isinstance(activation, Activation):
        return activation
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"unknown activation {activation!r}: expected one of {known}")
    return ACTIVATIONS[activation]


# Layers: what a module of PyTorch's, or of your own, is as an activation

# PyTorch's softplus is a straight line beyond its threshold; from here on the bend that it leaves
# out is at most 2e-9.
_SOFTPLUS_THRESHOLD = 20


def _read_gelu(layer: nn.GELU) -> Activation | None:
    return ACTIVATIONS["gelu"] if layer.approximate == "none" else None


def _read_softplus(layer: nn.Softplus) -> Activation | None:
    usual = layer.beta == 1 and layer.threshold >= _SOFTPLUS_THRESHOLD
    return ACTIVATIONS["softplus"] if usual else None


_LAYERS: dict[type[nn.Module], Callable[[Any], Activation | None]] = {
    nn.Identity: lambda _: ACTIVATIONS["identity"],
    nn.Sigmoid: lambda _: ACTIVATIONS["sigmoid"],
    nn.Tanh: lambda _: ACTIVATIONS["tanh"],
    nn.Softplus: _read_softplus,
    nn.GELU: _read_gelu,
    nn.SiLU: lambda _: ACTIVATIONS["silu"],
    nn.ReLU: lambda _: ACTIVATIONS["relu"],
    nn.LeakyReLU: lambda layer: leaky_relu(layer.negative_slope),
}
_PYTORCHS = tuple(_LAYERS)

# Of element-wise layers without a closed form: those that bend at points, and those that do not.
_KINKED = (nn.PReLU, nn.RReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid)
_KINKED_ELSEWHERE = (nn.Hardshrink, nn.Softshrink, nn.Threshold)
_SMOOTH = (nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink)


def register_activation(
    kind: type[nn.Module], activation: Activation | Callable[[Any], Activation | None]
) -> None:
    """Teach the library an element-wise layer of your own.

    The closed form then covers it, in ``nn.Sequential`` and by name in ``lowland.exact``;
    :func:`lowland.rescale` and :func:`lowland.permute` know what it keeps, and differences of
    gradients whether they may cross a kink.

    Args:
        kind: The layer's class. It must apply one function to each entry of its input.
        activation: What it computes; or, where that depends on its settings, a function of the
            layer, which returns None for settings without a closed form.

    Raises:
        TypeError: If ``kind`` is no class of layers, or ``activation`` no activation or function.
        ValueError: If a derivative is not that of the function, at some points in float64.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> from lowland.activations import Activation
        >>> class Sine(nn.Module):
        ...     def forward(self, a):
        ...         return a.sin()
        >>> sine = Activation("sine", lambda a: (a.sin(), a.cos(), -a.sin(), -a.cos()))
        >>> lowland.exact.register_activation(Sine, sine)
        >>> model = nn.Sequential(nn.Linear(2, 3), Sine(), nn.Linear(3, 1))
        >>> x, y = torch.randn(9, 2), torch.randn(9, 1)
        >>> lowland.hessian_moments(model, nn.MSELoss(), x, y).method
        'exact'
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(
            f"expected a layer's class, a subclass of nn.Module; got {kind!r}: give the class "
            "rather than an instance or a function"
        )
    if isinstance(activation, Activation):
        check_derivatives(activation)
        ACTIVATIONS[activation.name] = known = activation
        _LAYERS[kind] = lambda _: known
    elif callable(activation):
        _LAYERS[kind] = activation
    else:
        raise TypeError(
            "expected a lowland.activations.Activation, or a function of the layer that returns "
            f"one; got {activation!r}"
        )


def read_activation(layer: nn.Module) -> Activation | None:
    """What a layer computes, element by element; None where that is not known.

    Raises:
        ValueError: If a layer of your own computes something else than was registered for it.
    """
    kind = _known_kind(layer)
    # What a layer has learned would be a constant to the closed form.
    if kind is None or has_parameters(layer):
        return None
    activation = _LAYERS[kind](layer)
    if activation is not None and kind not in _PYTORCHS:
        check_derivatives(activation)
        _check_layer(layer, activation)
    return activation


def _known_kind(layer: nn.Module) -> type[nn.Module] | None:
    """The class whose forward pass the layer has, if that is known here."""
    if type(layer) in _LAYERS:
        return type(layer)
    kinds = (kind for kind in type(layer).__mro__ if kind in _LAYERS)
    return next((kind for kind in kinds if is_as_inherited(layer, kind)), None)


def is_homogeneous(layer: nn.Module) -> bool:
    """Whether ``phi(b a) = b phi(a)`` for every ``b > 0``: straight on either side of zero."""
    if isinstance(layer, nn.PReLU):
        return True
    activation = read_activation(layer)
    return activation is not None and activation.negative_slope is not None


def is_elementwise(layer: nn.Module) -> bool:
    """Whether a layer treats each entry of its input by itself."""
    others = (*_KINKED, *_KINKED_ELSEWHERE, *_SMOOTH)
    return isinstance(layer, others) or _known_kind(layer) is not None


def has_kinks(layer: nn.Module) -> bool:
    """Whether its derivative jumps somewhere."""
    if isinstance(layer, (*_KINKED, *_KINKED_ELSEWHERE)):
        return True
    activation = read_activation(layer)
    return activation is not None and activation.negative_slope not in (None, 1)


@lru_cache(64)
def check_derivatives(activation: Activation) -> None:
    """Require that an activation's derivatives are those of its value, by differences.

    Raises:
        ValueError: Naming the first that is not.
    """
    with torch.no_grad():
        told, *sides = (activation(_POINTS + shift) for shift in (0.0, _STEP, -_STEP))
    shapes = [getattr(part, "shape", None) for part in told]
    if shapes != 4 * [_POINTS.shape]:
        raise ValueError(
            f"the activation {activation.name!r} must return its value and three derivatives, each "
            f"of its input's shape {tuple(_POINTS.shape)}; got {shapes}"
        )
    for order in (1, 2, 3):
        above, below = (side[order - 1] for side in sides)
        mine, theirs = told[order], (above - below) / (2 * _STEP)
        if not torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6):
            worst = int((mine - theirs).abs().argmax())
            raise ValueError(
                f"derivative {order} of the activation {activation.name!r} is not that of what "
                f"stands before it: at {float(_POINTS[worst]):.6g} it is {float(mine[worst]):.6g}, "
                f"by differences {float(theirs[worst]):.6g}; correct one of them"
            )


@torch.no_grad()
def _check_layer(layer: nn.Module, activation: Activation) -> None:
    buffer = next(layer.buffers(), None)
    points = _POINTS if buffer is None else _POINTS.to(buffer.device)
    mine, theirs = activation(points)[0], layer(points)
    if theirs.shape != mine.shape or not torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6):
        raise ValueError(
            f"{layer} is not the activation {activation.name!r} that register_activation was given "
            "for it: their values differ. Register a function of the layer's settings that returns "
            "the activation they mean"
        )


_STEP = 1e-5
# On no kink that anybody would think of.
_POINTS = torch.tensor([-3.1, -1.7, -0.83, -0.37, -0.11, 0.13, 0.41, 0.79, 1.3, 2.9]).double()

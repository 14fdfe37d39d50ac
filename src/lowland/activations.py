"""Element-wise activations and their first three derivatives.

The Hessian of a network needs two derivatives of its activation, the gradient of a function of
that Hessian needs a third. Every form below is free of overflow and of the cancellation in
``1 - sigmoid(a)``: derivatives keep their relative accuracy far into the saturated range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

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
    slope = 4 * torch.sigmoid(2 * a) * torch.sigmoid(-2 * a)
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

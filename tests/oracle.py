"""Brute force: a three-layer network as a plain function of a flat parameter vector.

Nothing here uses lowland: activations and losses are PyTorch's own, the Hessian is
``torch.func.hessian``'s, and gradients are autograd's through all of it. Parameters are ordered as
``W`` row by row, then ``v``, biases first.

Where PyTorch's own derivative is ``p (1 - p)`` with ``p`` close to one, no digits are left; there
the function is written with the small one of ``p`` and ``1 - p``.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional


def _sigmoid(a):
    return torch.where(a > 0, 1 - torch.sigmoid(-a), torch.sigmoid(a))


def _tanh(a):
    tail = 2 * torch.sigmoid(-2 * a.abs())
    return torch.where(a.abs() < 1, torch.tanh(a), a.sign() * (1 - tail))


def _softplus(a):
    # PyTorch's is linear beyond a threshold; below zero it never gets there.
    return torch.where(a > 0, a + functional.softplus(-a), functional.softplus(a))


ACTIVATIONS = {
    "identity": lambda a: a,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "softplus": _softplus,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
}


def _bce(logits, targets, reduction):
    losses = _softplus((1 - 2 * targets) * logits)
    return losses.mean() if reduction == "mean" else losses.sum()


LOSSES = {
    "bce": _bce,
    "mse": functional.mse_loss,
}
SMOOTH = [name for name in ACTIVATIONS if "relu" not in name]


@dataclass(frozen=True)
class Network:
    """One network without its weights."""

    inputs: int
    hidden: int
    activation: str
    loss: str
    reduction: str = "mean"

    @property
    def dim(self):
        return (self.inputs + 1) * self.hidden + self.hidden + 1

    def logits(self, flat, x):
        split = (self.inputs + 1) * self.hidden
        weight = flat[:split].view(self.inputs + 1, self.hidden)
        output = flat[split:]
        z = ACTIVATIONS[self.activation](weight[0] + x @ weight[1:])
        return output[0] + z @ output[1:]

    def loss_of(self, flat, x, y):
        return LOSSES[self.loss](self.logits(flat, x), y.to(x.dtype), reduction=self.reduction)

    def hessian(self, flat, x, y):
        return torch.func.hessian(self.loss_of)(flat, x, y)

    def sample_hessians(self, flat, x, y):
        """``H_i`` of each sample's own loss, so that ``H`` is their mean or their sum."""
        parts = [self.hessian(flat, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
        return torch.stack(parts)


def flatten(weights):
    """``[W, v]`` of one network as a flat vector."""
    return torch.cat([part.reshape(-1) for part in weights])


def unflatten(flat, network):
    """The inverse of :func:`flatten`."""
    split = (network.inputs + 1) * network.hidden
    return (
        flat[:split].view(network.inputs + 1, network.hidden),
        flat[split:].view(network.hidden + 1, 1),
    )


def moments(matrix):
    """``Tr H`` and ``Tr H^2``."""
    return matrix.trace(), matrix.square().sum()


def upper(trace, trace_sq, dim):
    """The Wolkowicz-Styan upper bound, straight from its formula."""
    mean = trace / dim
    return mean + (trace_sq / dim - mean**2).sqrt() * (dim - 1) ** 0.5


def gradient(network, flat, x, y, function):
    """The gradient of ``function(H)`` in the flat parameters, by autograd through the Hessian."""
    flat = flat.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(function(network.hessian(flat, x, y)), flat)
    return result

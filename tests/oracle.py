"""Brute force: a three-layer network as a plain function of a flat parameter vector.

Nothing here uses lowland: activations and losses are PyTorch's own, the Hessian is
``torch.func.hessian``'s, and gradients are autograd's through all of it. Parameters are ordered as
``W`` row by row, then ``v``, biases first.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

ACTIVATIONS = {
    "identity": lambda a: a,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    # PyTorch's softplus is linear beyond a threshold; at 500 that is exact in every float type.
    "softplus": lambda a: functional.softplus(a, threshold=500),
    "gelu": functional.gelu,
    "silu": functional.silu,
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
}


def _bce(logits, targets, reduction):
    """Binary cross-entropy as softplus of the signed logit.

    The derivative of PyTorch's own is ``p - y``, which has no digits left for a sample that is
    fitted well.
    """
    losses = functional.softplus((1 - 2 * targets) * logits, threshold=500)
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

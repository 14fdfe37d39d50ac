"""Brute force: a multilayer perceptron as a plain function of a flat parameter vector.

Nothing here uses lowland: activations and losses are PyTorch's own, the Hessian is
``torch.func.hessian``'s, and gradients are autograd's through all of it. Parameters are ordered
layer by layer, each row by row, biases first.

Where PyTorch's own derivative is ``p (1 - p)`` with ``p`` close to one, no digits are left; there
the function is written with the small one of ``p`` and ``1 - p``.
"""

from dataclasses import dataclass
from itertools import pairwise

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


def _bce(logits, targets):
    return (1 - targets) * _softplus(logits) + targets * _softplus(-logits)


def _ce(logits, targets):
    # Everything in differences from the largest logit, whose own is a constant: all other
    # probabilities are small, and nothing is left of "1 - p" for the largest one.
    index = logits.argmax(-1, keepdim=True)
    is_top = torch.arange(logits.shape[-1], device=logits.device) == index
    below = torch.where(is_top, 0, logits - logits.gather(-1, index))
    return targets.sum(-1) * torch.logsumexp(below, -1) - (targets * below).sum(-1)


def _mse(logits, targets):
    return (logits - targets).square()


def _poisson(logits, targets):
    return logits.exp() - targets * logits


def _distance(logits, targets):
    return (1 + (logits - targets).square().sum(-1)).sqrt()


# By sample and output, or by sample for those that couple the outputs.
LOSSES = {"bce": _bce, "ce": _ce, "mse": _mse}
OF_ONES_OWN = {"poisson": _poisson, "distance": _distance}
SMOOTH = [name for name in ACTIVATIONS if "relu" not in name]


@dataclass(frozen=True)
class Network:
    """One network without its weights; ``hidden`` and ``activation`` for one layer or for each."""

    inputs: int
    hidden: int | tuple[int, ...]
    activation: str | tuple[str, ...]
    loss: str
    reduction: str = "mean"
    outputs: int = 1

    @property
    def widths(self):
        hidden = self.hidden if isinstance(self.hidden, tuple) else (self.hidden,)
        return (self.inputs, *hidden, self.outputs)

    @property
    def shapes(self):
        """Of each layer's weights, biases in row 0."""
        return [(before + 1, after) for before, after in pairwise(self.widths)]

    @property
    def activations(self):
        hidden = len(self.widths) - 2
        return (self.activation,) * hidden if isinstance(self.activation, str) else self.activation

    @property
    def dim(self):
        return sum(rows * columns for rows, columns in self.shapes)

    @property
    def takes_columns(self):
        """Whether there is a column of targets for each output, rather than one target a sample."""
        return self.outputs > 1 and self.loss != "ce"

    def logits(self, flat, x):
        """``(samples, outputs)``, or ``(samples,)`` for one output."""
        *hidden, last = unflatten(flat, self)
        for weight, activation in zip(hidden, self.activations, strict=True):
            x = ACTIVATIONS[activation](weight[0] + x @ weight[1:])
        logits = last[0] + x @ last[1:]
        return logits.squeeze(-1) if self.outputs == 1 else logits

    def losses(self, flat, x, y):
        """Of each sample, or of each of its outputs."""
        return self.losses_at(self.logits(flat, x), y)

    def losses_at(self, logits, y):
        if self.loss == "ce" and y.ndim < 2:
            y = functional.one_hot(y.long(), self.outputs)
        y = y.to(logits.dtype)
        if self.loss == "distance" and self.outputs == 1:
            logits, y = logits.unsqueeze(-1), y.unsqueeze(-1)
        return {**LOSSES, **OF_ONES_OWN}[self.loss](logits, y)

    def loss_of(self, flat, x, y):
        losses = self.losses(flat, x, y)
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def hessian(self, flat, x, y):
        return torch.func.hessian(self.loss_of)(flat, x, y)

    def gauss_newton(self, flat, x, y):
        """``J^T Q J`` of the logits' Jacobian and the loss's Hessian in them."""

        def loss(logits):
            losses = self.losses_at(logits, y)
            return losses.mean() if self.reduction == "mean" else losses.sum()

        logits = self.logits(flat, x)
        rows = torch.func.jacrev(self.logits)(flat, x).reshape(logits.numel(), -1)
        inside = torch.func.hessian(loss)(logits).reshape(len(rows), -1)
        return rows.T @ inside @ rows

    def matrix(self, name, flat, x, y):
        """The Hessian, or one of its two parts."""
        if name == "ggn":
            return self.gauss_newton(flat, x, y)
        hessian = self.hessian(flat, x, y)
        return hessian if name == "hessian" else hessian - self.gauss_newton(flat, x, y)

    def sample_hessians(self, flat, x, y):
        """``H_i`` of each sample's own loss, so that ``H`` is their mean or their sum."""
        parts = [self.hessian(flat, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
        return torch.stack(parts)


def flatten(weights):
    """The weights of one network as a flat vector."""
    return torch.cat([part.reshape(-1) for part in weights])


def unflatten(flat, network):
    """The inverse of :func:`flatten`."""
    parts = flat.split([rows * columns for rows, columns in network.shapes])
    return [part.view(shape) for part, shape in zip(parts, network.shapes, strict=True)]


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

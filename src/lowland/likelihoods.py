r"""Criteria that are negative log-likelihoods, and their Fisher information in a model's outputs.

Of a distribution ``p(y | z)`` of targets, given by a model's outputs ``z``,

.. math:: E_{y \sim p(y | z)} \left[ \nabla_z \log p \, \nabla_z \log p^T \right]
    = E_{y \sim p(y | z)} \left[ \nabla_z^2 (-\log p) \right],

and a loss that is affine in ``y``, as all of these are, has its own Hessian at the mean of ``y`` on
the right-hand side. So a Fisher matrix is the Gauss-Newton matrix of the same criterion with the
mean of the model's predictive distribution in the place of the targets. Where the outputs are
natural parameters (logits, logarithms of rates, means of a Gaussian) the targets do not matter at
all, and it is the Gauss-Newton matrix itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowland.criteria import Criterion, is_any, name_of, reduction_of, setting
from lowland.errors import UnsupportedModelError

_NATURAL = (
    nn.BCEWithLogitsLoss,
    nn.CrossEntropyLoss,
    nn.MSELoss,
    nn.MultiLabelSoftMarginLoss,
)

_KNOWN = (
    "CrossEntropyLoss, BCEWithLogitsLoss, MSELoss, NLLLoss of log_softmax, BCELoss, "
    "PoissonNLLLoss, SoftMarginLoss and MultiLabelSoftMarginLoss"
)


def likelihood(criterion: Criterion, y: Any) -> Criterion:
    """A criterion whose Hessian in the outputs is the Fisher information of another one's.

    Args:
        criterion: One of PyTorch's that is a negative log-likelihood, up to a constant and to the
            factors of its mean.
        y: Targets as it takes them.

    Returns:
        The criterion itself where its outputs are natural parameters.

    Raises:
        UnsupportedModelError: If the criterion is no negative log-likelihood that is known here, or
            has weights, or its soft labels are no distributions.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowland.likelihoods import likelihood
        >>> criterion = nn.CrossEntropyLoss()
        >>> likelihood(criterion, torch.tensor([0, 2])) is criterion
        True
    """
    for name in ("weight", "pos_weight"):
        if setting(criterion, name, None) is not None:
            raise UnsupportedModelError(
                f"{name_of(criterion)}({name}=...) is no negative log-likelihood, since its "
                "weights come on top of one, so it has no one Fisher matrix; matrix='ggn' takes "
                "weights as the criterion does"
            )
    if is_any(criterion, *_NATURAL):
        if is_any(criterion, nn.CrossEntropyLoss):
            _check_distributions(y)
        return criterion
    if is_any(criterion, nn.PoissonNLLLoss):
        return criterion if setting(criterion, "log_input", True) else _at_outputs(criterion)
    if is_any(criterion, nn.BCELoss):
        return _at_outputs(criterion)
    if is_any(criterion, nn.SoftMarginLoss):  # the curvature is the same for -1 and 1
        return lambda output, _: criterion(output, torch.ones_like(output))
    if is_any(criterion, nn.NLLLoss):
        return _categorical(criterion)
    raise UnsupportedModelError(
        f"the Fisher matrix is known of {_KNOWN}; {name_of(criterion)} is none of them: use "
        "matrix='ggn', which takes any criterion"
    )


def _at_outputs(criterion: Criterion) -> Criterion:
    """The same with the mean of the predictive distribution for targets: the outputs."""
    return lambda output, _: criterion(output, output.detach())


def _categorical(criterion: Criterion) -> Criterion:
    """Cross-entropy, which has curvature in logarithms of probabilities; NLLLoss is linear there.

    Both are one function of what a model ends with before ``log_softmax``.
    """

    def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
        total = output.detach().logsumexp(min(1, output.ndim - 1))
        if not float(total.abs().max()) < 100 * torch.finfo(output.dtype).eps ** 0.5:
            raise UnsupportedModelError(
                "NLLLoss takes logarithms of probabilities, of which the Fisher matrix is known; "
                "the model's outputs are none, since probabilities do not add up to 1: end the "
                "model with nn.LogSoftmax(1), or use CrossEntropyLoss on logits"
            )
        return functional.cross_entropy(
            output,
            y,
            ignore_index=setting(criterion, "ignore_index", -100),
            reduction=reduction_of(criterion),
        )

    return cross_entropy


def _check_distributions(y: Any) -> None:
    """Require that soft labels of classes add up to one."""
    if not (isinstance(y, Tensor) and y.is_floating_point()):
        return
    apart = (y.sum(min(1, y.ndim - 1)) - 1).abs().max()
    if not float(apart) < torch.finfo(y.dtype).eps ** 0.5:
        raise UnsupportedModelError(
            "soft labels of classes must add up to 1 for CrossEntropyLoss to be a negative "
            f"log-likelihood; here they are off by up to {float(apart):.3g}: normalize them, or "
            "use matrix='ggn'"
        )

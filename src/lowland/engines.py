"""One call for the moments of a model, whichever engine computes them."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from lowland.dense import dense_moments
from lowland.errors import UnsupportedModelError
from lowland.exact.modules import check_supported, module_moments, module_trace
from lowland.exact.plan import DEFAULT_MEMORY_BUDGET
from lowland.moments import HessianMoments, check_number
from lowland.validation import check_constant

Method = Literal["auto", "exact", "dense"]

# Above this many parameters brute force takes minutes rather than seconds; it must be asked for.
DENSE_LIMIT = 2048


def hessian_moments(
    model: nn.Module,
    criterion: nn.Module,
    x: Tensor,
    y: Tensor,
    method: Method = "auto",
    *,
    unbiased: bool = False,
    moments: Literal[2, 4] = 2,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> HessianMoments:
    """``Tr H`` and ``Tr H^2`` of ``criterion(model(x), y)`` in the trainable parameters.

    Args:
        model: For ``"exact"`` a Linear layer, or an ``nn.Sequential`` of Linear layers,
            element-wise activations and sequences of these, with or without ``Flatten`` in front.
            For ``"dense"`` any module.
        criterion: For ``"exact"`` ``nn.BCEWithLogitsLoss``, ``nn.CrossEntropyLoss``,
            ``nn.MSELoss``, or one of your own (:func:`lowland.exact.register_criterion`), with the
            reduction ``"mean"`` or ``"sum"``. For ``"dense"`` anything that returns a scalar.
        x: Inputs, ``(samples, inputs)`` for ``"exact"``.
        y: Targets as the criterion takes them; for one output also ``(samples,)``.
        method: ``"exact"`` is the closed form, ``"dense"`` brute force by automatic
            differentiation, ``"auto"`` the closed form where it covers the model and ``x`` and
            ``y`` ask for no gradients, and else brute force, up to a few thousand parameters.
        unbiased: Take the samples for a batch of a larger data set, whose ``Tr H^2`` is to be
            estimated: a batch's own is too large on average, since it holds each sample's pair with
            itself. For ``"exact"`` alone. The estimate may come out negative, and bounds from it
            are estimates too: see :class:`~lowland.HessianMoments`.
        moments: 4 for ``Tr H^3`` and ``Tr H^4`` as well, see
            :meth:`~lowland.HessianMoments.bracket`.
        memory_budget: Bytes of temporaries that ``"exact"`` does not exceed. Wide layers need more:
            a hidden layer of ``M`` units some ``100 M^2`` bytes for a sample, except the last one
            where ``M`` is above four times the square of the outputs.

    Returns:
        Scalar moments, differentiable in the model's parameters. Frozen parameters
        (``requires_grad=False``) are constants: the Hessian is that of the others.

    Raises:
        UnsupportedModelError: If the closed form does not cover the model or the criterion, or
            ``x`` or ``y`` requires gradients, and brute force is not to be used.
        TypeError, ValueError: As :func:`lowland.exact.moments`.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> x, y = torch.randn(50, 3), torch.ones(50, dtype=torch.long)
        >>> moments = lowland.hessian_moments(model, nn.CrossEntropyLoss(), x, y)
        >>> moments.dim, bool(moments.lower <= moments.upper)
        (26, True)
    """
    check_number(moments)
    if _resolve(model, criterion, x, y, method) == "exact":
        return module_moments(
            model,
            criterion,
            x,
            y,
            unbiased=unbiased,
            moments=moments,
            memory_budget=memory_budget,
        )
    if unbiased:
        raise UnsupportedModelError(
            "unbiased=True needs the closed form, which sees the samples one by one; brute force "
            "sees their mean alone"
        )
    return dense_moments(model, criterion, x, y, moments=moments)


def hessian_trace(
    model: nn.Module,
    criterion: nn.Module,
    x: Tensor,
    y: Tensor,
    method: Method = "auto",
    *,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    """``Tr H`` alone, which the closed form has in linear time; as :func:`hessian_moments`."""
    if _resolve(model, criterion, x, y, method) == "exact":
        return module_trace(model, criterion, x, y, memory_budget=memory_budget)
    return dense_moments(model, criterion, x, y).trace


def check_method(method: str) -> None:
    """Refuse what is no engine.

    Raises:
        ValueError: If there is no engine of that name.
    """
    if method not in get_args(Method):
        raise ValueError(f"unknown method {method!r}: expected 'auto', 'exact' or 'dense'")


def _resolve(
    model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, method: Method
) -> Literal["exact", "dense"]:
    check_method(method)
    if method != "auto":
        return method
    try:
        check_supported(model, criterion)
        check_constant(x, "x")
        check_constant(y, "y")
    except UnsupportedModelError as error:
        dim = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if dim > DENSE_LIMIT:
            raise UnsupportedModelError(
                f"{error} (the model has {dim} trainable parameters; method='auto' goes through "
                f"brute force up to {DENSE_LIMIT})"
            ) from None
        return "dense"
    return "exact"

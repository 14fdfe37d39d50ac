"""Reading a PyTorch model and criterion as a three-layer network and a loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowland.activations import ACTIVATIONS, Activation, leaky_relu
from lowland.exact.api import OrderChoice, Setup, prepare
from lowland.exact.engine import run_moments
from lowland.exact.plan import DEFAULT_MEMORY_BUDGET
from lowland.losses import LOSSES, Loss
from lowland.moments import HessianMoments

_ELSEWHERE = "use method='dense', which differentiates any module (in memory quadratic in P)"


class UnsupportedModelError(ValueError):
    """The closed form does not cover a model or a criterion."""


def module_moments(
    model: nn.Module,
    criterion: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    order: OrderChoice = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> HessianMoments:
    """Exact moments of the Hessian in the model's trainable parameters.

    Raises:
        UnsupportedModelError: If the closed form does not cover the model or the criterion.
        ValueError: As :func:`lowland.exact.moments`.
    """
    setup = _read(model, criterion, x, y)
    problem = setup.problem(order, memory_budget)
    first, second = run_moments(problem, setup.weight, setup.output)
    return HessianMoments(setup.size.dim, first.squeeze(0), second.squeeze(0))


def module_trace(
    model: nn.Module,
    criterion: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    """The exact trace alone, in linear time; otherwise as :func:`module_moments`."""
    setup = _read(model, criterion, x, y)
    first, _ = run_moments(setup.linear_problem("trace", memory_budget), setup.weight, setup.output)
    return first.squeeze(0)


def check_supported(model: nn.Module, criterion: nn.Module) -> None:
    """Require a model and a criterion that the closed form covers.

    Raises:
        UnsupportedModelError: Naming the layer or the setting that is not covered.
    """
    _read_layers(model)
    _read_criterion(criterion)


def _read(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> Setup:
    first, activation, last = _read_layers(model)
    loss = _read_criterion(criterion)
    if x.ndim != 2 or x.shape[1] != first.in_features:
        raise ValueError(
            f"x and the model do not match: {first} takes x of shape "
            f"(samples, {first.in_features}); got {tuple(x.shape)}"
        )
    if tuple(y.shape) not in ((len(x),), (len(x), 1)):
        raise ValueError(
            f"x and y do not match: y must have shape ({len(x)},) or ({len(x)}, 1), one target per "
            f"sample; got {tuple(y.shape)}"
        )
    y = y.reshape(-1)
    weights = None
    if isinstance(criterion, nn.BCEWithLogitsLoss) and criterion.pos_weight is not None:
        weights = torch.where(y > 0, criterion.pos_weight.to(x.dtype).reshape(()), 1)
    return prepare(
        [_augmented(first), _augmented(last)],
        x,
        y,
        activation,
        loss,
        "sum" if criterion.reduction == "sum" else "mean",
        sample_weights=weights,
        input_rows=_trained_rows(first),
        output_rows=_trained_rows(last),
    )


def _augmented(layer: nn.Linear) -> Tensor:
    """The layer's weights in the engine's layout: ``(inputs + 1, outputs)``, bias in row 0."""
    weight = layer.weight.T
    bias = weight.new_zeros(1, weight.shape[1]) if layer.bias is None else layer.bias.unsqueeze(0)
    return torch.cat([bias, weight])


def _trained_rows(layer: nn.Linear) -> slice:
    bias = layer.bias is not None and layer.bias.requires_grad
    start = 0 if bias else 1
    stop = layer.in_features + 1 if layer.weight.requires_grad else 1
    return slice(start, stop)


def _read_layers(model: nn.Module) -> tuple[nn.Linear, Activation, nn.Linear]:
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        raise UnsupportedModelError(
            "the closed form reads nn.Sequential(Linear, activation, Linear(hidden, 1)); got "
            f"{type(model).__name__}; {_ELSEWHERE}"
        )
    _require_no_hooks(model, "the model")
    for index, layer in enumerate(model):
        if type(layer) is not nn.Linear and _read_activation(layer) is None:
            raise UnsupportedModelError(
                f"layer {index} of the model, {layer}, is not covered by the closed form; "
                f"{_ELSEWHERE}"
            )
        _require_no_hooks(layer, f"layer {index} of the model, {layer},")
    layers = [layer for layer in model if not isinstance(layer, nn.Identity)]
    if len(layers) == 2 and len(model) > 2:
        layers.insert(1, nn.Identity())  # a linear hidden layer
    if len(layers) != 3:
        raise UnsupportedModelError(
            "the closed form covers one hidden layer, nn.Sequential(Linear, activation, "
            f"Linear(hidden, 1)); got {len(layers)} layers; {_ELSEWHERE}"
        )
    first, middle, last = layers
    activation = _read_activation(middle)
    if type(first) is not nn.Linear or type(last) is not nn.Linear or activation is None:
        raise UnsupportedModelError(
            "the closed form reads the layers Linear, activation, Linear in this order; got "
            f"{', '.join(type(layer).__name__ for layer in layers)}; {_ELSEWHERE}"
        )
    _require_fit(first, last)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "the model has no trainable parameter, so its Hessian is empty; set requires_grad on "
            "those whose curvature you want"
        )
    return first, activation, last


def _require_fit(first: nn.Linear, last: nn.Linear) -> None:
    if not {id(p) for p in first.parameters()}.isdisjoint(id(p) for p in last.parameters()):
        raise UnsupportedModelError(f"the two linear layers share a parameter; {_ELSEWHERE}")
    if last.in_features != first.out_features:
        raise ValueError(
            f"the layers do not fit: {first} gives {first.out_features} values and {last} takes "
            f"{last.in_features}; make them equal"
        )
    if last.out_features != 1:
        raise UnsupportedModelError(
            f"the closed form covers one output; layer {last} has {last.out_features}; {_ELSEWHERE}"
        )


def _require_no_hooks(module: nn.Module, name: str) -> None:
    """What changes a module's outputs from outside is invisible to the closed form.

    Pruning and the older weight normalization are hooks of this kind.
    """
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):  # noqa: SLF001
        raise UnsupportedModelError(
            f"{name} has forward hooks, which may change its outputs and which the closed form "
            f"would leave out; remove them, or {_ELSEWHERE}"
        )


_MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Softplus: "softplus",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}

# PyTorch's softplus is a straight line beyond its threshold; from here on the bend that it leaves
# out is at most 2e-9.
_SOFTPLUS_THRESHOLD = 20


def _read_activation(layer: nn.Module) -> Activation | None:
    if type(layer) is nn.LeakyReLU:
        return leaky_relu(layer.negative_slope)
    if isinstance(layer, nn.GELU) and layer.approximate != "none":
        return None
    if isinstance(layer, nn.Softplus) and (
        layer.beta != 1 or layer.threshold < _SOFTPLUS_THRESHOLD
    ):
        return None
    name = _MODULES.get(type(layer))
    return None if name is None else ACTIVATIONS[name]


def _read_criterion(criterion: nn.Module) -> Loss:
    if type(criterion) not in (nn.BCEWithLogitsLoss, nn.MSELoss):
        raise UnsupportedModelError(
            "the closed form covers nn.BCEWithLogitsLoss and nn.MSELoss; got "
            f"{type(criterion).__name__}; {_ELSEWHERE}"
        )
    _require_no_hooks(criterion, "the criterion")
    if criterion.reduction not in ("mean", "sum"):
        raise ValueError(
            f"the criterion's reduction must be 'mean' or 'sum' for its Hessian to be a matrix; "
            f"got {criterion.reduction!r}"
        )
    if isinstance(criterion, nn.MSELoss):
        return LOSSES["mse"]
    if criterion.weight is not None:
        raise UnsupportedModelError(
            f"the closed form does not cover BCEWithLogitsLoss(weight=...); {_ELSEWHERE}"
        )
    if criterion.pos_weight is not None and criterion.pos_weight.numel() != 1:
        raise UnsupportedModelError(
            "BCEWithLogitsLoss(pos_weight=...) must hold one value for a model of one output; got "
            f"{criterion.pos_weight.numel()}"
        )
    return LOSSES["bce"]

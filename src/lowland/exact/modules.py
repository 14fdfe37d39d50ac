"""Reading a PyTorch model and criterion as a multilayer perceptron and a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowland.activations import ACTIVATIONS, Activation, compose, leaky_relu
from lowland.errors import UnsupportedModelError
from lowland.exact.plan import DEFAULT_MEMORY_BUDGET, OrderChoice
from lowland.exact.setup import Reduction, Setup, prepare
from lowland.losses import LOSSES, Loss
from lowland.moments import HessianMoments
from lowland.validation import (
    check_constant,
    check_finite,
    check_initialized,
    check_labels,
    check_one_per_sample,
    check_targets,
    check_tensor,
)

_ELSEWHERE = "use method='probes' or, for few parameters, method='dense', which take any module"


def module_moments(
    model: nn.Module,
    criterion: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    order: OrderChoice = "auto",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    unbiased: bool = False,
    moments: int = 2,
) -> HessianMoments:
    """Exact moments of the Hessian in the model's trainable parameters.

    Raises:
        UnsupportedModelError: If the closed form does not cover the model or the criterion, or the
            data require gradients.
        ValueError: As :func:`lowland.exact.moments`.
    """
    setup = read(model, criterion, x, y)
    return setup.moments(order, memory_budget, unbiased=unbiased, moments=moments)


def module_trace(
    model: nn.Module,
    criterion: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    """The exact trace alone, in linear time; otherwise as :func:`module_moments`."""
    return read(model, criterion, x, y).trace(memory_budget)


def check_supported(model: nn.Module, criterion: nn.Module) -> None:
    """Require a model and a criterion that the closed form covers.

    Raises:
        UnsupportedModelError: Naming the layer or the setting that is not covered.
    """
    _read_layers(model)
    _read_criterion(criterion)


# The model


@dataclass(frozen=True)
class _Network:
    """A model as layers: what is done to the inputs, then weights and activations in turn."""

    flat: bool
    before: Activation | None
    layers: list[nn.Linear]
    activations: list[Activation]


def read(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> Setup:
    """What computes with a model, a criterion and data; errors as :func:`module_moments`."""
    network = _read_layers(model)
    loss = _read_criterion(criterion)
    check_tensor(x, "x")
    check_tensor(y, "y")
    for layer in network.layers:
        _require_closed_form_type(layer)
    first, outputs = network.layers[0], network.layers[-1].out_features
    if network.flat and x.ndim > 2:
        x = x.flatten(1)
    if x.ndim > 2 and x.shape[-1] == first.in_features:
        raise UnsupportedModelError(
            f"in the closed form {first} takes x of shape (samples, {first.in_features}); got "
            f"{tuple(x.shape)}, for which {_ELSEWHERE}"
        )
    if x.ndim != 2 or x.shape[1] != first.in_features:
        flat = " once flattened" if network.flat else ""
        raise ValueError(
            f"x and the model do not match: {first} takes x of shape "
            f"(samples, {first.in_features}){flat}; got {tuple(x.shape)}"
        )
    if network.before is not None:
        x = network.before(x)[0]
    y = _read_targets(y, len(x), outputs, loss)
    reduction: Reduction = "sum" if criterion.reduction == "sum" else "mean"
    scale: float | Tensor | None = None
    if isinstance(criterion, nn.CrossEntropyLoss):
        y, scale = _weigh_classes(criterion, y, outputs, like=x)
        if scale is not None:  # not a mean over samples
            reduction = "sum"
    elif isinstance(criterion, nn.BCEWithLogitsLoss):
        y, scale = _weigh_outputs(criterion, y, outputs, like=x)
    return prepare(
        [_augmented(layer) for layer in network.layers],
        x,
        y,
        network.activations,
        loss,
        reduction,
        scale=scale,
        rows=[_trained_rows(layer) for layer in network.layers],
    )


def _require_closed_form_type(layer: nn.Linear) -> None:
    if layer.weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"the model must be float32 or float64; {layer} has "
            f"{str(layer.weight.dtype).removeprefix('torch.')} weights. Convert it, with "
            "model.float() or model.double(), and x likewise"
        )


def _read_targets(y: Tensor, samples: int, outputs: int, loss: Loss) -> Tensor:
    """Targets as PyTorch's criterion takes them; with one output also without its dimension."""
    shapes: list[tuple[int, ...]]
    if loss.targets == "classes":
        shapes = [(samples,), (samples, outputs)]
    elif outputs == 1:
        shapes = [(samples,), (samples, 1)]
    else:
        shapes = [(samples, outputs)]
    if tuple(y.shape) not in shapes:
        raise ValueError(
            f"x and y do not match: y must have shape {' or '.join(map(str, shapes))}, one target "
            f"per {'sample' if len(shapes) > 1 else 'sample and output'}; got {tuple(y.shape)}"
        )
    return y.reshape(-1) if outputs == 1 else y


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


def _read_layers(model: nn.Module) -> _Network:
    check_initialized(model)
    if type(model) is not nn.Linear and not _is_plain_sequence(model):
        raise UnsupportedModelError(
            "the closed form reads nn.Linear, or nn.Sequential of Linear layers and activations; "
            f"got {type(model).__name__}; {_ELSEWHERE}"
        )
    flat, before = False, None
    last = ""  # the activation read last
    layers: list[nn.Linear] = []
    activations: list[Activation | None] = []  # after each layer
    for name, layer in _leaves(model, "the model"):
        if type(layer) is nn.Linear:
            layers.append(layer)
            activations.append(None)
        elif type(layer) is nn.Flatten:
            _require_plain_flatten(layer, name)
            flat = flat or not layers  # beyond them there is nothing left to flatten
        elif not _does_nothing(layer):
            activation = _read_activation(layer)
            if activation is None:
                raise UnsupportedModelError(_not_covered(name, layer))
            if layers:
                activations[-1] = compose(activation, activations[-1])
                last = name
            else:
                before = compose(activation, before)
    if activations and activations[-1] is not None:
        raise UnsupportedModelError(
            f"{last}, stands after the last Linear layer; the closed form takes logits, the "
            "outputs of a Linear layer, and a criterion on logits; remove it, or "
            f"{_ELSEWHERE}"
        )
    _require_layers(model, layers)
    hidden = [ACTIVATIONS["identity"] if each is None else each for each in activations[:-1]]
    return _Network(flat, before, layers, hidden)


def _is_plain_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _leaves(module: nn.Module, name: str, at: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers in a model and in sequences within it, with names for messages."""
    _require_no_hooks(module, name)
    if not _is_plain_sequence(module):
        yield name, module
        return
    for index, layer in enumerate(cast("nn.Sequential", module)):
        # A sequence would print all its layers.
        shown = type(layer).__name__ if isinstance(layer, nn.Sequential) else layer
        yield from _leaves(layer, f"layer {at}{index} of the model, {shown}", f"{at}{index}.")


def _does_nothing(layer: nn.Module) -> bool:
    if type(layer) is nn.Dropout:
        return not layer.training or layer.p == 0
    return type(layer) is nn.Identity


def _require_plain_flatten(layer: nn.Flatten, name: str) -> None:
    if (layer.start_dim, layer.end_dim) != (1, -1):
        raise UnsupportedModelError(f"{name}, is covered with its default dimensions; {_ELSEWHERE}")


def _require_layers(model: nn.Module, layers: list[nn.Linear]) -> None:
    if not layers:
        raise UnsupportedModelError(
            f"the closed form needs at least one Linear layer; got none; {_ELSEWHERE}"
        )
    _require_fit(layers)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "the model has no trainable parameter, so its Hessian is empty; set requires_grad on "
            "those whose curvature you want"
        )


def _not_covered(name: str, layer: nn.Module) -> str:
    if type(layer) is nn.Dropout:
        return (
            f"{name}, draws a new mask in each call while it is in training mode, so the loss has "
            "no one Hessian; call model.eval() first"
        )
    return f"{name}, is not covered by the closed form; {_ELSEWHERE}"


def _require_fit(layers: list[nn.Linear]) -> None:
    seen: dict[int, int] = {}
    for index, layer in enumerate(layers, start=1):
        for parameter in layer.parameters():
            other = seen.setdefault(id(parameter), index)
            if other != index:
                raise UnsupportedModelError(
                    f"Linear layers {other} and {index} of the model, {layers[other - 1]} and "
                    f"{layer}, share a parameter; {_ELSEWHERE}"
                )
    for first, second in pairwise(layers):
        if second.in_features != first.out_features:
            raise ValueError(
                f"the layers do not fit: {first} gives {first.out_features} values and {second} "
                f"takes {second.in_features}; make them equal"
            )


def _require_no_hooks(module: nn.Module, name: str) -> None:
    """What changes a module's outputs from outside is invisible to the closed form.

    Pruning and the older weight normalization are hooks of this kind.
    """
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):  # noqa: SLF001
        raise UnsupportedModelError(
            f"forward hooks on {name} may change its outputs, and the closed form would leave "
            f"them out; remove them, or {_ELSEWHERE}"
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


# The criterion

_CRITERIA: dict[type[nn.Module], Callable[[nn.Module], Loss]] = {
    nn.BCEWithLogitsLoss: lambda _: LOSSES["bce"],
    nn.CrossEntropyLoss: lambda _: LOSSES["ce"],
    nn.MSELoss: lambda _: LOSSES["mse"],
}


def register_criterion(kind: type[nn.Module], read: Callable[[nn.Module], Loss]) -> None:
    """Teach the closed form a criterion of your own.

    Args:
        kind: The criterion's class. Instances need an attribute ``reduction``, ``"mean"`` (over
            samples and outputs) or ``"sum"``.
        read: Maps an instance to its :class:`~lowland.losses.Loss`. The derivatives of a new one
            are compared with its value, so return the same one for the same settings.

    Raises:
        TypeError: If ``kind`` is no class of criteria, or ``read`` no function.

    Example:
        >>> from torch import nn
        >>> from lowland.exact import register_criterion
        >>> from lowland.losses import Loss, Separable
        >>> def derivatives(s, y):
        ...     rate = s.exp()
        ...     return Separable(rate - y, rate, rate)
        >>> poisson = Loss("poisson", lambda s, y: s.exp() - y * s, derivatives)
        >>> register_criterion(nn.PoissonNLLLoss, lambda criterion: poisson)  # log_input=True
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(
            f"expected a criterion's class, such as nn.PoissonNLLLoss; got {kind!r}: give the "
            "class rather than an instance or a function"
        )
    if not callable(read):
        raise TypeError(
            f"expected a function of a {kind.__name__} that returns its lowland.losses.Loss; got "
            f"{read!r}: for one loss use lambda criterion: loss"
        )
    _CRITERIA[kind] = read


def _read_criterion(criterion: nn.Module) -> Loss:
    read = _CRITERIA.get(type(criterion))
    if read is None:
        known = ", ".join(f"nn.{kind.__name__}" for kind in _CRITERIA)
        raise UnsupportedModelError(
            f"the closed form covers {known}; got {type(criterion).__name__}; {_ELSEWHERE}, or "
            "lowland.exact.register_criterion"
        )
    _require_no_hooks(criterion, "the criterion")
    reduction = getattr(criterion, "reduction", None)
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"the criterion's reduction must be 'mean' or 'sum' for its Hessian to be a matrix; "
            f"got {reduction!r}"
        )
    loss = read(criterion)
    if not isinstance(loss, Loss):
        raise TypeError(
            f"what register_criterion was given for {type(criterion).__name__} must return a "
            f"lowland.losses.Loss; got {type(loss).__name__}"
        )
    return loss


def _weigh_outputs(
    criterion: nn.BCEWithLogitsLoss, y: Tensor, outputs: int, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Labels, and their weights where there are any but those of the reduction."""
    positive, weight = criterion.pos_weight, criterion.weight
    if positive is None and weight is None:
        return y, None
    shape = (len(y), outputs)

    def spread(values: Tensor, name: str) -> Tensor:
        _check_weights(criterion, name)
        try:
            return values.to(like.dtype).expand(shape)
        except RuntimeError:
            raise UnsupportedModelError(
                f"BCEWithLogitsLoss({name}=...) must hold one value, or one for each output; with "
                f"{outputs} output{'s' if outputs > 1 else ''} got shape {tuple(values.shape)}"
            ) from None

    scale = like.new_ones(shape)
    if positive is not None:
        check_targets(y, LOSSES["bce"])
        # With p the weight, p y log(s) + (1 - y) log(1 - s) is the loss of another label.
        yes = y.to(like.dtype).view(shape)
        no, yes = 1 - yes, spread(positive, "pos_weight") * yes
        scale = yes + no
        y = torch.where(scale > 0, yes / scale, 0).view_as(y)
    if weight is not None:
        scale = scale * spread(weight, "weight")
    return y, scale if criterion.reduction == "sum" else scale / scale.numel()


def _check_weights(criterion: nn.Module, name: str) -> None:
    """Require weights that can weigh a loss: none is negative, and none is to be trained."""
    weights: Tensor = getattr(criterion, name)
    where = f"{type(criterion).__name__}({name}=...)"
    check_constant(weights, where)
    if weights.device.type != "cpu":
        return
    check_finite(weights, where)
    if bool((weights < 0).any()):
        raise ValueError(
            f"{where} must hold numbers of at least 0; got {float(weights.min()):g}: a negative "
            "weight leaves the loss without a minimum"
        )


def _weigh_classes(
    criterion: nn.CrossEntropyLoss, y: Tensor, classes: int, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Targets as distributions that hold the criterion's weights, and the mean's denominator.

    The latter is None where it is the number of samples, or where there is none.
    """
    smoothing, weights = criterion.label_smoothing, criterion.weight
    soft = y.is_floating_point()
    if soft and y.ndim < 2:
        raise TypeError(
            f"labels of classes must be integers; got {str(y.dtype).removeprefix('torch.')}: "
            "convert them with y.long()"
        )
    kept = None
    if not soft:
        check_one_per_sample(y)
        ignored = y == criterion.ignore_index
        # Elsewhere a look would wait for the device.
        if y.device.type != "cpu" or bool(ignored.any()):
            kept, y = (~ignored).to(like.dtype), torch.where(ignored, 0, y)
        check_labels(y, classes)
        y = functional.one_hot(y.long(), classes).to(like.dtype)
    if weights is not None:
        _check_weights(criterion, "weight")
    if weights is not None and weights.numel() != classes:
        raise ValueError(
            f"CrossEntropyLoss(weight=...) must hold one value for each of {classes} outputs; got "
            f"shape {tuple(weights.shape)}"
        )
    target = (1 - smoothing) * y + smoothing / classes
    mass = y
    if weights is not None:
        target, mass = target * weights.to(like.dtype), mass * weights.to(like.dtype)
    if kept is not None:
        target, mass = target * kept[:, None], mass * kept[:, None]
    counts = soft or (weights is None and kept is None)
    if criterion.reduction == "sum" or counts:
        return target, None
    total = mass.sum()
    if total.device.type == "cpu" and not bool(total > 0):
        raise ValueError(
            "every sample has weight zero, by CrossEntropyLoss(weight=...) or ignore_index, so the "
            "mean loss does not exist; leave such a batch out"
        )
    return target, (1 / total).expand(len(y))

"""Reading a PyTorch model as a multilayer perceptron."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowland._batches import described, holds_tensors
from lowland._layers import has_hooks, is_plain_sequence, walk
from lowland.activations import ACTIVATIONS, Activation, compose, read_activation
from lowland.criteria import Criterion, encode, read_loss
from lowland.errors import ANY_MODULE, UnsupportedModelError
from lowland.exact.setup import Setup, prepare_layers
from lowland.exact.terms import activate
from lowland.validation import check_parameters, check_tensor, check_types

T = TypeVar("T", Tensor, Tensor | None)


@dataclass(frozen=True)
class _Network:
    """A model as layers: what is done to the inputs, then weights and activations in turn."""

    flat: bool
    before: Activation | None
    layers: list[nn.Linear]
    parameters: list[tuple[Tensor, Tensor | None]]  # weights and biases of each
    activations: list[Activation]


def read(
    model: nn.Module,
    criterion: Criterion,
    x: Any,
    y: Any,
    parameters: Iterable[Tensor] | None = None,
) -> Setup:
    """What computes with a model, a criterion and data.

    Args:
        model: A Linear layer, or a sequence of these and activations.
        criterion: Of logits.
        x: Inputs; moments carry gradients in them if they ask for some.
        y: Targets.
        parameters: Those whose Hessian is meant; by default all that are trainable.

    Raises:
        UnsupportedModelError: If the closed form does not cover the model or the criterion, or the
            targets require gradients.
        TypeError, ValueError: As :func:`lowland.exact.moments`.
    """
    check_parameters(dict(model.named_parameters()))
    chosen = model.parameters() if parameters is None else parameters
    return read_checked(model, criterion, x, y, chosen)


def read_checked(
    model: nn.Module, criterion: Criterion, x: Any, y: Any, parameters: Iterable[Tensor]
) -> Setup:
    """:func:`read` of a model whose parameters are here and have their shapes."""
    network = _read_layers(model)
    trained = {id(parameter) for parameter in parameters if parameter.requires_grad}
    loss = read_loss(criterion)
    for name, part in (("x", x), ("y", y)):
        dense = isinstance(part, Tensor) and part.layout == torch.strided
        if part is None or (holds_tensors(part) and not dense):
            raise UnsupportedModelError(
                f"the closed form takes {name} as a dense tensor; got {described(part)}, for which "
                f"{ANY_MODULE}"
            )
        check_tensor(part, name)
    check_types({f"{place}.weight": each for place, (each, _) in enumerate(network.parameters)})
    first, outputs = network.layers[0], network.layers[-1].out_features
    if network.flat and x.ndim > 2:
        x = x.flatten(1)
    if x.ndim > 2 and x.shape[-1] == first.in_features:
        raise UnsupportedModelError(
            f"in the closed form {first} takes x of shape (samples, {first.in_features}); got "
            f"{tuple(x.shape)}, for which {ANY_MODULE}"
        )
    if x.ndim != 2 or x.shape[1] != first.in_features:
        flat = " once flattened" if network.flat else ""
        raise ValueError(
            f"x and the model do not match: {first} takes x of shape "
            f"(samples, {first.in_features}){flat}; got {tuple(x.shape)}"
        )
    if network.before is not None:
        x, *_ = activate(x, network.before)
    targets = encode(criterion, loss, y, outputs=outputs, like=x)
    return prepare_layers(
        [(_constant(weight), _constant(bias)) for weight, bias in network.parameters],
        x,
        targets,
        network.activations,
        loss,
        [_trained_rows(*parts, trained) for parts in network.parameters],
    )


def _constant(part: T) -> T:
    """Weights or biases; those that are constants now stay so."""
    return part if part is None or part.requires_grad else part.detach()


def _trained_rows(weight: Tensor, bias: Tensor | None, trained: set[int]) -> slice:
    start = 0 if bias is not None and id(bias) in trained else 1
    stop = weight.shape[1] + 1 if id(weight) in trained else 1
    return slice(start, stop)


def _read_layers(model: nn.Module) -> _Network:
    if type(model) is not nn.Linear and not is_plain_sequence(model):
        raise UnsupportedModelError(
            "the closed form reads nn.Linear, or nn.Sequential of Linear layers and activations; "
            f"got {type(model).__name__}; {ANY_MODULE}"
        )
    flat, before = False, None
    last: tuple[str, nn.Module] | None = None  # the activation read last
    layers: list[nn.Linear] = []
    activations: list[Activation | None] = []  # after each layer
    for path, layer in _leaves(model):
        if type(layer) is nn.Linear:
            layers.append(layer)
            activations.append(None)
        elif type(layer) is nn.Flatten:
            _require_plain_flatten(layer, path)
            flat = flat or not layers  # beyond them there is nothing left to flatten
        elif not _does_nothing(layer):
            activation = read_activation(layer)
            if activation is None:
                raise UnsupportedModelError(_not_covered(path, layer))
            if layers:
                activations[-1] = compose(activation, activations[-1])
                last = path, layer
            else:
                before = compose(activation, before)
    if activations and activations[-1] is not None and last is not None:
        raise UnsupportedModelError(
            f"{_named(*last)}, stands after the last Linear layer; the closed form takes logits, "
            "the outputs of a Linear layer, and a criterion on logits; remove it, or "
            f"{ANY_MODULE}"
        )
    parameters: list[tuple[Tensor, Tensor | None]] = [(each.weight, each.bias) for each in layers]
    _require_fit(layers, parameters)
    hidden = [ACTIVATIONS["identity"] if each is None else each for each in activations[:-1]]
    return _Network(flat, before, layers, parameters, hidden)


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers in a model and in sequences within it, each with its path."""
    for path, module in walk(model):
        if has_hooks(module):
            raise UnsupportedModelError(
                f"forward hooks on {_named(path, module)} may change its outputs, and the closed "
                f"form would leave them out; remove them, or {ANY_MODULE}"
            )
        if not is_plain_sequence(module):
            yield path, module


def _named(path: str, module: nn.Module) -> str:
    """What messages call a layer."""
    # A sequence would print all its layers.
    shown = type(module).__name__ if isinstance(module, nn.Sequential) else module
    return f"layer {path} of the model, {shown}" if path else "the model"


def _does_nothing(layer: nn.Module) -> bool:
    if type(layer) is nn.Dropout:
        return not layer.training or layer.p == 0
    return type(layer) is nn.Identity


def _require_plain_flatten(layer: nn.Flatten, path: str) -> None:
    if (layer.start_dim, layer.end_dim) != (1, -1):
        name = _named(path, layer)
        raise UnsupportedModelError(f"{name}, is covered with its default dimensions; {ANY_MODULE}")


def _not_covered(path: str, layer: nn.Module) -> str:
    name = _named(path, layer)
    if type(layer) is nn.Dropout:
        return (
            f"{name}, draws a new mask in each call while it is in training mode, so the loss has "
            "no one Hessian; call model.eval() first"
        )
    return f"{name}, is not covered by the closed form; {ANY_MODULE}"


def _require_fit(layers: list[nn.Linear], parameters: list[tuple[Tensor, Tensor | None]]) -> None:
    seen: dict[int, int] = {}
    for index, layer in enumerate(layers, start=1):
        for parameter in parameters[index - 1]:
            if parameter is None:
                continue
            other = seen.setdefault(id(parameter), index)
            if other != index:
                raise UnsupportedModelError(
                    f"Linear layers {other} and {index} of the model, {layers[other - 1]} and "
                    f"{layer}, share a parameter; {ANY_MODULE}"
                )
    for first, second in pairwise(layers):
        if second.in_features != first.out_features:
            raise ValueError(
                f"the layers do not fit: {first} gives {first.out_features} values and {second} "
                f"takes {second.in_features}; make them equal"
            )

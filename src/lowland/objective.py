"""A loss as a function of a model's parameters, for any module and criterion."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.parallel import DistributedDataParallel

from lowland.criteria import Criterion, check_splits_evenly, scalar_loss
from lowland.torch_fixes import is_ordinary

Gradient = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True)
class Objective:
    """``criterion(model(x), y)`` in some of the model's parameters.

    Attributes:
        model: Without the wrappers that :func:`unwrap` takes off.
        criterion: Maps the model's output and ``y`` to a scalar.
        x: Whatever the model takes.
        y: Whatever the criterion takes.
        names: Those of the parameters in the model.
        parameters: What the loss is a function of.
        places: Where the model holds them, a tied one more than once: module, name and parameter.
    """

    model: nn.Module
    criterion: Criterion
    x: Any
    y: Any
    names: list[str]
    parameters: list[Tensor]
    places: list[tuple[nn.Module, str, Tensor]]

    @property
    def dim(self) -> int:
        """``P``, the number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    @cached_property
    def is_ordinary(self) -> bool:
        """Whether model and criterion are, by :func:`lowland.torch_fixes.is_ordinary`."""
        return is_ordinary(self.model, self.criterion)

    def loss(self) -> Tensor:
        """The loss, with a graph to the parameters.

        Raises:
            ValueError: If it is no scalar, not finite, or has no graph.
        """
        return self._checked(self._loss())

    def _loss(self) -> Tensor:
        return scalar_loss(self.criterion, self.model(self.x), self.y)

    def gradient(self, at: Sequence[Tensor] | None = None) -> Gradient:
        """The loss and its gradient at other values of the parameters, without graphs.

        Raises:
            ValueError: As :meth:`loss`, or if the loss does not depend on one of the parameters.
        """
        values = [v.detach().requires_grad_() for v in at or self.parameters]

        with torch.enable_grad(), not_compiled(), self._holding(values):
            # Elsewhere than at the parameters NaN is an answer: of a step that a scaler leaves out.
            loss = self.loss() if at is None else self._loss()
            # In here, as activation checkpointing runs the model again during the backward pass.
            parts = grad(loss, values, allow_unused=True)
        return loss.detach(), self.complete(parts)

    @contextmanager
    def _holding(self, values: Sequence[Tensor]) -> Iterator[None]:
        """The model with other tensors in the places of its parameters."""
        self._put(values)
        try:
            yield
        finally:
            self._put(self.parameters)

    def _put(self, values: Sequence[Tensor]) -> None:
        by_parameter = {id(p): value for p, value in zip(self.parameters, values, strict=True)}
        for module, name, parameter in self.places:
            module._parameters[name] = by_parameter[id(parameter)]  # type: ignore[assignment]  # noqa: SLF001
            if isinstance(module, nn.RNNBase):  # it keeps a list of its own
                module._flat_weights = [  # noqa: SLF001
                    getattr(module, weight)
                    for weight in module._flat_weights_names  # noqa: SLF001
                ]

    def complete(self, parts: Sequence[Tensor | None]) -> list[Tensor]:
        """The parts of a gradient, of which none may be missing."""
        missing = [n for n, part in zip(self.names, parts, strict=True) if part is None]
        if missing:
            raise ValueError(
                f"the loss does not depend on {', '.join(missing)}: freeze what the model does not "
                "use by requires_grad_(False), or name the parameters to measure (parameters=...)"
            )
        return [part for part in parts if part is not None]

    def halves(self) -> list[Objective]:
        """The same with the two halves of the samples.

        Raises:
            TypeError: If the data are no tensors.
            ValueError: If the samples are not an even number, or the loss is not their mean.
        """
        if not (isinstance(self.x, Tensor) and isinstance(self.y, Tensor)):
            raise TypeError(
                "unbiased=True splits the batch in two, for which x and y must be tensors; got "
                f"{type(self.x).__name__} and {type(self.y).__name__}"
            )
        if len(self.x) < 2 or len(self.x) % 2:
            raise ValueError(
                "unbiased=True splits the batch in two halves of one size: it needs an even number "
                f"of samples; got {len(self.x)}"
            )
        halves = [
            replace(self, x=x, y=y) for x, y in zip(self.x.chunk(2), self.y.chunk(2), strict=True)
        ]
        check_splits_evenly(self.criterion, [half.y for half in halves])
        return halves

    def _checked(self, loss: Tensor) -> Tensor:
        if loss.ndim:
            raise ValueError(
                f"the criterion must return a scalar for its Hessian to be a matrix; got shape "
                f"{tuple(loss.shape)}: use reduction='mean' or 'sum'"
            )
        if not loss.requires_grad:
            raise ValueError(
                "the loss has no graph to the model's parameters: something in the model or the "
                "criterion detaches it (torch.no_grad, .detach(), .item(), a rounding or an argmax)"
            )
        check_finite(loss, "the loss")
        return loss


def objective(
    model: nn.Module,
    criterion: Criterion,
    x: Any,
    y: Any,
    parameters: Iterable[Tensor] | None = None,
) -> Objective:
    """The loss as a function of the given parameters, or of all that are trainable.

    Raises:
        ValueError: As :func:`trainable` and :func:`check_subset`.
    """
    model = unwrap(model)
    named = trainable(model)
    if parameters is not None:
        wanted = check_subset(model, parameters)
        named = {name: p for name, p in named.items() if id(p) in wanted}
    chosen = {id(p) for p in named.values()}
    places: list[tuple[nn.Module, str, Tensor]] = [
        (module, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()  # noqa: SLF001
        if id(p) in chosen and p is not None
    ]
    return Objective(model, criterion, x, y, list(named), list(named.values()), places)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are not frozen, by name.

    Raises:
        ValueError: If there are none.
    """
    named: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(
            "the model has no trainable parameter, so its Hessian is empty; set requires_grad on "
            "those whose curvature you want"
        )
    return named


def check_subset(model: nn.Module, parameters: Iterable[Tensor]) -> set[int]:
    """The identities of the parameters.

    Raises:
        ValueError: If there are none, or some are not the model's own or frozen.
    """
    wanted = {id(parameter) for parameter in parameters}
    found = wanted & {id(p) for p in model.parameters() if p.requires_grad}
    if not wanted or len(found) < len(wanted):
        raise ValueError(
            f"parameters= must be trainable parameters of the model, at least one; of "
            f"{len(wanted)} given {len(found)} are"
        )
    return wanted


@contextmanager
def only(model: nn.Module, parameters: Iterable[Tensor] | None) -> Iterator[list[Tensor] | None]:
    """All other parameters frozen meanwhile; gives the parameters as a list.

    Raises:
        ValueError: As :func:`check_subset`.
    """
    if parameters is None:
        yield None
        return
    parameters = list(parameters)
    wanted = check_subset(model, parameters)
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in wanted]
    for parameter in others:
        parameter.requires_grad = False
    try:
        yield parameters
    finally:
        for parameter in others:
            parameter.requires_grad = True


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside data-parallel and compiled ones, whose parameters are the same.

    Compiled code cannot be differentiated twice, and a data-parallel module expects one backward
    pass for each forward pass.
    """
    *_, inside = _unwrapping(model)
    return inside


def data_parallel(model: nn.Module) -> DistributedDataParallel | None:
    """The data-parallel module that it is, or that is compiled in it."""
    parallel = (each for each in _unwrapping(model) if isinstance(each, DistributedDataParallel))
    return next(parallel, None)


def _unwrapping(model: nn.Module) -> Iterator[nn.Module]:
    inside: Any = model
    while isinstance(inside, nn.Module):
        yield inside
        compiled = getattr(inside, "_orig_mod", None)
        inside = inside.module if isinstance(inside, DistributedDataParallel) else compiled


@contextmanager
def not_compiled() -> Iterator[None]:
    """Run compiled modules, at any depth, as they were written."""
    # To load the compiler takes seconds, and where it is not loaded nothing is compiled.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def check_finite(value: Tensor, what: str) -> None:
    """Refuse NaN and infinity, where :func:`may_look`.

    Raises:
        ValueError: If there is one.
    """
    if may_look(value.device) and not bool(value.isfinite().all()):
        raise ValueError(
            f"{what} is not finite: look for NaN or infinity in the data and the parameters, or "
            "lower the learning rate if training diverges"
        )


def may_look(device: torch.device) -> bool:
    """Whether values are looked at.

    Only on a processor: elsewhere the look would make the host wait for the device. Not in half
    precision either, where ``GradScaler`` takes care of overflows.
    """
    return device.type == "cpu" and not half_autocast(device)


def half_autocast(device: torch.device) -> bool:
    """Whether autocast is on with float16, whose short exponent overflows and underflows."""
    return torch.is_autocast_enabled(device.type) and (
        torch.get_autocast_dtype(device.type) == torch.float16
    )

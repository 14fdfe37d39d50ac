"""A loss as a function of a model's parameters, for any module, criterion and data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.jit import ScriptModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointFunction

from lowland._batches import Batch, any_requires_grad, mapped, one_batch, tensors, to_device
from lowland._call import call
from lowland._shares import check_even
from lowland._watch import notice
from lowland.criteria import (
    Criterion,
    check_callable,
    check_kept,
    check_splits_evenly,
    holders_of,
    is_known,
    modules_of,
    scalar_loss,
)
from lowland.errors import UnsupportedModelError
from lowland.matrices import Matrix, check_matrix
from lowland.passes import remember, remember_randomness, remember_state
from lowland.torch_fixes import is_ordinary, leaves_no_trace
from lowland.validation import check_parameters, check_types

Gradient = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True, eq=False)
class Objective:
    r"""The loss of a model on its data, in some of the model's parameters.

    .. math:: L(\theta) = \sum_b \frac{m_b}{m} \ell(f_\theta(x_b), y_b), \qquad m = \sum_b m_b

    A batch counts by what its own mean divides by (:mod:`lowland._weights`), so that ``L`` is the
    mean over all samples however these are cut into batches.

    Attributes:
        outer: The model as the caller has it.
        model: Without the wrappers that :func:`unwrap` takes off.
        criterion: Maps the model's output and ``y`` to a scalar.
        batches: Pairs of whatever the model and the criterion take.
        names: Those of the parameters in the model.
        parameters: What the loss is a function of.
        others: Trainable parameters that are constants of the matrix. Its moments carry gradients
            in them where exact derivatives lead there (:meth:`with_others`).
        shares: ``m_b / m`` of each batch; None where there is one, whose loss is meant as it is.
        matrix: Which matrix of curvature is meant (:mod:`lowland.matrices`).
        beside: Whether the model has parameters that are no constants here, beside those that the
            loss is looked at as a function of.
        once: Whether what is found of the loss will be differentiated once at most.
        half_scale: What gradients are multiplied by on their way in half precision.
        apart: Whether it is looked at beside a step of training: its passes leave no trace, and
            who says so keeps the state of what they write to (:meth:`state_kept`).
    """

    outer: nn.Module
    model: nn.Module
    criterion: Criterion
    batches: Iterable[Batch]
    names: list[str]
    parameters: list[Tensor]
    others: list[Tensor] = field(default_factory=list)
    shares: Sequence[float] | None = None
    matrix: Matrix = "hessian"
    beside: bool = False
    once: bool = False
    half_scale: float | Tensor = 1024.0
    apart: bool = False

    @property
    def dim(self) -> int:
        """``P``, the number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.parameters[0].device

    @cached_property
    def is_ordinary(self) -> bool:
        """Whether model and criterion are, by :func:`lowland.torch_fixes.is_ordinary`."""
        return is_ordinary(self.model, self.criterion)

    @cached_property
    def leaves_no_trace(self) -> bool:
        """Whether its passes write to nothing and draw nothing, so that there is nothing to keep.

        For as long as nobody changes the model: of a pass that may come later :meth:`remember`.
        """
        # An ordinary criterion is a module.
        return self.is_ordinary and leaves_no_trace(self.model, cast("nn.Module", self.criterion))

    @property
    def parallel(self) -> DistributedDataParallel | None:
        """The data-parallel module that the model is wrapped in, if it is."""
        return data_parallel(self.outer)

    @property
    def batch(self) -> Batch:
        """The one batch that there is."""
        (only_one,) = self.batches
        return only_one

    def on(self, *batches: Batch) -> Objective:
        """The loss on other data, of one batch as it is."""
        return replace(self, batches=batches, shares=None)

    def parts(self) -> Iterator[tuple[float, Objective]]:
        """Each batch's share in the loss, and the loss on it, where the parameters are."""
        if self.shares is None:
            yield 1.0, self
            return
        for share, (x, y) in zip(self.shares, self.batches, strict=True):
            if share:  # else all of its targets are ignored, and its loss is no number
                yield share, self.on((to_device(x, self.device), to_device(y, self.device)))

    def loss(self) -> Tensor:
        """The loss, with a graph to the parameters.

        Raises:
            TypeError: If it is no tensor.
            ValueError: If it is no scalar, not finite, or has no graph.
            RuntimeError: If the derivatives have been looked at, but not those of this batch's
                operations, and these are wrong.
        """
        return self.checked(self.value())

    def step_loss(self) -> Tensor:
        """What a step of training without us would have computed: by the model as it is wrapped."""
        x, y = self.batch
        if self.apart:
            with nullcontext() if self.leaves_no_trace else self.remember()():
                return self.value()
        return scalar_loss(self.criterion, call(self.outer, x), y)

    def value(self) -> Tensor:
        """:meth:`loss`, whatever it is: NaN too, and what has no graph."""
        if self.shares is None:
            x, y = _ordinary(self.batch)
            return scalar_loss(self.criterion, call(self.model, x), y)
        return torch.stack([part.value() * share for share, part in self.parts()]).sum()

    @property
    def others_require_grad(self) -> bool:
        """Whether somebody may ask for gradients in more than the parameters, as in the data."""
        return torch.is_grad_enabled() and (self.beside or any_requires_grad(self.batch))

    @property
    def others_beside(self) -> bool:
        """Whether more than the parameters may have a gradient of an ordinary model's loss."""
        return bool(self.others) or self.beside or any_requires_grad(self.batch)

    def with_others(self) -> Objective:
        """The same loss, of which gradients may be asked for in the other parameters, too."""
        return replace(self, others=[], beside=True) if self.others else self

    @contextmanager
    def others_frozen(self) -> Iterator[None]:
        """All parameters that are constants here ask for no gradient meanwhile."""
        for parameter in self.others:
            parameter.requires_grad = False
        try:
            yield
        finally:
            for parameter in self.others:
                parameter.requires_grad = True

    def gradient(
        self, at: Sequence[Tensor] | None = None, used: list[bool] | None = None
    ) -> Gradient:
        """The loss and its gradient at other values of the parameters, without graphs.

        Args:
            at: Values of the parameters, if not their own.
            used: Is told whether the loss depends on each of them at all.

        Raises:
            ValueError: As :meth:`loss`.
        """
        with (
            differentiating(),
            not_compiled(),
            without_hooks(self.parameters),
            nullcontext() if at is None else self.moved(at),
        ):
            # Elsewhere than at the parameters NaN is an answer: of a step that a scaler leaves out.
            loss = self.loss() if at is None else self.value()
            # In here, as activation checkpointing runs the model again during the backward pass.
            parts = grad(loss, self.parameters, allow_unused=True)
        if used is not None:
            used[:] = [part is not None for part in parts]
        return loss.detach(), self.complete(parts, loss)

    @contextmanager
    def moved(self, values: Sequence[Tensor]) -> Iterator[None]:
        """The parameters with other numbers in them, whoever holds them; their graphs stay whole.

        For a while each has other memory, and its version does not count that. A backward pass that
        is still to come finds the memory that it knows.
        """
        held = [p.data for p in self.parameters]
        try:
            for p, value in zip(self.parameters, values, strict=True):
                p.data = value.detach()
            yield
        finally:
            for p, data in zip(self.parameters, held, strict=True):
                p.data = data

    @contextmanager
    def replaced(self, values: Sequence[Tensor]) -> Iterator[None]:
        """The model with other tensors in the places of its parameters.

        Raises:
            UnsupportedModelError: If one cannot be replaced by another tensor.
        """
        places = places_of(self.model, self.parameters)
        found = {id(parameter) for _, _, parameter in places}
        if any(id(p) not in found for p in self.parameters):
            raise UnsupportedModelError("scripted modules keep the parameters that they have")
        by_parameter = {id(p): value for p, value in zip(self.parameters, values, strict=True)}
        with replacing(places, by_parameter):
            yield

    @property
    def modules(self) -> list[nn.Module]:
        """The model, and the modules that the criterion is or calls."""
        return [self.model, *modules_of(self.criterion)]

    @property
    def holders(self) -> list[Any]:
        """All that a pass of the loss may write to: the model, and what the criterion holds."""
        return [self.model, *holders_of(self.criterion)]

    def remember(self) -> Callable[[], AbstractContextManager[None]]:
        """:func:`lowland.passes.remember` of all that a pass of the loss may write to."""
        return remember(*self.holders, device=self.device)

    def state_kept(self) -> Callable[[], AbstractContextManager[None]]:
        """As :meth:`remember`, for passes that come at once, and without the random numbers."""
        return nullcontext if self.leaves_no_trace else remember_state(*self.holders)

    def unnoticed(self) -> AbstractContextManager[None]:
        """As ``remember()()``, for passes that come at once."""
        if self.leaves_no_trace:
            return nullcontext()
        return remember_randomness([self.device])() if self.apart else self.remember()()

    def free(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """A direction without what is a constant of the loss, though it belongs to a parameter.

        An embedding's row for padding is one: PyTorch gives it no gradient.
        """
        rows = {
            id(module.weight): module.padding_idx
            for module in self.model.modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None
        }
        parts = list(direction)
        for index, p in enumerate(self.parameters if rows else []):
            if id(p) in rows:
                parts[index] = parts[index].clone()
                parts[index][rows[id(p)]] = 0
        return parts

    def complete(self, parts: Sequence[Tensor | None], loss: Tensor) -> list[Tensor]:
        """The parts of a gradient; zero where the loss does not depend on a parameter.

        So it is with routed experts, stochastic depth, or an early exit: the Hessian has rows of
        zeros there.

        Raises:
            RuntimeError: If reentrant checkpointing may have hidden the parameter from the graph.
        """
        missing = [n for n, part in zip(self.names, parts, strict=True) if part is None]
        if missing and any(function_of(node) is CheckpointFunction for node in graph(loss)):
            raise RuntimeError(
                f"the loss seems not to depend on {', '.join(missing)}, but activation "
                "checkpointing in its reentrant form hides parameters from the graph: use "
                "checkpoint(..., use_reentrant=False)"
            )
        return [
            torch.zeros_like(p) if part is None else part.to_dense() if part.is_sparse else part
            for p, part in zip(self.parameters, parts, strict=True)
        ]

    def halves(self) -> list[Objective]:
        """The loss on each of the two halves of the samples.

        Raises:
            TypeError: If the data are no tensors.
            ValueError: If the samples are not an even number, or the loss is not their mean.
        """
        x, y = self.batch
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            raise TypeError(
                "unbiased=True splits the batch in two, for which x and y must be tensors; got "
                f"{type(x).__name__} and {type(y).__name__}"
            )
        if len(x) < 2 or len(x) % 2:
            raise ValueError(
                "unbiased=True splits the batch in two halves of one size: it needs an even number "
                f"of samples; got {len(x)}"
            )
        halves = [self.on(half) for half in zip(x.chunk(2), y.chunk(2), strict=True)]
        check_splits_evenly(self.criterion, [half.batch[1] for half in halves])
        if not is_known(self.criterion):
            with torch.no_grad(), self.remember()():
                first, second = ((call(self.model, h.batch[0]), h.batch[1]) for h in halves)
            check_even(self.criterion, first, second)
        return halves

    def checked(self, loss: Tensor) -> Tensor:
        """:meth:`loss`, of a value that is at hand; errors as there."""
        if loss.ndim:
            raise ValueError(
                f"the criterion must return a scalar for its Hessian to be a matrix; got shape "
                f"{tuple(loss.shape)}: use reduction='mean' or 'sum'"
            )
        if not loss.requires_grad:
            raise ValueError(
                "the loss has no graph to the model's parameters, so it has no derivatives: "
                "something in the model or the criterion detaches it (torch.no_grad, .detach(), "
                ".item(), a rounding or an argmax), or counts, as accuracy does"
            )
        if self.shares is None and may_look(loss.device) and not loss.isfinite():
            check_kept(self.criterion, self.batch[1])
        check_finite(loss, "the loss")
        if not getattr(self.criterion, "stands_in", False):
            self.notice(graph(loss))
        return loss

    def notice(self, nodes: Iterable[Any]) -> None:
        """Let the derivatives be looked at if the loss is made of operations never met before.

        Args:
            nodes: Of the loss's graph.

        Raises:
            RuntimeError: If they are wrong.
        """
        if not self.is_ordinary:
            notice(self.model, nodes, self)


def objective(
    model: nn.Module,
    criterion: Criterion,
    x: Any,
    y: Any,
    parameters: Iterable[Tensor] | None = None,
    *,
    matrix: Matrix = "hessian",
) -> Objective:
    """The loss on one batch, as a function of the given parameters, or of all that are trainable.

    Without ``y`` the batch is a pair of both, or one that holds both in itself.

    Raises:
        TypeError: If the criterion cannot be called, or the data are several batches.
        ValueError: As :func:`trainable` and :func:`check_subset`; if a lazy layer has seen no data,
            or there is no such matrix.
        UnsupportedModelError: If the parameters are sharded.
        TypeError: If they are of half precision.
    """
    batch = _ordinary(one_batch(x, y))
    return over(model, criterion, (batch,), parameters, matrix=matrix)


def over(
    model: nn.Module,
    criterion: Criterion,
    batches: Iterable[Batch],
    parameters: Iterable[Tensor] | None = None,
    *,
    matrix: Matrix = "hessian",
) -> Objective:
    """:func:`objective` of any data, whose shares in the loss are still to be found."""
    check_matrix(matrix)
    check_callable(criterion)
    inside = unwrap(model)
    every = dict(inside.named_parameters())
    check_parameters(every)
    if any(p.is_inference() for p in every.values()):
        raise ValueError(
            "the model's parameters were made within torch.inference_mode(), where there are no "
            "derivatives of them, ever; make the model outside of it"
        )
    named, others = trainable(every), []
    if parameters is not None:
        wanted = check_subset(inside, parameters)
        others = [p for p in named.values() if id(p) not in wanted]
        named = {name: p for name, p in named.items() if id(p) in wanted}
    check_types(named)
    return Objective(
        model,
        inside,
        criterion,
        batches,
        list(named),
        list(named.values()),
        others,
        matrix=matrix,
    )


def _ordinary(batch: Batch) -> Batch:
    """Itself, or with copies of tensors that no graph may hold, since inference mode made them."""
    x, y = batch
    plain = isinstance(x, Tensor) and isinstance(y, Tensor)  # as most are
    if not any(tensor.is_inference() for tensor in (batch if plain else tensors(batch))):
        return batch
    with torch.inference_mode(mode=False):
        return cast("Batch", mapped(Tensor.clone, batch))


# What holds a tensor, by which name or number, and the tensor.
Place = tuple[Any, Any, Tensor]


def places_of(model: nn.Module, wanted: Iterable[Tensor]) -> list[Place]:
    """Where a model's modules hold tensors: as parameters, buffers, attributes, or in lists.

    Recurrent layers hold theirs in a list too, and some models a parameter of another module.
    """
    chosen, seen = {id(tensor) for tensor in wanted}, set()
    places: list[Place] = []

    def look(holder: dict[Any, Any] | list[Any]) -> None:
        if id(holder) in seen:
            return
        seen.add(id(holder))
        for name, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
            if isinstance(value, Tensor):
                if id(value) in chosen:
                    places.append((holder, name, value))
            elif isinstance(value, dict | list):
                look(value)

    for module in model.modules():
        if not isinstance(module, ScriptModule):
            look(vars(module))
    return places


@contextmanager
def replacing(places: Sequence[Place], instead: Mapping[int, Tensor]) -> Iterator[None]:
    """Other tensors in some places, by the identity of those that stand there; afterwards these."""
    try:
        for holder, name, tensor in places:
            holder[name] = instead[id(tensor)]
        yield
    finally:
        for holder, name, tensor in places:
            holder[name] = tensor


def is_scripted(model: nn.Module) -> bool:
    """Whether a part of it is scripted or traced, which does not part with its parameters."""
    return any(isinstance(module, ScriptModule) for module in model.modules())


def graph(*values: Tensor, until: Iterable[Any] = ()) -> Iterator[Any]:
    """The nodes of the graphs that lead to values, each once; not beyond some of them."""
    ahead, seen = [value.grad_fn for value in values], set(until)
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            ahead += [before for before, _ in node.next_functions]


def leaves(*values: Tensor, until: Iterable[Any] = ()) -> list[Tensor]:
    """The tensors that a backward pass from values would give a gradient; not beyond some nodes."""
    nodes = graph(*values, until=until)
    return [node.variable for node in nodes if hasattr(node, "variable")]


def function_of(node: Any) -> Any:
    """The ``torch.autograd.Function`` that a node is of; None for PyTorch's own operations."""
    return getattr(type(node), "_forward_cls", None)


def trainable(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a model's parameters that are not frozen, by name.

    Raises:
        ValueError: If there are none.
    """
    named = {n: p for n, p in parameters.items() if p.requires_grad}
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
def without_hooks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Run no hooks on gradients: they belong to a step of training, and not to the loss."""
    hooks = [h for p in parameters if (h := p._backward_hooks)]  # noqa: SLF001 - no public name
    held = [dict(each) for each in hooks]
    try:
        for each in hooks:
            each.clear()
        yield
    finally:
        for each, before in zip(hooks, held, strict=True):
            each.update(before)


@contextmanager
def differentiating() -> Iterator[None]:
    """Record a graph, whatever the caller has switched off."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


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

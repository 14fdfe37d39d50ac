"""The last layers of any model, by themselves: what comes into them, and that nothing else counts.

The Hessian in parameters of a head is that of a small network whose inputs are what the layers
below give. It is so only if the head is all that stands between these inputs and the criterion, it
runs once, and nobody else uses its parameters; each of this is looked at in one pass of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from lowland._call import call
from lowland._circumstances import once_a_model
from lowland.errors import ANY_MODULE, UnsupportedModelError
from lowland.objective import (
    Objective,
    differentiating,
    function_of,
    graph,
    is_scripted,
    may_look,
    not_compiled,
)


@dataclass(frozen=True, eq=False)
class Tail:
    """The last layers of a model, in one pass of it.

    Attributes:
        layers: From the lowest that holds one of the parameters looked at to the last.
        inputs: What comes into them, with its graph where gradients are enabled.
        output: What the model gave, with its graph too.
    """

    layers: nn.Sequential
    inputs: Tensor
    output: Tensor

    def check(self) -> None:
        """Require that the layers give what the model gave, where it may be looked at.

        Raises:
            UnsupportedModelError: If they do not.
        """
        if not may_look(self.output.device):
            return
        with torch.no_grad():
            again = self.layers(self.inputs.detach())
        if not torch.allclose(again, self.output, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise _refused("these layers by themselves give something else than the model")


@dataclass(frozen=True, eq=False)
class _Run:
    """One run of a layer: what it was given and what it gave, with the counts of writes to both."""

    layer: nn.Module
    given: Tensor
    given_version: int
    output: Tensor
    output_version: int
    has_graph: bool


def holds_all(target: Objective) -> bool:
    """Whether Linear layers hold all parameters that are looked at, each one of them, and others.

    Without it there is no need to run the model.
    """
    wanted = {id(p) for p in target.parameters}
    owners = [
        (layer, id(p))
        for layer in target.model.modules()
        for p in layer.parameters(recurse=False)
        if id(p) in wanted
    ]
    of_linear = all(type(layer) is nn.Linear for layer, _ in owners)
    others = any(id(p) not in wanted for p in target.model.parameters())
    return others and of_linear and len(owners) == len(wanted) and not is_scripted(target.model)


def find(target: Objective) -> Tail:
    """The layers at the end of a model that hold the parameters looked at.

    The model runs once, with random numbers and running statistics that are put back afterwards.

    Args:
        target: The loss, for which :func:`holds_all`.

    Raises:
        UnsupportedModelError: If it cannot be shown that they are the end of the model, and nothing
            else uses their parameters.
    """
    x, _ = target.batch
    wanted = {id(p) for p in target.parameters}
    with differentiating(), not_compiled(), target.remember()(), _recorded(target.model) as runs:
        output = call(target.model, x)
        if not isinstance(output, Tensor):
            raise _refused(f"the model gives a {type(output).__name__} in place of a tensor")
        chain = _back_from(output, runs, wanted)
        inputs = chain[0].given
        _check_apart(inputs, wanted)
        tail = nn.Sequential(*(run.layer for run in chain))
    for run in chain:
        if sum(other.layer is run.layer for other in runs) > 1:
            raise _refused(f"the model runs {run.layer} more than once")
    if inputs._version != chain[0].given_version:  # noqa: SLF001 - no public name
        raise _refused("something writes to the inputs of these layers later")
    if _moves_its_inputs(target, chain[0].layer):
        raise _refused("what comes into these layers depends on their own parameters")
    if not torch.is_grad_enabled():
        inputs, output = inputs.detach(), output.detach()
    return Tail(tail, inputs, output)


@once_a_model
def _moves_its_inputs(target: Objective, lowest: nn.Module) -> bool:
    """Whether other parameters give the last layers other inputs, though no graph leads there.

    So it is where a norm of theirs, or a first prediction, is detached and fed back.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Tensor]) -> None:
        seen.append(given[0].detach().clone())

    x, _ = target.batch
    hook = lowest.register_forward_pre_hook(keep)
    try:
        for factor in (1.0, 1.25):
            moved = [factor * p.detach() for p in target.parameters]
            with torch.no_grad(), not_compiled(), target.remember()(), target.moved(moved):
                call(target.model, x)
    finally:
        hook.remove()
    one, other = seen[0], seen[len(seen) // 2]
    return not torch.allclose(one, other, rtol=1e-5, atol=1e-7, equal_nan=True)


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[_Run]]:
    """All runs of layers without layers of their own, of one tensor each, in their order."""
    runs: list[_Run] = []
    versions: dict[nn.Module, int] = {}

    def before(layer: nn.Module, given: tuple[object, ...]) -> None:
        if given and isinstance(given[0], Tensor):
            versions[layer] = given[0]._version  # noqa: SLF001

    def after(layer: nn.Module, given: tuple[object, ...], output: object) -> None:
        if len(given) == 1 and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            version = output._version  # noqa: SLF001
            runs.append(
                _Run(layer, given[0], versions[layer], output, version, output.requires_grad)
            )

    with ExitStack() as stack:
        for layer in model.modules():
            if next(layer.children(), None) is None:
                stack.callback(layer.register_forward_pre_hook(before).remove)
                stack.callback(layer.register_forward_hook(after).remove)
        yield runs


def _back_from(output: Tensor, runs: Sequence[_Run], wanted: set[int]) -> list[_Run]:
    """The runs that lead to an output, each given the very tensor that the one before gave.

    Back to the first that holds one of the parameters wanted.
    """
    missing, chain = set(wanted), list[_Run]()
    value, version, end = output, output._version, len(runs)  # noqa: SLF001
    while missing:
        place = next((i for i in range(end - 1, -1, -1) if runs[i].output is value), None)
        if place is None or runs[place].output_version != version:
            below = chain[0].layer if chain else "the model's output"
            raise _refused(f"what comes before {below} is no layer's output as the layer gave it")
        run = runs[place]
        if not run.has_graph:  # within a function with a backward pass of its own
            raise _refused(f"{run.layer} runs where no graph is recorded")
        chain.insert(0, run)
        missing -= {id(p) for p in run.layer.parameters()}
        value, version, end = run.given, run.given_version, place
    return chain


def _check_apart(inputs: Tensor, wanted: set[int]) -> None:
    """Require that the inputs are no function of the parameters."""
    for node in graph(inputs):
        if id(getattr(node, "variable", None)) in wanted:
            raise _refused("what comes into these layers depends on their own parameters")
        if function_of(node) is CheckpointFunction:
            raise _refused(
                "activation checkpointing below them, in its reentrant form, hides parameters from "
                "the graph; use checkpoint(..., use_reentrant=False)"
            )


def _refused(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "the closed form of parameters= takes Linear layers, and activations between them, that "
        f"are the last thing between their inputs and the criterion: {why}; {ANY_MODULE}"
    )

"""Extra forward passes that leave no trace: all state stays, random numbers come again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy


@contextmanager
def frozen_statistics(*models: nn.Module) -> Iterator[None]:
    """Let forward passes leave everything alone that modules keep beside their parameters.

    Inside, each module writes to a copy of its buffers: running statistics of normalizations, the
    vectors of spectral normalization, counters. The loss and its gradient do not change, and
    afterwards all is as before, bit for bit.

    Args:
        *models: Modules whose buffers, at any depth, are kept, and their attributes that are plain
            numbers, tensors or generators of random numbers. What others hold is not looked at.

    Notes:
        Nothing is written to the buffers themselves, not even their own values, so a backward pass
        that is still to come finds what it saved. With activation checkpointing the backward pass
        runs the forward pass again and belongs inside too.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowland.passes import frozen_statistics
        >>> model = nn.BatchNorm1d(3)
        >>> with frozen_statistics(model):
        ...     _ = model(torch.randn(8, 3) + 5)
        >>> model.running_mean
        tensor([0., 0., 0.])
    """
    with _running_from(_states_of(models)):
        yield


def remember_state(*models: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Remember what modules keep beside their parameters, to run them from there again later.

    Args:
        *models: As for :func:`frozen_statistics`.

    Returns:
        A function that gives a context, any number of times, in which the modules' state is what it
        was at this call. Outside of it they go on as if it had not been there.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowland.passes import remember_state
        >>> model = nn.BatchNorm1d(3)
        >>> again = remember_state(model)
        >>> _ = model(torch.randn(8, 3))
        >>> with again():
        ...     print(int(model.num_batches_tracked))
        0
        >>> int(model.num_batches_tracked)
        1
    """
    # Copies already, since whatever runs next may write to the buffers.
    remembered = _copies(_states_of(models))
    return lambda: _running_from(remembered)


@dataclass(frozen=True, eq=False)
class _State:
    """What one module keeps beside its parameters and the modules within it."""

    module: nn.Module
    buffers: dict[str, Tensor | None]
    numbers: dict[str, float]
    tensors: dict[str, Tensor]
    generators: dict[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        attributes = vars(module).items()
        numbers = {name: value for name, value in attributes if type(value) in _COUNTERS}
        others = {name: value for name, value in attributes if isinstance(value, Tensor)}
        drawn = {name: g.get_state() for name, g in attributes if isinstance(g, torch.Generator)}
        return cls(module, dict(module._buffers.items()), numbers, others, drawn)  # noqa: SLF001

    def put(self) -> None:
        """Give it to the module."""
        vars(self.module).update(self.numbers)
        vars(self.module).update(self.tensors)
        for name, drawn in self.generators.items():
            vars(self.module)[name].set_state(drawn)
        buffers = self.module._buffers  # noqa: SLF001
        if isinstance(self.module, ScriptModule):  # it does not part with them
            for name, value in self.buffers.items():
                if isinstance(value, Tensor):
                    buffers[name].copy_(value)  # type: ignore[union-attr]
            return
        for name in buffers.keys() - self.buffers.keys():
            del buffers[name]
        buffers.update(self.buffers)


_COUNTERS = (bool, int, float)


def _states_of(models: Iterable[nn.Module]) -> list[_State]:
    modules = {module: None for model in models for module in model.modules()}
    # The wrapper's own numbers say how far its communication has come.
    return [_State.of(m) for m in modules if not isinstance(m, DistributedDataParallel)]


def _copies(states: Iterable[_State]) -> list[_State]:
    """The same with other tensors of the same values; one for each, however often it occurs."""
    copied: dict[int, Tensor] = {}

    def copy(buffer: Any) -> Any:
        if buffer is None or is_lazy(buffer):
            return buffer
        if id(buffer) not in copied:
            copied[id(buffer)] = buffer.detach().clone()
        return copied[id(buffer)]

    return [
        replace(
            state,
            buffers={name: copy(buffer) for name, buffer in state.buffers.items()},
            # Of what has a graph the values are another loss's, and nobody writes to them.
            tensors={n: t if t.requires_grad else copy(t) for n, t in state.tensors.items()},
        )
        for state in states
    ]


@contextmanager
def _running_from(remembered: Sequence[_State]) -> Iterator[None]:
    """Run modules from copies of a state, and give them back the one that they have now."""
    now = [_State.of(state.module) for state in remembered]
    if any(isinstance(state.module, ScriptModule) for state in now):
        now = _copies(now)
    with torch.no_grad():
        for state in _copies(remembered):
            state.put()
    try:
        yield
    finally:
        with torch.no_grad():
            for state in now:
                state.put()


def unsteady(module: nn.Module) -> str | None:
    """What makes a layer's next call another function than this one; None for nothing.

    Example:
        >>> from torch import nn
        >>> from lowland.passes import unsteady
        >>> unsteady(nn.Dropout(0.5)), unsteady(nn.Dropout(0.5).eval())
        ('draws random numbers', None)
    """
    if not module.training:
        return None
    if isinstance(module, _NormBase) and module.track_running_stats:
        return "updates its running statistics"
    rate = 0.0
    if isinstance(module, _DropoutNd):
        rate = module.p
    elif isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        rate = module.dropout
    return "draws random numbers" if rate > 0 else None


def remember_randomness(
    devices: Iterable[torch.device | str] = (),
) -> Callable[[], AbstractContextManager[None]]:
    """Remember where the random numbers stand, to draw the same ones again later.

    Args:
        devices: Accelerators whose default generators are remembered beside the CPU's, Python's
            and NumPy's.

    Returns:
        A function that gives a context, any number of times, in which random numbers start where
        they stood at this call. Outside of it they go on as if it had not been there.

    Example:
        >>> import torch
        >>> from lowland.passes import remember_randomness
        >>> again = remember_randomness()
        >>> first = torch.rand(2)
        >>> with again():
        ...     print(torch.equal(torch.rand(2), first))
        True
    """
    devices = list(devices)
    remembered, others = random_states(devices), _states_beside()

    @contextmanager
    def again() -> Iterator[None]:
        interrupted, their = random_states(devices), _states_beside()
        _restore(remembered)
        _restore_beside(others)
        try:
            yield
        finally:
            _restore(interrupted)
            _restore_beside(their)

    return again


def remember(
    *models: nn.Module, device: torch.device
) -> Callable[[], AbstractContextManager[None]]:
    """Both: :func:`remember_state` of models, and :func:`remember_randomness` where they run.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowland.passes import remember
        >>> model, x = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)), torch.randn(8, 3)
        >>> again = remember(model, device=x.device)
        >>> first = model(x)
        >>> with again():
        ...     print(torch.equal(model(x), first))
        True
    """
    state, randomness = remember_state(*models), remember_randomness([device])

    @contextmanager
    def again() -> Iterator[None]:
        with state(), randomness():
            yield

    return again


def random_states(devices: Iterable[torch.device | str]) -> dict[torch.device, Tensor]:
    """Where the random numbers of devices stand, and always the CPU's.

    Example:
        >>> import torch
        >>> from lowland.passes import random_states
        >>> list(random_states([]))
        [device(type='cpu')]
    """
    accelerators = {torch.device(device) for device in devices} - {torch.device("cpu")}
    states = {torch.device("cpu"): torch.get_rng_state()}
    for device in accelerators:
        states[device] = torch.get_device_module(device).get_rng_state(*_index(device))
    return states


def _states_beside() -> tuple[Any, Any]:
    """Where Python's own random numbers stand, and NumPy's, which layers draw from too."""
    return random.getstate(), np.random.get_state()  # noqa: NPY002 - whoever draws from it


def _restore_beside(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002


def _restore(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """What names one of several; "mps" is always one, and in older PyTorch takes no name."""
    return () if device.type == "mps" else (device,)

"""Extra forward passes that leave no trace: all state stays, random numbers come again."""

from __future__ import annotations

import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from types import CellType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils.data import Dataset


@contextmanager
def frozen_statistics(*models: Any) -> Iterator[None]:
    """Let forward passes leave everything alone that modules keep beside their parameters.

    Inside, each module writes to a copy of its buffers: running statistics of normalizations, the
    vectors of spectral normalization, counters. The loss and its gradient do not change, and
    afterwards all is as before, bit for bit.

    Args:
        *models: Modules whose state, at any depth, is kept: buffers, and attributes that are
            numbers, strings, tensors, arrays, generators of random numbers, or collections of these
            (in one of more than 10,000 entries tensors are taken for data); and the attributes of
            objects of a class of your own. An object that is no module is looked at alike.

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


def remember_state(*models: Any) -> Callable[[], AbstractContextManager[None]]:
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
    """What one holder keeps beside parameters and the modules within it.

    A holder is a module, another object with attributes, a list or dictionary, or the variable that
    a function shares with another one.
    """

    holder: Any
    buffers: dict[str, Tensor | None]
    data: Any

    @classmethod
    def of(cls, holder: Any) -> _State:
        if isinstance(holder, CellType):
            return cls(holder, {}, {"cell_contents": _kept(_content(holder))})
        if not hasattr(holder, "__dict__") or isinstance(holder, dict | list):
            return cls(holder, {}, _kept(holder))
        attributes = vars(holder)
        buffers = dict(attributes["_buffers"]) if isinstance(holder, nn.Module) else {}
        data = {
            name: _kept(value)
            for name, value in attributes.items()
            if isinstance(value, _DATA) and not (name in _OWN and isinstance(holder, nn.Module))
        }
        return cls(holder, buffers, data)

    def copied(self, copy: Callable[[Any], Any]) -> _State:
        """The same with other tensors."""
        buffers = {name: copy(buffer) for name, buffer in self.buffers.items()}
        return _State(self.holder, buffers, _mapped(copy, self.data))

    def put(self) -> None:
        """Give it to its holder."""
        holder = self.holder
        if isinstance(holder, CellType):
            value = _given(self.data["cell_contents"])
            if value is not _EMPTY:
                holder.cell_contents = value
            return
        if not isinstance(self.data, dict):
            _given(self.data)
            return
        attributes = vars(holder)
        new = [n for n, v in attributes.items() if n not in self.data and isinstance(v, _DATA)]
        for name in new:
            if not (name in _OWN and isinstance(holder, nn.Module)):
                del attributes[name]
        for name, value in self.data.items():
            attributes[name] = _given(value)
        if isinstance(holder, nn.Module):
            self._put_buffers(holder)

    def _put_buffers(self, module: nn.Module) -> None:
        buffers = module._buffers  # noqa: SLF001
        if isinstance(module, ScriptModule):  # it does not part with them
            for name, value in self.buffers.items():
                if isinstance(value, Tensor):
                    buffers[name].copy_(value)  # type: ignore[union-attr]
            return
        for name in buffers.keys() - self.buffers.keys():
            del buffers[name]
        buffers.update(self.buffers)


@dataclass(frozen=True, eq=False)
class _Contents:
    """What is in a list, a dictionary or the like, and goes back into the same one."""

    holder: Any
    parts: Any

    def put(self) -> Any:
        self.holder.clear()
        put = self.holder.extend if isinstance(self.holder, list | deque) else self.holder.update
        put(_given(self.parts))
        return self.holder


@dataclass(frozen=True, eq=False)
class _Source:
    """Where a generator of random numbers stands."""

    generator: Any
    state: Any

    @classmethod
    def of(cls, generator: Any) -> _Source:
        if isinstance(generator, torch.Generator):
            return cls(generator, generator.get_state())
        if isinstance(generator, random.Random):
            return cls(generator, generator.getstate())
        return cls(generator, generator.bit_generator.state)

    def put(self) -> Any:
        if isinstance(self.generator, torch.Generator):
            self.generator.set_state(self.state)
        elif isinstance(self.generator, random.Random):
            self.generator.setstate(self.state)
        else:
            self.generator.bit_generator.state = self.state
        return self.generator


_COLLECTIONS = (list, set, deque, dict, OrderedDict, defaultdict, Counter)
_SOURCES = (torch.Generator, random.Random, np.random.Generator)
_PLAIN = (bool, int, float, complex, str, bytes, NoneType, np.generic)
_DATA = (*_PLAIN, *_COLLECTIONS, *_SOURCES, tuple, Tensor, np.ndarray)
_MANY = 10_000  # in a collection of more, tensors are taken for data, which nobody writes to
_OWN = frozenset(vars(nn.Module())) - {"training"}
_EMPTY = object()


def _kept(value: Any) -> Any:
    """Data as they are now, with copies of collections; tensors are the same ones.

    So are tuples: what is in them may be known by its identity.
    """
    kind = type(value)
    if kind in _COLLECTIONS and not _holds_parameters(value):
        parts = dict(value) if isinstance(value, dict) else list(value)
        if len(value) <= _MANY:
            parts = _nested(_kept, parts)
        return _Contents(value, parts)
    return _Source.of(value) if isinstance(value, _SOURCES) else value


def _nested(function: Callable[[Any], Any], parts: Any) -> Any:
    """Apply a function to what is in a plain dictionary or list."""
    if isinstance(parts, dict):
        return {name: function(value) for name, value in parts.items()}
    return list(map(function, parts))


def _holds_parameters(values: Any) -> bool:
    """Whether they are parameters, as of recurrent layers: others may stand there for a while."""
    each = values.values() if isinstance(values, dict) else values
    return any(isinstance(value, nn.Parameter) for value in each)


def _mapped(copy: Callable[[Any], Any], kept: Any) -> Any:
    if isinstance(kept, _Contents):
        large = len(kept.parts) > _MANY
        return kept if large else _Contents(kept.holder, _mapped(copy, kept.parts))
    if type(kept) in (dict, list) and not _holds_parameters(kept):
        return _nested(partial(_mapped, copy), kept)
    # Of what has a graph the values are another loss's, and nobody writes to them.
    constant = isinstance(kept, Tensor) and kept.requires_grad
    return copy(kept) if isinstance(kept, Tensor | np.ndarray) and not constant else kept


def _given(kept: Any) -> Any:
    if isinstance(kept, _Contents | _Source):
        return kept.put()
    return _nested(_given, kept) if type(kept) in (dict, list) else kept


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is still empty
        return _EMPTY


def _states_of(holders: Iterable[Any]) -> list[_State]:
    found: dict[int, Any] = {}
    for holder in holders:
        inside = holder.modules() if isinstance(holder, nn.Module) else [holder]
        for each in inside:
            # The wrapper's own numbers say how far its communication has come.
            if not isinstance(each, DistributedDataParallel):
                found[id(each)] = each
                found.update((id(other), other) for other in _objects_in(each))
    return list(map(_State.of, found.values()))


def _objects_in(holder: Any) -> list[Any]:
    """Objects of a user's own classes that an object holds: meters, counters, caches."""
    return [value for value in getattr(holder, "__dict__", {}).values() if is_holder(value)]


_STRANGERS = sys.stdlib_module_names | {"lowland", "numpy", "torch"}


def is_holder(value: Any) -> bool:
    """Whether something is an object of a user's own, which may keep state in its attributes.

    Example:
        >>> from lowland.passes import is_holder
        >>> is_holder(3), is_holder(print)
        (False, False)
    """
    kind = type(value)
    return (
        hasattr(value, "__dict__")
        and kind.__module__.partition(".")[0] not in _STRANGERS
        and not isinstance(value, type | nn.Module | Tensor | Dataset)
    )


def _copies(states: Iterable[_State]) -> list[_State]:
    """The same with other tensors of the same values; one for each, however often it occurs."""
    copied: dict[int, Any] = {}

    def copy(value: Any) -> Any:
        if value is None or is_lazy(value):
            return value
        if id(value) not in copied:
            whole = isinstance(value, Tensor)
            copied[id(value)] = value.detach().clone() if whole else value.copy()
        return copied[id(value)]

    return [state.copied(copy) for state in states]


@contextmanager
def _running_from(remembered: Sequence[_State]) -> Iterator[None]:
    """Run modules from copies of a state, and give them back the one that they have now."""
    now = [_State.of(state.holder) for state in remembered]
    if any(isinstance(state.holder, ScriptModule) for state in now):
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


def remember(*models: Any, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
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

"""Extra forward passes that leave no trace: all state stays, random numbers come again."""

from __future__ import annotations

import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from types import CellType, MethodType, NoneType
from typing import Any, no_type_check
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
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

    A holder is a module, another object with attributes, or the variable that a function shares
    with another one. Of parameters it has those that are constants and written to all the same.
    """

    holder: Any
    buffers: dict[str, Tensor | None]
    data: Any
    written: dict[str, Tensor]

    @classmethod
    def of(cls, holder: Any) -> _State:
        if isinstance(holder, CellType):
            return cls(holder, {}, {"cell_contents": _kept(content(holder))}, {})
        attributes, buffers, written = vars(holder), {}, {}
        if isinstance(holder, nn.Module):
            buffers = dict(holder._buffers.items())  # noqa: SLF001
            constants = holder._parameters.items()  # noqa: SLF001
            names = _written.get(holder, ())
            written = {n: p.data for n, p in constants if n in names and p is not None}
        data = {
            name: _kept(value)
            for name, value in attributes.items()
            if isinstance(value, _DATA) and not (name in _OWN and isinstance(holder, nn.Module))
        }
        return cls(holder, buffers, data, written)

    def copied(self, copy: Callable[[Any], Any]) -> _State:
        """The same with other tensors."""
        buffers = {name: copy(buffer) for name, buffer in self.buffers.items()}
        written = {name: copy(value) for name, value in self.written.items()}
        return _State(self.holder, buffers, _mapped(copy, self.data), written)

    def put(self) -> None:
        """Give it to its holder."""
        holder = self.holder
        if isinstance(holder, CellType):
            value = _given(self.data["cell_contents"])
            if value is not EMPTY:
                holder.cell_contents = value
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
            for name, value in self.written.items():
                holder._parameters[name].data = value  # type: ignore[union-attr]  # noqa: SLF001

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
EMPTY = object()


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


def content(cell: CellType) -> Any:
    """What is in a variable that a function shares with another one; ``EMPTY`` before it is set.

    Example:
        >>> from lowland.passes import content
        >>> def counter():
        ...     number = 3
        ...     return lambda: number
        >>> [content(cell) for cell in counter().__closure__]
        [3]
    """
    try:
        return cell.cell_contents
    except ValueError:
        return EMPTY


def _states_of(holders: Iterable[Any]) -> list[_State]:
    found, ahead = dict[int, Any](), list(holders)
    while ahead:
        holder = ahead.pop()
        if id(holder) not in found:
            found[id(holder)] = holder
            inside = holder.children() if isinstance(holder, nn.Module) else ()
            ahead += [*inside, *_held_in(holder)]
    # The wrapper's own numbers say how far its communication has come.
    kept = (each for each in found.values() if not isinstance(each, DistributedDataParallel))
    return list(map(_State.of, kept))


def _held_in(holder: Any) -> list[Any]:
    """Modules that an object holds without saying so, as in a list, and a module's own objects.

    These are of a user's classes: meters, counters, caches. What they hold in turn is theirs.
    """
    around = isinstance(holder, nn.Module)
    values: list[Any] = []
    for name, value in getattr(holder, "__dict__", {}).items():
        if not (around and name in _OWN):
            values += [value, *_parts_of(value)]
    return [v for v in values if isinstance(v, nn.Module) or (around and is_holder(v))]


def _parts_of(value: Any) -> Iterable[Any]:
    if isinstance(value, MethodType):
        return (value.__self__,)
    if isinstance(value, partial):
        return (value.func, *_parts_of(value.func), *value.args, *value.keywords.values())
    if not isinstance(value, (*_COLLECTIONS, tuple)) or len(value) > _MANY:
        return ()
    return value.values() if isinstance(value, dict) else value


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
        with _constants_watched([state.holder for state in now]):
            yield
    finally:
        with torch.no_grad():
            for state in now:
                state.put()


# Names of parameters that are constants, of which it is known that passes write to them or do not:
# encoders that follow others, code books.
_written: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
_watched: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@contextmanager
def _constants_watched(holders: Iterable[Any]) -> Iterator[None]:
    """See, in the first pass, which parameters that are constants are written to; put these back.

    From then on they are part of the state. To copy all of them each time would be dear.
    """
    new: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in holders:
        if isinstance(module, nn.Module) and not isinstance(module, ScriptModule):
            known = _watched.get(module, ())
            named = module._parameters.items()  # noqa: SLF001
            new += [
                (module, name, p)
                for name, p in named
                if p is not None and not p.requires_grad and name not in known and not is_lazy(p)
            ]
    if not new:
        yield
        return
    watch = _Writes([p for _, _, p in new])
    try:
        with watch:
            yield
    finally:
        for module, name, p in new:
            _watched.setdefault(module, set()).add(name)
            if (before := watch.before.get(id(p))) is not None:
                _written.setdefault(module, set()).add(name)
                p.data = before


class _Writes(TorchDispatchMode):
    """Keeps what stood in parameters before something writes to them."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.before: dict[int, Tensor] = {}
        self._by_memory = {p.untyped_storage().data_ptr(): p for p in parameters if p.numel()}

    @no_type_check  # called for each operation of PyTorch
    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, schema = kwargs or {}, func._schema  # noqa: SLF001 - no public name
        if schema.is_mutable:
            for index, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    given = args[index] if index < len(args) else kwargs.get(argument.name)
                    for each in given if isinstance(given, list | tuple) else [given]:
                        self._about_to_write(each)
        return func(*args, **kwargs)

    def _about_to_write(self, target: Any) -> None:
        if not isinstance(target, Tensor) or target.layout is not torch.strided:
            return
        p = self._by_memory.get(target.untyped_storage().data_ptr())
        if p is not None and id(p) not in self.before:
            self.before[id(p)] = p.detach().clone()


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

"""Extra forward passes that leave no trace: running statistics stay, random numbers come again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def frozen_statistics(*models: nn.Module) -> Iterator[None]:
    """Let forward passes in training mode leave the running statistics of normalizations alone.

    Activations are normalized by their batch as before, so the loss and its gradient do not change.

    Args:
        *models: Modules whose batch and instance normalizations, of any kind and at any depth, keep
            ``running_mean``, ``running_var`` and ``num_batches_tracked``. Those in evaluation mode
            update nothing anyway and go on using them.

    Notes:
        Nothing is written to the statistics, not even their own values, so a backward pass that is
        still to come finds what it saved. With activation checkpointing the backward pass runs the
        forward pass again and belongs inside too. Inside, a ``state_dict()`` may lack the
        statistics of instance normalizations.

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
    tracking = {
        module
        for model in models
        for module in model.modules()
        if isinstance(module, _BatchNorm | _InstanceNorm)
        and module.training
        and module.track_running_stats
    }
    # Batch normalization leaves out its buffers where it does not track; instance normalization
    # would go on updating the ones it has.
    hidden = {
        module: {name: getattr(module, name) for name in _STATISTICS}
        for module in tracking
        if isinstance(module, _InstanceNorm)
    }
    try:
        for module in tracking:
            module.track_running_stats = False
        for module, buffers in hidden.items():
            for name in buffers:
                setattr(module, name, None)
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
        for module, buffers in hidden.items():
            for name, buffer in buffers.items():
                setattr(module, name, buffer)


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
        devices: Accelerators whose default generators are remembered beside the CPU's.

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
    accelerators = {torch.device(device) for device in devices} - {torch.device("cpu")}
    remembered = _states(accelerators)

    @contextmanager
    def again() -> Iterator[None]:
        interrupted = _states(accelerators)
        _restore(remembered)
        try:
            yield
        finally:
            _restore(interrupted)

    return again


def _states(accelerators: Iterable[torch.device]) -> dict[torch.device, Tensor]:
    states = {torch.device("cpu"): torch.get_rng_state()}
    for device in accelerators:
        states[device] = torch.get_device_module(device).get_rng_state(*_index(device))
    return states


def _restore(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """What names one of several; "mps" is always one, and in older PyTorch takes no name."""
    return () if device.type == "mps" else (device,)

"""A model that holds other values for a while, none of its own tensors being written to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from lowland.errors import UnsupportedModelError
from lowland.objective import places_of, replacing


@contextmanager
def holding(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other tensors in the places of some parameters and buffers; afterwards the own ones.

    Whatever happens meanwhile, the model ends with the very tensors that it had. Those that others
    hold on to, such as a ``state_dict()`` of this model, keep their values all the time, which
    they would not if values were copied into the parameters.

    Args:
        model: A tensor that it has in several places is replaced in all of them.
        values: By the names of ``named_parameters()`` and ``named_buffers()``.

    Raises:
        UnsupportedModelError: If a tensor belongs to a scripted module.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    instead = {id(own[name]): value for name, value in values.items()}
    places = places_of(model, [own[name] for name in values])
    found = {id(part) for _, _, part in places}
    for name in values:
        if id(own[name]) not in found:
            raise UnsupportedModelError(
                f"{name!r} belongs to a scripted or traced module, which does not part with it, so "
                "the model cannot be looked at with other parameters: use the module that was "
                "scripted"
            )
    try:
        with replacing(places, instead):
            yield
    finally:
        remind_recurrent(model)


def remind_recurrent(model: nn.Module) -> None:
    """Let recurrent layers list their parameters anew, which they look at before a call."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # noqa: SLF001

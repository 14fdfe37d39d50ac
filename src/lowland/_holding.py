"""A model that holds other values for a while, none of its own tensors being written to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def holding(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other tensors in the places of some parameters and buffers; afterwards the own ones.

    Whatever happens meanwhile, the model ends with the very tensors that it had. Those that others
    hold on to, such as a ``state_dict()`` of this model, keep their values all the time, which
    they would not if values were copied into the parameters.

    Args:
        model: A tensor that it has in several places is replaced in all of them.
        values: By the names of ``named_parameters()`` and ``named_buffers()``.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    instead = {id(own[name]): value for name, value in values.items()}
    tables = [
        (table, dict(table))
        for module in model.modules()
        for table in (module._parameters, module._buffers)  # noqa: SLF001
    ]
    try:
        for table, before in tables:
            for name, part in before.items():
                if id(part) in instead:
                    table[name] = instead[id(part)]  # type: ignore[assignment]
        _tell_recurrent(model)
        yield
    finally:
        for table, before in tables:
            table.update(before)  # type: ignore[arg-type]
        _tell_recurrent(model)


def _tell_recurrent(model: nn.Module) -> None:
    """Recurrent layers keep a list of their parameters beside the table that all modules have."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            names = module._flat_weights_names  # noqa: SLF001
            module._flat_weights = [getattr(module, name) for name in names]  # noqa: SLF001

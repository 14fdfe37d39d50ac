"""The running statistics of batch normalization, away from the parameters that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowland._batches import tensors
from lowland._call import arguments
from lowland.spectra.surface import NamedVector, Surface, untouched

Statistics = Literal["none", "running", "recomputed"]

_TRACKED = ("running_mean", "running_var", "num_batches_tracked")


def batch_normalizations(model: nn.Module) -> dict[str, _BatchNorm]:
    """Those whose evaluation mode uses running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and module.running_mean is not None
    }


def loss_with(surface: Surface, statistics: Statistics) -> Callable[[NamedVector], float]:
    """The loss at other parameters, NaN where the network's outputs are not finite.

    Args:
        surface: The loss.
        statistics: ``"recomputed"`` for those of each point, else those that the model has.
    """

    def loss(parts: NamedVector) -> float:
        # Copies for each point: a layer that writes to its buffers would begin the next one there.
        buffers = {
            name: surface.state[name].clone() for name, _ in surface.objective.model.named_buffers()
        }
        values = {**buffers, **parts}
        try:
            if statistics == "recomputed":
                return surface.loss({**values, **recomputed(surface, values)})
            return surface.loss(values)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # what a decomposition makes of NaN
            return torch.nan
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):  # what a criterion makes of NaN, such as nn.BCELoss
            if _outputs_are_finite(surface, values):
                raise
            return torch.nan

    return loss


@torch.no_grad()
def recomputed(surface: Surface, values: Mapping[str, Tensor]) -> NamedVector:
    """The statistics of one pass over the data, with batch normalization in training mode.

    Means and unbiased variances of the batches, averaged over these, as
    ``torch.optim.swa_utils.update_bn`` does.

    Raises:
        ValueError: If a batch has one value for each channel, which has no variance.
    """
    model = surface.objective.model
    layers = batch_normalizations(model)
    fresh: NamedVector = {}
    for name, layer in layers.items():
        for kind in _TRACKED:
            if (own := getattr(layer, kind)) is not None:
                start = torch.ones_like if kind == "running_var" else torch.zeros_like
                fresh[f"{name}.{kind}" if name else kind] = start(own)
    with untouched(model), _in_training(layers):
        for _, part in surface.objective.parts():
            x, _ = part.batch
            try:
                _output(surface, {**values, **fresh}, x)
            except ValueError as error:
                raise ValueError(
                    f"the statistics of batch normalization cannot be computed anew: {error}; use "
                    "batches of more samples (drop_last=True), or batch_norm='running'"
                ) from error
    return fresh


@contextmanager
def _in_training(layers: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """Batch normalization by the batch, whose statistics count alike in their average."""
    before = [(layer, layer.training, layer.momentum) for layer in layers.values()]
    try:
        for layer in layers.values():
            layer.training, layer.momentum = True, None
        yield
    finally:
        for layer, training, momentum in before:
            layer.training, layer.momentum = training, momentum


@torch.no_grad()
def _outputs_are_finite(surface: Surface, values: Mapping[str, Tensor]) -> bool:
    with untouched(surface.objective.model):
        for _, part in surface.objective.parts():
            output = _output(surface, values, part.batch[0])
            if not all(bool(torch.isfinite(each).all()) for each in tensors(output)):
                return False
    return True


def _output(surface: Surface, values: Mapping[str, Tensor], x: Any) -> Any:
    state = {**surface.state, **values}
    model = surface.objective.model
    return torch.func.functional_call(model, state, *arguments(model, x), strict=False)

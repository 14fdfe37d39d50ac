r"""Maps of a network's parameters that leave every prediction unchanged.

They move the Hessian by orders of magnitude, so that whatever is to explain generalization should
not change under them.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lowland._layers import has_hooks, is_as_inherited, is_plain_sequence, walk
from lowland.activations import is_elementwise, is_homogeneous
from lowland.errors import UnsupportedModelError
from lowland.validation import check_parameters, check_tensor, is_number

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# Beside activations, of which lowland.activations knows.
_HOMOGENEOUS = (nn.Flatten, *_POOLS, *_DROPOUTS)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_BY_UNIT = (*_HOMOGENEOUS, *_NORMS)


@dataclass(frozen=True)
class _Junction:
    """Two consecutive layers with weights, and what stands between them."""

    first: nn.Module
    between: list[nn.Module]
    second: nn.Module

    @property
    def units(self) -> int:
        """How many outputs the first layer has: columns or channels."""
        return int(self.first.get_parameter("weight").shape[0])

    @property
    def inputs(self) -> int:
        """How many inputs the second layer takes: columns or channels."""
        return int(self.second.get_parameter("weight").shape[1])

    def incoming(self) -> Tensor:
        """The second layer's weights, as ``(outputs, repeats, units, positions)``."""
        weight = self.second.get_parameter("weight").detach()
        if self.second_is_linear and isinstance(self.first, nn.Linear):
            return weight.view(len(weight), -1, self.units, 1)  # a sequence flattened: units last
        return weight.view(len(weight), 1, self.units, -1)

    @property
    def second_is_linear(self) -> bool:
        return isinstance(self.second, nn.Linear)


def rescale(model: nn.Module, layer: int, factor: float | Tensor) -> nn.Sequential:
    r"""A new model with one layer scaled up, the next one scaled down, and the same predictions.

    Weights and bias of a layer are multiplied by :math:`\beta > 0`, the next layer's weights, not
    its bias, divided by it. Where all between them is positively homogeneous,
    :math:`\phi(\beta a) = \beta \phi(a)`, as ReLU is, nothing else changes but the rounding; with
    powers of two not even that.

    Args:
        model: An ``nn.Sequential``, also of sequences.
        layer: Which of its linear and convolutional layers, counted from 0; not the last.
        factor: ``beta``, or one for each of the layer's units, shape ``(units,)``.

    Raises:
        UnsupportedModelError: If what stands between the two layers is not positively homogeneous,
            or the model is no sequence, or the layers' weights are used elsewhere too.
        ValueError: If there is no such layer, or a factor is not positive and finite.

    References:
        L. Dinh et al., Sharp minima can generalize for deep nets, ICML 2017; arXiv:2605.05209,
        table 6.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import lowland
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> other = lowland.rescale(model, layer=0, factor=8.0)
        >>> x = torch.randn(5, 3)
        >>> torch.equal(other(x), model(x)), torch.equal(other[0].weight, 8 * model[0].weight)
        (True, True)
    """
    changed = _copy(model)
    junction = _junction(changed, layer)
    for module in junction.between:
        if not (isinstance(module, _HOMOGENEOUS) or is_homogeneous(module)):
            raise UnsupportedModelError(
                f"rescale keeps predictions only where everything between layers {layer} and "
                f"{layer + 1} is positively homogeneous, such as ReLU, leaky ReLU, pooling, "
                f"Flatten; got {type(module).__name__}"
            )
    weight = junction.first.get_parameter("weight")
    if not isinstance(factor, Tensor) and not is_number(factor):
        raise TypeError(f"factor must be a number or a tensor; got {type(factor).__name__}")
    factors = torch.as_tensor(factor, dtype=weight.dtype, device=weight.device).detach()
    if factors.shape not in ((), (junction.units,)):
        raise ValueError(
            f"factor must be one number, or one for each of the {junction.units} units of layer "
            f"{layer}; got shape {tuple(factors.shape)}"
        )
    if not bool((torch.isfinite(factors) & (factors > 0)).all()):
        raise ValueError(f"factor must be positive and finite; got {factor}")
    factors = factors.expand(junction.units)
    with torch.no_grad():
        weight.mul_(factors.view(-1, *[1] * (weight.ndim - 1)))
        if junction.first.bias is not None:
            junction.first.get_parameter("bias").mul_(factors)
        junction.incoming().div_(factors.view(-1, 1))
    return changed


def permute(model: nn.Module, layer: int, order: Int[Tensor, " units"]) -> nn.Sequential:
    """A new model with one layer's units in another order, and the same predictions.

    Args:
        model: An ``nn.Sequential``, also of sequences.
        layer: Which of its linear and convolutional layers, counted from 0; not the last.
        order: The old index of each new unit, shape ``(units,)``; ``torch.randperm(units)`` for
            one by chance.

    Raises:
        UnsupportedModelError: If what stands between the two layers mixes units or is not known,
            or the model is no sequence, or the layers' weights are used elsewhere too.
        ValueError: If there is no such layer, or ``order`` is no permutation of its units.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import lowland
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> other = lowland.permute(model, layer=0, order=torch.tensor([2, 0, 3, 1]))
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(other(x), model(x), atol=1e-6)
        True
        >>> torch.equal(other[0].weight[0], model[0].weight[2])
        True
    """
    changed = _copy(model)
    junction = _junction(changed, layer)
    for module in junction.between:
        if not (isinstance(module, _BY_UNIT) or is_elementwise(module)):
            raise UnsupportedModelError(
                f"permute needs to know that what stands between layers {layer} and {layer + 1} "
                f"treats each unit by itself; got {type(module).__name__}"
            )
    units = junction.units
    check_tensor(order, "order")
    if order.ndim != 1 or order.is_floating_point():
        raise ValueError(
            f"order must hold whole numbers, shape ({units},); got {order.dtype} of shape "
            f"{tuple(order.shape)}"
        )
    if sorted(order.tolist()) != list(range(units)):
        raise ValueError(
            f"order must hold each of 0 to {units - 1}, the units of layer {layer}, once; got "
            f"{order.tolist()}"
        )
    order = order.to(junction.first.get_parameter("weight").device)
    with torch.no_grad():
        for module in (junction.first, *junction.between):
            # Whatever a module keeps for each unit: weights, biases, running statistics.
            for part in (*module.parameters(), *module.buffers()):
                if part.ndim and len(part) == units:
                    part.copy_(part[order].clone())
        incoming = junction.incoming()
        incoming.copy_(incoming[:, :, order].clone())
    return changed


def weighted_layers(model: nn.Module) -> list[nn.Module]:
    """A sequence's linear and convolutional layers, in the order in which ``layer`` counts them.

    Raises:
        UnsupportedModelError: If the model is no sequence.
    """
    return [module for module in _modules(_sequence(model)) if isinstance(module, _WEIGHTED)]


def _copy(model: nn.Module) -> nn.Sequential:
    sequence = _sequence(model)
    check_parameters(dict(sequence.named_parameters()))
    try:
        return deepcopy(sequence)
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"the model cannot be copied ({error}); if its weights are pruned or normalized by a "
            "hook, make that permanent first, by torch.nn.utils.prune.remove or remove_weight_norm"
        ) from error


def _sequence(model: nn.Module) -> nn.Sequential:
    if not is_plain_sequence(model):
        raise UnsupportedModelError(
            f"expected an nn.Sequential, whose layers follow one another; got "
            f"{type(model).__name__}: write the network as one, nn.Sequential(nn.Linear(...), "
            "nn.ReLU(), ...), and load its weights"
        )
    return model


def _modules(model: nn.Sequential) -> list[nn.Module]:
    """One after another, those of inner sequences in their place."""
    return [module for _, module in walk(model) if not is_plain_sequence(module)]


def _junction(model: nn.Sequential, layer: int) -> _Junction:
    modules = _modules(model)
    places = [place for place, module in enumerate(modules) if isinstance(module, _WEIGHTED)]
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer must be a whole number, counted from 0; got {layer!r}")
    if len(places) < 2:
        raise ValueError(
            "expected a model with two linear or convolutional layers, one behind the other; got "
            f"{len(places)}"
        )
    if not 0 <= layer < len(places) - 1:
        raise ValueError(
            "expected the index of a linear or convolutional layer with another one behind it, "
            f"from 0 to {len(places) - 2}; got {layer} of {len(places)} such layers"
        )
    first, second = places[layer : layer + 2]
    junction = _Junction(modules[first], modules[first + 1 : second], modules[second])
    own = [junction.first, *junction.between, junction.second]
    _check_alone(own, modules)
    _check_fit(junction, layer)
    return junction


def _check_alone(own: list[nn.Module], modules: list[nn.Module]) -> None:
    """Require weights that nothing else uses, and that are what the forward pass uses."""
    users: dict[int, int] = {}
    for module in modules:
        for parameter in module.parameters():
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for module in own:
        if _is_altered(module):
            raise UnsupportedModelError(
                f"{type(module).__name__} computes something else than PyTorch's layer of that "
                "kind, or has hooks, which may: nothing is known of its units; remove the hooks"
            )
        if any(users[id(parameter)] > 1 for parameter in module.parameters()):
            raise UnsupportedModelError(
                f"{type(module).__name__} shares its weights with another layer, and a change for "
                "one would change the other"
            )
        if is_parametrized(module):
            raise UnsupportedModelError(
                f"{type(module).__name__} computes its weights from other parameters; remove the "
                "parametrization first"
            )


def _is_altered(module: nn.Module) -> bool:
    """Whether a layer may compute something else than PyTorch's class says."""
    kind = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn."))
    if kind is nn.Module:
        return False  # a module of its own, and no layer that is known here
    return has_hooks(module) or not is_as_inherited(module, kind)


def _check_fit(junction: _Junction, layer: int) -> None:
    """Require that each unit's inputs to the second layer are known."""
    for module in (junction.first, junction.second):
        if getattr(module, "groups", 1) != 1:
            raise UnsupportedModelError(
                f"layers {layer} and {layer + 1} must be convolutions of one group; got "
                f"groups={module.groups}"
            )
    if isinstance(junction.first, nn.Linear):
        # Pools would mix its units, and what is kept by channel belongs to places of a sequence.
        sequence = junction.inputs != junction.units
        for module in junction.between:
            by_channel = isinstance(module, _NORMS) or (
                isinstance(module, nn.PReLU) and module.num_parameters > 1
            )
            if isinstance(module, _POOLS) or (sequence and by_channel):
                raise UnsupportedModelError(
                    f"behind a linear layer {type(module).__name__} does not treat each of its "
                    "units by itself"
                )
    flat = [module for module in junction.between if isinstance(module, nn.Flatten)]
    inputs = junction.inputs
    linear = isinstance(junction.first, nn.Linear), junction.second_is_linear
    fits = linear[0] == linear[1] and inputs == junction.units
    if flat and junction.second_is_linear:
        known = all((m.start_dim, m.end_dim) == (1, -1) for m in flat)
        fits = known and inputs % junction.units == 0
    if not fits:
        raise UnsupportedModelError(
            f"layer {layer} has {junction.units} units and layer {layer + 1} takes {inputs} "
            f"inputs; between {type(junction.first).__name__} and "
            f"{type(junction.second).__name__} lowland follows them if the numbers agree, or "
            "through Flatten()"
        )

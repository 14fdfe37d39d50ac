"""The loss of a model on a data set, as a function of the model's trainable parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowland.criteria import check_reduction, is_sum, mass
from lowland.dense import untouched
from lowland.objective import trainable
from lowland.passes import unsteady
from lowland.spectra.data import Weighed, as_batches, checked, digest

Parts = dict[str, Tensor]
"""One tensor for each parameter, by its name in the model and of its shape."""

# Two passes over the same data differ by more than this only if something was drawn at random.
_SAME = 5e-5


@dataclass(frozen=True, eq=False)
class Surface:
    r"""``L(theta)``, the loss over a data set around the parameters that a model had.

    Args:
        model: Any module.
        criterion: Knows what a batch adds to the loss.
        batches: The data, in as many passes as it takes.
        names: Of the parameters that are looked at; all others are constants.
        state: All parameters and buffers as they were.
        adaptive: Whether curvature is measured in steps relative to the parameters.
    """

    model: nn.Module
    criterion: Weighed
    batches: Iterable[Any]
    names: tuple[str, ...]
    state: Parts
    adaptive: bool = False

    @property
    def parameters(self) -> Parts:
        """``theta``, where the loss was looked at."""
        return {name: self.state[name] for name in self.names}

    @property
    def dim(self) -> int:
        """``P``."""
        return sum(part.numel() for part in self.parameters.values())

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.state[self.names[0]].device

    def within(self, names: Sequence[str]) -> Surface:
        """The same loss as a function of fewer parameters."""
        return replace(self, names=tuple(names))

    def flatten(self, parts: Mapping[str, Tensor]) -> Float[Tensor, " parameters"]:
        """One vector, in the order of ``names``."""
        return torch.cat([parts[name].reshape(-1) for name in self.names])

    def unflatten(self, flat: Float[Tensor, " parameters"]) -> Parts:
        """The inverse of :meth:`flatten`."""
        like = self.parameters
        parts = flat.split([part.numel() for part in like.values()])
        return {n: new.view_as(old) for (n, old), new in zip(like.items(), parts, strict=True)}

    def scaled(self, flat: Float[Tensor, " parameters"]) -> Float[Tensor, " parameters"]:
        """The step that a vector stands for: times ``|theta|`` if it is relative to these."""
        return flat * self.flatten(self.parameters).abs() if self.adaptive else flat

    @torch.no_grad()
    def loss(self, parts: Mapping[str, Tensor]) -> float:
        """``L`` with other values of the parameters that are looked at; the model stays as it is.

        Raises:
            ValueError: If the model was put into training mode where that matters.
        """
        check_mode(self.model)
        device = self.device
        total = 0.0
        with untouched(self.model), torch.random.fork_rng(_cuda(device)):
            for x, y in self.batches:
                x_there = x.to(device) if isinstance(x, Tensor) else x
                output = torch.func.functional_call(
                    self.model, {**self.state, **parts}, (x_there,), strict=False
                )
                total += float(self.criterion(output, y.to(device)))
        return total

    def operator(self) -> Any:
        """``v -> H v`` by curvlinops, at the parameters that the model has now; or ``D H D v``.

        Raises:
            ImportError: If it is not installed.
        """
        linear = need_curvlinops()
        named = dict(self.model.named_parameters())
        hessian = linear.HessianLinearOperator(
            _Anchored(self.model, [named[name] for name in self.names]),
            _WithAnchor(self.criterion),
            [named[name] for name in self.names],
            self.batches,
            check_deterministic=False,  # looked at once, for all operators on this surface
            num_data=1,  # the criterion knows
            batch_size_fn=lambda _: 1,
        )
        if not self.adaptive:
            return hessian
        return _Relative(hessian, self.flatten(self.parameters).abs())


class _Relative:
    """``D H D`` with ``D = diag(d)``, with as much of an operator as is asked of it here.

    Args:
        operator: ``H``.
        scale: ``d``.
    """

    def __init__(self, operator: Any, scale: Float[Tensor, " parameters"]) -> None:
        self.operator, self.scale = operator, scale
        self.shape, self.device, self.dtype = operator.shape, operator.device, operator.dtype

    def __matmul__(self, vectors: Tensor) -> Tensor:
        scale = self.scale.view(-1, *[1] * (vectors.ndim - 1))
        result: Tensor = scale * (self.operator @ (scale * vectors))
        return result


class _Anchored(nn.Module):
    """A model with ``0 |theta|^2`` beside its output.

    Where a gradient does not depend on any parameter, as of one that is not used, vmap in
    curvlinops finds no dimension of vectors in its derivative, and fails.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.model = model
        self.places = [
            (module, name)
            for module in model.modules()
            for name, own in module.named_parameters(recurse=False)
            if any(own is one for one in parameters)
        ]

    def forward(self, x: Any) -> tuple[Any, Tensor]:
        flat = torch.cat([getattr(module, name).reshape(-1) for module, name in self.places])
        return self.model(x), 0 * (flat @ flat)


class _WithAnchor(nn.Module):
    reduction = "sum"  # of batches; the criterion knows what each of them counts

    def __init__(self, criterion: Weighed) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, output: tuple[Any, Tensor], y: Tensor) -> Any:
        value, anchor = output
        return self.criterion(value, y) + anchor


def need_curvlinops() -> Any:
    """The package, or what to do without it.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        with warnings.catch_warnings():  # of a package that it imports, about PyTorch
            warnings.simplefilter("ignore", DeprecationWarning)
            import curvlinops  # noqa: PLC0415 - optional, and takes a second
            import scipy.sparse.linalg  # noqa: F401, PLC0415 - optional
    except ImportError as error:
        raise ImportError(
            f"the spectrum of a model needs curvlinops and SciPy, which are not installed "
            f"({error}): pip install 'lowland[spectrum]'"
        ) from error
    return curvlinops


def survey(model: nn.Module, criterion: Callable[..., Any], data: object) -> Surface:
    """The surface of a model's loss, after a look at everything that its Hessian depends on.

    Raises:
        TypeError: If the data has another form, or the loss is no tensor.
        ValueError: If there is no trainable parameter, the parameters are of several types or
            devices, a layer draws random numbers or updates statistics, the data is empty, not
            finite or other in each pass, or the loss is no finite scalar with a graph.
    """
    named = trainable(model)
    _check_parameters(named)
    check_mode(model)
    check_reduction(criterion)
    batches = as_batches(data)
    device = next(iter(named.values())).device

    def one(x: Any, y: Tensor) -> Tensor:
        output = model(x.to(device) if isinstance(x, Tensor) else x)
        loss = Weighed(criterion)(output, y.to(device))
        _check_loss(loss, criterion)
        detached: Tensor = loss.detach()
        return detached

    with torch.enable_grad(), torch.random.fork_rng(_cuda(device)):
        seen = [(digest((x, y)), one(x, y), mass(criterion, y)) for x, y in checked(batches)]
        index = -1
        for index, (x, y) in enumerate(batches):
            if index >= len(seen) or digest((x, y)) != seen[index][0]:
                raise ValueError(_OTHER_BATCHES.format(index))
            first, second = float(seen[index][1]), float(one(x, y))
            if not math.isclose(first, second, rel_tol=_SAME, abs_tol=1e-12):
                raise ValueError(
                    f"the loss is {first:.6g} and then {second:.6g} on the same data, so there is "
                    "no one Hessian: a layer draws random numbers or updates statistics; call "
                    "model.eval() first"
                )
        if index + 1 < len(seen):
            raise ValueError(_OTHER_BATCHES.format(index + 1))
    total = 1.0 if is_sum(criterion) else float(sum(part for _, _, part in seen))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = {name: part.detach().clone() for name, part in state.items()}
    return Surface(model, Weighed(criterion, total), batches, tuple(named), kept)


_OTHER_BATCHES = (
    "data gives other batches in each pass, from batch {} on, so there is no one Hessian to "
    "multiply by: use shuffle=False, or a sampler that draws no random numbers, and no random "
    "augmentation"
)


def check_mode(model: nn.Module) -> None:
    """Require layers that neither draw random numbers nor update statistics.

    Raises:
        ValueError: Naming the first that does.
    """
    for name, module in model.named_modules():
        if what := unsteady(module):
            raise ValueError(
                f"layer {name!r} of the model, {module}, is in training mode, where it {what} in "
                "each call, so the loss has no one Hessian; call model.eval() first"
            )


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Let random numbers follow from a seed alone, and give the generators back as they were.

    curvlinops draws its probes from PyTorch's global ones, as each pass of a DataLoader does.
    """
    with torch.random.fork_rng(_cuda(device)):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _check_parameters(named: Mapping[str, Tensor]) -> None:
    kinds = {f"{str(p.dtype).removeprefix('torch.')} on {p.device}" for p in named.values()}
    if len(kinds) > 1:
        raise ValueError(
            "the model's trainable parameters must be of one type on one device; got "
            f"{' and '.join(sorted(kinds))}"
        )
    if next(iter(named.values())).dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the model's parameters must be float32 or float64; got {kinds.pop()}: use "
            "model.double()"
        )


def _check_loss(loss: object, criterion: object) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the criterion must return a scalar tensor; got {type(loss).__name__}: "
            "a loss without derivatives has no Hessian"
        )
    if loss.ndim:
        raise ValueError(
            "the criterion must return a scalar for its Hessian to be a matrix; got shape "
            f"{tuple(loss.shape)}: use reduction='mean' or 'sum'"
        )
    if not loss.requires_grad:
        raise ValueError(
            "the loss has no graph to the model's trainable parameters, so it has no derivatives: "
            "the model or the criterion detaches its values, runs without gradients, or counts "
            f"(as accuracy does); got {float(loss):.6g} by {type(criterion).__name__}"
        )
    if not bool(torch.isfinite(loss)):
        raise ValueError(
            f"the loss is {float(loss.detach())}, so it has no Hessian; look at the model's "
            "parameters and outputs first"
        )


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []

"""The loss of a model on a data set, around the parameters that the model had."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowland._batches import Batch, as_batch, as_batches, checked, digest, to_device
from lowland._call import arguments
from lowland._elsewhere import with_respect_to
from lowland._holding import remind_recurrent
from lowland._weights import Count, Weights
from lowland.criteria import check_reduction, scalar_loss
from lowland.errors import UnsupportedModelError
from lowland.estimation import Estimation, Products
from lowland.matrices import Matrix
from lowland.objective import Objective, differentiating, over
from lowland.passes import frozen_statistics, unsteady
from lowland.products import RepeatedProducts
from lowland.verification import parameters_untouched, routed

NamedVector = dict[str, Tensor]
"""One tensor for each parameter, by its name in the model and of its shape."""

# One vector, or one in each column.
Columns = Float[Tensor, "parameters *columns"]

# Two passes over the same data differ by more than this only if something was drawn at random.
_SAME = 5e-5


@dataclass(frozen=True, eq=False)
class Surface:
    r"""``L(theta)``, the loss over a data set around the parameters that a model had.

    Args:
        objective: The loss over all batches.
        state: All parameters and buffers as they were.
        adaptive: Whether curvature is measured in steps relative to the parameters.
        l2: Weight decay that is part of the loss: ``l2 / 2`` times the squared norm of
        penalized: these parameters.
        products: How the Hessian is multiplied: by automatic differentiation, or differences of
            gradients where PyTorch's derivatives are missing or wrong.
    """

    objective: Objective
    state: NamedVector
    adaptive: bool = False
    products: Products = "autograd"
    l2: float = 0.0
    penalized: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Of the parameters that are looked at; all others are constants."""
        return self.objective.names

    @property
    def parameters(self) -> NamedVector:
        """``theta``, where the loss was looked at."""
        return {name: self.state[name] for name in self.names}

    @property
    def dim(self) -> int:
        """``P``."""
        return self.objective.dim

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.objective.device

    def within(self, names: Sequence[str]) -> Surface:
        """The loss as a function of some of the parameters; the others become constants."""
        named = dict(zip(self.names, self.objective.parameters, strict=True))
        chosen = [named[name] for name in names]
        return replace(
            self, objective=replace(self.objective, names=list(names), parameters=chosen)
        )

    def flatten(self, parts: Mapping[str, Tensor]) -> Float[Tensor, " parameters"]:
        """One vector, in the order of ``names``."""
        return torch.cat([parts[name].reshape(-1) for name in self.names])

    def unflatten(self, flat: Float[Tensor, " parameters"]) -> NamedVector:
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
        model, criterion = self.objective.model, self.objective.criterion
        check_mode(model)
        total = 0.0
        with untouched(model), torch.random.fork_rng(_cuda(self.device)):
            for share, part in self.objective.parts():
                x, y = part.batch
                buffers = {name: self.state[name].clone() for name, _ in model.named_buffers()}
                values = {**self.state, **buffers, **parts}
                output = torch.func.functional_call(
                    model, values, *arguments(model, x), strict=False
                )
                total += share * float(scalar_loss(criterion, output, y))
        if self.l2:
            now = {**self.state, **parts}
            squares = (float(now[name].double().square().sum()) for name in self.penalized)
            total += self.l2 / 2 * sum(squares)
        return total

    def operator(self) -> HessianOperator:
        """``v -> H v`` at the parameters that the model has now; or ``D H D v``.

        ``H`` is the matrix that the objective means.
        """
        return HessianOperator(self)


class HessianOperator:
    """Products of flat vectors with ``H``, or with ``D H D`` of ``D = diag(|theta|)``.

    Args:
        surface: The loss, and whether steps are relative to the parameters.
    """

    def __init__(self, surface: Surface) -> None:
        self.surface = surface
        self.shape = (surface.dim, surface.dim)
        self.device, self.dtype = surface.device, surface.objective.parameters[0].dtype
        self.products = RepeatedProducts(surface.objective, surface.products)

    def __matmul__(self, vectors: Columns) -> Columns:
        surface = self.surface
        columns = vectors.unsqueeze(1) if vectors.ndim == 1 else vectors
        directions = [
            list(surface.unflatten(surface.scaled(column)).values()) for column in columns.T
        ]
        products = self.products(directions)
        flat = [torch.cat([part.reshape(-1) for part in product]) for product in products]
        if surface.l2:
            decay = zip(flat, columns.T, strict=True)
            flat = [each + surface.l2 * surface.scaled(column) for each, column in decay]
        return torch.stack([surface.scaled(each) for each in flat], dim=1).view_as(vectors)


def survey(
    model: nn.Module,
    criterion: Callable[..., Any],
    data: object,
    count: Count | None = None,
    *,
    matrix: Matrix = "hessian",
    wrt: str | None = None,
) -> Surface:
    """The surface of a model's loss, after a look at everything that its Hessian depends on.

    Raises:
        UnsupportedModelError: If the model is trained by several processes, of which each has its
            own data.
        TypeError: If the data has another form, or the loss is no tensor.
        RuntimeError: If PyTorch's derivatives of the loss are wrong, or missing, and differences of
            gradients cannot stand for them.
        ValueError: If there is no trainable parameter, the parameters are of several types or
            devices, a layer draws random numbers or updates statistics, the data is empty, not
            finite or other in each pass, or the loss is no finite scalar with a graph.
    """
    target = over(model, criterion, (), matrix=matrix)
    if target.parallel:
        raise UnsupportedModelError(
            "the model is a DistributedDataParallel module, and each process would measure its own "
            "data; give model.module and the whole data set in one process"
        )
    _check_parameters(target.parameters)
    check_mode(target.model)
    check_reduction(criterion)
    batches = as_batches(data)
    if wrt is not None:
        target = with_respect_to(replace(target, batches=(_only(data),)), wrt)
    device = target.device
    weigh = Weights(target, count)

    def one(weight: float, x: Any, y: Any) -> tuple[float, float]:
        if not weight:  # all of its targets are ignored, and their mean is no number
            return 0.0, 0.0
        there = to_device(x, device), to_device(y, device)
        with frozen_statistics(*target.holders):
            return weight, float(target.on(there).loss().detach())

    with (
        parameters_untouched(target),
        differentiating(),
        torch.random.fork_rng(_cuda(device)),
    ):
        seen = [(digest((x, y)), *one(weigh(x, y), x, y)) for x, y in checked(batches)]
        index = -1
        for index, (x, y) in enumerate(batches):
            if index >= len(seen) or digest((x, y)) != seen[index][0]:
                raise ValueError(_OTHER_BATCHES.format(index))
            _, weight, first = seen[index]
            second = one(weight, x, y)[1]
            if not math.isclose(first, second, rel_tol=_SAME, abs_tol=1e-12):
                raise ValueError(
                    f"the loss is {first:.6g} and then {second:.6g} on the same data, so there is "
                    "no one Hessian: a layer draws random numbers or updates statistics; call "
                    "model.eval() first"
                )
        if index + 1 < len(seen):
            raise ValueError(_OTHER_BATCHES.format(index + 1))
    shares = [weight / weigh.total for _, weight, _ in seen]
    state = {**dict(target.model.named_parameters()), **dict(target.model.named_buffers())}
    kept = {name: part.detach().clone() for name, part in state.items()}
    over_all = replace(target, batches=batches, shares=shares)
    with torch.random.fork_rng(_cuda(device)):  # from which a loader draws, too
        _, part = next(over_all.parts())
        products = routed(part, Estimation()).products
    return Surface(over_all, kept, products=products)


def _only(data: object) -> Batch:
    """The one batch that the data are.

    Raises:
        UnsupportedModelError: If they are several, or may be.
    """
    if (batch := as_batch(data)) is None:
        raise UnsupportedModelError("wrt= looks at one batch: pass a pair (x, y) of tensors")
    return batch


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
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Let random numbers follow from a seed alone, and give the generators back as they were.

    Each pass of a ``DataLoader`` draws from PyTorch's global ones.
    """
    with torch.random.fork_rng(_cuda(device)):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put parameters and buffers back: a functional call leaves its own in a module used twice.

    Raises:
        UnsupportedModelError: If they belong to a scripted module.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UnsupportedModelError(
            "a scripted or traced module does not part with its parameters, so the loss cannot "
            "be looked at elsewhere: use the module that was scripted"
        )
    before = [
        (table, dict(table))
        for module in model.modules()
        for table in (module._parameters, module._buffers)  # noqa: SLF001
    ]
    try:
        yield
    finally:
        for table, own in before:
            table.update(own)  # type: ignore[arg-type]  # of parameters or of buffers, as it was
        remind_recurrent(model)


def _check_parameters(parameters: Sequence[Tensor]) -> None:
    kinds = {f"{str(p.dtype).removeprefix('torch.')} on {p.device}" for p in parameters}
    if len(kinds) > 1:
        raise ValueError(
            "the model's trainable parameters must be of one type on one device; got "
            f"{' and '.join(sorted(kinds))}"
        )


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []

r"""Products with the Hessian and their derivatives, for any loss that can be differentiated.

With a direction ``v`` and :math:`u = Hv`, the gradient of any function of :math:`v^T H v` and
:math:`\lVert Hv \rVert^2` is one third derivative: :math:`\nabla^3 L[v, a v + 2 b u]` with that
function's slopes ``a`` and ``b``. There are two ways to it:

* autograd: differentiate the graph of ``u``;
* differences: ``u`` from the gradient ``g`` at two points, the third derivative from four,
  for losses whose gradient is smooth,

      u = (g(t + eps v) - g(t)) / eps
      D^3 L[v, w] = (g(t + eps v + delta w) - g(t + eps v) - g(t + delta w) + g(t)) / (eps delta)

  so there is never a graph of a graph. In single precision the third derivative is off by some
  percent, and by more where it is small itself, at the end of training; of networks with kinks
  (ReLU) it is noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, grad
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import CheckpointError

from lowland._batches import tensors
from lowland._carried import carried
from lowland._once import any_once
from lowland._precision import best_precision
from lowland.activations import has_kinks
from lowland.estimation import Products
from lowland.gauss_newton import Split, surrogate
from lowland.jets import along, covers
from lowland.objective import (
    Gradient,
    Objective,
    check_finite,
    differentiating,
    graph,
    half_autocast,
    leaves,
    may_look,
    not_compiled,
    without_hooks,
)
from lowland.passes import frozen_statistics
from lowland.torch_fixes import differentiable_operations

# A vector in the space of the parameters: one tensor for each.
Vector = list[Tensor]
Tensors = list[Tensor] | tuple[Tensor, ...]

# For each direction: (loss, v^T H v, squared norm of H v), the last two with one entry a direction.
Forms = tuple[Tensor, Tensor, Tensor]

# Averages tensors over all processes, in place.
Average = Callable[[Vector], None]

_NO_CURVATURE = (
    "the gradient of the loss does not change with the parameters, so its Hessian is zero: a "
    "criterion that is linear almost everywhere (L1Loss) on a linear model, for example"
)
_NOT_TWICE = (
    "this model and loss cannot be differentiated twice: {}\n"
    "Use products='differences', which needs gradients alone; or replace what has no second "
    "derivative"
)


NO_GRADIENT = (
    "products='differences' gives the moments of the Hessian alone with gradients: of another "
    "matrix use products='autograd', or torch.no_grad() for values"
)
_CHECKPOINTED = (
    "activation checkpointing runs layers again, and where lowland writes some out, whose "
    "derivatives PyTorch has wrong, such as LayerNorm, they are others then. Use "
    "products='differences', or switch checkpointing off"
)


def quadratic_forms(
    halves: Sequence[Objective],
    directions: Sequence[Vector],
    products: Products = "autograd",
    average: Average | None = None,
    *,
    disposable: bool = False,
    step: float = 1.0,
) -> Forms:
    r"""A loss and the Hessian's quadratic forms in some directions.

    Args:
        halves: The objective alone; or two, over the halves of its samples. Then their products
            with the Hessian meet each other, so that neither meets its own noise.
        directions: Each with one tensor a parameter.
        products: ``"autograd"`` or ``"differences"``.
        average: Over the processes of data-parallel training.
        disposable: The directions may be written over, which saves their memory once.
        step: Of differences: how much longer than usual their steps are.

    Returns:
        The loss; of each direction :math:`v^T H v` and :math:`\lVert Hv \rVert^2`. All three carry
        gradients if gradients are enabled. With several processes the values of the two forms are
        those of all samples, and the gradients those of one process's share, to be averaged as the
        loss's are.

    Raises:
        ValueError: As :meth:`Objective.loss`, or if a product is not finite.
        RuntimeError: If the loss cannot be differentiated twice, with what may help.
    """
    if products == "differences":
        directions = [halves[0].free(direction) for direction in directions]
        if not disposable:
            directions = [_copies(direction) for direction in directions]
        if halves[0].matrix != "hessian":
            return _by_surrogates(halves, directions, average, step)
        run = _Differences(halves, directions, average, step)
        result: Forms = _Finite.apply(run, *run.parameters)  # type: ignore[no-untyped-call]
        return result
    return _by_autograd(halves, directions, average)


def form_along(
    part: Objective,
    direction: Vector,
    products: Products = "autograd",
    average: Average | None = None,
    *,
    step: float = 1.0,
) -> tuple[Tensor, Tensor, Vector]:
    r"""A loss, its second derivative :math:`v^T H v` along one direction, and :math:`Hv`.

    By differences all comes from three gradients, and what goes backward is ready by then:

        H v = (g(t + eps v) - g(t - eps v)) / (2 eps)
        D^3 L[v, v] = (g(t + eps v) - 2 g(t) + g(t - eps v)) / eps^2

    Args:
        part: The loss.
        direction: With one tensor a parameter, of length 1 together.
        products: ``"autograd"`` or ``"differences"``.
        average: Over the processes of data-parallel training.
        step: Of differences: how much longer than usual their steps are.

    Returns:
        The first two carry gradients if gradients are enabled, as :func:`quadratic_forms` has it;
        the product does not.

    Raises:
        ValueError, RuntimeError: As :func:`quadratic_forms`.
    """
    if products == "differences":
        run = _Differences([part], [part.free(direction)], average, step * _second(part))
        loss, form, *found = _Central.apply(run, *run.parameters)  # type: ignore[no-untyped-call]
        return loss, form, found
    wanted = torch.is_grad_enabled()
    if covers(part):
        return _form_by_jets(part, direction, average, wanted=wanted)
    scale = _loss_scale(part)
    with derivatives_of(part):
        curvature = Curvature(part, scale)
        loss = curvature.loss_once
        found = curvature.product(direction, wanted=wanted)
        if not _is_one(scale):
            found = [each / scale for each in found]
        (value,) = _averaged([[each.detach() for each in found]], average)
        form = _carry(dot(direction, value), dot(direction, found))
    if not wanted:
        return loss.detach(), form.detach(), value
    if not form.requires_grad:  # the Hessian is constant
        if not norm(value):
            raise ValueError(_NO_CURVATURE)
        form = form + 0 * loss
    return loss, form, value


def _form_by_jets(
    part: Objective, direction: Vector, average: Average | None, *, wanted: bool
) -> tuple[Tensor, Tensor, Vector]:
    size = len(part.parameters)
    with derivatives_of(part):
        ways = [way.detach().requires_grad_() for way in direction]
        loss, form = along(part, ways)
        once = wanted and part.once and not part.others_beside
        inputs = [*part.parameters, *ways] if once else ways
        found = list(grad(form, inputs, retain_graph=wanted, materialize_grads=True))
        product = list(torch._foreach_mul(found[-size:], 0.5))  # noqa: SLF001
        _check_product(part, product)
        (value,) = _averaged([product], average)
        if once:
            form = carried(form.detach(), part.parameters, found[:size])
            gradient = grad(loss, part.parameters, materialize_grads=True)
            loss = carried(loss.detach(), part.parameters, gradient)
        if average:
            form = _carry(dot(direction, value), form)
    return (loss, form, value) if wanted else (loss.detach(), form.detach(), value)


def traces_along(
    part: Objective, directions: Sequence[Vector], average: Average | None = None
) -> tuple[Tensor, Tensor]:
    r"""A loss, and :math:`v^T H v` alone for each direction, where :func:`lowland.jets.covers` it.

    Both carry gradients if gradients are enabled, as :func:`quadratic_forms` has it.

    Raises:
        ValueError: As :func:`quadratic_forms`.
    """
    wanted = torch.is_grad_enabled()
    with derivatives_of(part):
        losses, forms = zip(*(along(part, direction) for direction in directions), strict=True)
        loss, traces = losses[0], torch.stack(forms)
        check_finite(traces.detach(), "the Hessian's product with a direction")
        if average:
            (value,) = _averaged([[traces.detach()]], average)
            traces = _carry(value[0], traces)
    return (loss, traces) if wanted else (loss.detach(), traces.detach())


@contextmanager
def products_here(
    part: Objective, products: Products, step: float = 1.0
) -> Iterator[Callable[[Vector], Vector]]:
    """``v -> H v`` of one batch at one point, again and again, from one gradient or its graph.

    In the parameters' own precision and without gradients; the model's state stays as it is.
    """
    full_precision = torch.autocast(part.device.type, enabled=False)
    with part.remember()(), full_precision:
        if products == "differences":
            run = _Differences([part], [], None, step)
            _, gradient = run.first_gradient(part)

            yield lambda direction: run.one_sided(part.free(direction), gradient)
        else:
            with curvature_of(part) as curvature:
                yield lambda direction: curvature.product(direction, wanted=False)


def hessian_products(
    target: Objective, directions: Sequence[Vector], products: Products = "autograd"
) -> list[Vector]:
    """``H v`` for each direction, of the loss on all batches, without gradients.

    Args:
        target: The loss.
        directions: Each with one tensor a parameter.
        products: ``"autograd"``; or ``"differences"``, which are taken in double precision where
            the model goes along with it.

    Returns:
        As many products, each with one tensor a parameter.

    Raises:
        ValueError, RuntimeError: As :func:`quadratic_forms`; but a Hessian of zeros is one.
    """
    totals: list[Vector] = []
    for share, part in target.parts():
        with frozen_statistics(*part.holders):
            found = _products_of_batch(part, directions, products)
        if target.shares is None:
            return found
        totals = totals or [[torch.zeros_like(each) for each in product] for product in found]
        for total, product in zip(totals, found, strict=True):
            torch._foreach_add_(total, product, alpha=share)
    return totals


def _products_of_batch(
    part: Objective, directions: Sequence[Vector], products: Products
) -> list[Vector]:
    if products == "differences":
        with best_precision(part) as wide:
            beside = wide.matrix != "hessian"
            there = surrogate(wide)[0] if beside else wide
            free = [_typed(part.free(each), wide) for each in directions]
            run = _Differences([there], free, None)
            run.again.append(wide.remember())
            if beside:  # whose Hessian is the matrix where it is looked at first
                run.gradient(0, run.parameters)
            return [_typed(run.central(direction), part) for direction in run.directions]
    with curvature_of(part) as curvature:
        return [curvature.product(direction, wanted=False) for direction in directions]


def differences(part: Objective, directions: Sequence[Vector], factor: float = 1.0) -> list[Vector]:
    """``H v`` for each direction by differences of gradients, in the parameters' own precision."""
    run = _Differences([part], directions, None, factor)
    _, gradient = run.first_gradient(part)
    return [run.one_sided(direction, gradient) for direction in directions]


def _typed(parts: Vector, like: Objective) -> Vector:
    return [part.to(p.dtype) for part, p in zip(parts, like.parameters, strict=True)]


class Curvature:
    """The matrix of one batch's loss, whichever is meant, to be multiplied with directions.

    Args:
        part: The loss.
        scale: What the products are multiplied by.

    Attributes:
        loss: The loss itself, with its graph.

    Raises:
        UnsupportedModelError, ValueError: As :meth:`Objective.loss`, and as
            :class:`lowland.gauss_newton.Split`.
        RuntimeError: If something in the loss can be differentiated once only.
    """

    def __init__(self, part: Objective, scale: float | Tensor = 1.0) -> None:
        self.part, self.scale, self._split, self._gradient = part, scale, None, None
        if part.matrix == "hessian":
            self.loss = part.loss()
        else:
            self._split = Split(part, scale)
            self.loss = self._split.loss
            _check_differentiable(self._split.nodes)
        if part.matrix in ("hessian", "residual"):
            self._gradient = _gradient(part, scale * self.loss)

    @property
    def loss_once(self) -> Tensor:
        """The loss; with the gradient that is known and no graph, where nobody needs more."""
        part, gradient = self.part, self._gradient
        if not part.once or gradient is None or not _is_one(self.scale):
            return self.loss
        if part.is_ordinary:
            known = not part.others_beside
            used = part.parameters
        else:
            used = leaves(self.loss)
            known = {id(each) for each in used} <= {id(p) for p in part.parameters}
        if not known:
            return self.loss
        by_parameter = {id(p): g for p, g in zip(part.parameters, gradient, strict=True)}
        return carried(self.loss.detach(), used, [by_parameter[id(p)].detach() for p in used])

    def product(self, direction: Sequence[Tensor | None], *, wanted: bool) -> Vector:
        """The product with a direction, None for parts that are zero; with its graph if wanted.

        Raises:
            ValueError: If it is not finite.
            RuntimeError: If something in it cannot be differentiated.
        """
        result: Vector | None = None
        if self._gradient is not None:
            used = [(g, v) for g, v in zip(self._gradient, direction, strict=True) if v is not None]
            gradient, parts = [g for g, _ in used], [v for _, v in used]
            result = product(self.part, gradient, parts, wanted=wanted)
        if self._split is None:
            return result or []
        pairs = zip(self.part.parameters, direction, strict=True)
        found = self._split.product(
            [torch.zeros_like(p) if v is None else v for p, v in pairs], wanted=wanted
        )
        if result is not None:
            found = list(torch._foreach_sub(result, found))  # noqa: SLF001
        _check_product(self.part, found)
        return found


@contextmanager
def curvature_of(part: Objective) -> Iterator[Curvature]:
    """The matrix of a loss, where it can be multiplied; errors as :class:`Curvature`."""
    with derivatives_of(part):
        yield Curvature(part)


@contextmanager
def derivatives_of(part: Objective) -> Iterator[None]:
    """Where a loss's derivatives of all orders are right."""
    with differentiating(), not_compiled(), _operations(part), without_hooks(part.parameters):
        yield


class RepeatedProducts:
    """:func:`hessian_products` again and again, at the same parameters.

    Of one batch the gradient's graph is kept from the first product on, which saves a third of
    each; of several it would take the memory of all of them.

    Args:
        target: The loss.
        products: As for :func:`hessian_products`.
    """

    def __init__(self, target: Objective, products: Products) -> None:
        self.target, self.products = target, products
        self._kept: tuple[float, Curvature] | None = None

    def __call__(self, directions: Sequence[Vector]) -> list[Vector]:
        """As :func:`hessian_products`."""
        shares = self.target.shares
        if self.products == "differences" or (shares is not None and len(shares) > 1):
            return hessian_products(self.target, directions, self.products)
        if self._kept is None:
            ((share, part),) = self.target.parts()
            with frozen_statistics(*part.holders), curvature_of(part) as curvature:
                self._kept = share, curvature
        share, curvature = self._kept
        with derivatives_of(curvature.part):
            found = [curvature.product(direction, wanted=False) for direction in directions]
        for product in found if share != 1 else []:
            torch._foreach_mul_(product, share)
        return found


def _by_surrogates(
    halves: Sequence[Objective],
    directions: Sequence[Vector],
    average: Average | None,
    step: float,
) -> Forms:
    """By differences of the gradients of losses whose Hessians are the matrices that are meant.

    These are the same here alone, so there is no way on to the gradients of the forms.
    """
    parts, criterions = zip(*map(surrogate, halves), strict=True)
    with torch.no_grad():
        run = _Differences(parts, directions, average, step)
        _, *forms = _Finite.apply(run, *run.parameters)  # type: ignore[no-untyped-call]
        loss = torch.stack([each.loss for each in criterions]).mean()
    parameters = halves[0].parameters
    first, second = (_Constant.apply(form, *parameters) for form in forms)  # type: ignore[no-untyped-call]
    return loss, first, second


class _Constant(Function):
    # Without it a sum with something that has a gradient would leave this one out, silently.

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:  # noqa: ARG004
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
        raise RuntimeError(NO_GRADIENT)


@contextmanager
def gradient_graph(part: Objective) -> Iterator[Vector]:
    """The gradient with its graph, where it can be differentiated again.

    Raises:
        ValueError: As :meth:`Objective.loss`.
        RuntimeError: If something in it can be differentiated once only.
    """
    with derivatives_of(part):
        yield _gradient(part, part.loss())


def _by_autograd(
    halves: Sequence[Objective], directions: Sequence[Vector], average: Average | None
) -> Forms:
    wanted = torch.is_grad_enabled()
    scale = _loss_scale(halves[0])
    first = halves[0]
    with differentiating(), not_compiled(), _operations(first), without_hooks(first.parameters):
        curvatures = [Curvature(part, scale) for part in halves]
        losses = [each.loss_once for each in curvatures]
        forms = []
        for direction in directions:
            products = [each.product(direction, wanted=wanted) for each in curvatures]
            if not _is_one(scale):
                products = [[each / scale for each in one] for one in products]
            values = [[each.detach() for each in one] for one in products]
            forms.append(_forms(products, _averaged(values, average), direction))
        loss = sum(losses[1:], losses[0]) / len(losses)
    traces, squares = (torch.stack(each) for each in zip(*forms, strict=True))
    if not wanted:
        return loss.detach(), traces.detach(), squares.detach()
    if not traces.requires_grad:  # the Hessian is constant
        if not squares.any():
            raise ValueError(_NO_CURVATURE)
        traces, squares = traces + 0 * loss, squares + 0 * loss
    return loss, traces, squares


def _forms(
    products: Sequence[Vector],
    values: Sequence[Vector],
    direction: Vector,
) -> tuple[Tensor, Tensor]:
    """Both quadratic forms, as linear functions of the products: that is all a gradient needs."""
    trace, square = _values(values, direction)
    in_trace = torch.stack([dot(direction, each) for each in products]).mean()
    # Each product meets the other half's, or itself.
    in_square = 2 * torch.stack(list(map(dot, values[::-1], products))).mean()
    return _carry(trace, in_trace), _carry(square, in_square)


def _carry(value: Tensor, slope: Tensor) -> Tensor:
    """``value`` with the gradient of ``slope``."""
    return value + (slope - slope.detach())


def _operations(part: Objective) -> AbstractContextManager[None]:
    if part.is_ordinary:
        return nullcontext()
    return differentiable_operations(part.model)


def _gradient(part: Objective, loss: Tensor) -> Vector:
    if not part.is_ordinary:
        _check_differentiable(graph(loss))
    try:
        found = grad(loss, part.parameters, create_graph=True, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except CheckpointError as error:
        raise RuntimeError(_CHECKPOINTED) from error
    except RuntimeError as error:
        raise RuntimeError(_NOT_TWICE.format(error)) from error
    gradient = part.complete(found, loss)
    if not part.is_ordinary:
        _check_differentiable(graph(*gradient))
    return gradient


def _check_differentiable(nodes: Iterable[Any]) -> None:
    """Refuse functions that are ``once_differentiable``: a product would leave them out."""
    if any_once(nodes):
        raise RuntimeError(_NOT_TWICE.format("a function in it is marked as once_differentiable"))


def product(part: Objective, gradient: Vector, direction: Vector, *, wanted: bool) -> Vector:
    """``H v``, with its graph if wanted; zeros where the gradient does not change."""
    used = [(g, v) for g, v in zip(gradient, direction, strict=True) if g.requires_grad]
    if not used:
        return [torch.zeros_like(p) for p in part.parameters]
    try:
        result = grad(
            [g for g, _ in used],
            part.parameters,
            [v for _, v in used],
            create_graph=wanted,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # NotImplementedError is one
        raise RuntimeError(_NOT_TWICE.format(error)) from error
    _check_product(part, result)
    return list(result)


def _check_product(part: Objective, result: Tensors) -> None:
    if may_look(result[0].device) and not norm(result).isfinite():
        for name, each in zip(part.names, result, strict=True):
            check_finite(each.detach(), f"the Hessian's product with a direction, in {name},")


class _Differences:
    """Gradients at shifted parameters.

    They are taken in the parameters' own precision: differences of 16-bit gradients are noise.
    """

    def __init__(
        self,
        halves: Sequence[Objective],
        directions: Sequence[Vector],
        average: Average | None,
        factor: float = 1.0,
    ) -> None:
        self.halves, self.directions, self.average = halves, directions, average
        self.factor = factor
        self.parameters = halves[0].parameters
        self.device = self.parameters[0].device
        self.again: list[Callable[[], AbstractContextManager[None]]] = []
        self.used = [False] * len(self.parameters)

    def first_gradient(self, part: Objective) -> Gradient:
        """The gradient at the parameters themselves, of a pass that counts as one."""
        self.again.append(part.remember())
        used: list[bool] = []
        with self._full_precision():
            found = part.gradient(used=used)
        self.used = [one or other for one, other in zip(self.used, used, strict=True)]
        return found

    def of_used(self, parts: Sequence[Tensor]) -> list[Tensor | None]:
        """A gradient, without what belongs to parameters that the loss does not depend on."""
        return [part if used else None for part, used in zip(parts, self.used, strict=True)]

    def gradient(self, number: int, at: Vector) -> Vector:
        """The gradient of a part elsewhere, from the same state and random numbers."""
        part = self.halves[number]
        with self.again[number](), self._full_precision():
            return part.gradient(at)[1]

    def one_sided(self, direction: Vector, here: Vector) -> Vector:
        """``H v`` from the gradient on one side, and that at the parameters."""
        step = self.shift() / norm(direction)
        near = self.gradient(0, plus(self.parameters, direction, step))
        torch._foreach_sub_(near, here)
        return times(near, 1 / step)

    def central(self, direction: Vector) -> Vector:
        """``H v`` from the gradients on both sides."""
        step = self.shift() / norm(direction)
        one, other = (
            self.gradient(0, plus(self.parameters, direction, sign * step)) for sign in (1, -1)
        )
        return [(a - b) / (2 * step) for a, b in zip(one, other, strict=True)]

    def _full_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)

    def shift(self) -> Tensor:
        """How long the differences' steps are: a small part of the parameters' own norm.

        Of some of a model's parameters, which may be small or zero yet, as much as it is on average
        of all of them.
        """
        length = norm(self.parameters)
        everything = [p for p in self.halves[0].model.parameters() if p.is_floating_point()]
        if len(everything) > len(self.parameters):
            count, total = (sum(p.numel() for p in each) for each in (self.parameters, everything))
            usual = norm([p.to(length.device) for p in everything]) * (count / total) ** 0.5
            length = torch.maximum(length, usual.to(length.dtype))
        return self.factor * relative_step(length.dtype) * torch.where(length > 0, length, 1)


class _Finite(Function):
    # Passes over all parameters cost as much as small networks' gradients, so there are few: the
    # products stay what they are as differences, step * H v, and all that scales them is numbers.

    @staticmethod
    def forward(ctx: Any, run: _Differences, *parameters: Tensor) -> Forms:
        losses, gradients = zip(*(run.first_gradient(part) for part in run.halves), strict=True)
        shift = run.shift()
        forms, steps, points, differences, averages = [], [], [], [], []
        for direction in run.directions:
            step = shift / norm(direction)
            at = direction
            torch._foreach_mul_(at, step)
            torch._foreach_add_(at, parameters)
            found = [run.gradient(i, at) for i in range(len(run.halves))]
            for near, gradient in zip(found, gradients, strict=True):
                torch._foreach_sub_(near, gradient)
            averaged = _averaged(found, run.average)
            trace = torch.stack([_along(at, parameters, each) for each in averaged]).mean()
            square = dot(averaged[0], averaged[-1])
            forms.append(torch.stack([trace, square]) / step.square())
            steps.append(step)
            points.append(at)
            differences += found
            averages += averaged if run.average else []
        traces, squares = torch.stack(forms).unbind(1)
        check_finite(squares, "the Hessian's product with a direction")
        # Saved rather than kept as attributes, tensors are guarded, and gone after the backward
        # pass. The parameters are needed where they are now.
        kept = [*points, *gradients, *differences, *averages]
        data = [each for half in run.halves for each in tensors(half.batch)]
        ctx.save_for_backward(
            *data, *parameters, shift, torch.stack(steps), *(each for part in kept for each in part)
        )
        ctx.run, ctx.data = run, len(data)
        ctx.set_materialize_grads(False)
        return torch.stack(losses).mean(), traces, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        run: _Differences = ctx.run
        size, count = len(run.parameters), len(run.halves)
        everything = ctx.saved_tensors[ctx.data :]
        parameters, (shift, steps) = everything[:size], everything[size : size + 2]
        saved = _batched(everything[size + 2 :], size)
        points = list(islice(saved, len(steps)))
        gradients = list(islice(saved, count))
        differences = list(islice(saved, len(steps) * count))
        averages = list(saved) or differences
        in_loss, in_trace, in_square = slopes
        # What nobody will ask for again is written over: fresh memory is dear.
        own = _copies if torch._C._autograd._get_current_graph_task_keep_graph() else list  # noqa: SLF001

        total = own(gradients[0])
        share = shift.new_zeros(()) if in_loss is None else in_loss / count
        torch._foreach_mul_(total, share)
        for gradient in gradients[1:]:
            plus_(total, gradient, share)
        if in_trace is None and in_square is None:
            return None, *run.of_used(total)
        for i, (point, step) in enumerate(zip(points, steps, strict=True)):
            # Each product meets the other half's, or itself, and the direction.
            others = averages[i * count : (i + 1) * count][::-1]
            # In multiples of what is at hand: step * H v, and the way to the point, step * v.
            slope = 0 * step if in_square is None else 2 / count * in_square[i] / step
            weight = None if in_trace is None else in_trace[i] / count / step
            fars = []
            for other in others:
                square = slope.square() * dot(other, other)
                if weight is not None:
                    along = _along(point, parameters, other)
                    square = square + 2 * slope * weight * along + (weight * shift).square()
                fars.append(shift / torch.where(square > 0, square, 1).sqrt())
            for part, far in enumerate(fars):
                plus_(total, differences[i * count + part], -1 / (step * far))
            for part, (other, far) in enumerate(zip(others, fars, strict=True)):
                at = own(other)
                torch._foreach_mul_(at, far * slope)
                torch._foreach_add_(at, parameters)
                if weight is not None:
                    plus_(at, point, far * weight)
                    plus_(at, parameters, -far * weight)
                near = run.gradient(part, at)
                torch._foreach_add_(at, point)
                torch._foreach_sub_(at, parameters)
                found = run.gradient(part, at)
                torch._foreach_sub_(found, near)
                plus_(total, found, 1 / (step * far))
        return None, *run.of_used(total)


class _Central(Function):
    # The gradient of the form is known as soon as its value is: nothing else is kept for it.

    @staticmethod
    def forward(ctx: Any, run: _Differences, *parameters: Tensor) -> tuple[Tensor, ...]:
        (part,), (direction,) = run.halves, run.directions
        loss, gradient = run.first_gradient(part)
        step = run.shift()
        at = plus(parameters, direction, step)
        near = run.gradient(0, at)
        plus_(at, direction, -2 * step)
        far = run.gradient(0, at)
        del at  # fresh memory is dear
        product = list(torch._foreach_sub(near, far))  # noqa: SLF001
        torch._foreach_mul_(product, 0.5 / step)
        torch._foreach_add_(near, far)
        torch._foreach_add_(near, gradient, alpha=-2)
        (product,) = _averaged([product], run.average)
        form = dot(direction, product)
        check_finite(form, "the Hessian's product with a direction")
        ctx.save_for_backward(step, *gradient, *near)
        ctx.run = run
        ctx.mark_non_differentiable(*product)
        ctx.set_materialize_grads(False)
        return loss, form, *product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.run.of_used(_of_central(ctx.saved_tensors, *slopes[:2]))


def _of_central(saved: Tensors, in_loss: Tensor | None, in_form: Tensor | None) -> Sequence[Tensor]:
    """The gradient in the parameters, from the slopes in the loss and in the form."""
    step, *parts = saved
    gradient, third = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    if in_form is None:
        return gradient if in_loss is None else times(gradient, in_loss)
    in_third = in_form / step.square()
    if in_loss is None:
        return times(third, in_third)
    if in_loss.device.type == "cpu" and in_loss == 1:  # nearly always: one pass less
        return plus(gradient, third, in_third)
    total = times(gradient, in_loss)
    plus_(total, third, in_third)
    return total


def _along(point: Tensors, origin: Tensors, parts: Tensors) -> Tensor:
    """The inner product with the way from one to the other, which is not stored."""
    return dot(point, parts) - dot(origin, parts)


def _copies(parts: Tensors) -> Vector:
    return [part.clone() for part in parts]


def plus(parts: Tensors, others: Tensors, factor: Tensor) -> Vector:
    """``parts + factor * others``."""
    if factor.device.type == "cpu":  # in one pass; elsewhere the host would wait for the number
        return list(torch._foreach_add(parts, others, alpha=factor.item()))  # noqa: SLF001
    return list(torch._foreach_add(parts, times(others, factor)))  # noqa: SLF001


def plus_(parts: Vector, others: Tensors, factor: Tensor) -> None:
    """Add ``factor * others`` to ``parts`` in place."""
    if factor.device.type == "cpu":
        torch._foreach_add_(parts, others, alpha=factor.item())
    else:
        torch._foreach_add_(parts, times(others, factor))


def times(parts: Tensors, factor: Tensor) -> Vector:
    """Each of them times a number."""
    return list(torch._foreach_mul(parts, factor))  # noqa: SLF001


def relative_step(dtype: torch.dtype) -> float:
    """How far differences go, relative to the parameters: 2e-3 in single precision.

    The error of a second difference is of the step's own size, and the rounding error of the
    gradient over the step's square: the least of both is near the third root of the precision.
    """
    return float(0.4 * torch.finfo(dtype).eps ** (1 / 3))


def _second(part: Objective) -> float:
    """How much longer than for two gradients steps are best for three, along sharp directions.

    The error of a second central difference is of the step's square, and of rounding over it: the
    least of both is near the fourth root of the precision.
    """
    return float(0.14 * torch.finfo(part.parameters[0].dtype).eps ** (-1 / 12))


def warn_of_kinks(model: nn.Module) -> None:
    """Warn where differences of gradients say little: at kinks the gradient itself jumps."""
    if (layer := kinked_layer(model)) is not None:
        warnings.warn(
            f"products='differences' with {layer}: the gradient jumps at its kinks, and "
            "differences across them can be many times what the Hessian is; use "
            "products='autograd', or smooth layers (GELU, SiLU, average pooling)",
            stacklevel=4,
        )


def kinked_layer(model: nn.Module) -> str | None:
    """The first layer with kinks, in words; functions called in a ``forward`` are not seen."""
    for name, module in model.named_modules():
        if isinstance(module, _KINKED_POOLS) or has_kinks(module):
            return f"layer {name!r}, {type(module).__name__}"
    return None


_KINKED_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)


def _batched(tensors: tuple[Tensor, ...], size: int) -> Iterator[tuple[Tensor, ...]]:
    return (tensors[start : start + size] for start in range(0, len(tensors), size))


def _values(
    values: Sequence[Sequence[Tensor]], direction: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    trace = torch.stack([dot(direction, value) for value in values]).mean()
    return trace, dot(values[0], values[-1])


def _averaged(parts: list[Vector], average: Average | None) -> list[Vector]:
    if average is None:
        return parts
    copies = [[each.clone() for each in part] for part in parts]
    average([each for part in copies for each in part])
    return copies


def _loss_scale(part: Objective) -> float | Tensor:
    """Small gradients would vanish on the way where the exponent is short."""
    return part.half_scale if half_autocast(part.device) else 1.0


def _is_one(scale: float | Tensor) -> bool:
    return isinstance(scale, float) and scale == 1


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The inner product."""
    parts = [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(left, right, strict=True)]
    return torch.stack(parts).sum()


def norm(parts: Sequence[Tensor]) -> Tensor:
    """The length of all of them together."""
    norms = torch._foreach_norm([part.detach() for part in parts])  # noqa: SLF001
    length: Tensor = torch.stack(norms).norm()
    return length

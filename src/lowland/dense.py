r"""Moments of any module by brute force: form the Hessian, take its traces.

The matrix is formed row by row, each a derivative of one entry of the gradient, in the memory of
one product with the Hessian. So is the gradient of its moments: that of a function of the matrix is
:math:`\nabla \langle C, H \rangle` with the constant :math:`C` of that function's slopes,

.. math:: C = a I + 2 b H + 3 c H^2 + 4 d H^3 \quad \text{for} \quad
    a \mathrm{Tr} H + b \mathrm{Tr} H^2 + c \mathrm{Tr} H^3 + d \mathrm{Tr} H^4,

and a row of ``H`` with the row of ``C`` gives one term of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function, grad

from lowland._batches import tensors
from lowland._limits import DENSE_LIMIT, DENSE_MEMORY, DENSE_SECONDS
from lowland._precision import best_precision
from lowland._work import seconds_a_product
from lowland.criteria import Criterion
from lowland.errors import UnsupportedModelError
from lowland.estimation import Estimation
from lowland.gauss_newton import surrogate
from lowland.moments import HessianMoments, check_number
from lowland.objective import Objective, may_look, objective
from lowland.passes import unsteady
from lowland.products import NO_GRADIENT, Curvature, Vector, curvature_of, dot
from lowland.spectral_functions import SpectralFunction
from lowland.validation import check_values
from lowland.verification import Order, best_step, is_random, routed, verify, verify_backward


@dataclass(frozen=True, eq=False)
class BruteForce:
    """The engine for small models of any kind: the Hessian itself.

    Attributes:
        target: The loss.
        settings: How rows of the matrix are found, by derivatives or by differences of gradients,
            these in double precision; and that the samples are all there are.
        memory_limit: Bytes that the matrix may take.
        name: What the moments say that they are found by.
    """

    target: Objective
    settings: Estimation
    memory_limit: int = DENSE_MEMORY
    name: str = "dense"

    def moments(self, count: int = 2) -> HessianMoments:
        """The moments, to rounding; running statistics of normalizations stay as they are.

        Raises:
            UnsupportedModelError: If the data set's moments are to be estimated from a batch.
            ValueError, RuntimeError: As :func:`dense_hessian`.
        """
        return self._moments(self._frame(), count)

    def _moments(self, frame: _Frame, count: int) -> HessianMoments:
        if self.settings.unbiased:
            raise UnsupportedModelError(
                "unbiased=True needs the closed form or probes, which see some samples apart "
                "from others; brute force sees their mean alone"
            )
        self._check()
        if self.target.others_require_grad:  # only a whole graph leads to them
            powers = _powers(frame.matrix(wanted=torch.is_grad_enabled()), count)
            verify_backward(self.target, *powers)
        else:
            powers = _Powers.apply(frame, count, *frame.reachable)  # type: ignore[no-untyped-call]
        higher = None if count < 4 else (powers[2], powers[3])
        return HessianMoments(
            self.target.dim,
            powers[0],
            powers[1],
            higher=higher,
            method=self.name,
            matrix=self.target.matrix,
        )

    def loss_and_moments(self, count: int = 2) -> tuple[Tensor, HessianMoments]:
        """The model's own loss beside them, from the same state and random numbers."""
        frame = self._frame()
        return self.target.step_loss(), self._moments(frame, count)

    def hessian(self) -> Tensor:
        """The matrix, with its graph if gradients are enabled; errors as :func:`dense_hessian`."""
        self._check()
        return self._frame().matrix(wanted=torch.is_grad_enabled())

    def of_eigenvalues(self, function: SpectralFunction) -> Tensor:
        """A function of the matrix's eigenvalues, with its gradient; state stays as it is.

        Raises:
            ValueError, RuntimeError: As :func:`dense_hessian`.
        """
        self._check()
        frame = self._frame()
        if not self.target.others_require_grad:
            value: Tensor = _OfEigenvalues.apply(frame, function, *frame.reachable)  # type: ignore[no-untyped-call]
            return value
        # Only a whole graph leads to them. The constant C gives it the gradient of the function.
        matrix = frame.matrix(wanted=torch.is_grad_enabled())
        value, coefficients = function.of((matrix + matrix.mT) / 2)
        change = (coefficients * matrix).sum()
        value = value + (change - change.detach())
        verify_backward(self.target, value)
        return value

    def _frame(self) -> _Frame:
        frame = _Frame(self.target, routed(self.target, self.settings))
        if frame.by_differences and self.target.others_require_grad:
            raise UnsupportedModelError(
                "x, y, or parameters beside those that are looked at ask for gradients, to which "
                "differences of gradients do not lead; use torch.no_grad(), or products='autograd'"
            )
        return frame

    def _check(self) -> None:
        for label, data in zip("xy", self.target.batch, strict=True):
            if isinstance(data, Tensor):  # others are the model's and the criterion's own affair
                check_values(data, label)
        dim = self.target.dim
        size = dim * dim * self.target.parameters[0].element_size()
        if size > self.memory_limit:
            raise ValueError(
                f"the Hessian of {dim} parameters takes {size / 2**30:.3g} GiB, more than the "
                f"limit of {self.memory_limit / 2**30:.3g} GiB; leave parameters out of it by "
                "requires_grad_(False), or call lowland.dense.dense_moments or dense_hessian with "
                "a larger memory_limit"
            )


def without_closed_form(
    target: Objective,
    method: str,
    settings: Estimation,
    *,
    limit: int = DENSE_LIMIT,
    order: Order = 2,
) -> tuple[bool, Estimation, str]:
    """Whether brute force it is, or probes; how to come to products; and what that is called.

    Args:
        target: The loss.
        method: ``"dense"``, ``"probes"`` or ``"auto"``.
        settings: With products as they were asked for.
        limit: Up to how many parameters ``"auto"`` may take brute force.
        order: As for :func:`lowland.verification.verify`.

    Raises:
        RuntimeError: As :func:`lowland.verification.routed`.
    """
    chosen = routed(target, settings, order)
    by_matrix = method == "dense" or (method == "auto" and _suits(target, limit))
    name = "dense" if by_matrix else "probes"
    if settings.products == "auto" and chosen.products == "differences":
        name += ", differences"
    return by_matrix, chosen, name


def _suits(target: Objective, limit: int) -> bool:
    """Whether brute force is worth its price, and its one matrix means something.

    Of layers that are others in each call it would be of one draw.
    """
    return (
        target.dim <= limit
        and not any(map(unsteady, target.model.modules()))
        and not is_random(target)
        and target.dim * seconds_a_product(target) <= DENSE_SECONDS
    )


class _Frame:
    """The circumstances under which a matrix is formed, to be found again by a backward pass.

    Args:
        target: The loss.
        settings: How rows of the matrix are found.
    """

    def __init__(self, target: Objective, settings: Estimation) -> None:
        self.target = target
        self.by_differences = settings.products == "differences"
        kind = target.device.type
        self.again = target.remember()
        self.autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    @property
    def reachable(self) -> list[Tensor]:
        """What there are gradients in: differences lead to no more than they are taken in."""
        target = self.target
        return [*target.parameters, *([] if self.by_differences else target.others)]

    @contextmanager
    def curvature(self, *, wanted: bool) -> Iterator[Curvature]:
        """What is multiplied by unit vectors, the same at each call."""
        target, (enabled, dtype) = self.target, self.autocast
        with ExitStack() as stack:
            stack.enter_context(self.again())
            if not wanted:
                stack.enter_context(target.others_frozen())
            stack.enter_context(torch.autocast(target.device.type, enabled=enabled, dtype=dtype))
            yield stack.enter_context(curvature_of(target))

    def rows(self, curvature: Curvature, *, wanted: bool) -> Iterator[Vector]:
        """The rows of ``H`` one after another, each with its own graph if wanted."""
        parameters = self.target.parameters
        for place, part in enumerate(parameters):
            direction: list[Tensor | None] = [None] * len(parameters)
            unit = part.new_zeros(part.shape)  # in one piece, whatever the parameter is
            entries = unit.view(-1)
            for index in range(part.numel()):
                entries[index] = 1
                direction[place] = unit.clone()
                yield curvature.product(direction, wanted=wanted)
                entries[index] = 0

    def matrix(self, *, wanted: bool) -> Tensor:
        """``H``."""
        if self.by_differences:
            return self._matrix_by_differences()
        with self.curvature(wanted=wanted) as curvature:
            rows = [_flat(row) for row in self.rows(curvature, wanted=wanted)]
        matrix = torch.stack(rows)
        _check_symmetric(matrix.detach())
        if wanted and not matrix.requires_grad:  # a constant, whose gradient is zero
            matrix += 0 * torch.stack([p.sum() for p in self.target.parameters]).sum()
        return matrix

    def contracted(self, coefficients: Tensor) -> Vector:
        r""":math:`\nabla \langle C, H \rangle`, row by row."""
        if self.by_differences:
            return self._contracted_by_differences(coefficients)
        parameters = self.target.parameters
        total = [torch.zeros_like(p) for p in self.reachable]
        with self.curvature(wanted=True) as curvature:
            rows = self.rows(curvature, wanted=True)
            for row, slopes in zip(rows, coefficients, strict=True):
                value = dot(row, _like(parameters, slopes))
                if value.requires_grad:
                    found = grad(
                        value,
                        self.reachable,
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                    torch._foreach_add_(total, list(found))
        return total

    @contextmanager
    def _gradients(self) -> Iterator[tuple[Callable[[Tensor], Tensor], float]]:
        """The gradient as a function of all parameters, flat, and how long steps are for it.

        In double precision if possible; the steps relative to the parameters.
        """
        target = self.target
        with self.again(), target.others_frozen(), best_precision(target) as wide:
            again = wide.remember()
            # Of another matrix than the Hessian the first gradient has to be at the parameters.
            found = wide if wide.matrix == "hessian" else surrogate(wide)[0]

            def gradient(at: Tensor) -> Tensor:
                with again():
                    return _flat(found.gradient(_like(wide.parameters, at))[1])

            yield gradient, best_step(wide)

    def _matrix_by_differences(self) -> Tensor:
        """``H`` by central differences of gradients."""
        with self._gradients() as (gradient, step):
            start = _flat([p.detach() for p in self.target.parameters]).double()
            steps = step * start.abs().clamp(min=_scale(start))
            matrix = torch.stack(
                [
                    (gradient(start + way) - gradient(start - way)).double() / (2 * step)
                    for way, step in zip(torch.diag(steps), steps, strict=True)
                ]
            )
        free = _flat(self.target.free([torch.ones_like(p) for p in self.target.parameters]))
        matrix = matrix * free * free[:, None]
        _check_symmetric(matrix)
        return ((matrix + matrix.T) / 2).to(self.target.parameters[0].dtype)

    def _contracted_by_differences(self, coefficients: Tensor) -> Vector:
        r""":math:`\nabla \langle C, H \rangle` by second differences along C's eigenvectors."""
        if self.target.matrix != "hessian":
            raise RuntimeError(NO_GRADIENT)
        parameters = self.target.parameters
        weights, vectors = torch.linalg.eigh(coefficients.double())
        with self._gradients() as (gradient, relative):
            start = _flat([p.detach() for p in parameters]).double()
            here = gradient(start)
            # The error by rounding is over the step's square here.
            step = max(torch.finfo(here.dtype).eps ** 0.25, relative) * _scale(start)
            total = torch.zeros_like(start)
            for weight, vector in zip(weights, vectors.T, strict=True):
                way = step * vector
                bend = gradient(start + way) - 2 * here + gradient(start - way)
                total += weight * bend.double() / step**2
        return [
            part.to(p.dtype) for part, p in zip(_like(parameters, total), parameters, strict=True)
        ]


class _Powers(Function):
    """Traces of powers of ``H``, whose backward pass forms it anew, row by row."""

    @staticmethod
    def forward(ctx: Any, frame: _Frame, count: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        matrix = frame.matrix(wanted=False)
        # Parameters and data, too, so that a change of theirs before the backward pass is noticed.
        ctx.save_for_backward(matrix, *tensors(frame.target.batch), *parameters)
        ctx.frame, ctx.count = frame, count
        return _powers(matrix, count)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        matrix, *_ = ctx.saved_tensors
        parameters = ctx.frame.reachable
        # Of the gradient, too, there shall be a gradient.
        if torch.is_grad_enabled() and not ctx.frame.by_differences:
            powers = _powers(ctx.frame.matrix(wanted=True), ctx.count)
            found = grad(powers, parameters, slopes, create_graph=True, materialize_grads=True)
            return None, None, *found
        if not ctx.frame.by_differences:
            verify(ctx.frame.target.with_others(), 3)
        coefficients = 2 * slopes[1] * matrix
        coefficients.diagonal().add_(slopes[0])
        if ctx.count > 2:
            square = matrix @ matrix
            coefficients += 3 * slopes[2] * square + 4 * slopes[3] * square @ matrix
        return None, None, *ctx.frame.contracted(coefficients)


class _OfEigenvalues(Function):
    """A function of the eigenvalues of ``H``, whose backward pass forms it anew, row by row."""

    @staticmethod
    def forward(ctx: Any, frame: _Frame, function: SpectralFunction, *parameters: Tensor) -> Tensor:
        matrix = frame.matrix(wanted=False)
        value, coefficients = function.of((matrix + matrix.mT) / 2)
        # Parameters and data, too, so that a change of theirs before the backward pass is noticed.
        ctx.save_for_backward(coefficients, *tensors(frame.target.batch), *parameters)
        ctx.frame = frame
        return value

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, *_ = ctx.saved_tensors
        if torch.is_grad_enabled():  # C would be taken for a constant once more
            raise RuntimeError(
                "a function of the Hessian's eigenvalues can be differentiated once, not twice: "
                "leave out create_graph=True, or take torch.linalg.eigvalsh of "
                "lowland.dense.dense_hessian, which has a graph"
            )
        if not ctx.frame.by_differences:
            verify(ctx.frame.target.with_others(), 3)
        return None, None, *ctx.frame.contracted(slopes[0] * coefficients)


def _powers(matrix: Tensor, count: int) -> tuple[Tensor, ...]:
    first, second = matrix.trace(), matrix.square().sum()
    if count <= 2:
        return first, second
    square = matrix @ matrix
    return first, second, (square * matrix).sum(), square.square().sum()


def _check_symmetric(matrix: Tensor) -> None:
    """Refuse what is no matrix of second derivatives.

    Raises:
        RuntimeError: If a layer's or the criterion's derivatives are wrong.
    """
    if not may_look(matrix.device):
        return
    apart, size = float((matrix - matrix.T).abs().max()), float(matrix.abs().max())
    if 0.003 * size < apart <= 0.05 * size:
        warnings.warn(
            f"entries of the Hessian up to {size:.4g} differ by {apart:.4g} from those across the "
            "diagonal, by rounding: use model.double()",
            stacklevel=2,
        )
    elif apart > size * 0.05:
        raise RuntimeError(
            f"the Hessian is not symmetric: entries up to {size:.4g} differ by {apart:.4g} from "
            "those across the diagonal, so a layer's or the criterion's second derivatives are "
            "wrong: those of a torch.autograd.Function of your own, or PyTorch's, or what it holds "
            "for a constant is none (spectral normalization in training mode, for one: call "
            "model.eval()); or rounding has eaten it: use model.double()"
        )


def _flat(parts: Vector) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _like(parts: Sequence[Tensor], flat: Tensor) -> Vector:
    split = flat.split([part.numel() for part in parts])
    return [new.view_as(part).to(part.dtype) for new, part in zip(split, parts, strict=True)]


def _scale(parameters: Tensor) -> float:
    """The usual size of a parameter; 1 where all are zero."""
    return float(parameters.square().mean().sqrt()) or 1.0


def dense_hessian(
    model: nn.Module,
    criterion: Criterion,
    x: Any,
    y: Any,
    *,
    memory_limit: int = DENSE_MEMORY,
) -> Tensor:
    """The Hessian of ``criterion(model(x), y)`` in the trainable parameters, with its graph.

    Args:
        model: Any module whose loss can be differentiated twice.
        criterion: Maps the model's output and ``y`` to a scalar.
        x: Whatever the model takes.
        y: Whatever the criterion takes.
        memory_limit: Bytes that the matrix itself may take. Its graph, if gradients are enabled,
            takes that of a product with the Hessian for each row.

    Returns:
        ``(P, P)``, parameters in the order of ``model.parameters()``, flattened. It can be
        differentiated in the parameters and the data if gradients are enabled.

    Raises:
        ValueError: If there is no trainable parameter, a lazy layer has seen no data, ``x`` or
            ``y`` is empty or not finite, the loss is not a scalar, or the matrix would exceed the
            limit.
        RuntimeError: If PyTorch cannot differentiate the model twice, with what may help.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowland.dense import dense_hessian
        >>> model, x, y = nn.Linear(2, 1), torch.randn(5, 2), torch.randn(5)
        >>> dense_hessian(model, nn.MSELoss(), x, y).shape
        torch.Size([3, 3])
    """
    target = objective(model, criterion, x, y)
    return BruteForce(target, Estimation(), memory_limit).hessian()


def dense_moments(
    model: nn.Module,
    criterion: Criterion,
    x: Any,
    y: Any,
    *,
    moments: Literal[2, 4] = 2,
    memory_limit: int = DENSE_MEMORY,
) -> HessianMoments:
    """Moments of :func:`dense_hessian`; arguments and errors are the same.

    ``moments=4`` adds ``Tr H^3`` and ``Tr H^4``, at the cost of one product of matrices.

    Raises:
        ValueError: Also if ``moments`` is neither 2 nor 4.

    Notes:
        Time grows with ``P`` products with the Hessian, and twice that for the gradient; memory is
        that of one product and of the matrix. It is the reference for the other engines and the
        fallback for small models.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowland.dense import dense_moments
        >>> model, x, y = nn.Linear(2, 1), torch.randn(5, 2), torch.randn(5)
        >>> dense_moments(model, nn.MSELoss(), x, y).dim
        3
    """
    check_number(moments)
    target = objective(model, criterion, x, y)
    return BruteForce(target, Estimation(), memory_limit).moments(moments)

r"""Products with the Gauss-Newton and the Fisher matrix, from a loss split at the model's outputs.

With outputs ``z`` and their Jacobian ``J`` in the parameters, a product takes three steps,

.. math:: G v = J^T \left( \nabla_z^2 \ell \, (J v) \right),

of which only the middle one is a second derivative, and that of the criterion alone. ``J v`` is
the derivative in ``w`` of the gradient :math:`J^T w`, which is linear in ``w``. All steps can be
differentiated, so that the gradient of any function of ``G v`` is that of :math:`G(\theta) v`: with
the third derivatives of the criterion and the second ones of the model. Where PyTorch has no
derivative of an operation's gradient, ``J v`` is taken in forward mode, and ``G v`` has its value
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import compress
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad, grad
from torch.utils import _pytree

from lowland._once import any_once
from lowland.criteria import Criterion, as_target, name_of, scalar_loss
from lowland.likelihoods import likelihood
from lowland.objective import Objective, graph
from lowland.passes import remember_randomness


class Split:
    """The loss on one batch as a criterion of outputs, and these as a function of parameters.

    Args:
        part: The loss; its ``matrix`` says which criterion's curvature is meant.
        scale: What the curvature is multiplied by.

    Attributes:
        loss: The loss itself, with its graph to the parameters.
        outputs: All tensors of the model's output that the criterion depends on.
        nodes: Those of the criterion's own graph, from the outputs on.

    Raises:
        UnsupportedModelError: If it is the Fisher matrix of a criterion for which there is none.
        ValueError: As :meth:`Objective.loss`, or if the loss depends on the parameters in another
            way than by the outputs, or not at all in a curved way.
    """

    def __init__(self, part: Objective, scale: float | Tensor = 1.0) -> None:
        self.part = part
        self._again = part.remember()
        reader = _Reader(part)
        self.loss = replace(part, criterion=reader).loss()
        # Of outputs that the criterion does not look at, nothing may depend on what they are.
        slopes = reader.slopes(scale)
        self._used = [slope is not None for slope in slopes]
        self.outputs = list(compress(reader.outputs, self._used))
        self._slopes = [slope for slope in slopes if slope is not None]
        self.nodes = reader.nodes
        own = [each.grad_fn for each in reader.outputs]
        part.notice(node for node in graph(*reader.outputs) if node not in own)

    def product(self, direction: Sequence[Tensor], *, wanted: bool) -> list[Tensor]:
        """``J^T (the criterion's Hessian) J v``, with its graph if wanted.

        Raises:
            RuntimeError: If the Jacobian has no product with a direction.
        """
        moved = self._moved(direction, wanted=wanted)
        bent = [(slope, m) for slope, m in zip(self._slopes, moved, strict=True) if slope.grad_fn]
        weighed = _pulled(bent, self.outputs, wanted=wanted)
        return _pulled(
            list(zip(self.outputs, weighed, strict=True)), self.part.parameters, wanted=wanted
        )

    def _moved(self, direction: Sequence[Tensor], *, wanted: bool) -> list[Tensor]:
        """``J v``, for each output."""
        try:
            gradient, weights = self._transposed
            used = [(g, v) for g, v in zip(gradient, direction, strict=True) if g.requires_grad]
            return _pulled(used, weights, wanted=wanted)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an operation whose gradient has no derivative
            found = self._moved_forward(direction, error)
            if wanted:
                raise RuntimeError(_VALUES_ALONE.format(_first_line(error))) from error
            return found

    @cached_property
    def _transposed(self) -> tuple[list[Tensor], list[Tensor]]:
        """``J^T w`` as a function of ``w``, and ``w``."""
        part = self.part
        weights = [torch.zeros_like(each).requires_grad_() for each in self.outputs]
        found = grad(self.outputs, part.parameters, weights, create_graph=True, allow_unused=True)
        gradient = part.complete(found, self.loss)
        if not part.is_ordinary and any_once(graph(*gradient)):
            raise RuntimeError("a function in it is marked as once_differentiable")
        return gradient, weights

    def _moved_forward(self, direction: Sequence[Tensor], why: RuntimeError) -> list[Tensor]:
        part = self.part
        reader = _Reader(part)
        try:
            with self._again(), _forward_mode():
                pairs = zip(part.parameters, direction, strict=True)
                with part.replaced([forward_ad.make_dual(p, v) for p, v in pairs]):
                    reader.read(part.model(part.batch[0]))
                outputs = compress(reader.outputs, self._used)
                tangents = [forward_ad.unpack_dual(each).tangent for each in outputs]
                if all(each is None for each in tangents):
                    raise RuntimeError("forward mode does not reach the outputs")  # noqa: TRY301
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(_NO_JACOBIAN.format(*map(_first_line, (why, error)))) from error
        pairs = zip(tangents, self.outputs, strict=True)
        return [torch.zeros_like(z) if t is None else t for t, z in pairs]


class _Reader:
    """A criterion that keeps what it is given.

    Args:
        part: The loss whose criterion it stands for.

    Attributes:
        outputs: The model's outputs.
        curved: The criterion whose curvature is meant: itself, or that of the Fisher matrix.
        nodes: Those of its own graph, from the outputs on.
    """

    outputs: list[Tensor]
    curved: Tensor
    nodes: list[Any]
    stands_in = True  # for another criterion, which is the one to be looked at

    def __init__(self, part: Objective) -> None:
        self.part = part

    def read(self, output: Any) -> Any:
        """What is handed on in the place of a model's output."""
        leaves, form = _pytree.tree_flatten(output)
        # As outputs of their own: one may be made of another, as logits are of features.
        leaves = [leaf.view_as(leaf) if _is_output(leaf) else leaf for leaf in leaves]
        self.outputs = list(filter(_is_output, leaves))
        self._given = leaves, form
        # A criterion may write over what it gets.
        copies = [leaf.clone() if _is_output(leaf) else leaf for leaf in leaves]
        return _pytree.tree_unflatten(copies, form)

    def __call__(self, output: Any, y: Any) -> Tensor:
        criterion, output, self._y = self.part.criterion, self.read(output), y
        loss = self.curved = scalar_loss(criterion, output, y)
        if self.part.matrix == "fisher":
            expected: Criterion = likelihood(criterion, y)
            if expected is not criterion:
                self.curved = expected(output, as_target(criterion, output, y))
        return loss

    def slopes(self, scale: float | Tensor = 1.0) -> tuple[Tensor | None, ...]:
        """The criterion's derivatives in the outputs, with their graph; None for those not used.

        Raises:
            ValueError: If it knows the parameters by another way, or has no curvature.
        """
        part = self.part
        self.nodes = list(graph(self.curved, until=[each.grad_fn for each in self.outputs]))
        variables = {id(getattr(node, "variable", None)) for node in self.nodes}
        named = zip(part.names, part.parameters, strict=True)
        if beside := [name for name, p in named if id(p) in variables]:
            raise ValueError(_BESIDE.format(", ".join(beside)))
        found = grad(scale * self.curved, self.outputs, create_graph=True, allow_unused=True)
        if part.matrix == "ggn" and self._is_linear(found):
            raise ValueError(_LINEAR.format(name_of(part.criterion)))
        return found

    def _is_linear(self, slopes: Sequence[Tensor | None]) -> bool:
        """Whether the criterion is: without curvature here, and of the same slopes far away.

        So is not one that is linear in pieces, as HuberLoss far from its targets.
        """
        bent = [(each, torch.ones_like(each)) for each in slopes if _is_output(each)]
        try:
            curvature = _pulled(bent, self.outputs, wanted=False)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            name = name_of(self.part.criterion)
            raise RuntimeError(_NOT_CURVED.format(name, _first_line(error))) from error
        if any(bool(each.any()) for each in curvature):
            return False
        far = 1e3 * (1 + max(float(each.detach().abs().max()) for each in self.outputs))
        again = remember_randomness([self.part.device])
        return all(
            _equal(each, other)
            for shift in (far, -far)
            for each, other in zip(slopes, self._slopes_at(shift, again), strict=True)
        )

    def _slopes_at(
        self, shift: float, again: Callable[[], AbstractContextManager[None]]
    ) -> tuple[Tensor | None, ...]:
        """The criterion's derivatives at outputs that are all so much larger."""
        leaves, form = self._given
        away = [(p.detach() + shift).requires_grad_() if _is_output(p) else p for p in leaves]
        copies = [leaf.clone() if _is_output(leaf) else leaf for leaf in away]
        with again():
            loss = scalar_loss(self.part.criterion, _pytree.tree_unflatten(copies, form), self._y)
        return grad(loss, list(filter(_is_output, away)), allow_unused=True)


class _Surrogate:
    r"""A criterion whose Hessian, where it is called first, is one part of another one's.

    .. math:: \ell(z) - c^T z \quad \text{for G}, \qquad c^T z \quad \text{for R},
        \qquad c = \nabla \ell(z_0)

    So differences of its gradients, which have no second derivative, are products with ``G`` or
    ``R``.

    Args:
        part: The loss whose criterion it stands for.

    Attributes:
        loss: What the loss was then.
    """

    loss: Tensor
    stands_in = True

    def __init__(self, part: Objective) -> None:
        self.part, self._reader = part, _Reader(part)
        self._slopes: list[Tensor | None] = []

    def __call__(self, output: Any, y: Any) -> Tensor:
        reader = self._reader
        loss = reader(output, y)
        if loss.ndim or not reader.outputs:  # which is refused as it is
            return loss
        if not self._slopes:
            self.loss = loss.detach()
            self._slopes = [None if s is None else s.detach() for s in reader.slopes()]
        pairs = zip(self._slopes, reader.outputs, strict=True)
        linear = torch.stack([(slope * z).sum() for slope, z in pairs if slope is not None]).sum()
        return linear if self.part.matrix == "residual" else reader.curved - linear


def surrogate(part: Objective) -> tuple[Objective, _Surrogate]:
    """A loss whose Hessian, where it is looked at first, is the matrix of another one."""
    criterion = _Surrogate(part)
    return replace(part, criterion=criterion, matrix="hessian"), criterion


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Forward mode, within a ``torch.autograd.Function`` too, where PyTorch switches it off."""
    with forward_ad._set_fwd_grad_enabled(mode=True), forward_ad.dual_level():  # noqa: SLF001
        yield


def _is_output(leaf: object) -> TypeGuard[Tensor]:
    """Whether a part of a model's output is a tensor that depends on something."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0]


def _pulled(
    values: Sequence[tuple[Tensor, Tensor]], places: Sequence[Tensor], *, wanted: bool
) -> list[Tensor]:
    """The gradient of ``sum <value, weight>`` in some places, zero where there is none."""
    if not values:
        return [torch.zeros_like(each) for each in places]
    found = grad(
        [value for value, _ in values],
        places,
        [weight for _, weight in values],
        create_graph=wanted,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return [each.to_dense() if each.is_sparse else each for each in found]


_LINEAR = (
    "{} is linear in the model's outputs, so the Gauss-Newton matrix, which splits the loss there, "
    "is zero, and all curvature is in matrix='residual'. A model that ends with log_softmax or "
    "computes its own loss hides the curvature from the split: use CrossEntropyLoss on logits, or "
    "for NLLLoss matrix='fisher'"
)
_NOT_CURVED = (
    "{} cannot be differentiated twice in the model's outputs, which the Gauss-Newton matrix "
    "takes: {}. Use matrix='hessian', for which differences of gradients will do"
)
_VALUES_ALONE = (
    "the gradient of this model's outputs cannot be differentiated: {}\nThe Gauss-Newton matrix "
    "has its values here, within torch.no_grad(), but no gradient"
)
_BESIDE = (
    "the criterion knows {} by another way than the tensors of the model's output (a penalty on "
    "weights, or an output that is neither a real tensor nor a tuple, list or dict of these), and "
    "the Gauss-Newton matrix splits a loss at that output: leave it out of the criterion, or let "
    "the model return tensors"
)
_NO_JACOBIAN = (
    "products with the Gauss-Newton matrix need the derivative of the model's outputs in one "
    "direction, by a gradient that can be differentiated or in forward mode, and this model has "
    "neither: {}; {}\nUse method='probes' with products='differences', which needs gradients alone"
)

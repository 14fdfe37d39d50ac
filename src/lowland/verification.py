r"""Whether PyTorch's derivatives of a loss are right: each is compared with differences, once.

Before a product with the Hessian is trusted, it is compared with the difference of two gradients,

.. math:: H v \approx \frac{g(\theta + \epsilon v) - g(\theta - \epsilon v)}{2 \epsilon},

these with the difference of two losses, and a third derivative, where one is wanted, with the
difference of two products. That is done for the first call of a model, a criterion and a mode, on a
few samples and in double precision, where ``eps`` is so small that hardly a kink lies between; two
steps of different length tell what rounding and kinks leave of a difference. Of a difference that
says nothing, each layer of the model is looked at alone. A model with code of its own is looked at
on more samples too, and again when a batch takes operations that were not met
(:mod:`lowland._watch`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import grad

from lowland._batches import mapped, part_of, rows, spread, tensors
from lowland._call import call
from lowland._circumstances import circumstances, once_a_model
from lowland._elsewhere import Given
from lowland._precision import best_precision
from lowland._watch import Step, meeting, met_by, steps_of
from lowland.criteria import scalar_loss
from lowland.estimation import Estimation
from lowland.objective import (
    Objective,
    differentiating,
    graph,
    is_scripted,
    not_compiled,
    objective,
    places_of,
    without_hooks,
)
from lowland.passes import random_states
from lowland.products import (
    Vector,
    curvature_of,
    derivatives_of,
    differences,
    dot,
    gradient_graph,
    kinked_layer,
    norm,
    plus,
    product,
)
from lowland.torch_fixes import is_ordinary

Order = Literal[2, 3]

_ROWS = 6  # samples that are looked at
_MANY = 128  # samples that are, where a model has code of its own
_SAME = 1e-4  # of two losses that differ by rounding alone
_AGREED = 1e-3  # of two differences that say the same
_UNCLEAR = 0.1  # of two that say nothing
_OFF = 0.01  # of a derivative that is wrong

# Relative to the parameters. Longer ones help where something within is of single precision.
_STEPS = {
    torch.float64: (1e-7, 1e-8, 1e-9, 1e-6, 1e-5, 1e-4, 1e-3),
    torch.float32: (1e-2, 3e-3, 1e-3, 3e-2),
}

_checking = ContextVar("checking", default=True)


@contextmanager
def unchecked() -> Iterator[None]:
    """Trust PyTorch's derivatives without a look at them.

    For models whose gradients are meant to be others than the loss's, as those of quantization by
    straight-through estimators, and for who counts each millisecond of a first call.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model, x, y = nn.Linear(2, 1), torch.randn(8, 2), torch.randn(8, 1)
        >>> with lowland.unchecked():
        ...     moments = lowland.hessian_moments(model, nn.MSELoss(), x, y, method="dense")
    """
    token = _checking.set(False)
    try:
        yield
    finally:
        _checking.reset(token)


@dataclass(frozen=True)
class Verdict:
    """What a comparison says.

    Attributes:
        what: ``"gradient"``, ``"product"`` or ``"third"``: the first derivative that is wrong;
            ``"none"`` where PyTorch has no second one. None if all are right.
        reason: In words, for who is told; with the layer if one is known.
        clear: Whether the differences said anything.
    """

    what: Literal["gradient", "product", "third", "none"] | None = None
    reason: str = ""
    clear: bool = True


@once_a_model
def is_random(target: Objective) -> bool:
    """Whether a pass of the model draws random numbers, in layers of PyTorch or in others."""
    with differentiating(), target.remember()():
        before = random_states([target.device])
        target.value()
        after = random_states([target.device])
    return not all(torch.equal(state, after[device]) for device, state in before.items())


def routed(target: Objective, settings: Estimation, order: Order = 2) -> Estimation:
    """How to come to products with the Hessian of a loss: the settings, with that decided.

    Args:
        target: The loss, on one batch.
        settings: With ``products="auto"``, automatic differentiation where it is right, and
            differences of gradients elsewhere.
        order: As for :func:`verify`.

    Raises:
        RuntimeError: If neither way leads there.
    """
    if settings.step is not None:  # it has been looked at
        return settings
    found = verdict(target, order)
    if target.matrix in ("ggn", "fisher") and found.what in ("product", "third", "none"):
        found = _without_second_derivatives(target)
    if found.what == "gradient" or (settings.products == "autograd" and found.what is not None):
        raise RuntimeError(found.reason)
    if settings.products != "differences" and found.what is None:
        return replace(settings, products="autograd", step=1.0)
    if settings.products == "auto":
        obstacle = kinked_layer(target.model)
        if obstacle or is_scripted(target.model):
            why = (
                f"has kinks, where gradients jump: {obstacle}"
                if obstacle
                else "is scripted, and its kinks, if it has some, are not seen; measure the module "
                "that was scripted, or, if it is smooth, use products='differences'"
            )
            raise RuntimeError(
                f"{found.reason}\nDifferences of gradients are no way here, though: the model {why}"
            )
    return replace(settings, products="differences", step=step_of(target))


def _without_second_derivatives(target: Objective) -> Verdict:
    """Of products that hold no second derivative of the model: whether there are any.

    What is wrong with their gradients, which do, is looked at by who takes these.
    """
    try:
        with (
            target.remember()(),
            target.others_frozen(),
            curvature_of(target) as curvature,
        ):
            curvature.product(_direction(target.parameters), wanted=False)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return Verdict("none", str(error))
    return Verdict()


def step_of(target: Objective) -> float:
    """How much longer than usual the steps of differences are best; found once.

    Of several steps the one is taken whose difference, in the model's own precision, is closest to
    one in double precision: what rounding is in a model, single precision within double as well,
    is seen there.
    """
    if not _checking.get():
        return 1.0
    target = replace(target, matrix="hessian")  # the step depends on the gradient alone
    # Where the parameters grow or shrink, rounding is another.
    return _step_at(target, round(math.log2(float(norm(target.parameters)) or 1.0)))


@once_a_model
def _step_at(target: Objective, size: int) -> float:  # noqa: ARG001 - another size, another step
    return _calibrated(_on_few_samples(target))


_FACTORS = (1.0, 10.0, 0.1, 100.0, 0.01, 1000.0)
_NEAR = 0.01  # of a difference that needs no better step
_DROWNED = 0.3  # of one that is mostly rounding


_verdicts: WeakKeyDictionary[nn.Module, dict[object, Verdict]] = WeakKeyDictionary()


def verify(target: Objective, order: Order = 2) -> None:
    """Require derivatives of a loss that are right; looked at once.

    Args:
        target: The loss, on one batch.
        order: 2 for products with the Hessian, 3 for their gradients too.

    Raises:
        RuntimeError: If a derivative is wrong or missing, with the layer that it comes from.
    """
    found = verdict(target, order)
    if found.what is not None:
        raise RuntimeError(found.reason)


def verify_backward(target: Objective, *moments: Tensor) -> None:
    """Let third derivatives be looked at when somebody goes backward from moments, not before."""
    wanted = [moment for moment in moments if moment.requires_grad]
    if wanted and not _is_known_as_right(target):
        for moment in wanted:
            moment.register_hook(lambda _: verify(target, 3))


def _is_known_as_right(target: Objective) -> bool:
    """Whether third derivatives have been looked at, in this model as it is."""
    known = _verdicts.get(target.model)
    found = known.get((3, circumstances(target))) if known and not target.beside else None
    return found is not None and found.what is None


def verdict(target: Objective, order: Order = 2) -> Verdict:
    """:func:`verify` in a value."""
    if not _checking.get():
        return Verdict()
    if order == 3 and target.beside:  # a gradient may be asked for in these, too
        everything: dict[str, Tensor] = {
            n: p for n, p in target.model.named_parameters() if p.requires_grad
        }
        names, parameters = list(everything), list(everything.values())
        target = replace(target, names=names, parameters=parameters, beside=False)
    known = _verdicts.setdefault(target.model, {})
    now = circumstances(target)
    of_third = known.get((3, now))
    if of_third and order == 2 and of_third.what != "third":
        return of_third
    if (order, now) not in known:
        known[order, now] = _look(target, order)
    return known[order, now]


def _look(target: Objective, order: Order) -> Verdict:
    with parameters_untouched(target):
        small = _on_few_samples(target)
    if reason := _known_as_wrong(target):
        return Verdict("gradient", reason)
    with meeting(target.model, _look_again):
        found = _judged(small, order)
        if found.what is None and not target.is_ordinary:
            found = _judged_as_it_is(small, order) or found
        _meet(small)
    if found.what is not None or small is target or target.is_ordinary:
        return found
    steps = _steps_of(target)
    if not steps <= met_by(target.model):
        found = _judged_beyond(target, steps, order)
    if found.what is None:
        # What is wrong for a few samples only, by the same operations, is not among six of them.
        many = _judged(_on_samples(target, _MANY), order)
        found = many if many.what is not None else found
    return found


def _judged_as_it_is(small: Objective, order: Order) -> Verdict | None:
    """What the comparison says in the model's own precision, if it runs other operations there.

    So it is with kernels of single precision that have a substitute in double.
    """
    with suppress(RuntimeError, TypeError, ValueError), small.remember()(), derivatives_of(small):
        if not steps_of(graph(small.value())) <= met_by(small.model):
            found = _compare(small, order)
            reason = found.reason.replace(_WHERE, "what the model runs in its own precision")
            return replace(found, reason=reason)
    return None


def _known_as_wrong(target: Objective) -> str | None:
    """What is known of a layer beforehand, whatever some samples show; None for nothing."""
    wanted = {id(p) for p in target.parameters}
    for name, module in target.model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and id(module.weight) in wanted:
            if module.scale_grad_by_freq:
                return _BY_FREQUENCY.format(name, type(module).__name__)
            if module.max_norm is not None:
                raise ValueError(_WRITES.format(f"{name}.weight"))
    return None


def _look_again(target: Objective, steps: frozenset[Step]) -> None:
    """Look at a loss that is made of operations which were not there before.

    Raises:
        RuntimeError: If their derivatives are wrong, or more so than others that were.
    """
    if not _checking.get():
        return
    known, now = _verdicts.setdefault(target.model, {}), circumstances(target)
    order: Order = 3 if (3, now) in known else 2
    before = known.get((order, now), Verdict())
    found = _judged_beyond(target, steps, order)
    if _SEVERITY[found.what] > _SEVERITY[before.what]:
        known[order, now] = found
        raise RuntimeError(f"a batch takes operations that others did not: {found.reason}")


def _judged_beyond(target: Objective, steps: frozenset[Step], order: Order) -> Verdict:
    """What is to be said of the rows of a batch that take operations which were not met."""
    few = _on_samples_with(target, steps)
    with meeting(target.model, _look_again):
        found = _judged(few, order)
        _meet(target)
    return found


_SEVERITY = {None: 0, "third": 1, "product": 2, "none": 2, "gradient": 3}


def _meet(target: Objective) -> None:
    """Let the operations of a loss be known, as gradients are made of them, and as products are."""
    if target.is_ordinary:
        return
    plainly = (differentiating(), not_compiled(), without_hooks(target.parameters))
    with suppress(RuntimeError, TypeError, ValueError), ExitStack() as stack:
        for each in (*plainly, target.remember()()):
            stack.enter_context(each)
        target.loss()
    with suppress(RuntimeError, TypeError, ValueError), target.remember()(), derivatives_of(target):
        target.loss()


def _on_samples_with(target: Objective, steps: frozenset[Step]) -> Objective:
    """The loss on as few rows of a batch as still show the operations that are new.

    The batch is halved for as long as a half does.
    """
    few, new = target, steps - met_by(target.model)
    while halves := _halves_of(few):
        seen = [_steps_of(half) & new for half in halves]
        best = max((0, 1), key=lambda index: len(seen[index]))
        if not seen[best]:
            break
        few, new = halves[best], seen[best]
    return few


def _halves_of(target: Objective) -> list[Objective]:
    """The loss on each half of the rows; none where there are no halves."""
    (x, y), halves = target.batch, []
    with suppress(TypeError, RuntimeError):  # whose rows are not known, or cannot be cut
        if (count := rows(x, y)) > 1:
            for start, stop in ((0, count // 2), (count // 2, count)):
                half = part_of(x, count, start, stop), part_of(y, count, start, stop)
                halves.append(target.on(half))
    return halves


def _steps_of(target: Objective) -> frozenset[Step]:
    try:
        with differentiating(), target.remember()():
            loss = target.value()
            return steps_of(graph(loss)) if bool(loss.isfinite()) else frozenset()
    except Exception:  # noqa: BLE001 - whatever a model says of half a batch
        return frozenset()


def _judged(small: Objective, order: Order) -> Verdict:
    """What the comparison says of a loss on a few samples, and of which layer."""
    found = _compared(small, order)
    if found.what is None and found.clear:
        return found
    # What PyTorch's plain layers compute is right, unless something is known to be wrong.
    suspects = {
        name: module
        for name, module in small.model.named_modules()
        if name and (found.what is not None or not is_ordinary(module))
    }
    name, alone = _culprit(small, suspects, order) or ("the model's own forward", found)
    # Where the whole says nothing, what is wrong with a layer alone is wrong.
    verdict = alone if found.what is None else found
    return replace(verdict, reason=verdict.reason.replace(_WHERE, name))


@contextmanager
def parameters_untouched(target: Objective) -> Iterator[None]:
    """Refuse a model whose forward pass writes to its parameters, and put them back.

    Raises:
        ValueError: If it has.
    """
    before = [p.detach().clone() for p in target.parameters]
    places = places_of(target.model, target.parameters)
    try:
        yield
    finally:  # after an error or an interruption too
        named = zip(target.names, target.parameters, before, strict=True)
        written = [(name, p, value) for name, p, value in named if not torch.equal(p, value)]
        with torch.no_grad():
            for _, p, value in written:
                p.copy_(value)
        others = [place for place in places if not _is_there(*place)]
        for holder, name, p in others:
            holder[name] = p
    if written:
        raise ValueError(_WRITES.format(written[0][0]))
    if others:
        raise ValueError(
            f"the model's forward pass puts another tensor in the place of {others[0][1]!r}, so "
            "there is no one loss to differentiate; compute it from the parameter each time"
        )


def _is_there(holder: dict[Any, Any] | list[Any], name: Any, value: Tensor) -> bool:
    return (holder.get(name) if isinstance(holder, dict) else holder[name]) is value


_WRITES = (
    "the model's forward pass writes to its parameter {!r}, so there is no "
    "one loss to differentiate. If the layer chooses its parameters by the first data that "
    "it sees, call model(x) once before; if it renormalizes them each time, as "
    "nn.Embedding(max_norm=...) does, do that after the optimizer's step instead"
)
_BY_FREQUENCY = (
    "the gradient of this loss is not its derivative: layer {!r}, {}, has scale_grad_by_freq=True, "
    "which divides it by how often an index occurs; such a loss has no Hessian. Leave it out, or "
    "take the derivatives as they are, within lowland.unchecked()"
)


def _on_few_samples(target: Objective) -> Objective:
    """The loss on some rows of the batch, evenly spread, where that is a loss too.

    Raises:
        ValueError: If a pass writes to the batch, or the loss is another one each time.
    """
    few = _on_samples(target, _ROWS)
    _check_repeats(few)
    return few


def _on_samples(target: Objective, count: int) -> Objective:
    x, y = target.batch
    few = target
    with suppress(Exception):  # whatever a model says of half a batch
        some = target.on((spread(x, count), spread(y, count)))
        with differentiating(), some.remember()():
            few = some if bool(some.value().isfinite()) else target
    return few


def _check_repeats(target: Objective) -> None:
    """Refuse a loss that is another one each time.

    Raises:
        ValueError: If its pass writes to the batch, or goes on from something that is not seen.
    """
    copies = mapped(Tensor.clone, target.batch)
    before = [_numbers(tensor).clone() for tensor in tensors(copies)]
    values = []
    with suppress(RuntimeError, TypeError, ValueError), differentiating():
        for batch in (copies, mapped(Tensor.clone, target.batch)):
            with target.remember()():
                values.append(float(target.on(batch).value().detach()))
    pairs = zip(before, map(_numbers, tensors(copies)), strict=True)
    if any(not torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in pairs):
        raise ValueError(
            "the model or the criterion writes to the batch that it is given, which is another one "
            "afterwards, with another loss; let it begin with a copy, x = x.clone(), or leave out "
            "inplace=True in the first layer"
        )
    if len(values) == 2 and abs(values[0] - values[1]) > _SAME * abs(values[0]):
        raise ValueError(
            f"the loss is {values[0]:.6g} and then {values[1]:.6g} on the same data, though all "
            "that modules and criterion keep in attributes has been put back: something counts or "
            "draws where that is not seen, as in a global variable, a generator (itertools.count), "
            "__slots__, or an attribute of a class. Keep it in an attribute of the module"
        )


def _numbers(tensor: Tensor) -> Tensor:
    """What a tensor is stored as, if it is a sparse one in some layout."""
    if tensor.layout is torch.strided:
        return tensor
    return (tensor.coalesce() if tensor.layout is torch.sparse_coo else tensor).values()


def _compared(target: Objective, order: Order) -> Verdict:
    with best_precision(target) as wide:
        return _compare(wide, order)


def _compare(target: Objective, order: Order) -> Verdict:
    run = _Comparison(target)
    with (
        differentiating(),
        not_compiled(),
        without_hooks(target.parameters),
        torch.autocast(target.device.type, enabled=False),
    ):
        try:
            return run.of_gradient() or run.of_products(order)
        except torch.OutOfMemoryError:
            raise
        except ValueError:
            # There is no finite one, here or nearby; whoever wants it will be told.
            return Verdict(clear=False)


class _Comparison:
    """One loss, at its parameters and a little way off along a random direction."""

    def __init__(self, target: Objective, along: Vector | None = None) -> None:
        self.target = target
        self.again = target.remember()
        self.before = [p.detach().clone() for p in target.parameters]
        self.along = target.free(along or _direction(self.before))
        double = all(p.dtype == torch.float64 for p in self.before)
        self.steps = _STEPS[torch.float64 if double else torch.float32]
        self.is_coarse = False
        self.known: dict[float, tuple[Tensor, Vector]] = {}

    def of_gradient(self) -> Verdict | None:
        """Whether the gradient is the loss's."""
        loss, gradient = self._first(0.0)
        if self.is_coarse:  # no step is short enough there, and long enough
            return Verdict(clear=False)
        told = float(dot(gradient, self.along))
        seen = _slope(
            lambda step: [self._first(step)[0].reshape(1)],
            self.steps,
            self._visible(told, float(loss)),
        )
        change = float(seen.parts[0])
        size = float(norm(gradient) * norm(self.along)) / math.sqrt(self.target.dim)
        room = _OFF * max(abs(told), abs(change), size) + 10 * float(seen.noise[0])
        if seen.clear and abs(told - change) > room:
            return Verdict("gradient", _NO_GRADIENT.format(change, told, _WHERE))
        return None

    def of_products(self, order: Order) -> Verdict:
        """Whether the products are the gradient's, and their gradient is theirs."""
        try:
            found, third = self._products(order)
        except RuntimeError as error:
            return Verdict("none", f"{error}\nThat comes from {_WHERE}")
        except ValueError:  # it is not finite
            return self._of_no_number()
        size = float(norm(self._first(0.0)[1]))
        of_gradients = self.of_gradients(self._visible(float(norm(found)), size))
        off = of_gradients.apart_from(found)
        if off > _OFF:
            return Verdict("product", _WRONG.format("second", off, "gradients", _WHERE))
        if order == 2:
            return Verdict(clear=of_gradients.clear)
        visible = self._visible(float(norm(third)), float(norm(found)))
        of_products = _slope(self._second, self.steps, visible)
        off = of_products.apart_from(third)
        if off > _OFF:
            return Verdict("third", _WRONG.format("third", off, "products", _WHERE))
        return Verdict(clear=of_gradients.clear and of_products.clear)

    def _of_no_number(self) -> Verdict:
        """What a product says that is not finite: nothing, unless the differences are."""
        seen = self.of_gradients()
        if seen.clear and all(bool(part.isfinite().all()) for part in seen.parts):
            return Verdict("product", _NO_NUMBER.format(_WHERE))
        return Verdict(clear=False)

    def of_gradients(self, visible: float = 0.0) -> _Slope:
        """``H v`` by differences; ``visible`` as for :func:`_slope`."""
        return _slope(lambda step: self._first(step)[1], self.steps, visible)

    @staticmethod
    def _visible(change: float, size: float) -> float:
        """From which step on a change would be seen, were something within of single precision."""
        return 100 * torch.finfo(torch.float32).eps * size / abs(change) if change else math.inf

    def _products(self, order: Order) -> tuple[Vector, Vector]:
        """``H v``, and the gradient of ``v' H v`` if it is wanted."""
        with self.again(), gradient_graph(self.target) as gradient:
            found = product(self.target, gradient, self.along, wanted=order > 2)
            third = _gradient_of(dot(self.along, found), self.target.parameters)
        return [part.detach() for part in found], third

    def _first(self, step: float) -> tuple[Tensor, Vector]:
        """The loss and its gradient elsewhere."""
        if step not in self.known:
            with self._at(step) as there:
                loss = there.loss()
                self.is_coarse = self.is_coarse or _has_half_precision(loss)
                found = grad(loss, there.parameters, allow_unused=True)
                self.known[step] = loss.detach(), there.complete(found, loss)
        return self.known[step]

    def _second(self, step: float) -> Vector:
        """``H v`` elsewhere."""
        with self._at(step) as there, gradient_graph(there) as gradient:
            return product(there, gradient, self.along, wanted=False)

    @contextmanager
    def _at(self, step: float) -> Iterator[Objective]:
        """The loss with other values of its parameters."""
        values = plus(self.before, self.along, self.before[0].new_tensor(step))
        with self.again(), self.target.moved(values):
            yield self.target


def best_step(target: Objective) -> float:
    """How long steps of central differences are best, relative to the parameters."""
    with differentiating(), not_compiled(), without_hooks(target.parameters):
        slope = _Comparison(target).of_gradients()
    return max(slope.step, 1e-6) if slope.clear else 1e-6


def _calibrated(target: Objective) -> float:
    signs = target.free([torch.sign(part) for part in _direction(target.parameters)])
    with differentiating(), without_hooks(target.parameters):
        truth = _true_product(target, signs)
    if truth is None:  # kinks, of which there is a warning already
        return 1.0
    errors: dict[float, float] = {}
    for factor in _FACTORS:
        with target.remember()():
            (found,) = differences(target, [signs], factor)
        errors[factor] = float(norm([a - b for a, b in zip(found, truth, strict=True)]))
        if errors[factor] <= _NEAR * float(norm(truth)):
            break
    best = min(errors, key=errors.__getitem__)
    if errors[best] <= _DROWNED * float(norm(truth)):
        return best
    if kinked_layer(target.model) is None:  # of which there is a warning already
        warnings.warn(
            "products='differences' are no Hessian here: with each of several steps, the best of "
            f"them too, they are {errors[best] / float(norm(truth)):.2g} of their size off, by "
            "rounding, or by kinks in the model's own forward; use products='autograd', or "
            "model.double()",
            stacklevel=5,
        )
    return 1.0


def _true_product(target: Objective, along: Vector) -> Vector | None:
    """``H v`` by differences in double precision, in the model's own; None if they say nothing."""
    size = float(norm(target.parameters) / norm(along)) or 1.0
    scaled = [part.double() * size for part in along]
    with best_precision(target) as wide:
        steps = [part.to(p.dtype) for part, p in zip(scaled, wide.parameters, strict=True)]
        slope = _Comparison(wide, steps).of_gradients()
    if not slope.clear:
        return None
    return [part.to(p.dtype) / size for part, p in zip(slope.parts, target.parameters, strict=True)]


def _has_half_precision(loss: Tensor) -> bool:
    """Whether something on the way to a loss is of 16 bits."""
    made = (each for node in graph(loss) for each in getattr(node, "_input_metadata", ()))
    return any(getattr(each, "dtype", None) in (torch.bfloat16, torch.float16) for each in made)


def _gradient_of(form: Tensor, parameters: Sequence[Tensor]) -> Vector:
    if not form.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    return list(grad(form, parameters, allow_unused=True, materialize_grads=True))


_WHERE = "<where>"
_NO_GRADIENT = (
    "the gradient of this loss is not its derivative: along a random direction the loss changes by "
    "{:.4g}, and by the gradient it would be {:.4g}. That comes from {}, whose gradient is another "
    "than that of what it computes, as with straight-through estimators and gradient reversal; "
    "such a loss has no Hessian. Leave it out, or take the derivatives as they are, within "
    "lowland.unchecked()"
)
_WRONG = (
    "PyTorch's {} derivatives of this loss are wrong: some are {:.2g} of their size off the "
    "difference of two {}. They come from {}; write that out in plain operations, or use "
    "products='differences', which takes gradients alone"
)


_NO_NUMBER = (
    "PyTorch's second derivatives of this loss are NaN or infinite where it has finite ones, by "
    "the difference of two gradients. They come from {}; write that out in other operations, or "
    "use products='differences', which takes gradients alone"
)


def _direction(parameters: Sequence[Tensor]) -> Vector:
    """A random one, in proportion to the parameters' sizes, so that relative steps suit it."""
    sizes = [float(p.detach().double().square().mean().sqrt()) for p in parameters]
    generator = torch.Generator().manual_seed(0)
    least = 0.01 * max(sizes) or 0.1
    return [
        torch.randn(p.shape, generator=generator).to(p) * max(size, least)
        for p, size in zip(parameters, sizes, strict=True)
    ]


@dataclass(frozen=True)
class _Slope:
    """A difference quotient, how much two of them differ, and whether it says anything."""

    parts: Vector
    noise: Vector
    clear: bool
    step: float

    def apart_from(self, found: Vector) -> float:
        """How far the worst part of a derivative is off, of its own size; 0 if nothing is clear."""
        if not self.clear:
            return 0.0
        least = 1e-6 * float(norm(self.parts))
        worst = 0.0
        for one, other, unsure in zip(found, self.parts, self.noise, strict=True):
            apart = float((one - other).detach().norm()) - 10 * float(unsure.norm()) - least
            if not bool(one.isfinite().all()):
                return math.inf
            size = max(float(one.detach().norm()), float(other.norm()))
            worst = max(worst, apart / size if size else 0.0)
        return worst


def _slope(function: Callable[[float], Vector], steps: Sequence[float], visible: float) -> _Slope:
    """The central difference of a function at zero, by the two steps that agree best.

    Of steps shorter than ``visible`` a difference of nothing says nothing: rounding hides it. Where
    the differences to either side are others, there is a kink right here, and they say nothing.
    """
    found: dict[float, Vector] = {}
    best: tuple[float, Vector, Vector] | None = None
    least = math.inf
    here = function(0.0)
    for step in steps:
        one, other = function(step), function(-step)
        quotient = [(a - b) / (2 * step) for a, b in zip(one, other, strict=True)]
        if step < visible and not any(map(torch.any, quotient)):
            continue
        sides = zip(one, here, other, strict=True)
        bend = [((a - b) + (c - b)).abs() / step for a, b, c in sides]
        for before, parts in found.items():
            noise = [(a - b).abs() for a, b in zip(quotient, parts, strict=True)]
            apart = max(_relative(noise, parts), _relative(bend, parts))
            if apart < least:
                pair = zip(noise, bend, strict=True)
                best, least = (max(step, before), quotient, [a + b for a, b in pair]), apart
        if least < _AGREED:
            break
        found[step] = quotient
    if best is None:  # it is clear if there was nothing, at no step
        nothing = not any(map(torch.any, quotient))
        return _Slope(quotient, quotient, clear=nothing, step=step)
    step, quotient, noise = best
    return _Slope(quotient, noise, clear=least < _UNCLEAR, step=step)


def _relative(parts: Vector, whole: Vector) -> float:
    length, size = float(norm(parts)), float(norm(whole))
    return length / size if length and size else math.inf if length else 0.0


# Which layer it is


def _culprit(
    target: Objective, suspects: Mapping[str, nn.Module], order: Order
) -> tuple[str, Verdict] | None:
    """The innermost layer whose own derivatives are wrong, in words, and what is wrong."""
    inputs, output = _inputs(target, suspects)
    # The inner ones first: if a layer is wrong, so is each that holds it.
    for name in sorted(inputs, key=lambda name: -name.count(".")):
        found = _alone(suspects[name], *inputs[name], order)
        if found.what is not None:
            return f"layer {name!r}, {type(suspects[name]).__name__}", found
    criterion, (_, y) = target.criterion, target.batch
    found = _alone(lambda output: scalar_loss(criterion, output, y), (output,), {}, order)
    if found.what is not None:
        return f"the criterion, {getattr(criterion, '__name__', type(criterion).__name__)}", found
    return None


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _inputs(
    target: Objective, suspects: Mapping[str, nn.Module]
) -> tuple[dict[str, Arguments], Any]:
    """What each layer is called with at first, and what the criterion is."""
    inputs: dict[str, Arguments] = {}

    def remember_them(name: str, _: nn.Module, args: tuple[Any, ...], options: Any) -> None:
        inputs.setdefault(name, mapped(Tensor.detach, (args, options)))

    with ExitStack() as stack:
        stack.enter_context(target.remember()())
        stack.enter_context(not_compiled())
        for name, module in suspects.items():
            if not is_scripted(module):
                hook = module.register_forward_pre_hook(
                    partial(remember_them, name), with_kwargs=True
                )
                stack.callback(hook.remove)
        with differentiating():
            x, _ = target.batch
            output = call(target.model, x)
    return inputs, mapped(Tensor.detach, output)


def _alone(
    call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], order: Order
) -> Verdict:
    """:func:`_compared` of one layer, as a function of its parameters and its inputs."""
    layer = _Alone(call, args, options)
    try:
        return _compared(objective(layer, _weighed, None, None), order)
    except (RuntimeError, TypeError, ValueError):  # of it alone there is nothing to be said
        return Verdict(clear=False)


class _Alone(Given):
    """A layer whose floating-point inputs are parameters."""

    def __init__(
        self, call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        super().__init__((args, options), "inputs")
        self.call = call

    def forward(self, _: Any) -> Any:
        args, options = self.value()
        return self.call(*args, **options)


def _weighed(output: Any, _: Any) -> Tensor:
    """A smooth function of all that a layer gives."""
    parts = [t for t in tensors(output) if t.is_floating_point()]
    total: Tensor = sum(part.sum() * 0 for part in parts)  # type: ignore[assignment]
    for part in parts:
        weights = torch.linspace(-1, 1.5, part.numel(), dtype=part.dtype, device=part.device)
        total = total + (part * (weights.view_as(part) + part / 2)).mean()
    return total

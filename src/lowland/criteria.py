"""What a criterion's targets, weights and means are; every engine asks here.

PyTorch's criteria differ in what they compare and in what their means divide by, and say neither.
A criterion is known here by its class, by being one of PyTorch's functions (also within
``functools.partial``), or by :func:`register_criterion`. Of all others nothing is assumed: targets
reach them as they are, and what a batch counts is measured (:mod:`lowland._weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from types import CellType
from typing import Any, Literal, NamedTuple, no_type_check
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import _reduction, functional
from torch.overrides import TorchFunctionMode

from lowland._batches import described, digest
from lowland._layers import has_hooks, is_as_inherited
from lowland._loss_checks import check_criterion
from lowland.errors import ANY_MODULE, UnsupportedModelError
from lowland.losses import LOSSES, Loss
from lowland.passes import content, is_holder
from lowland.validation import (
    are_labels,
    check_constant,
    check_finite,
    check_labels,
    check_one_per_sample,
    check_targets,
)

Reduction = Literal["mean", "sum"]

# Maps a model's output and targets to one number.
Criterion = Callable[..., Any]

# Each output is compared with a target of its own, and the mean is one over outputs.
_ELEMENTWISE: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.BCELoss: functional.binary_cross_entropy,
    nn.BCEWithLogitsLoss: functional.binary_cross_entropy_with_logits,
    nn.HingeEmbeddingLoss: functional.hinge_embedding_loss,
    nn.HuberLoss: functional.huber_loss,
    nn.KLDivLoss: functional.kl_div,
    nn.L1Loss: functional.l1_loss,
    nn.MSELoss: functional.mse_loss,
    nn.MultiLabelSoftMarginLoss: functional.multilabel_soft_margin_loss,
    nn.PoissonNLLLoss: functional.poisson_nll_loss,
    nn.SmoothL1Loss: functional.smooth_l1_loss,
    nn.SoftMarginLoss: functional.soft_margin_loss,
}

# Each sample has one class, and the mean is one over the classes' weights.
_BY_CLASS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.CrossEntropyLoss: functional.cross_entropy,
    nn.NLLLoss: functional.nll_loss,
}

_KNOWN = {**_ELEMENTWISE, **_BY_CLASS}

# Criteria that the closed form knows.
_CLOSED_FORMS: dict[type[nn.Module], Callable[[Any], Loss | None]] = {
    nn.BCEWithLogitsLoss: lambda _: LOSSES["bce"],
    nn.CrossEntropyLoss: lambda _: LOSSES["ce"],
    nn.MSELoss: lambda _: LOSSES["mse"],
}
_PYTORCHS = dict(_CLOSED_FORMS)


def register_criterion(kind: type[nn.Module], read: Callable[[Any], Loss | None]) -> None:
    """Teach the closed form a criterion of your own.

    Args:
        kind: The criterion's class. Instances need an attribute ``reduction``, ``"mean"`` (over
            samples and outputs) or ``"sum"``.
        read: Maps an instance to its :class:`~lowland.losses.Loss`. The derivatives of a new one
            are compared with its value, and with the criterion itself, so return the same one for
            the same settings; and None for settings that have no closed form.

    Raises:
        TypeError: If ``kind`` is no class of criteria, or ``read`` no function.

    Example:
        >>> from torch import nn
        >>> from lowland.exact import register_criterion
        >>> from lowland.losses import Loss, Separable
        >>> def derivatives(s, y):
        ...     rate = s.exp()
        ...     return Separable(rate - y, rate, rate)
        >>> poisson = Loss("poisson", lambda s, y: s.exp() - y * s, derivatives)
        >>> register_criterion(nn.PoissonNLLLoss, lambda criterion: poisson)  # log_input=True
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(
            f"expected a criterion's class, such as nn.PoissonNLLLoss; got {kind!r}: give the "
            "class rather than an instance or a function"
        )
    if not callable(read):
        raise TypeError(
            f"expected a function of a {kind.__name__} that returns its lowland.losses.Loss; got "
            f"{read!r}: for one loss use lambda criterion: loss"
        )
    _CLOSED_FORMS[kind] = read


# What every engine asks


def check_callable(criterion: object) -> None:
    """Require a criterion that can be called.

    Raises:
        TypeError: If it is a class, or no function.
    """
    if isinstance(criterion, type) or not callable(criterion):
        raise TypeError(
            f"expected a criterion that can be called, such as nn.CrossEntropyLoss(); got "
            f"{criterion!r}"
        )


def scalar_loss(criterion: Criterion, output: Any, y: Any) -> Tensor:
    """``criterion(output, y)``, with targets as :func:`as_target` makes them.

    Raises:
        TypeError: If it is no tensor, or the criterion does not take what the model returns.
        ValueError: As :func:`as_target`; or if one of PyTorch's criteria within it would broadcast.
    """
    loss: Any
    if _is_named(criterion):
        check_two_tensors(criterion, output, y)
        loss = criterion(output, as_target(criterion, output, y))
    else:
        loss = _unknown_loss(criterion, output, y)
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the criterion must return a scalar tensor; got {type(loss).__name__}: "
            "a loss without derivatives has no Hessian"
        )
    return loss


def check_two_tensors(criterion: object, output: Any, y: Any) -> None:
    """Require of data what PyTorch's criteria compare.

    Raises:
        TypeError: If the output or the targets are no tensor.
    """
    if (
        isinstance(output, Tensor)
        and isinstance(y, Tensor)
        and output.layout == y.layout == torch.strided
    ):
        return
    name = name_of(criterion)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{name} takes a tensor, and the model returns {described(output)}: give a criterion "
            "that takes this, such as lambda output, y: criterion(output[0], y), or lambda output, "
            "y: output.loss where the model computes its own"
        )
    if y is None:
        raise TypeError(
            f"{name} compares the model's output with targets, and y is missing: give (x, y), or "
            "(x, x) where inputs are their own targets"
        )
    if not isinstance(y, Tensor):
        raise TypeError(
            f"{name} takes targets y as a torch.Tensor; got {described(y)}: convert them with "
            "torch.as_tensor, or give a criterion that takes this, such as lambda output, y: "
            "criterion(output.logits, y['labels']), or lambda output, y: output.loss where the "
            "model computes its own"
        )
    what, part = ("outputs", output) if y.layout == torch.strided else ("targets y", y)
    raise TypeError(f"{name} takes dense {what}; got {part.layout}: convert them with to_dense()")


def _unknown_loss(criterion: Criterion, output: Any, y: Any) -> Any:
    try:
        with _NoBroadcast():
            return criterion(output, y)
    except (TypeError, AttributeError, LookupError) as error:
        if isinstance(output, Tensor) and isinstance(y, Tensor):
            raise
        raise TypeError(
            f"the criterion {name_of(criterion)} does not take what the model returns, "
            f"{described(output)}, with y, {described(y)}: {error}"
        ) from error


_WATCHED = frozenset([*_ELEMENTWISE.values(), functional.gaussian_nll_loss])


class _NoBroadcast(TorchFunctionMode):
    """Refuse what PyTorch's criteria would broadcast within another one, at most with a warning."""

    @no_type_check  # called for each operation of PyTorch
    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _WATCHED:
            output, y = (
                args[place] if len(args) > place else kwargs.get(name)
                for place, name in enumerate(("input", "target"))
            )
            if isinstance(output, Tensor) and isinstance(y, Tensor) and y.ndim and output.ndim:
                _check_one_shape(func.__name__, output, y)
        return func(*args, **kwargs)


# Not in the class, for torch.compile, which goes through it where a criterion is compiled.
def _check_one_shape(name: str, output: Tensor, y: Tensor) -> None:
    if output.shape != y.shape:
        raise ValueError(
            f"{name} within the criterion is given outputs of shape {tuple(output.shape)} and "
            f"targets of shape {tuple(y.shape)}, which PyTorch would broadcast: give them one "
            "shape there, as by y.view_as(output), or where this is meant by y.expand_as(output); "
            f"{name} as the criterion itself pairs (samples,) with (samples, 1)"
        )


def as_target(criterion: object, output: Any, y: Any) -> Any:
    """Targets for a criterion that compares numbers: of the output's shape, and of its type.

    ``(samples,)`` and ``(samples, 1)`` both mean one target a sample, as everywhere in the library;
    PyTorch would broadcast one against the other to ``(samples, samples)``, and take the mean of
    that. The type is not one of 16 bits, though: autocast computes the loss in single precision,
    which targets have.

    Raises:
        ValueError: If there is not one target for each output, which PyTorch would broadcast too.
    """
    if not (isinstance(y, Tensor) and isinstance(output, Tensor) and _is_elementwise(criterion)):
        return y
    if y.shape != output.shape:
        if (*y.shape, 1) != tuple(output.shape) and tuple(y.shape) != (*output.shape, 1):
            raise ValueError(
                f"x and y do not match: {name_of(criterion)} compares each output with a target of "
                f"its own, so y must have the shape of the model's output, {tuple(output.shape)}; "
                f"got {tuple(y.shape)}"
            )
        y = y.reshape(output.shape)
    return y.to(torch.promote_types(output.dtype, torch.float32))


def is_known(criterion: object) -> bool:
    """Whether what it computes is known: a criterion of PyTorch's, or a registered one."""
    inside = _inner(criterion)
    return _is_named(criterion) and not (isinstance(inside, nn.Module) and has_hooks(inside))


def _is_named(criterion: object) -> bool:
    """Whether its class or function is known, whatever hooks make of it."""
    return _is_any(criterion, _KNOWN) or _registered_loss(_inner(criterion)) is not None


def reduction_of(criterion: object) -> str:
    """``"mean"``, ``"sum"``, or another that is no scalar; of what is not known nothing, ``""``."""
    if not is_known(criterion):
        return ""
    # What PyTorch's criteria took before they took a reduction, and still take first.
    size_average, reduce = (_setting(criterion, name, None) for name in ("size_average", "reduce"))
    if size_average is not None or reduce is not None:
        return _reduction.legacy_get_string(size_average, reduce, emit_warning=False)
    return str(_setting(criterion, "reduction", "mean"))


def check_reduction(criterion: object) -> None:
    """Require a criterion that gives one number.

    Raises:
        ValueError: If its reduction leaves a loss for each sample.
    """
    if reduction_of(criterion) not in ("", "mean", "sum", "batchmean"):
        raise ValueError(
            "the criterion's reduction must be 'mean' or 'sum' for its Hessian to be a matrix; got "
            f"{reduction_of(criterion)!r}"
        )


def mass(criterion: object, y: Tensor) -> Tensor | float:
    """What a known mean over a batch divides by, up to a factor of all batches; 1 for a sum.

    Outputs where each has a target; of classes the samples that are not ignored, by their weights;
    else samples.
    """
    if is_sum(criterion) or not y.ndim:
        return 1.0
    if _is_any(criterion, _BY_CLASS):
        return _mass_of_classes(criterion, y)
    if reduction_of(criterion) == "mean" and _is_elementwise(criterion):
        return float(y.numel())
    return float(y.shape[0])


def _mass_of_classes(criterion: object, y: Tensor) -> Tensor | float:
    if y.is_floating_point():  # a distribution for each sample, classes in the second dimension
        return y.numel() / y.shape[min(1, y.ndim - 1)]
    kept: Tensor = y != _setting(criterion, "ignore_index", -100)
    weight: Tensor | None = _setting(criterion, "weight", None)
    if weight is None:
        return kept.sum().double()
    counted: Tensor = (weight.to(y.device)[torch.where(kept, y, 0)] * kept).sum()
    return counted.double()


def is_sum(criterion: object) -> bool:
    """Whether a known loss of several batches is the sum of theirs, rather than a mean."""
    return reduction_of(criterion) == "sum"


def check_kept(criterion: object, y: Any) -> None:
    """Require a target, and one that is not ignored, of a loss that turned out to be no number.

    Raises:
        ValueError: If the mean is over none.
    """
    if not isinstance(y, Tensor):
        return
    if y.ndim and not len(y):
        raise ValueError(f"the batch is empty, y of shape {tuple(y.shape)}: leave it out")
    if is_known(criterion) and not mass(criterion, y):
        raise ValueError(
            f"every target of the batch is ignored by {name_of(criterion)}, or has weight zero, so "
            "its mean loss does not exist; leave such a batch out"
        )


def check_splits_evenly(criterion: object, parts: Iterable[Any]) -> None:
    """Require that the loss is the plain mean of what it is on each part of a batch.

    Raises:
        ValueError: If it is a sum, or the parts' means divide by different numbers.
    """
    masses = [float(mass(criterion, y)) for y in parts if isinstance(y, Tensor)]
    weighed = _is_any(criterion, _BY_CLASS) and _setting(criterion, "weight", None) is not None
    if is_sum(criterion) or weighed or len(set(masses)) > 1:
        raise ValueError(
            "unbiased=True estimates the moments of a mean over samples; got a sum, or a mean "
            "weighed by classes or without ignored targets, whose denominator depends on the "
            "batch: use a mean without class weights and ignored targets"
        )


# Classes, for who counts predictions


def predictions(criterion: object, outputs: Tensor) -> Tensor | None:
    """The classes that outputs stand for, None if they stand for none."""
    if _is_any(criterion, _BY_CLASS) and outputs.ndim > 1:
        return outputs.argmax(1)
    if _is_any(criterion, (nn.BCEWithLogitsLoss,)):
        return outputs > 0
    return None


def labels(criterion: object, outputs: Tensor, y: Tensor) -> Tensor | None:
    """The classes that targets name, in the shape of :func:`predictions`; None if they do not."""
    predicted = predictions(criterion, outputs)
    if predicted is None:
        return None
    if predicted.dtype == torch.bool:
        hard = bool(((y == 0) | (y == 1)).all()) and y.numel() == outputs.numel()
        return y.reshape(outputs.shape) == 1 if hard else None
    return None if y.is_floating_point() or y.shape != predicted.shape else y


def counted(criterion: object, y: Tensor) -> Tensor:
    """Which labels are not ignored."""
    usual = -100 if _is_any(criterion, _BY_CLASS) else None
    ignored = _setting(criterion, "ignore_index", usual)
    return torch.ones_like(y, dtype=torch.bool) if ignored is None else y != ignored


# What the closed form asks


class Targets(NamedTuple):
    """Targets in the closed form's terms.

    Attributes:
        y: One for each logit, or a distribution over classes for each sample.
        scale: The weight of each sample, or of each of its outputs; None where ``reduction`` gives
            it.
        reduction: ``"mean"`` or ``"sum"`` over what the scale has weighed.
        of_labels: Whether ``y`` was made of labels of classes, so that it needs no further look.
    """

    y: Tensor
    scale: Tensor | None
    reduction: Reduction
    of_labels: bool = False


def read_loss(criterion: Criterion) -> Loss:
    """The loss that a criterion is a mean or a sum of.

    Raises:
        UnsupportedModelError: If the closed form does not know the criterion, or hooks may change
            it.
        TypeError: If what was registered for it gives something else.
        ValueError: If it is no mean and no sum.
    """
    read = _CLOSED_FORMS.get(type(criterion))  # type: ignore[arg-type]
    if not isinstance(criterion, nn.Module) or read is None:
        known = ", ".join(f"nn.{kind.__name__}" for kind in _CLOSED_FORMS)
        raise UnsupportedModelError(
            f"the closed form covers {known}; got {name_of(criterion)}; {ANY_MODULE}, or "
            "lowland.exact.register_criterion"
        )
    if has_hooks(criterion):
        raise UnsupportedModelError(
            "forward hooks on the criterion may change its outputs, and the closed form would "
            f"leave them out; remove them, or {ANY_MODULE}"
        )
    if getattr(criterion, "reduction", None) not in ("mean", "sum"):
        raise ValueError(
            f"the criterion's reduction must be 'mean' or 'sum' for its Hessian to be a matrix; "
            f"got {getattr(criterion, 'reduction', None)!r}"
        )
    loss: object = read(criterion)
    if loss is None:
        raise UnsupportedModelError(
            f"what was registered for {name_of(criterion)} says that it has no closed form with "
            f"these settings; {ANY_MODULE}"
        )
    if not isinstance(loss, Loss):
        raise TypeError(
            f"what register_criterion was given for {type(criterion).__name__} must return a "
            f"lowland.losses.Loss; got {type(loss).__name__}"
        )
    return loss


def encode(criterion: Criterion, loss: Loss, y: Tensor, *, outputs: int, like: Tensor) -> Targets:
    """Targets as the closed form takes them, with the criterion's weights.

    Args:
        criterion: What gives the targets their weights.
        loss: What :func:`read_loss` says that it is.
        y: As the criterion takes them; with one output also without its dimension.
        outputs: Of the model.
        like: ``(samples, ...)``, of the type that the logits have.

    Raises:
        UnsupportedModelError: If weights are given by sample.
        TypeError: If labels of classes are not whole numbers.
        ValueError: If shapes or values do not suit the criterion, every sample has weight zero, or
            what was registered for the criterion is another loss.
    """
    y = _one_a_sample(y, len(like), outputs, loss)
    # As read_loss has found it: of a module, and one of the two.
    reduction: Reduction = "sum" if getattr(criterion, "reduction", None) == "sum" else "mean"
    if isinstance(criterion, nn.Module) and _is_registered(criterion):
        _check_registered(criterion, loss, y, outputs, like)
    if isinstance(criterion, nn.CrossEntropyLoss):
        of_labels = not y.is_floating_point()
        y, scale = _weigh_classes(criterion, y, outputs, like)
        # With weights it is no mean over samples.
        return Targets(y, scale, reduction if scale is None else "sum", of_labels)
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        return Targets(*_weigh_outputs(criterion, y, outputs, like), reduction)
    return Targets(y, None, reduction)


# Of criteria that were compared with what is registered for them: the loss, and their settings.
_compared: WeakKeyDictionary[nn.Module, tuple[Loss, object]] = WeakKeyDictionary()


def _check_registered(
    criterion: nn.Module, loss: Loss, y: Tensor, outputs: int, like: Tensor
) -> None:
    """Compare a criterion with the loss that was registered for it, once for its settings."""
    settings = digest(vars(criterion))
    if _compared.get(criterion) != (loss, settings):
        check_criterion(criterion, loss, y.reshape(len(y), -1), outputs, like=like)
        _compared[criterion] = loss, settings


def _one_a_sample(y: Tensor, samples: int, outputs: int, loss: Loss) -> Tensor:
    """Targets as PyTorch's criterion takes them; with one output without its dimension."""
    shapes: list[tuple[int, ...]]
    if loss.targets == "classes":
        shapes = [(samples,), (samples, outputs)]
    elif outputs == 1:
        shapes = [(samples,), (samples, 1)]
    else:
        shapes = [(samples, outputs)]
    if tuple(y.shape) not in shapes:
        raise ValueError(
            f"x and y do not match: y must have shape {' or '.join(map(str, shapes))}, one target "
            f"per {'sample' if len(shapes) > 1 else 'sample and output'}; got {tuple(y.shape)}"
        )
    return y.reshape(-1) if outputs == 1 else y


def _weigh_outputs(
    criterion: nn.BCEWithLogitsLoss, y: Tensor, outputs: int, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Labels, and their weights where there are any but those of the reduction."""
    positive, weight = criterion.pos_weight, criterion.weight
    if positive is None and weight is None:
        return y, None
    shape = (len(y), outputs)

    def spread(values: Tensor, name: str) -> Tensor:
        _check_weights(criterion, name)
        try:
            return values.to(like.dtype).expand(shape)
        except RuntimeError:
            raise UnsupportedModelError(
                f"BCEWithLogitsLoss({name}=...) must hold one value, or one for each output; with "
                f"{outputs} output{'s' if outputs > 1 else ''} got shape {tuple(values.shape)}"
            ) from None

    scale = like.new_ones(shape)
    if positive is not None:
        check_targets(y, LOSSES["bce"])
        # With p the weight, p y log(s) + (1 - y) log(1 - s) is the loss of another label.
        yes = y.to(like.dtype).view(shape)
        no, yes = 1 - yes, spread(positive, "pos_weight") * yes
        scale = yes + no
        y = torch.where(scale > 0, yes / scale, 0).view_as(y)
    if weight is not None:
        scale = scale * spread(weight, "weight")
    return y, scale if criterion.reduction == "sum" else scale / scale.numel()


def _weigh_classes(
    criterion: nn.CrossEntropyLoss, y: Tensor, classes: int, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Targets as distributions that hold the criterion's weights, and the mean's denominator.

    The latter is None where it is the number of samples, or where there is none.
    """
    smoothing, weights = criterion.label_smoothing, criterion.weight
    soft = y.is_floating_point()
    if soft and y.ndim < 2:
        raise TypeError(
            f"labels of classes must be integers; got {str(y.dtype).removeprefix('torch.')}: "
            "convert them with y.long()"
        )
    kept = None
    if not soft:
        y, kept = _one_hot(y, classes, criterion.ignore_index, like)
    if weights is not None:
        _check_weights(criterion, "weight")
    if weights is not None and weights.numel() != classes:
        raise ValueError(
            f"CrossEntropyLoss(weight=...) must hold one value for each of {classes} outputs; got "
            f"shape {tuple(weights.shape)}"
        )
    target = (1 - smoothing) * y + smoothing / classes if smoothing else y
    weighed = y
    if weights is not None:
        target, weighed = target * weights.to(like.dtype), weighed * weights.to(like.dtype)
    if kept is not None:
        target, weighed = target * kept[:, None], weighed * kept[:, None]
    if criterion.reduction == "sum" or soft or (weights is None and kept is None):
        return target, None
    total = weighed.sum()
    if total.device.type == "cpu" and not bool(total > 0):
        raise ValueError(
            "every sample has weight zero, by CrossEntropyLoss(weight=...) or ignore_index, so the "
            "mean loss does not exist; leave such a batch out"
        )
    return target, (1 / total).expand(len(y))


def _one_hot(
    y: Tensor, classes: int, ignore_index: int, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Labels as distributions, and which of them are not ignored, if there may be others."""
    check_one_per_sample(y)
    kept = None
    # Where all are labels, and that of no class is ignored, none is: one look for both. On other
    # devices it would wait for them.
    if 0 <= ignore_index < classes or not are_labels(y, classes):
        ignored = y == ignore_index
        if y.device.type != "cpu" or bool(ignored.any()):
            kept, y = (~ignored).to(like.dtype), torch.where(ignored, 0, y)
        check_labels(y, classes)
    return like.new_zeros(len(y), classes).scatter_(1, y.long().unsqueeze(1), 1), kept


def _check_weights(criterion: nn.Module, name: str) -> None:
    """Require weights that can weigh a loss: none is negative, and none is to be trained."""
    weights: Tensor = getattr(criterion, name)
    where = f"{type(criterion).__name__}({name}=...)"
    check_constant(weights, where)
    if weights.device.type != "cpu":
        return
    check_finite(weights, where)
    if bool((weights < 0).any()):
        raise ValueError(
            f"{where} must hold numbers of at least 0; got {float(weights.min()):g}: a negative "
            "weight leaves the loss without a minimum"
        )


# How a criterion is known


def _is_elementwise(criterion: object) -> bool:
    if _is_any(criterion, _ELEMENTWISE):
        return True
    loss = _registered_loss(_inner(criterion))
    return loss is not None and loss.per_output


def _registered_loss(inside: object) -> Loss | None:
    """What somebody else than we said that a criterion is, with its settings."""
    if not (isinstance(inside, nn.Module) and _is_registered(inside)):
        return None
    try:
        loss = _CLOSED_FORMS[type(inside)](inside)
    except UnsupportedModelError:  # it is not one with these settings
        return None
    return loss if isinstance(loss, Loss) else None


def _is_registered(criterion: nn.Module) -> bool:
    """Whether somebody else than we said what a criterion is to the closed form."""
    read = _CLOSED_FORMS.get(type(criterion))
    return read is not None and read is not _PYTORCHS.get(type(criterion))


def _is_any(criterion: object, kinds: Collection[type[nn.Module]]) -> bool:
    """Whether it computes what one of PyTorch's criteria does: as a module or as a function."""
    criterion = _inner(criterion)
    if isinstance(criterion, nn.Module):
        if type(criterion) in _KNOWN:
            return type(criterion) in kinds
        return any(is_as_inherited(criterion, kind) for kind in kinds)
    return any(criterion is _KNOWN[kind] for kind in kinds)


def is_any(criterion: object, *kinds: type[nn.Module]) -> bool:
    """Whether it computes what one of these criteria of PyTorch does, and no hook changes that."""
    modules = (each for each in _layers(criterion) if isinstance(each, nn.Module))
    return _is_any(criterion, kinds) and not any(map(has_hooks, modules))


def setting(criterion: object, name: str, default: Any) -> Any:
    """A criterion's setting, whether it is a module or a function within ``functools.partial``."""
    return _setting(criterion, name, default)


def modules_of(criterion: object) -> list[nn.Module]:
    """The modules that a criterion is, or that it calls as a function that holds them."""
    return [each for each in _held_by(criterion) if isinstance(each, nn.Module)]


def holders_of(criterion: object) -> list[Any]:
    """What a criterion may keep state in: :func:`modules_of`, objects, and a function's variables.

    Example:
        >>> from torch import nn
        >>> from lowland.criteria import holders_of
        >>> holders_of(nn.MSELoss()), holders_of(nn.functional.mse_loss)
        ([MSELoss()], [])
    """
    return [
        each
        for each in _held_by(criterion)
        if isinstance(each, nn.Module | CellType) or is_holder(each)
    ]


def _held_by(criterion: object) -> Iterator[Any]:
    for inside in _layers(criterion):
        cells = getattr(inside, "__closure__", None) or ()
        yield from (inside, getattr(inside, "__self__", None))
        for cell in cells:
            yield from (cell, content(cell))


def _layers(criterion: object) -> Iterator[object]:
    """A criterion, and what it is within ``functools.partial`` and ``torch.compile``."""
    inside: Any = criterion
    while inside is not None:
        yield inside
        modules = vars(inside).get("_modules", {}) if isinstance(inside, nn.Module) else {}
        if isinstance(inside, partial):
            inside = inside.func
        elif "_orig_mod" in modules:
            inside = modules["_orig_mod"]
        else:
            inside = getattr(inside, "_torchdynamo_orig_callable", None)


def _inner(criterion: object) -> object:
    *_, inside = _layers(criterion)
    return inside


def _setting(criterion: object, name: str, default: Any) -> Any:
    for layer in _layers(criterion):
        if isinstance(layer, partial) and name in layer.keywords:
            return layer.keywords[name]
    return getattr(_inner(criterion), name, default)


def name_of(criterion: object) -> str:
    """Of its class or function, for messages."""
    function = _inner(criterion)
    return getattr(function, "__name__", type(function).__name__)

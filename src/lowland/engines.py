"""One call for the moments of a model, whichever engine computes them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from torch import Generator, Tensor, nn

from lowland._batches import as_batch
from lowland._elsewhere import with_respect_to
from lowland._limits import (
    DEFAULT_MEMORY_BUDGET,
    DEFAULT_PROBES,
    DENSE_LIMIT,
    GRADIENTS_A_PROBE,
    PROBES_WORTH,
)
from lowland._weights import Count, check_count
from lowland.criteria import Criterion
from lowland.dense import BruteForce, without_closed_form
from lowland.errors import UnsupportedModelError
from lowland.estimation import Estimation, Products
from lowland.exact.engine import ExactEngine
from lowland.exact.over_batches import OverBatches
from lowland.matrices import Matrix
from lowland.moments import HessianMoments, check_number
from lowland.objective import Objective, objective, over
from lowland.probes import Estimate, loader_moments
from lowland.validation import check_l2
from lowland.verification import Order, routed


@runtime_checkable
class Engine(Protocol):
    """Whatever finds the moments of one model, criterion and batch; :func:`choose` makes it.

    An engine of your own gives these three; ``method=`` takes what makes it, of a loss and of
    settings, wherever it takes an engine's name (docs/extending.md has an example).
    """

    @property
    def name(self) -> str:
        """What :attr:`lowland.HessianMoments.method` says."""

    def moments(self, count: int = 2) -> HessianMoments:
        """The first ``count`` moments, 1, 2 or 4, differentiable in the parameters.

        Of those that were not asked for nothing need be known; NaN stands for them.
        """

    def loss_and_moments(self, count: int = 2) -> tuple[Tensor, HessianMoments]:
        """The loss, as a step of training has it, and :meth:`moments`."""


Name = Literal["auto", "exact", "probes", "dense"]
Method = Name | Callable[[Objective, Estimation], Engine]
"""The name of an engine, or what makes one."""


def hessian_moments(
    model: nn.Module,
    criterion: Criterion,
    x: Any,
    y: Any = None,
    method: Method = "auto",
    *,
    probes: int = DEFAULT_PROBES,
    products: Products = "auto",
    generator: Generator | None = None,
    parameters: Iterable[Tensor] | None = None,
    matrix: Matrix = "hessian",
    unbiased: bool = False,
    moments: Literal[2, 4] = 2,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    count: Count | None = None,
    l2: float = 0.0,
    wrt: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    prune: float | None = None,
) -> HessianMoments:
    """``Tr H`` and ``Tr H^2`` of ``criterion(model(x), y)`` in the trainable parameters.

    Args:
        model: For ``"exact"`` a Linear layer, or an ``nn.Sequential`` of Linear layers,
            element-wise activations and sequences of these, with or without ``Flatten`` in front;
            or any module that ends in such layers, if ``parameters`` are theirs. For the others any
            module.
        criterion: For ``"exact"`` ``nn.BCEWithLogitsLoss``, ``nn.CrossEntropyLoss``,
            ``nn.MSELoss``, or one of your own (:func:`lowland.exact.register_criterion`), with the
            reduction ``"mean"`` or ``"sum"``. For the others anything that returns a scalar.
        x: Inputs, ``(samples, inputs)`` for ``"exact"``. A mapping goes to the model by names where
            its ``forward`` has them (``model(**x)``), otherwise as it is. Without ``y`` one batch,
            a pair of both or a mapping or object that holds both, with which the criterion is
            called as it is (``criterion(output, x)``); or a data loader, a data set, or anything
            that gives such batches: the moments are those of all of them, found in one pass. With
            ``"exact"`` they take the memory of all blocks of the Hessian, and carry gradients, for
            which a backward pass goes over the data once more; estimates have none.
        y: Targets as the criterion takes them; for one output also ``(samples,)``.
        method: ``"exact"`` is the closed form, ``"probes"`` an estimate with standard errors from
            products with the Hessian (:func:`lowland.probes.probe_moments`), ``"dense"`` brute
            force by automatic differentiation. ``"auto"`` takes the closed form where it covers the
            model, ``y`` asks for no gradients, and it is not dearer than the probes; else
            brute force where it is a matter of seconds, and probes beyond. The result says which
            it was, with ``", differences"`` behind it where PyTorch's derivatives were missing or
            wrong. Or what makes an engine of your own: see :class:`Engine`.
        probes: How many, for ``"probes"``. Standard errors fall with their square root.
        products: Of a matrix that is not known in closed form: ``"autograd"``, ``"differences"`` of
            gradients, or ``"auto"``, which takes the former where PyTorch's derivatives are right.
            These are compared with differences once (:mod:`lowland.verification`).
        generator: Of the probes' signs; without one PyTorch's own is used.
        parameters: Those whose Hessian is meant, if not all that are trainable, for example
            ``model.head.parameters()``. The moments carry gradients in the others, too, down to the
            first layer; by differences they do not.
        matrix: ``"hessian"``; or one beside it, for which ``H`` stands in all that is said here:
            ``"ggn"``, the generalized Gauss-Newton matrix; ``"residual"``, what the Hessian has
            beyond it, so that their traces add up to the Hessian's; ``"fisher"``, the Fisher matrix
            of the model's own predictive distribution. :mod:`lowland.matrices` defines them.
        unbiased: Take the samples for a batch of a larger data set, whose ``Tr H^2`` is to be
            estimated: a batch's own is too large on average, since it holds each sample's pair with
            itself. For ``"exact"``, and for ``"probes"``, which splits the batch in two. The
            estimate may come out negative, and bounds from it are estimates too: see
            :class:`~lowland.HessianMoments`.
        moments: 4 for ``Tr H^3`` and ``Tr H^4`` as well, see
            :meth:`~lowland.HessianMoments.bracket`. Not for ``"probes"``.
        memory_budget: Bytes of temporaries that ``"exact"`` does not exceed. Wide layers need more:
            a hidden layer of ``M`` units some ``100 M^2`` bytes for a sample, except the last one
            where ``M`` is above four times the square of the outputs.
        count: Of several batches, what the criterion's mean over one divides by: a function of its
            ``x`` and ``y``, such as ``lambda x, y: (y != -100).sum()``; or ``"samples"``, rows;
            ``"batches"``, for the mean of the batches' losses; ``"sum"``, for their sum. PyTorch's
            own criteria say it themselves, of others it is measured if it is not given: by the
            gradients of two batches' losses in the model's outputs and that of both together.
        l2: Weight decay that is part of the loss, as ``weight_decay`` of PyTorch's optimizers:
            ``l2 / 2`` times the squared norm of the parameters that are looked at, which adds
            ``l2`` to every eigenvalue.
        wrt: In place of parameters, ``"inputs"``, or the name of a layer for what it gives, which
            the model must run once: the Hessian in these numbers of one batch, of all its samples
            together. It is differentiable in the model's parameters.

        checkpoint: Of ``"exact"`` over a data loader, the path of a file in which the pass is kept
            as it goes, at most a twentieth of the time being spent on that. Killed, the same call
            goes on from there; complete, the file is deleted. The loader must not shuffle.
        prune: Of ``method="exact"`` on one batch, a relative tolerance such as 1e-2: leave out
            fitted samples which are certified to change moments and gradients by no more than that,
            see :func:`lowland.exact.moments`; the result reports them as ``pruned``.

    Returns:
        Scalar moments, differentiable in the model's parameters. Frozen parameters
        (``requires_grad=False``) are constants: the Hessian is that of the others.

    Raises:
        UnsupportedModelError: If the engine asked for cannot do what is asked.
        TypeError, ValueError: As :func:`lowland.exact.moments`; if data or criterion have another
            form; or if what a batch counts is neither known nor given, and cannot be measured. Of
            the Gauss-Newton matrix also if the criterion is linear in the model's outputs
            (``nn.NLLLoss``), or knows the parameters in another way. If ``l2`` is no finite number
            of at least zero, or ``wrt`` names nothing of the model.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> x, y = torch.randn(50, 3), torch.ones(50, dtype=torch.long)
        >>> moments = lowland.hessian_moments(model, nn.CrossEntropyLoss(), x, y)
        >>> moments.dim, bool(moments.lower <= moments.upper)
        (26, True)
        >>> parts = [
        ...     lowland.hessian_moments(model, nn.CrossEntropyLoss(), x, y, matrix=matrix).trace
        ...     for matrix in ("ggn", "residual")
        ... ]
        >>> torch.allclose(moments.trace, sum(parts), rtol=1e-4)
        True
    """
    check_number(moments)
    check_method(method)
    check_count(count)
    check_l2(l2)
    check_prune(prune, method)
    settings = Estimation(probes, products, generator, unbiased, memory_budget, prune=prune)
    batch = (x, y) if y is not None else as_batch(x)
    if batch is None:
        one_batch = moments != 2 or unbiased or prune is not None
        if method not in ("auto", "exact", "probes") or one_batch:
            raise UnsupportedModelError(
                "the moments over a data loader are estimated, or two of them exact: use "
                "method='exact' or 'probes', moments=2, unbiased=False and no prune=; or pass all "
                "samples as tensors x and y"
            )
        if wrt is not None:
            raise UnsupportedModelError("wrt= looks at one batch: pass tensors x and y")
        target = over(model, criterion, (), parameters, matrix=matrix)
        if method == "exact":
            found = OverBatches.begin(target, x, settings, count, checkpoint).moments()
            return found.shifted(l2) if l2 else found
        _check_no_checkpoint(checkpoint)
        if method == "auto":
            exact, x = OverBatches.attempt(target, x, settings, count, _price(settings))
            if exact:
                return exact.moments().shifted(l2)
        return loader_moments(target, x, settings, count).shifted(l2)
    _check_no_checkpoint(checkpoint)
    target = objective(model, criterion, *batch, parameters, matrix=matrix)
    if wrt is not None:
        if unbiased or parameters is not None:
            raise UnsupportedModelError(
                "wrt= takes the place of parameters=, and of one batch as it is: leave out "
                "parameters= and unbiased=True"
            )
        target = with_respect_to(target, wrt)
    limit = 0 if unbiased else DENSE_LIMIT
    engine = choose(target, method, settings, count=moments, dense_limit=limit)
    found = engine.moments(moments)
    if found.matrix != matrix:
        raise UnsupportedModelError(
            f"the engine {engine.name!r} gave moments of matrix={found.matrix!r} for those of "
            f"{matrix!r}: let it look at the matrix of its objective"
        )
    return found.shifted(l2) if l2 else found


def _price(settings: Estimation) -> float:
    """What probes cost, in gradients, up to which the closed form is taken."""
    return GRADIENTS_A_PROBE * max(settings.probes, PROBES_WORTH)


def _check_no_checkpoint(checkpoint: object) -> None:
    if checkpoint is not None:
        raise UnsupportedModelError(
            "checkpoint= keeps a pass of method='exact' over a data loader; leave it out elsewhere"
        )


def check_method(method: Method | str) -> None:
    """Refuse what is no engine.

    Raises:
        ValueError: If there is no engine of that name.
    """
    if not callable(method) and method not in get_args(Name):
        raise ValueError(
            f"unknown method {method!r}: expected 'auto', 'exact', 'probes' or 'dense'"
        )


def check_prune(prune: float | None, method: Method | str) -> None:
    """Refuse to leave out samples where nothing certifies what they are.

    Raises:
        UnsupportedModelError: If the engine is not the closed form for sure.
    """
    if prune is not None and method != "exact":
        raise UnsupportedModelError(
            "prune= leaves samples out of the closed form, whose bounds certify what they add: use "
            f"method='exact', or leave it out; got method={method!r}"
        )


def choose(
    target: Objective,
    method: Method,
    settings: Estimation,
    *,
    count: int = 2,
    dense_limit: int = DENSE_LIMIT,
    order: Order = 2,
) -> Engine:
    """The engine for a method; a model that the closed form may cover is read once, here.

    Args:
        target: The loss.
        method: ``"auto"``, the name of an engine, or what makes one.
        settings: What the engine may spend.
        count: How many moments are wanted: ``Tr H`` alone, 1, the closed form has in linear time.
        dense_limit: Up to how many parameters ``"auto"`` may use brute force.
        order: 3 if the moments' gradient is wanted for sure.

    Raises:
        UnsupportedModelError: If the closed form is asked for and does not cover the model; or any
            engine but probes where the samples are several processes'.
        TypeError, ValueError: If the data do not fit it.
    """
    if callable(method):
        engine = method(target, settings)
        if not isinstance(engine, Engine):
            raise TypeError(
                "method= must make an engine, with a name and the methods moments and "
                f"loss_and_moments; got {engine!r}"
            )
        return engine
    if target.parallel:
        if settings.prune is not None:
            raise UnsupportedModelError(
                "prune= certifies the samples of one process, and a DistributedDataParallel model "
                "has several: leave it out"
            )
        if method == "exact" and not settings.unbiased:
            return OverBatches.begin(target, [target.batch], settings)
        if method in ("exact", "dense"):
            raise UnsupportedModelError(
                f"method={method!r} would take each process's samples for all of them: Tr H^2 of a "
                "DistributedDataParallel model needs method='probes', or 'exact' with "
                "unbiased=False"
            )
        return Estimate(target, routed(target, settings, order))
    if method in ("auto", "exact"):
        exact = _read(target, settings, required=method == "exact")
        if exact and (method == "exact" or exact.relative_cost(count) <= _price(settings)):
            return exact
    by_matrix, chosen, name = without_closed_form(
        target, method, settings, limit=dense_limit, order=order
    )
    if by_matrix:
        return BruteForce(target, chosen, name=name)
    return Estimate(target, chosen, name=name)


def _read(target: Objective, settings: Estimation, *, required: bool) -> ExactEngine | None:
    try:
        return ExactEngine.read(target, settings)
    except UnsupportedModelError:
        if required:
            raise
        return None

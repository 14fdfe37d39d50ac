"""One call for the moments of a model, whichever engine computes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Generator, Tensor, nn

from lowland.criteria import Criterion
from lowland.dense import dense_moments
from lowland.errors import UnsupportedModelError
from lowland.exact.api import Setup
from lowland.exact.modules import read
from lowland.exact.plan import DEFAULT_MEMORY_BUDGET
from lowland.moments import HessianMoments, check_number
from lowland.objective import data_parallel, only, unwrap
from lowland.passes import unsteady
from lowland.probes import loader_moments, probe_moments
from lowland.products import Products

Method = Literal["auto", "exact", "probes", "dense"]

# Where the closed form does not cover a model.
Fallback = Literal["probes", "dense"]

# Above this many parameters brute force takes minutes rather than seconds; it must be asked for.
DENSE_LIMIT = 2048

DEFAULT_PROBES = 32

# What a probe and its gradient cost, in gradients of the loss; and how many probes an exact value
# is worth, which has no noise.
_GRADIENTS_A_PROBE = 4
_PROBES_WORTH = 8


def hessian_moments(
    model: nn.Module,
    criterion: Criterion,
    x: Any,
    y: Any = None,
    method: Method = "auto",
    *,
    probes: int = DEFAULT_PROBES,
    products: Products = "exact",
    generator: Generator | None = None,
    parameters: Iterable[Tensor] | None = None,
    unbiased: bool = False,
    moments: Literal[2, 4] = 2,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> HessianMoments:
    """``Tr H`` and ``Tr H^2`` of ``criterion(model(x), y)`` in the trainable parameters.

    Args:
        model: For ``"exact"`` a Linear layer, or an ``nn.Sequential`` of Linear layers,
            element-wise activations and sequences of these, with or without ``Flatten`` in front.
            For the others any module.
        criterion: For ``"exact"`` ``nn.BCEWithLogitsLoss``, ``nn.CrossEntropyLoss``,
            ``nn.MSELoss``, or one of your own (:func:`lowland.exact.register_criterion`), with the
            reduction ``"mean"`` or ``"sum"``. For the others anything that returns a scalar.
        x: Inputs, ``(samples, inputs)`` for ``"exact"``. Without ``y`` a pair of both; or a data
            loader, or anything that gives batches ``(x, y)``: the moments are those of all of them,
            estimated in one pass and without gradients.
        y: Targets as the criterion takes them; for one output also ``(samples,)``.
        method: ``"exact"`` is the closed form, ``"probes"`` an estimate with standard errors from
            products with the Hessian (:func:`lowland.probes.probe_moments`), ``"dense"`` brute
            force by automatic differentiation. ``"auto"`` takes the closed form where it covers the
            model, ``x`` and ``y`` ask for no gradients, and it is not dearer than the probes; else
            brute force up to a few thousand parameters, and probes beyond. The result says which
            it was.
        probes: How many, for ``"probes"``. Standard errors fall with their square root.
        products: ``"exact"`` or ``"finite"``, for ``"probes"``.
        generator: Of the probes' signs; without one PyTorch's own is used.
        parameters: Those whose Hessian is meant, if not all that are trainable.
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

    Returns:
        Scalar moments, differentiable in the model's parameters. Frozen parameters
        (``requires_grad=False``) are constants: the Hessian is that of the others.

    Raises:
        UnsupportedModelError: If the engine asked for cannot do what is asked.
        TypeError, ValueError: As :func:`lowland.exact.moments`.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> x, y = torch.randn(50, 3), torch.ones(50, dtype=torch.long)
        >>> moments = lowland.hessian_moments(model, nn.CrossEntropyLoss(), x, y)
        >>> moments.dim, bool(moments.lower <= moments.upper)
        (26, True)
    """
    check_number(moments)
    check_method(method)
    if y is None and isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], Tensor):
        x, y = x
    if y is None:
        if method not in ("auto", "probes") or moments != 2 or unbiased:
            raise UnsupportedModelError(
                "the moments over a data loader are estimated: use method='probes', moments=2 and "
                "unbiased=False; or pass all samples as tensors x and y"
            )
        return replace(
            loader_moments(
                model,
                criterion,
                x,
                probes=probes,
                products=products,
                generator=generator,
                parameters=parameters,
            ),
            method="probes",
        )
    with only(model, parameters) as chosen:
        took = choose(
            model,
            criterion,
            x,
            y,
            method,
            probes=probes,
            dense_limit=0 if unbiased else DENSE_LIMIT,
        )
        if isinstance(took, Setup):
            result = took.moments(memory_budget=memory_budget, unbiased=unbiased, moments=moments)
            return replace(result, method="exact")
        return without_closed_form(
            took,
            model,
            criterion,
            x,
            y,
            probes=probes,
            products=products,
            generator=generator,
            parameters=chosen,
            unbiased=unbiased,
            moments=moments,
        )


def without_closed_form(
    took: Fallback,
    model: nn.Module,
    criterion: Criterion,
    x: Any,
    y: Any,
    *,
    probes: int,
    products: Products,
    generator: Generator | None,
    parameters: Iterable[Tensor] | None,
    unbiased: bool,
    moments: Literal[2, 4] = 2,
) -> HessianMoments:
    """The moments by brute force or by probes; arguments as for :func:`hessian_moments`.

    Raises:
        UnsupportedModelError: If the engine cannot do what is asked.
    """
    if took == "dense":
        if unbiased:
            raise UnsupportedModelError(
                "unbiased=True needs the closed form or probes, which see some samples apart "
                "from others; brute force sees their mean alone"
            )
        result = dense_moments(unwrap(model), criterion, x, y, moments=moments)
    elif moments != 2:
        raise UnsupportedModelError(
            "moments=4 needs the closed form or brute force: probes estimate two moments; use "
            "method='exact' or method='dense'"
        )
    else:
        result = probe_moments(
            model,
            criterion,
            x,
            y,
            probes=probes,
            products=products,
            generator=generator,
            parameters=parameters,
            unbiased=unbiased,
        )
    return replace(result, method=took)


def check_method(method: str) -> None:
    """Refuse what is no engine.

    Raises:
        ValueError: If there is no engine of that name.
    """
    if method not in get_args(Method):
        raise ValueError(
            f"unknown method {method!r}: expected 'auto', 'exact', 'probes' or 'dense'"
        )


def choose(
    model: nn.Module,
    criterion: Criterion,
    x: Any,
    y: Any,
    method: Method,
    *,
    probes: int,
    dense_limit: int,
    linear: bool = False,
) -> Setup | Fallback:
    """The engine for a method; of the closed form what it has read.

    Args:
        model: As for :func:`hessian_moments`.
        criterion: As there.
        x: As there.
        y: As there.
        method: As there.
        probes: What the closed form competes with.
        dense_limit: Up to how many parameters ``"auto"`` may use brute force.
        linear: Whether ``Tr H`` alone is wanted, which the closed form has in linear time.

    Raises:
        UnsupportedModelError: If the closed form is asked for and does not cover the model; or any
            engine but probes where the samples are several processes'.
        TypeError, ValueError: If the data do not fit it.
    """
    if data_parallel(model):
        if method in ("exact", "dense"):
            raise UnsupportedModelError(
                f"method={method!r} would take each process's samples for all of them: Tr H^2 of a "
                "DistributedDataParallel model needs method='probes'"
            )
        return "probes"
    if method in ("probes", "dense"):
        return method
    try:
        setup = read(unwrap(model), criterion, x, y)
    except UnsupportedModelError:
        if method == "exact":
            raise
    else:
        worth = _GRADIENTS_A_PROBE * max(probes, _PROBES_WORTH)
        if method == "exact" or linear or setup.relative_cost() <= worth:
            return setup
    dim = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Brute force differentiates one function, without side effects.
    return "dense" if dim <= dense_limit and not any(map(unsteady, model.modules())) else "probes"

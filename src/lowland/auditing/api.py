"""One call that rescales a network and measures it again and again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lowland._lanczos import need_scipy
from lowland._limits import DEFAULT_PROBES
from lowland.auditing.readings import LANCZOS, Bench, Forward, Values
from lowland.auditing.result import Audit
from lowland.criteria import Criterion, scalar_loss
from lowland.errors import UnsupportedModelError
from lowland.objective import unwrap
from lowland.spectra.surface import check_mode
from lowland.symmetry import rescale, weighted_layers
from lowland.validation import check_features, check_tensor, check_values, is_number

# Powers of two: multiplying by them is exact, so that whatever moves was moved by the factor.
DEFAULT_FACTORS = (1 / 16, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 16.0)


def audit(
    model: nn.Module,
    criterion: Criterion,
    x: Tensor,
    y: Tensor,
    x_unseen: Tensor,
    *,
    layer: int | None = None,
    factors: Iterable[float] = DEFAULT_FACTORS,
    pairs: bool = True,
    probes: int = DEFAULT_PROBES,
    seed: int = 0,
) -> Audit:
    r"""Sharpness of a network, and what does not depend on its parameters' scale, over rescalings.

    One layer is multiplied by each factor and the next one divided by it (:func:`lowland.rescale`),
    which changes no prediction. What moves all the same says nothing about the predictions: the
    largest eigenvalue of the Hessian, its trace, the upper bound, the norms of the weights. What is
    a function of the predictions or of the hidden layers stays; so does adaptive sharpness, the
    largest eigenvalue and the trace of :math:`\mathrm{diag}(|\theta|) H \mathrm{diag}(|\theta|)`
    (:func:`lowland.spectrum` with ``adaptive=True``). All of it is measured again at each factor,
    and the last line of ``print(audit)`` says what came out.

    Args:
        model: An ``nn.Sequential`` of linear and convolutional layers, with something positively
            homogeneous (ReLU, leaky ReLU, pooling, Flatten) between at least two of them; in
            evaluation mode where it has dropout or normalization. It is not changed.
        criterion: Maps outputs and targets to a scalar. Predictions, accuracy and the pair proxy
            need classes: ``nn.CrossEntropyLoss``, ``nn.NLLLoss`` or ``nn.BCEWithLogitsLoss``.
        x: All training inputs, ``(samples, ...)``, taken at once.
        y: Their targets, as the criterion takes them; for one output also ``(samples,)``.
        x_unseen: Inputs that are not among them, ``(points, ...)``; 100 in the paper.
        layer: Which linear or convolutional layer is multiplied, counted from 0; without it the
            first that can be.
        factors: What it is multiplied by; 1 is added if missing. With powers of two, as in the
            default, the rescaling itself is exact.
        pairs: Whether to count the pair proxy, the dearest measure by far: seconds for 250 training
            points, 8 hidden units and 100 unseen points, minutes for 2,000 and 128. Where a factor
            leaves the last hidden layer as it was to the last bit, it is not counted again.
        probes: Random directions for traces that are too dear to compute exactly, at least 2.
        seed: Of these; the same directions serve at all factors.

    Returns:
        All measures at all factors, with a table, a figure and words.

    Raises:
        UnsupportedModelError: If no layer, or not the one asked for, can be rescaled without a
            change of predictions.
        TypeError, ValueError: If an argument is not what it should be, data are empty, not finite
            or do not fit each other, all unseen points are training points, or outputs overflow.
        ImportError: Without ``pip install 'lowland[spectrum]'``. Without ``'lowland[weakness]'``
            the pair proxy is left out, and the table says so.
        RuntimeError: If the model cannot be differentiated twice.

    Notes:
        ReLU has second derivatives almost everywhere, and those are what is used. For one logit the
        pair proxy is that of the two classes whose difference it is. A rescaling shows that a
        measure can be moved without the predictions; that one stays does not show that it says
        anything about generalization.

    References:
        L. Dinh et al., Sharp minima can generalize for deep nets, ICML 2017; arXiv:2605.05209,
        table 6; J. Kwon et al., ASAM, ICML 2021 (arXiv:2102.11600).

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x, y, x_unseen = torch.randn(40, 3), torch.arange(40) % 2, torch.randn(20, 3)
        >>> audit = lowland.audit(model, nn.CrossEntropyLoss(), x, y, x_unseen, factors=(1, 8))
        >>> audit.change("trace") > 2, audit.stays("adaptive_trace"), audit.stays("k_free")
        (True, True, True)
    """
    need_scipy()
    model = unwrap(model)
    scales = _factors(factors)
    if not isinstance(probes, int) or probes < 2:
        raise ValueError(f"probes must be a whole number of at least 2; got {probes!r}")
    layer = _layer(model, layer)
    original = rescale(model, layer, 1.0)
    _check_data(original, x, y, x_unseen)
    check_mode(original)
    bench = Bench(criterion, x, y, x_unseen, pairs, probes, seed)
    if seen := _count_seen(x, x_unseen):
        bench.notes.append(f"{seen:,} of the unseen points are training points too.")
    references = _forwards(bench, original, 1.0)
    _check_loss(bench, references[0])

    # The network itself first: what is wrong with it is no factor's doing.
    found = {1.0: _measure(bench, original, 1.0, references)}
    for factor in scales:
        if factor != 1:
            found[factor] = _measure(bench, rescale(model, layer, factor), factor, references)
    if bench.roughness > LANCZOS:
        bench.notes.append(
            f"Residuals of the largest eigenvalues reach {100 * bench.roughness:.2g} % of these: "
            "products with the Hessian are no more exact here; for more digits use model.double()."
        )
    weighted = weighted_layers(original)
    return Audit(
        layer=layer,
        layers=tuple(str(each) for each in weighted),
        parameters=sum(p.numel() for p in original.parameters() if p.requires_grad),
        samples=len(x),
        unseen=len(x_unseen),
        dtype=weighted[layer].get_parameter("weight").dtype,
        probes=probes,
        factors=tuple(scales),
        values=_rows([found[factor][0] for factor in scales]),
        stderr=_rows([found[factor][1] for factor in scales]),
        limits=bench.limits(references[1]),
        left_out=bench.left_out,
        notes=tuple(bench.notes),
    )


def _measure(
    bench: Bench, network: nn.Sequential, factor: float, references: list[Forward]
) -> tuple[Values, Values]:
    """All measures of one network, and the standard errors of those that are estimates."""
    train, unseen = _forwards(bench, network, factor)
    try:
        curvature, stderr = bench.curvature(network)
    except ValueError as error:
        if factor == 1:
            raise
        raise ValueError(f"at factor {factor:g}: {error}") from error
    return {
        **curvature,
        **bench.size(network),
        **bench.changes([train, unseen], references),
        **bench.function(train),
        **bench.weakness(network, train, unseen),
    }, stderr


def _rows(found: list[Values]) -> dict[str, tuple[float, ...]]:
    """Of each measure its value at every factor."""
    return {name: tuple(each[name] for each in found) for name in found[0]}


def _factors(factors: Any) -> list[float]:
    """In ascending order, with 1 among them.

    Raises:
        TypeError, ValueError: If one is no positive finite number, or there is none but 1.
    """
    given = factors.tolist() if isinstance(factors, Tensor) else factors
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"factors must be several numbers, such as (0.25, 1, 4); got {factors!r}")
    given = list(given)
    for factor in given:
        if not is_number(factor):
            raise TypeError(f"factors must be numbers, such as (0.25, 1, 4); got {factor!r}")
        if not 0 < factor < float("inf"):
            raise ValueError(f"factors must be positive and finite; got {factor!r}")
    found = sorted({1.0, *map(float, given)})
    if len(found) == 1:
        raise ValueError(
            f"factors must hold another one than 1, at which nothing is rescaled; got {factors!r}"
        )
    return found


def _layer(model: nn.Module, layer: int | None) -> int:
    """The layer asked for, or the first that can be rescaled.

    Raises:
        UnsupportedModelError: If there is none, with the reason for each.
    """
    if layer is not None:
        if not isinstance(layer, int):
            raise TypeError(f"layer must be a whole number, counted from 0; got {layer!r}")
        rescale(model, layer, 1.0)
        return layer
    reasons: list[str] = []
    count = len(weighted_layers(model))
    for index in range(count - 1):
        try:
            rescale(model, index, 1.0)
        except UnsupportedModelError as error:
            reasons.append(f"layer {index}: {error}")
        else:
            return index
    if not reasons:
        raise UnsupportedModelError(
            f"an audit rescales one of two linear or convolutional layers; the model has {count}"
        )
    raise UnsupportedModelError(
        "no layer can be rescaled without a change of predictions, so there is nothing to audit; "
        "between two of them must stand ReLU, leaky ReLU or the like (tanh allows flips of signs "
        "and permutations alone, which leave sharpness as it is; batch normalization can be folded "
        "into its layer by torch.nn.utils.fusion).\n" + "\n".join(reasons)
    )


def _check_data(model: nn.Sequential, x: Any, y: Any, x_unseen: Any) -> None:
    """Require data that fit the model and each other.

    Raises:
        TypeError, ValueError: With what does not fit.
    """
    weight = weighted_layers(model)[0].get_parameter("weight")
    for name, part in (("x", x), ("y", y), ("x_unseen", x_unseen)):
        check_tensor(part, name)
        check_values(part, name)
    for name, part in (("x", x), ("x_unseen", x_unseen)):
        if part.is_floating_point():
            check_features(part, like=weight, name=name)
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise ValueError(
            f"x and y must hold as many samples; got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x_unseen.shape[1:] != x.shape[1:] or x_unseen.dtype != x.dtype:
        raise ValueError(
            f"x_unseen must hold points like those of x, {x.dtype} of shape "
            f"({', '.join(['points', *map(str, x.shape[1:])])}); got {x_unseen.dtype} of shape "
            f"{tuple(x_unseen.shape)}"
        )


def _count_seen(x: Tensor, x_unseen: Tensor) -> int:
    """How many unseen points are training points.

    Raises:
        ValueError: If all are.
    """
    train, unseen = (
        [row.tobytes() for row in part.detach().cpu().reshape(len(part), -1).numpy()]
        for part in (x, x_unseen)
    )
    known = set(train)
    count = sum(row in known for row in unseen)
    if count == len(unseen):
        raise ValueError(
            "every point of x_unseen is in x too, so none is unseen: pass points that the model "
            "was not trained on, such as those of a test set"
        )
    return count


def _forwards(bench: Bench, network: nn.Sequential, factor: float) -> list[Forward]:
    """At training and at unseen points.

    Raises:
        ValueError: If the model does not take them, or outputs are not finite.
    """
    found = []
    for name, points in (("x", bench.x), ("x_unseen", bench.x_unseen)):
        try:
            forward = bench.forward(network, points)
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            raise ValueError(
                f"the model does not take {name}, {points.dtype} of shape {tuple(points.shape)}: "
                f"{error}"
            ) from error
        if not isinstance(forward.outputs, Tensor):
            raise TypeError(f"the model must return a tensor; got {type(forward.outputs).__name__}")
        if not bool(forward.outputs.isfinite().all()):
            raise ValueError(
                f"the model's outputs at {name} are not all finite at factor {factor:g}: "
                + (
                    "look for NaN or infinity in its parameters"
                    if factor == 1
                    else "take factors closer to 1, or model.double()"
                )
            )
        found.append(forward)
    return found


def _check_loss(bench: Bench, train: Forward) -> None:
    """Require a criterion that takes outputs and targets.

    Raises:
        TypeError, ValueError: If it does not, or returns no scalar.
    """
    if not callable(bench.criterion):
        raise TypeError(
            "criterion must map outputs and targets to a loss; got "
            f"{type(bench.criterion).__name__}"
        )
    try:
        loss = scalar_loss(bench.criterion, train.outputs, bench.y)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise ValueError(
            f"the criterion does not take outputs of shape {tuple(train.outputs.shape)} with "
            f"y, {bench.y.dtype} of shape {tuple(bench.y.shape)}: {error}"
        ) from error
    if not isinstance(loss, Tensor) or loss.ndim:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"the criterion must return a scalar tensor; got {got}: use reduction='mean' or 'sum'"
        )

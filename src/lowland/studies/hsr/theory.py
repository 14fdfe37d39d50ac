"""What the study says about the bound's gradient, measured: the data of figures 2 to 7.

Source: arXiv:2606.28662, sections IV and V.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lowland import exact
from lowland.losses import get_loss
from lowland.studies.ensembles.networks import Inputs, Targets, Weights, logits
from lowland.studies.hsr.preset import Preset
from lowland.studies.hsr.search import ACTIVATION, LOSS
from lowland.studies.hsr.task import samples, start, unflatten
from lowland.studies.runs.jobs import Tensors
from lowland.threads import threads

Moment = Literal["trace", "trace_sq"]

STEP = 1e-5  # of central differences in float64: truncation and rounding are then alike
REPEATS = 5  # of a timing, of which the median is kept; fewer where one takes long
LONG = 0.2  # seconds for all repeats of a timing, where it leaves a choice
TIMED_SAMPLES = (100, 400, 1600, 3200, 6400)
MOST_NUMERICAL = 1600  # samples; beyond, numerical gradients take minutes
TIMED_HIDDEN = (2, 4, 8, 16, 32)
COVARIANCES = (-1.8, -1.2, -0.6, 0.0, 0.6, 1.2, 1.8)
DESCENT_STEPS = 500


def agreement(preset: Preset) -> Tensors:
    """Figure 3: the distance between analytic and numerical gradients, one row per draw."""
    x, y = samples(preset, min(preset.train_size, 100))
    result = {}
    with threads(1):
        for moment in ("trace", "trace_sq"):
            rows = []
            for seed in range(preset.draws):
                weights = start(preset, [seed])
                exactly = analytic(weights, x, y, moment)
                nearly = numerical(weights, x, y, moment)
                rows.append(
                    [float((a - b).norm()) for a, b in zip(exactly, nearly, strict=True)]
                    + [float(a.norm()) for a in exactly]
                )
            # Columns: difference in W, difference in v, norm in W, norm in v.
            result[moment] = torch.tensor(rows, dtype=torch.float64)
    return result


def analytic(
    weights: Weights, x: Inputs, y: Targets, moment: Moment, order: exact.OrderChoice = "auto"
) -> list[Tensor]:
    """The gradient of one moment by theorems 2 to 5."""
    leaves = [part.clone().requires_grad_() for part in weights]
    moments = exact.moments(leaves, x, y, activation=ACTIVATION, loss=LOSS, order=order)
    return list(torch.autograd.grad(getattr(moments, moment).sum(), leaves))


def numerical(
    weights: Weights, x: Inputs, y: Targets, moment: Moment, order: exact.OrderChoice = "auto"
) -> list[Tensor]:
    """The gradient of a moment by central differences, two values of it per parameter."""

    def value(parts: list[Tensor]) -> Tensor:
        moments = exact.moments(parts, x, y, activation=ACTIVATION, loss=LOSS, order=order)
        result: Tensor = getattr(moments, moment)
        return result

    gradient = []
    for which, part in enumerate(weights):
        slopes = torch.zeros_like(part)
        for index in range(part.numel()):
            sides = []
            for sign in (1, -1):
                moved = [other.clone() for other in weights]
                moved[which].view(-1)[index] += sign * STEP
                sides.append(value(moved))
            slopes.view(-1)[index] = ((sides[0] - sides[1]) / (2 * STEP)).item()
        gradient.append(slopes)
    return gradient


def timing(preset: Preset) -> Tensors:
    """Figure 2: seconds of a gradient of ``Tr H^2`` over the samples, and over the parameters.

    Columns: the size, the numerical gradient (NaN beyond ``MOST_NUMERICAL`` samples) and the
    analytic one by pairs of samples as in the paper, and the analytic one by pairs of parameters,
    which is linear in the samples.
    """
    with threads(1):
        _timings(TIMED_SAMPLES[0], preset.hidden)  # the first calls of a process are long
        over_samples = [[n, *_timings(n, preset.hidden)] for n in TIMED_SAMPLES]
        over_parameters = [[4 * h + 1, *_timings(TIMED_SAMPLES[1], h)] for h in TIMED_HIDDEN]
    return {
        "samples": torch.tensor(over_samples, dtype=torch.float64),
        "parameters": torch.tensor(over_parameters, dtype=torch.float64),
    }


def _timings(count: int, hidden: int) -> tuple[float, float, float]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = normal(1, 3, hidden), normal(1, hidden + 1, 1)
    x, y = normal(1, count, 2), (normal(1, count) > 0).double()
    return (
        _median_seconds(lambda: numerical(weights, x, y, "trace_sq", "samples"))
        if count <= MOST_NUMERICAL
        else math.nan,
        _median_seconds(lambda: analytic(weights, x, y, "trace_sq", "samples")),
        _median_seconds(lambda: analytic(weights, x, y, "trace_sq", "parameters")),
    )


def _median_seconds(job: Callable[[], object]) -> float:
    times: list[float] = []
    while len(times) <= REPEATS and sum(times) < LONG:
        begin = time.perf_counter()
        job()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:] or times)  # the first one warms up


def fit(preset: Preset, parameters: Float[Tensor, "networks parameters"]) -> Tensors:
    """Figure 4: how much each sample adds to the bound's gradient, against how well it is fitted.

    Args:
        preset: The settings.
        parameters: Converged networks, each a row of ``W`` by rows and then ``v``.

    Returns:
        ``residual``, ``|p - y|``, and ``norm``, that of the sample's share; both
        ``(networks, samples)``.
    """
    x, y = samples(preset, preset.train_size)
    weights = unflatten(preset, parameters)
    with threads(1):
        shares = exact.sample_contributions(weights, x, y, activation=ACTIVATION, loss=LOSS)
        residual, _, _ = get_loss(LOSS).derivatives(
            logits(weights, x, ACTIVATION).squeeze(2), y.expand(len(parameters), -1)
        )
    squares = [share.square().sum((-2, -1)) for share in shares]
    return {"residual": residual.abs(), "norm": (squares[0] + squares[1]).sqrt()}


def covariance(preset: Preset) -> Tensors:
    """Figure 5: the norm of the gradient of ``Tr H^2`` against the covariance of the inputs.

    Both inputs have variance 2, as in the data; the more they covary, the more alike samples are.

    Returns:
        For ``identity`` and ``sigmoid`` units, ``(covariances, draws)``.
    """
    generator = torch.Generator().manual_seed(preset.data_seed)
    noise = torch.randn(1, preset.train_size, 2, generator=generator, dtype=torch.float64)
    _, y = samples(preset, preset.train_size)
    weights = start(preset, list(range(preset.draws)))
    # Weights of the usual size: from the search's wide interval every sigmoid is saturated.
    weights = weights[0] / preset.initial_range, weights[1] / preset.initial_range
    result: dict[str, list[Tensor]] = {"identity": [], "sigmoid": []}
    with threads(1):
        for value in COVARIANCES:
            matrix = torch.tensor([[2.0, value], [value, 2.0]], dtype=torch.float64)
            x = noise @ torch.linalg.cholesky(matrix).T
            for activation, norms in result.items():
                leaves = [part.clone().requires_grad_() for part in weights]
                moments = exact.moments(leaves, x, y, activation=activation, loss=LOSS)
                grads = torch.autograd.grad(moments.trace_sq.sum(), leaves)
                norms.append(_norm(grads))
    return {
        "covariance": torch.tensor(COVARIANCES, dtype=torch.float64),
        **{name: torch.stack(norms) for name, norms in result.items()},
    }


def parts(preset: Preset) -> Tensors:
    """Figure 6: norms of the direction's mean part and spread part at random parameters."""
    x, y = samples(preset, preset.train_size)
    with threads(1):
        direction = exact.direction(
            start(preset, list(range(10 * preset.draws))), x, y, activation=ACTIVATION, loss=LOSS
        )
    return {"mean": _norm(direction.mean), "spread": _norm(direction.spread)}


def _norm(gradient: tuple[Tensor, ...]) -> Tensor:
    """The norm of each network's gradient."""
    norms: Tensor = torch.cat([part.flatten(1) for part in gradient], 1).norm(dim=1)
    return norms


def descent(preset: Preset) -> Tensors:
    """Figure 7: descent on the bound alone, from the seeds of the first draws.

    Returns:
        ``upper_bound`` and ``lower_bound``, ``(51, networks)``, and ``eigenvalues``,
        ``(51, networks, P)``: at both ends and evenly between them.
    """
    x, y = samples(preset, preset.train_size)
    leaves = [part.requires_grad_() for part in start(preset, list(range(preset.draws)))]
    curves: dict[str, list[Tensor]] = {"upper_bound": [], "lower_bound": [], "eigenvalues": []}
    with threads(1):
        for step in range(DESCENT_STEPS + 1):
            moments = exact.moments(leaves, x, y, activation=ACTIVATION, loss=LOSS)
            if step % (DESCENT_STEPS // 50) == 0:
                matrices = exact.hessian(leaves, x, y, activation=ACTIVATION, loss=LOSS)
                curves["upper_bound"].append(moments.upper.detach())
                curves["lower_bound"].append(moments.lower.detach())
                curves["eigenvalues"].append(torch.linalg.eigvalsh(matrices))
            grads = torch.autograd.grad(moments.upper.sum(), leaves)
            with torch.no_grad():
                for leaf, slope in zip(leaves, grads, strict=True):
                    leaf.sub_(slope, alpha=preset.learning_rate)
    return {name: torch.stack(curve) for name, curve in curves.items()}

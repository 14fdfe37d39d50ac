"""Train on one data set with and without curvature control, and compare what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from lowland import exact
from lowland.errors import UserError
from lowland.studies.compare.settings import Settings
from lowland.studies.data.dataset import Dataset
from lowland.studies.data.splits import Splits, stratified_splits
from lowland.studies.ensembles.networks import (
    PerNetwork,
    Targets,
    initial_weights,
    logits,
    mean_loss,
    parameter_count,
)
from lowland.studies.ensembles.training import BASELINE, Trained, train
from lowland.studies.reporting.numbers import ROUNDING
from lowland.studies.reporting.statistics import holm, paired_test
from lowland.threads import threads

_WORTH_THREADS = 8_000_000  # training samples times parameters; below, a step is too short to share

MOST_PARAMETERS = 10_000
"""Of a network: beyond, its eigenvalues take minutes at every checkpoint."""

LEARNED = 0.99
"""A network has learned something if its training loss came below this share of what it was, and
of what it would be without a look at the features."""


@dataclass(frozen=True)
class Metric:
    """A number measured on every trained network.

    Attributes:
        name: Column in the tables.
        title: For people.
        symbol: For sentences and axes.
        meaning: One line for the report.
        scale: What values are multiplied with for people.
        unit: Behind values so multiplied.
        by_factor: Whether it is positive and varies by factors rather than amounts, so that
            methods are compared by the ratio: differences would be ruled by the few largest values.
    """

    name: str
    title: str
    symbol: str
    meaning: str
    scale: float = 1.0
    unit: str = ""
    by_factor: bool = False


METRICS = (
    Metric(
        "accuracy",
        "Test accuracy",
        "test accuracy",
        "share of test samples classified right",
        scale=100,
        unit=" %",
    ),
    Metric(
        "macro_f1",
        "Test macro-F1",
        "test macro-F1",
        "mean over the classes of the F1 score",
        scale=100,
        unit=" %",
    ),
    Metric(
        "log_loss",
        "Test log-loss",
        "test log-loss",
        "mean cross-entropy on the test part, in nats",
        by_factor=True,
    ),
    Metric(
        "train_loss",
        "Training loss",
        "training loss",
        "the same on the training part, without the penalty",
        by_factor=True,
    ),
    Metric(
        "lambda_max",
        "λ_max",
        "λ_max",
        "largest eigenvalue of the Hessian of the training loss",
        by_factor=True,
    ),
    Metric("lambda_min", "λ_min", "λ_min", "smallest eigenvalue of the same Hessian"),
    Metric(
        "upper_bound",
        "Upper bound",
        "the upper bound",
        "m + s √(P-1), never below λ_max",
        by_factor=True,
    ),
    Metric("lower_bound", "Lower bound", "the lower bound", "m - s √(P-1), never above λ_min"),
    Metric("trace", "Trace", "the trace", "sum of the eigenvalues, Tr H", by_factor=True),
)


@dataclass(frozen=True)
class Cell:
    """One method's value of one metric.

    Attributes:
        mean: Over seeds.
        stderr: Standard error of that mean.
        effect: Mean difference from the baseline, or mean logarithm of the ratio to it where that
            is what the test looks at.
        p: Of the test, adjusted over the methods; NaN for the baseline itself.
    """

    mean: float
    stderr: float
    effect: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        dataset: The data.
        settings: What was run.
        networks: One row per trained network: method, seed, each metric, steps, converged, and
            learned: whether its training loss fell, and below that of the classes' shares alone.
        history: One row per network and checkpoint: method, seed, step, loss, lambda_max.
        summary: One row per method and metric, with the columns of :class:`Cell`.
        seconds: Per method, time in its own gradients for all its networks together.
        parameters: ``P``, the number of weights of each network.
    """

    dataset: Dataset
    settings: Settings
    networks: pd.DataFrame
    history: pd.DataFrame
    summary: pd.DataFrame
    seconds: dict[str, float]
    parameters: int

    def to_frame(self) -> pd.DataFrame:
        """The summary, one row a method: ``<metric>``, ``<metric>_stderr``, ``<metric>_p``."""
        rows = []
        for method in self.settings.methods:
            row: dict[str, object] = {"method": method.name}
            for metric in METRICS:
                cell = self.cell(method.name, metric.name)
                row[metric.name] = cell.mean
                row[f"{metric.name}_stderr"] = cell.stderr
                row[f"{metric.name}_p"] = cell.p
            rows.append(row | {"seconds": self.seconds[method.name]})
        return pd.DataFrame(rows)

    def cell(self, method: str, metric: str) -> Cell:
        """One entry of the summary."""
        chosen = (self.summary["method"] == method) & (self.summary["metric"] == metric)
        return Cell(**self.summary.loc[chosen, [field.name for field in fields(Cell)]].iloc[0])


def compare(
    dataset: Dataset, settings: Settings, *, on_step: Callable[[int], None] | None = None
) -> Comparison:
    """Train every method on the same splits from the same starting points, and evaluate it.

    Args:
        dataset: The data.
        settings: What to run.
        on_step: Called with the number of training steps done, after each of them.

    Raises:
        UserError: If a network would have more than ``MOST_PARAMETERS`` parameters.
        DataError: If the data cannot be split.
        DivergenceError: If training leaves the finite numbers.
    """
    parameters = parameter_count(layer_sizes(dataset, settings))
    if parameters > MOST_PARAMETERS:
        units = " + ".join(map(str, settings.hidden))
        raise UserError(
            f"{len(dataset.features)} features and {units} hidden units make {parameters} "
            f"parameters; exact eigenvalues are computed for at most {MOST_PARAMETERS}, so use "
            "fewer hidden units or features"
        )
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    splits = stratified_splits(dataset, seeds, test_size=settings.test_size)
    cores = torch.get_num_threads()
    if splits.y_train.numel() * parameters < _WORTH_THREADS:
        cores = 1
    # Methods side by side come first: the threads of one operation wait for each other.
    workers = min(cores, len(settings.methods))
    with threads(cores // workers):
        return _compare(dataset, settings, splits, seeds, workers=workers, on_step=on_step)


def layer_sizes(dataset: Dataset, settings: Settings) -> tuple[int, ...]:
    """Units of each layer. Two classes share one logit, more have one each."""
    classes = len(dataset.classes)
    return (len(dataset.features), *settings.hidden, 1 if classes == 2 else classes)


def _compare(
    dataset: Dataset,
    settings: Settings,
    splits: Splits,
    seeds: range,
    *,
    workers: int,
    on_step: Callable[[int], None] | None,
) -> Comparison:
    sizes = layer_sizes(dataset, settings)
    start = initial_weights(seeds, sizes)
    model = {"activation": settings.activation, "loss": "bce" if sizes[-1] == 1 else "ce"}
    trained = train(
        settings.methods,
        start,
        splits.x_train,
        splits.y_train,
        schedule=settings.schedule,
        workers=workers,
        on_step=on_step,
        **model,
    )
    networks = pd.concat(
        [_evaluate(result, splits, seeds, **model) for result in trained], ignore_index=True
    )
    history = pd.concat([_curves(result, seeds) for result in trained], ignore_index=True)
    return Comparison(
        dataset,
        settings,
        networks,
        history,
        summarize(networks, test_fraction=splits.y_test.shape[1] / splits.y_train.shape[1]),
        {result.method.name: result.seconds for result in trained},
        parameter_count(sizes),
    )


def _evaluate(
    trained: Trained, splits: Splits, seeds: range, *, activation: str, loss: str
) -> pd.DataFrame:
    """One row per network."""
    weights, x, y = trained.weights, splits.x_train, splits.y_train
    moments = exact.moments(weights, x, y, activation=activation, loss=loss)
    predicted = labels(logits(weights, splits.x_test, activation))
    pairs = list(zip(splits.y_test.long().numpy(), predicted.numpy(), strict=True))
    trivial = torch.minimum(trained.loss[0], constant_loss(y))
    log_loss = mean_loss(weights, splits.x_test, splits.y_test, activation=activation, loss=loss)
    return pd.DataFrame(
        {
            "method": trained.method.name,
            "seed": list(seeds),
            "accuracy": [accuracy_score(true, label) for true, label in pairs],
            "macro_f1": [f1_score(true, label, average="macro") for true, label in pairs],
            "log_loss": log_loss.numpy(),
            "train_loss": trained.loss[-1].numpy(),
            "lambda_max": trained.lambda_max[-1].numpy(),
            "lambda_min": trained.curves["lambda_min"][-1].numpy(),
            "upper_bound": moments.upper.numpy(),
            "lower_bound": moments.lower.numpy(),
            "trace": moments.trace.numpy(),
            "steps": trained.steps.numpy(),
            "converged": trained.converged.numpy(),
            "learned": (trained.loss[-1] < LEARNED * trivial).numpy(),
        }
    )


def labels(
    logits: Float[Tensor, "networks samples outputs"],
) -> Int[Tensor, "networks samples"]:
    """The class that each network gives each sample: the likeliest one."""
    return logits.argmax(2) if logits.shape[2] > 1 else (logits.squeeze(2) > 0).long()


def constant_loss(y: Targets) -> PerNetwork:
    """The smallest cross-entropy without a look at the features: the entropy of the labels."""
    classes = int(y.max()) + 1
    counts = torch.stack([row.bincount(minlength=classes) for row in y.long()]).double()
    entropy: PerNetwork = torch.special.entr(counts / y.shape[1]).sum(1)
    return entropy


def _curves(trained: Trained, seeds: range) -> pd.DataFrame:
    """One row per network and checkpoint."""
    count = len(trained.checkpoints)
    return pd.DataFrame(
        {
            "method": trained.method.name,
            "seed": np.repeat(list(seeds), count),
            "step": np.tile(trained.checkpoints, len(seeds)),
            "loss": trained.loss.T.flatten().numpy(),
            "lambda_max": trained.lambda_max.T.flatten().numpy(),
        }
    )


def summarize(networks: pd.DataFrame, *, test_fraction: float) -> pd.DataFrame:
    """Means, standard errors over seeds, and paired tests against the baseline.

    Args:
        networks: As in :class:`Comparison`.
        test_fraction: Test samples per training sample.

    Returns:
        As in :class:`Comparison`. Differences are tested, or for metrics that vary by factors the
        logarithms of ratios. Each metric's p-values are adjusted over the methods by Holm's
        method, but not over metrics, each of which is a question of its own.
    """
    rows = []
    names = [name for name in networks["method"].unique() if name != BASELINE.name]
    for metric in METRICS:
        table = networks.pivot_table(index="seed", columns="method", values=metric.name)
        # No logarithm of what may turn out zero or negative, as a trace can.
        tested = np.log(table) if metric.by_factor and (table > 0).all(axis=None) else table
        changes = {
            name: _changes(table[name], table[BASELINE.name], tested[name] - tested[BASELINE.name])
            for name in (BASELINE.name, *names)
        }
        raw = [paired_test(np.asarray(changes[name], np.float64), test_fraction) for name in names]
        adjusted = dict(zip(names, holm(raw), strict=True))
        for name in (BASELINE.name, *names):
            values = table[name].to_numpy()
            rows.append(
                {
                    "method": name,
                    "metric": metric.name,
                    "mean": values.mean(),
                    "stderr": values.std(ddof=1) / math.sqrt(len(values)),
                    "effect": changes[name].mean(),
                    "p": adjusted.get(name, math.nan),
                }
            )
    return pd.DataFrame(rows)


def _changes(
    values: pd.Series[float], baseline: pd.Series[float], differences: pd.Series[float]
) -> pd.Series[float]:
    """The differences, without those that are rounding: a test would find the sign of that."""
    one = np.isclose(values, baseline, rtol=ROUNDING, atol=0) & np.isfinite(values)
    return differences.mask(one, 0.0)

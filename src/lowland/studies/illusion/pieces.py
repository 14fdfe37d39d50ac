"""The pieces of the run: each is computed by itself, anywhere, and kept."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowland.moments import HessianMoments
from lowland.studies.data.sources import Source
from lowland.studies.ensembles.networks import Weights, one_by_one, select
from lowland.studies.hsr import task as hsr_task
from lowland.studies.hsr.preset import Preset as HsrPreset
from lowland.studies.illusion.evaluation import columns, evaluate, hidden, rescaled
from lowland.studies.illusion.preset import SMALL, Preset, Regime, Task
from lowland.studies.illusion.tasks import BATCHES, JOINT, points, start
from lowland.studies.illusion.train import descend
from lowland.studies.runs.jobs import Tensors
from lowland.studies.runs.streams import stream
from lowland.threads import threads
from lowland.weakness import count_patterns, free_regions, joint_weakness, pair_proxy, weight_norm


def train(task: Task, regime: Regime, first: int, stop: int, source: Source) -> Tensors:
    """Train networks ``first`` to ``stop - 1`` of a regime together, and measure them.

    Returns:
        What :func:`~lowland.studies.illusion.evaluation.evaluate` gives; ``epochs`` and
        ``learnt``, the accuracy on the training points; of tasks with pair proxies the last hidden
        layer's outputs, ``features_train`` and ``features_unseen``; of networks that will be
        rescaled the weights, ``weights_0`` and so on.
    """
    with threads(1):
        data = points(task, regime.size, source)
        generators = [stream(regime.first + seed, BATCHES) for seed in range(first, stop)]
        begin = start(task, regime, data, first, stop)
        trained = descend(begin, data.x_train, data.y_train, regime.how, generators)
        found = evaluate(trained.weights, data, bound=not task.large_batch)
        found |= {"epochs": trained.epochs, "learnt": trained.accuracy}
        if task.unseen:
            found |= _features(task, trained.weights, data.x_train[0], data.x_test[0])
    if regime.batch == SMALL and first < task.rescaled:
        chosen = slice(0, min(stop, task.rescaled) - first)
        kept = select(trained.weights, chosen)
        found |= {f"weights_{place}": layer for place, layer in enumerate(kept)}
    return found


def _features(task: Task, weights: Weights, train: Tensor, test: Tensor) -> Tensors:
    each = [
        tuple(hidden(network, x)[-1] for x in (train, test[: task.unseen]))
        for network, _, _ in one_by_one(weights, train[None], train[None])
    ]
    seen, unseen = (torch.stack(side) for side in zip(*each, strict=True))
    return {"features_train": seen, "features_unseen": unseen}


@dataclass(frozen=True)
class LastLayer:
    """What the last layer of one network sees, at training points and at others."""

    seen: Float[Tensor, "train features"]
    labels: Int[Tensor, " train"]
    unseen: Float[Tensor, "unseen features"]
    classes: int


def pairs(layer: LastLayer) -> Tensors:
    """The pair proxy of one network: ``count``, ``undecided`` and ``separable``."""
    with threads(1):
        proxy = pair_proxy(layer.seen, layer.labels, layer.unseen, layer.classes)
    return {
        "count": torch.tensor(proxy.count),
        "undecided": proxy.undecided.sum(),
        "separable": torch.tensor(proxy.separable is True),
    }


def joint(preset: Preset, layer: LastLayer, seed: int) -> Tensors:
    """The joint weakness of one network: ``log_effective``, its ``stderr``, and ``r_hat``."""
    with threads(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # r_hat is kept, and judged in the table
        found = joint_weakness(
            layer.seen,
            layer.labels,
            layer.unseen,
            layer.classes,
            generator=stream(seed, JOINT),
            chains=preset.joint_chains,
            samples=preset.joint_samples,
            thinning=preset.joint_thinning,
            burn_in=preset.joint_burn_in,
        )
    values = {"log_effective": found.log_effective, "stderr": found.stderr, "r_hat": found.r_hat}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def rescale(task: Task, regime: Regime, weights: Weights, source: Source) -> Tensors:
    """One network under every rescaling, in double precision, as it is first of all.

    Returns:
        ``layer`` and ``factor``, and what :func:`~lowland.studies.illusion.evaluation.rescaled`
        finds there.
    """
    kinds = [(0, 1.0), *((0, factor) for factor in task.factors)]
    kinds += [(1, factor) for factor in task.second_factors]
    with threads(1):
        data = points(task, regime.size, source).double()
        network = tuple(layer.double() for layer in weights)
        rows = [
            {"layer": float(layer), "factor": factor, **rescaled(network, data, layer, factor)}
            for layer, factor in kinds
        ]
    return columns(rows)


def hsr(preset: HsrPreset, controlled: Tensors, unseen: int) -> Tensors:
    """Sharpness and weakness of networks of the HSR study's control experiment.

    The classes overlap, so that no last layer classifies every training point correctly. The pair
    proxy is that of the classes which the network itself gives to the training points.

    Args:
        preset: The study's.
        controlled: Networks that it trained.
        unseen: Test points of the pair proxy.
    """
    x, y = hsr_task.samples(preset, preset.train_size)
    test, _ = hsr_task.samples(preset, preset.test_size, test=True)
    weights = hsr_task.unflatten(preset, controlled["parameters"])
    values = controlled["eigenvalues"]
    moments = HessianMoments(values.shape[1], values.sum(1), values.square().sum(1))
    with threads(1):
        rows = [
            _hsr_row(network, x[0], test[0], unseen) for network, _, _ in one_by_one(weights, x, y)
        ]
    return columns(rows) | {
        "seed": controlled["seed"],
        "lambda_max": values[:, -1].clone(),
        "trace": moments.trace,
        "bound": moments.upper,
        "macro_f1": controlled["macro_f1"],
    }


def _hsr_row(network: Weights, x: Tensor, test: Tensor, unseen: int) -> dict[str, float]:
    (first,), (last,) = network
    before = [torch.addmm(first[0], points, first[1:]) for points in (x, test)]
    seen, new = (torch.sigmoid(values) for values in before)
    own = (torch.addmm(last[0], seen, last[1:])[:, 0] > 0).long()
    proxy = pair_proxy(seen, own, new[:unseen], 2)
    return {
        "pair_proxy": float(proxy.count) if proxy.separable else math.nan,
        "free_regions": free_regions(*before),
        "patterns": count_patterns(before[1]),
        "l2_norm": weight_norm(network),
    }

"""Where flatter minima classify better: the gain in test macro-F1 against the training size.

The paper reports a gain from sharp seeds, but not how many samples it trained on. Here many data
sets are drawn for each size: with few samples the gain depends on which ones, so data sets, not
networks, are what intervals are taken over. Source of the question: arXiv:2606.28662, figure 14.
"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import torch

from lowland.studies.ensembles.networks import select
from lowland.studies.ensembles.training import BASELINE, train
from lowland.studies.hsr.performance import macro_f1
from lowland.studies.hsr.preset import Preset
from lowland.studies.hsr.search import ACTIVATION, LOSS, sharpest
from lowland.studies.hsr.task import samples, start
from lowland.studies.runs.jobs import Tensors
from lowland.threads import threads


def sweep(preset: Preset, train_size: int, hidden: int, datasets: int) -> Tensors:
    """All data sets of one training size and one width, in one ensemble; a piece of the sweep.

    Returns:
        ``converged``, the share of each data set's seeds that did; and for each network that was
        trained again ``dataset``, ``seed``, ``baseline``, its macro-F1 by plain descent, and the
        macro-F1 and largest eigenvalue by each method, ``f1_*`` and ``lambda_max_*``.
    """
    cell = replace(preset, train_size=train_size, hidden=hidden)
    # Not the study's own data, whose seed this is.
    drawn = [
        samples(replace(cell, data_seed=cell.data_seed + 1 + index), train_size)
        for index in range(datasets)
    ]
    x, y = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    owner = torch.arange(datasets).repeat_interleave(preset.sweep_seeds)
    begin = start(cell, list(range(len(owner))))
    schedule = replace(preset.schedule, checkpoints=2)
    with threads(1):
        (found,) = train(
            [BASELINE],
            begin,
            x[owner],
            y[owner],
            schedule=schedule,
            activation=ACTIVATION,
            loss=LOSS,
        )
        bound = found.curves["upper_bound"][-1]
        again = torch.cat(
            [
                own[sharpest(bound[own], preset.share)]
                for index in range(datasets)
                if len(own := ((owner == index) & found.converged).nonzero().flatten())
            ]
            or [owner[:0]]
        )
        result = {
            "converged": found.converged.unflatten(0, (datasets, -1)).double().mean(1),
            "dataset": owner[again],
            "seed": again,
            "baseline": macro_f1(cell, select(found.weights, again)) if len(again) else bound[:0],
        }
        for name, method in preset.sweep_methods.items():
            if not len(again):
                result |= dict.fromkeys((f"f1_{name}", f"lambda_max_{name}"), bound[:0])
                continue
            (trained,) = train(
                [method],
                select(begin, again),
                x[owner[again]],
                y[owner[again]],
                schedule=schedule,
                activation=ACTIVATION,
                loss=LOSS,
            )
            result[f"f1_{name}"] = macro_f1(cell, trained.weights)
            result[f"lambda_max_{name}"] = trained.lambda_max[-1]
    return result


def gains(cell: Tensors, method: str) -> pd.Series[float]:
    """What a method adds to the baseline's macro-F1, in percentage points: one value a data set."""
    gain = 100 * (cell[f"f1_{method}"] - cell["baseline"]).numpy()
    means: pd.Series[float] = pd.Series(gain).groupby(cell["dataset"].numpy()).mean()
    return means

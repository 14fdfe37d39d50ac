"""The study's results as tables: one row a network, one row a correlation, one row a rescaling."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from lowland.studies.illusion.preset import LARGE, SMALL, Task
from lowland.studies.illusion.run import Results
from lowland.studies.reporting.statistics import Correlation, spearman
from lowland.studies.runs.jobs import Tensors
from lowland.weakness import ensemble_agreement

MEASURES = {
    "trace": "Hessian trace",
    "bound": "HSR's bound on λ_max",
    "l2_norm": "L2 norm",
    "l1_norm": "L1 norm",
    "pair_proxy": "pair proxy",
    "joint": "joint weakness",
    "patterns_1": "unseen patterns, layer 1",
    "patterns_2": "unseen patterns, layer 2",
    "free_parameters": "free parameters",
    "free_regions": "free regions",
    "agreement": "ensemble agreement",
}
"""What is held against test accuracy, for people."""

ASKED: dict[str, tuple[str, ...]] = {
    "pairs": ("trace", "bound", "l2_norm", "pair_proxy", "joint"),
    "selection": (
        *("trace", "bound", "l2_norm", "l1_norm"),
        *("patterns_2", "free_parameters", "free_regions"),
    ),
    "advantage": ("trace", "patterns_1", "patterns_2", "agreement"),
}
"""By kind of task."""

HSR_MEASURES = {
    "lambda_max": "λ_max",
    "trace": "Hessian trace",
    "bound": "HSR's bound on λ_max",
    "pair_proxy": "pair proxy",
    "free_regions": "free regions",
    "l2_norm": "L2 norm",
}
"""What is held against the test F1 of the HSR study's networks."""

_PARTS = ("weights_", "features_", "predictions")


def networks(results: Results) -> pd.DataFrame:
    """One row a network: where it belongs, what it got right, and every measure."""
    rows = []
    for task in results.tasks():
        agreement = _agreement(results, task)
        for regime in results.preset.regimes(task):
            found = results.trained[regime.name]
            values = {k: v.numpy() for k, v in found.items() if not k.startswith(_PARTS)}
            extra = results.joint.get(task.name, {})
            values |= {
                name: extra[key].numpy()
                for name, key in (
                    *(("joint", "log_effective"), ("joint_stderr", "stderr")),
                    ("joint_r_hat", "r_hat"),
                )
                if extra
            }
            pairs = results.pairs.get(task.name)
            if pairs:
                values["pair_proxy"] = pairs["count"].numpy()
                values["undecided"] = pairs["undecided"].numpy()
            rows.append(
                pd.DataFrame(
                    {
                        "task": task.name,
                        "size": regime.size,
                        "batch": regime.batch,
                        "seed": range(regime.first, regime.first + task.seeds),
                        **values,
                        "agreement": agreement[regime.name],
                    }
                )
            )
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def _agreement(results: Results, task: Task) -> dict[str, np.ndarray]:
    """The agreement of each network with all others of its size, whatever their batch."""
    found = {}
    for size in task.sizes:
        regimes = [regime for regime in results.preset.regimes(task) if regime.size == size]
        classes = torch.cat([results.trained[regime.name]["predictions"] for regime in regimes])
        values = ensemble_agreement(classes.long(), results.labels[task.name]).numpy()
        for regime, part in zip(regimes, np.split(values, len(regimes)), strict=True):
            found[regime.name] = part
    return found


def asked(results: Results, table: pd.DataFrame, task: Task) -> Iterator[tuple[int, pd.DataFrame]]:
    """The networks of each size that are compared.

    A pair proxy is one of networks that learnt their points; the other measures of that task are
    then held against the same networks.
    """
    own = table[table["task"] == task.name]
    if task.kind == "pairs":
        own = own[own["learnt"] >= results.preset.enough]
    for size in task.sizes:
        yield size, own[own["size"] == size]


def varies(part: pd.DataFrame, measure: str) -> bool:
    """Whether a measure was taken, and tells networks apart."""
    return measure in part and bool(part[measure].max() > part[measure].min())


def correlations(results: Results) -> pd.DataFrame:
    """One row for each measure of a task, a size and a regime: its correlation with accuracy."""
    table, rows = networks(results), []
    for task in results.tasks():
        for size, part in asked(results, table, task):
            groups = {"all": part}
            if task.large_batch:
                groups |= {name: part[part["batch"] == name] for name in (SMALL, LARGE)}
            for batch, group in groups.items():
                for measure in ASKED[task.kind]:
                    if varies(group, measure):
                        found = correlation(results, group, measure)
                        key = {"task": task.name, "size": size, "batch": batch}
                        rows.append({**key, "measure": measure, **vars(found)})
    return pd.DataFrame(rows)


def correlation(results: Results, group: pd.DataFrame, measure: str) -> Correlation:
    """The rank correlation of a measure with the test accuracy."""
    x, y = (group[name].to_numpy(np.float64) for name in (measure, "accuracy"))
    return spearman(x, y, resamples=results.preset.resamples)


def rescalings(results: Results) -> pd.DataFrame:
    """One row for each network and rescaling."""
    rows = []
    for task, regime, found in results.rescalings():
        count, kinds = found["factor"].shape
        rows.append(
            pd.DataFrame(
                {
                    "task": task.name,
                    "size": regime.size,
                    "seed": np.repeat(np.arange(count), kinds),
                    **{key: value.flatten().numpy() for key, value in found.items()},
                }
            )
        )
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def hsr_networks(results: Results) -> pd.DataFrame:
    """One row for each network of the HSR study."""
    return pd.concat([_hsr(*key, part) for key, part in results.hsr.items()], ignore_index=True)


def _hsr(kind: str, method: str, part: Tensors) -> pd.DataFrame:
    return pd.DataFrame(
        {"kind": kind, "method": method, **{name: value.numpy() for name, value in part.items()}}
    )


def hsr_correlations(results: Results) -> pd.DataFrame:
    """One row for each measure and method of the HSR study: its correlation with the test F1.

    Networks of one seed under several methods hang together: of all of them there is an interval,
    which draws seeds, and no p-value.
    """
    table, rows = hsr_networks(results), []
    groups = {"all": table, **{str(name): own for name, own in table.groupby("method", sort=False)}}
    for method, group in groups.items():
        for measure in HSR_MEASURES:
            found = hsr_correlation(results, group, measure, together=method == "all")
            rows.append({"method": method, "measure": measure, **vars(found)})
    return pd.DataFrame(rows)


def hsr_correlation(
    results: Results, group: pd.DataFrame, measure: str, *, together: bool
) -> Correlation:
    """The rank correlation of a measure with the test F1."""
    x, y, seeds = (group[name].to_numpy(np.float64) for name in (measure, "macro_f1", "seed"))
    clusters = seeds if together else None
    return spearman(x, y, resamples=results.preset.resamples, clusters=clusters)


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """Everything, by name: ``networks``, ``correlations``, ``rescalings``, ``hsr``..."""
    result = {"networks": networks(results), "correlations": correlations(results)}
    if results.rescaled:
        result["rescalings"] = rescalings(results)
    if results.hsr:
        result |= {"hsr": hsr_networks(results), "hsr_correlations": hsr_correlations(results)}
    return result

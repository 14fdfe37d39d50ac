"""The study's results as tables, one row a network."""

from __future__ import annotations

import pandas as pd

from lowland.studies.ensembles.training import CURVES
from lowland.studies.hsr.run import Results
from lowland.studies.runs.jobs import Tensors


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """``search``, ``control`` and its ``curves``, ``alignment`` and ``sweep``; if they were run."""
    result = {}
    if results.found:
        result["search"] = search_table(results)
    if results.controlled:
        result["control"] = pd.concat(
            [_control(*key, part) for key, part in results.controlled.items()], ignore_index=True
        )
        steps = results.preset.schedule.checkpoint_steps
        result["curves"] = pd.concat(
            [_curves(steps, *key, part) for key, part in results.controlled.items()],
            ignore_index=True,
        )
    if "alignment" in results.theory:
        result["alignment"] = _alignment(results.theory["alignment"])
    if results.sweep:
        result["sweep"] = pd.concat(
            [_sweep(*key, cell) for key, cell in results.sweep.items()], ignore_index=True
        )
    return result


def search_table(results: Results) -> pd.DataFrame:
    """One row a seed; ``kind`` is sharp, flat, distinct, duplicate or unconverged."""
    columns = ("seed", "steps", "loss", "lambda_max", "lambda_min", "upper_bound", "lower_bound")
    table = pd.DataFrame({name: results.found[name].numpy() for name in columns})
    kinds = pd.Series("unconverged", index=table.index)
    for kind, index in (
        ("duplicate", results.selection.converged),
        ("distinct", results.selection.distinct),
        ("flat", results.selection.flat),
        ("sharp", results.selection.sharp),
    ):
        kinds.iloc[index.numpy()] = kind
    table.insert(1, "kind", kinds)
    return table


def _control(kind: str, method: str, part: Tensors) -> pd.DataFrame:
    eigenvalues = part["eigenvalues"]
    return pd.DataFrame(
        {
            "kind": kind,
            "method": method,
            "seed": part["seed"].numpy(),
            "steps": part["steps"].numpy(),
            "converged": part["converged"].numpy(),
            **{name: part[f"curve_{name}"][:, -1].numpy() for name in CURVES},
            "mean": eigenvalues.mean(1).numpy(),
            "std": eigenvalues.std(1, correction=0).numpy(),
            "macro_f1": part["macro_f1"].numpy(),
        }
    )


def _curves(steps: list[int], kind: str, method: str, part: Tensors) -> pd.DataFrame:
    seeds = part["seed"].numpy()
    return pd.DataFrame(
        {
            "kind": kind,
            "method": method,
            "seed": seeds.repeat(len(steps)),
            "step": steps * len(seeds),
            **{name: part[f"curve_{name}"].flatten().numpy() for name in CURVES},
        }
    )


def _alignment(found: Tensors) -> pd.DataFrame:
    """One row a network at each place, after so many steps in training."""
    steps, columns = found["steps"], ("bound", "trace", "gap")
    parts = []
    for place in ("random", "training", "critical"):
        table = {name: found[f"{place}_{name}"] for name in columns}
        networks = table["gap"].shape[-1]
        part = pd.DataFrame({name: values.flatten().numpy() for name, values in table.items()})
        part.insert(0, "place", place)
        own = steps.repeat_interleave(networks).tolist() if place == "training" else pd.NA
        part.insert(1, "step", pd.Series(own, index=part.index, dtype="Int64"))
        part.insert(2, "network", list(range(networks)) * (len(part) // networks))
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _sweep(hidden: int, train_size: int, cell: Tensors) -> pd.DataFrame:
    networks = {name: value.numpy() for name, value in cell.items() if name != "converged"}
    table = pd.DataFrame({"hidden": hidden, "train_size": train_size, **networks})
    table.insert(4, "seeds_converged", cell["converged"].numpy()[cell["dataset"].numpy()])
    return table

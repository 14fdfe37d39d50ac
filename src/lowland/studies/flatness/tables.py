"""The study's results as tables: one row a network, and one row a method."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lowland.studies.flatness.preset import Task, Way
from lowland.studies.flatness.run import Results
from lowland.studies.reporting.numbers import number, plus_minus
from lowland.studies.reporting.reproduction import Listing

Array = NDArray[np.float64]

MEASURES = ("final_accuracy", "best_accuracy", "average_flatness", "final_trace_sq", "seconds")

PUBLISHED = (
    ("0", "0.2633", "0.2800", "0 (not measured)", "60.85", ""),
    ("0.001", "0.2633", "0.2833", "23.050", "2290.77", "37.6"),
    ("0.01", "0.2700", "0.2783", "10.739", "2433.53", "40.0"),
    ("0.1", "0.2667", "0.2967", "4.144", "2203.87", "36.2"),
    ("1", "0.2583", "0.2983", "1.550", "2337.86", "38.4"),
)
"""The paper's table: weight, final and best accuracy, average flatness, seconds, multiple."""


def networks(results: Results) -> pd.DataFrame:
    """One row a network: task, method, strength, seed, and what came of it."""
    parts = []
    for task in results.tasks:
        for name, way in results.preset.ways(task).items():
            part = {key: value.numpy() for key, value in results.trained[task.name, name].items()}
            accuracy = part["accuracy"]
            parts.append(
                pd.DataFrame(
                    {
                        "task": task.name,
                        "method": way.kind,
                        "strength": way.strength,
                        "seed": range(task.seeds),
                        "final_accuracy": accuracy[:, -1],
                        "best_accuracy": accuracy.max(1),
                        "average_flatness": part["flatness"].mean(1),
                        "final_trace_sq": part["trace_sq"],
                        "final_trace_sq_stderr": part["stderr"],
                        "final_loss": part["loss"],
                        "seconds": part["seconds"],
                        "failed": part["failed"],
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def values(table: pd.DataFrame, task: Task, way: Way, measure: str) -> Array:
    """A measure of one way's networks, seed after seed."""
    chosen = (table["task"] == task.name) & (table["method"] == way.kind)
    return table.loc[chosen & (table["strength"] == way.strength), measure].to_numpy(float)


def multiples(results: Results, task: Task) -> dict[str, Array]:
    """What a step costs, in steps of the baseline: one ratio a round, by way."""
    seconds = results.timing[task.name].numpy()
    names = list(results.preset.ways(task))
    return {name: seconds[:, i] / seconds[:, 0] for i, name in enumerate(names)}


def summary(results: Results) -> pd.DataFrame:
    """One row a task and way: means over seeds, standard errors, and the cost of a step."""
    table = networks(results)
    rows = []
    for task in results.tasks:
        cost = multiples(results, task)
        for name, way in results.preset.ways(task).items():
            row: dict[str, object] = {
                "task": task.name,
                "method": way.kind,
                "strength": way.strength,
                "networks": task.seeds,
                "failed": int(values(table, task, way, "failed").sum()),
            }
            for measure in MEASURES:
                found = values(table, task, way, measure)
                row[measure] = found.mean()
                row[f"{measure}_stderr"] = found.std(ddof=1) / math.sqrt(len(found))
            low, middle, high = np.quantile(cost[name], (0.25, 0.5, 0.75))
            rows.append(row | {"multiple": middle, "multiple_q1": low, "multiple_q3": high})
    return pd.DataFrame(rows)


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """``networks``, their ``summary``, and the ``curves`` of accuracy and flatness."""
    accuracy, flatness = [], []
    for task in results.tasks:
        for name, way in results.preset.ways(task).items():
            part = results.trained[task.name, name]
            for seed in range(task.seeds):
                key = {"task": task.name, "method": way.kind, "strength": way.strength}
                key |= {"seed": seed}
                reached = part["accuracy"][seed].numpy()
                epochs = range(1, len(reached) + 1)
                accuracy.append(pd.DataFrame({**key, "epoch": epochs, "accuracy": reached}))
                steps, seen = part["looks"][seed].numpy(), part["flatness"][seed].numpy()
                flatness.append(pd.DataFrame({**key, "step": steps, "flatness": seen}))
    return {
        "networks": networks(results),
        "summary": summary(results),
        "accuracy": pd.concat(accuracy, ignore_index=True),
        "flatness": pd.concat(flatness, ignore_index=True),
    }


def listings(results: Results) -> list[Listing]:
    """The paper's table, and ours for each task."""
    found = summary(results)
    published = Listing(
        "The paper's table",
        "As published, for a two-layer ReLU MLP on CIFAR-100; the last column is the time over "
        "that of λ = 0. All ten accuracies are multiples of 1/600: with 600 test images the "
        "standard error of each would be 0.018, as large as the largest of the differences.",
        ("λ", "final accuracy", "best accuracy", "average flatness", "time, s", "multiple"),
        PUBLISHED,
    )
    return [published, *(_listing(results, task, found) for task in results.tasks)]


def _listing(results: Results, task: Task, found: pd.DataFrame) -> Listing:
    rows = []
    for way in results.preset.ways(task).values():
        chosen = (found["task"] == task.name) & (found["method"] == way.kind)
        row = found[chosen & (found["strength"] == way.strength)].iloc[0]
        percent = [
            plus_minus(100 * row[name], 100 * row[f"{name}_stderr"])
            for name in ("final_accuracy", "best_accuracy")
        ]
        others = [
            plus_minus(row[name], row[f"{name}_stderr"])
            for name in ("average_flatness", "final_trace_sq", "seconds")
        ]
        failed = f" ({row['failed']} of {row['networks']} failed)" if row["failed"] else ""
        rows.append((way.title + failed, *percent, *others, number(row["multiple"])))
    return Listing(
        results.titles[task.name],
        f"Means over {task.seeds} seeds and standard errors; λ = 0 is plain SGD, and λ > 0 "
        "the flatness-aware penalty. Average flatness is the mean of Tr(H²)/B over batches of "
        f"{task.batch} seen in training, Tr H² that of the training loss at the end. The time is "
        "that of the steps alone, beside other runs; the multiple, of a step's time over the "
        "baseline's, is the median over rounds in which the methods take turns."
        + (
            " Networks failed where the loss ended no lower than that of the classes' shares alone."
            if any("failed" in row[0] for row in rows)
            else ""
        ),
        (
            "method",
            "final accuracy, %",
            "best accuracy, %",
            "average flatness",
            "Tr H² at the end",
            "time, s",
            "multiple",
        ),
        rows,
    )

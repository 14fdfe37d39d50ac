"""Fit the prices of lowland.exact.plan, and see how well the model chooses between the orders.

Times every path on a grid of sizes, fits one price for each kind of work by non-negative least
squares on relative errors, and reports how often the cheaper order is chosen and what a wrong
choice costs.
"""

from __future__ import annotations

import itertools
import statistics
import time

import numpy as np
import torch
from exact import Case
from scipy.optimize import nnls

from lowland.exact import engine
from lowland.exact.api import prepare
from lowland.exact.plan import DEFAULT_MEMORY_BUDGET, PRICES, Path, cost, work

GRID = list(itertools.product((30, 100, 300, 1_000, 3_000), (2, 10, 30, 100), (2, 8, 32)))
DEAREST = 2.0  # seconds; a size that the present prices expect to take longer is left out


def measure(case: Case, path: Path) -> float:
    setup = prepare(case.weights, case.x, case.y, "sigmoid", "bce", "mean")
    order = "samples" if path == "samples" else "parameters"
    problem = setup.problem(order, DEFAULT_MEMORY_BUDGET, compiled=path == "compiled")
    times = []
    for _ in range(6):
        start = time.perf_counter()
        first, second = engine.run_moments(problem, setup.weight, setup.output)
        torch.autograd.grad((first + second).sum(), [setup.weight, setup.output])
        times.append(time.perf_counter() - start)
    return min(times)  # other work on the machine can only add


def main() -> None:
    paths: tuple[Path, ...] = ("samples", "parameters", "compiled")
    times: dict[Path, list[float]] = {path: [] for path in paths}
    sizes = []
    for samples, inputs, hidden in GRID:
        case = Case(samples, inputs, hidden)
        size = prepare(case.weights, case.x, case.y, "sigmoid", "bce", "mean").size
        if max(cost(size, path) for path in paths) > DEAREST:
            continue
        sizes.append(size)
        for path in paths:
            times[path].append(measure(case, path))
    print(f"{len(sizes)} sizes\n")
    fitted: dict[Path, np.ndarray] = {}
    for path in paths:
        seconds = np.array(times[path])
        features = np.array([work(size, path) for size in sizes])
        fitted[path], _ = nnls(features / seconds[:, None], np.ones(len(seconds)))
        off = np.abs(np.log(features @ fitted[path] / seconds))
        print(f'    "{path}": ({", ".join(f"{price:.1e}" for price in fitted[path])}),', end="")
        print(f"  # median factor off {np.exp(np.median(off)):.2f}, now {PRICES[path]}")
    for rival in paths[1:]:
        report_choices(sizes, times, fitted, rival)


def report_choices(sizes: list, times: dict, fitted: dict, rival: Path) -> None:
    regrets = []
    for index, size in enumerate(sizes):
        guesses = {
            path: float(np.dot(work(size, path), fitted[path])) for path in ("samples", rival)
        }
        chosen = min(guesses, key=guesses.__getitem__)
        regrets.append(times[chosen][index] / min(times["samples"][index], times[rival][index]))
    right = sum(regret == 1 for regret in regrets)
    worst = sizes[int(np.argmax(regrets))]
    print(
        f"\nsamples against {rival}: right in {right} of {len(regrets)}; a choice costs "
        f"{statistics.mean(regrets):.2f} times the best on average, {max(regrets):.2f} at worst\n"
        f"({worst.samples} samples, {worst.inputs - 1} inputs, {worst.hidden} hidden)"
    )


if __name__ == "__main__":
    main()

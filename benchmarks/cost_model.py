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
from deep import Case
from scipy.optimize import nnls

from lowland._limits import DEFAULT_MEMORY_BUDGET
from lowland.exact import problem as problems
from lowland.exact.modules import read
from lowland.exact.plan import PRICES, Path, cost, work
from lowland.exact.setup import Setup
from lowland.exact.size import Size

SAMPLES = (30, 100, 300, 1_000, 3_000)
ONE_HIDDEN = [(inputs, hidden, 1) for inputs in (2, 10, 30, 100) for hidden in (2, 8, 32)]
DEEPER = [(64, 32, 10), (10, 8, 8, 3), (30, 16, 16, 1), (5, 4, 4, 4, 4, 2), (200, 20, 5), (20, 4)]
DEAREST = 2.0  # seconds; a size that the present prices expect to take longer is left out


def measure(setup: Setup, path: Path) -> float:
    order = "samples" if path == "samples" else "parameters"
    problem = setup.problem(order, DEFAULT_MEMORY_BUDGET, compiled=path == "compiled")
    times = []
    for _ in range(4):
        start = time.perf_counter()
        first, second = problems.run_moments(problem, setup.weights)
        torch.autograd.grad((first + second).sum(), setup.weights)
        times.append(time.perf_counter() - start)
    return min(times)  # other work on the machine can only add


def main() -> None:
    paths: tuple[Path, ...] = ("samples", "parameters", "compiled")
    times: dict[Path, list[float]] = {path: [] for path in paths}
    sizes: dict[Path, list[Size]] = {path: [] for path in paths}
    for samples, widths in itertools.product(SAMPLES, ONE_HIDDEN + DEEPER):
        case = Case(widths, samples)
        setup = read(case.model, case.criterion, case.x, case.y)
        own = [path for path in paths if path != "compiled" or widths in ONE_HIDDEN]
        if max(cost(setup.size, path) for path in own) > DEAREST:
            continue
        for path in own:
            sizes[path].append(setup.size)
            times[path].append(measure(setup, path))
    print(f"{len(sizes['samples'])} sizes, {len(sizes['compiled'])} of them compiled\n")
    fitted: dict[Path, np.ndarray] = {}
    for path in paths:
        seconds = np.array(times[path])
        features = np.array([work(size, path) for size in sizes[path]])
        fitted[path], _ = nnls(features / seconds[:, None], np.ones(len(seconds)))
        off = np.abs(np.log(features @ fitted[path] / seconds))
        print(f'    "{path}": ({", ".join(f"{price:.1e}" for price in fitted[path])}),', end="")
        print(f"  # median factor off {np.exp(np.median(off)):.2f}, now {PRICES[path]}")
    for rival in paths[1:]:
        report_choices(sizes, times, fitted, rival)


def report_choices(sizes: dict, times: dict, fitted: dict, rival: Path) -> None:
    regrets = []
    by_samples = dict(zip(sizes["samples"], times["samples"], strict=True))
    for size, by_rival in zip(sizes[rival], times[rival], strict=True):
        guesses = {
            path: float(np.dot(work(size, path), fitted[path])) for path in ("samples", rival)
        }
        taken = {"samples": by_samples[size], rival: by_rival}
        regrets.append(taken[min(guesses, key=guesses.__getitem__)] / min(taken.values()))
    right = sum(regret == 1 for regret in regrets)
    worst = sizes[rival][int(np.argmax(regrets))]
    print(
        f"\nsamples against {rival}: right in {right} of {len(regrets)}; a choice costs "
        f"{statistics.mean(regrets):.2f} times the best on average, {max(regrets):.2f} at worst\n"
        f"({worst.samples} samples, widths {worst.widths})"
    )


if __name__ == "__main__":
    main()

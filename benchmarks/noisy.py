"""What cheap versions of penalties lose where labels are noisy, and what they cost.

MNIST's test images, 5,000 to train with and 5,000 to validate by, 40 % of the training labels drawn
anew from all ten; 784→128→10 with ReLU units, 30 epochs of batches of 64, SGD with momentum 0.9 and
a rate that follows a cosine from 0.05. Every penalty in full against the same on a part of each
batch, or in some steps alone. The result is printed, with ``--keep`` it is kept in
benchmarks/README.md; trainings that are in ``--out`` are not run again.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from timing import interleaved, median_ratio
from trainings import Job, Results, command_line, data_of, measured, network, table, tell, ways

PLAIN = Job("MNIST", noise=0.4, steps=30 * 79, sharpness=True)
PENALTIES = {
    "HSR": (
        {"strength": 0.3, "method": "probes"},
        ({"samples": 0.25}, {"samples": 0.25, "every": 4}),
    ),
    "HessianTrace": ({"strength": 0.3}, ({"samples": 0.25, "every": 2},)),
    "LambdaMax": ({"strength": 0.3}, ({"samples": 0.5},)),
}
POINTS, SHARPER = 0.7, 0.2  # of accuracy, and of the largest eigenvalue, that may be lost
ROUNDS = 101


def ways_of_training() -> dict[str, tuple[Job, str | None]]:
    """Each way, and the full version that it is measured by."""
    found: dict[str, tuple[Job, str | None]] = {
        "plain": (PLAIN, None),
        "weight decay 0.01": (replace(PLAIN, decay=0.01), None),
        "SAM 0.2": (replace(PLAIN, method="SAM", settings={"rho": 0.2}), None),
    }
    for name, (full, cheap) in PENALTIES.items():
        said = ", ".join(f"{key}={value}" for key, value in full.items())
        title = f"{name}, {said}"
        found[title] = replace(PLAIN, method=name, settings=full), None
        for each in cheap:
            said = ", ".join(f"{key}={value}" for key, value in each.items())
            found[f"{name}, {said}"] = replace(PLAIN, method=name, settings=full | each), title
    return found


def costs(jobs: dict[str, Job]) -> dict[str, float]:
    """A step of each in plain ones, its update included; of one in some steps, their average."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "the limit of")  # repeated on one batch it often acts

    def steps(job: Job) -> Callable[[], None]:
        job = replace(job, rate=1e-6)  # a long measurement stays at the same network
        data = data_of(job)
        _, step, penalty = ways(job, network(job, data.x.shape[1], data.classes))

        def run() -> None:
            for _ in range(penalty.every if penalty else 1):
                step(data.x[: job.batch], data.y[: job.batch])

        return run

    every = {name: job.settings.get("every", 1) for name, job in jobs.items()}
    times = interleaved({name: steps(job) for name, job in jobs.items()}, rounds=ROUNDS)
    return {name: median_ratio(times[name], times["plain"]) / every[name] for name in jobs}


def report(results: Results, seeds: range) -> str:
    jobs = ways_of_training()
    cost = costs({name: job for name, (job, _) in jobs.items()})

    def values(name: str, key: str) -> list[float]:
        return [results[replace(jobs[name][0], seed=seed)][key] for seed in seeds]

    rows, missed = [], 0
    for name, (_, full) in jobs.items():
        accuracy, nll, sharp = (values(name, key) for key in ("accuracy", "nll", "sharpness"))
        spread = f" ± {100 * statistics.stdev(accuracy):.1f}" if len(seeds) > 1 else ""
        judged = ["", ""]
        if full:
            points = 100 * (statistics.mean(accuracy) - statistics.mean(values(full, "accuracy")))
            factor = statistics.mean(sharp) / statistics.mean(values(full, "sharpness"))
            missed += points < -POINTS or not abs(factor - 1) <= SHARPER
            judged = [f"{points:+.1f}", f"{factor:.2f}"]
        rows.append(
            [
                name,
                f"{100 * statistics.mean(accuracy):.1f}{spread}",
                f"{statistics.mean(nll):.3f}",
                f"{statistics.mean(sharp):.1f}",
                *judged,
                f"{cost[name]:.2f}",
            ]
        )
    head = (
        f"{len(seeds)} seeds, means, and deviations between seeds; λ_max of 1,000 training samples "
        f"at the end; time in plain steps, medians of {ROUNDS} interleaved rounds. **{missed}** "
        f"cheap versions miss the reach: at most {POINTS} points below the full one, λ_max within "
        f"{SHARPER:.0%} of its."
    )
    heads = ["training", "accuracy, %", "NLL", "λ_max", "points to full", "λ_max to full", "steps"]
    return f"{head}\n\n{table(heads, rows)}"


def main() -> None:
    parser = command_line(__doc__, "noisy.jsonl")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    seeds = range(1 if arguments.quick else arguments.seeds)
    ways = [job for job, _ in ways_of_training().values()]
    jobs = [replace(job, seed=seed) for seed in seeds for job in ways]
    results = measured(jobs, arguments.out, arguments.jobs)
    tell("noisy.py", report(results, seeds), write=arguments.keep)


if __name__ == "__main__":
    main()

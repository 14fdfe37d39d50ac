"""Whether the strength of a penalty that is best on one data set is so on others.

40 % of the training labels are drawn anew from all classes; for each data set and penalty the best
strength by accuracy on clean validation data, mean over seeds. It is to be within one step, a
factor of about 3, of MNIST's best one. The same on MNIST with ``--invariance``, where the loss is
multiplied, the batch or the network is smaller or larger. The result is printed, with ``--keep`` it
is kept in benchmarks/README.md; trainings that are in ``--out`` are not run again.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

from trainings import (
    PENALTIES,
    TABLES,
    Job,
    Results,
    command_line,
    data_of,
    measured,
    table,
    tell,
)

DATA = ("MNIST", "Fashion-MNIST", "digits", *TABLES, "CIFAR-10")
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)
SAMPLES, NOISE = 1_000, 0.4
EPOCHS, OF_TABLES = 30, 100  # small inputs take longer to fit noise
CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "loss summed, times 64": {"scale": 64.0},
    "batch 32": {"batch": 32},
    "batch 128": {"batch": 128},
    "width 64": {"width": 64},
    "width 256": {"width": 256},
}
Ways = dict[tuple[str, str], list[list[Job]]]  # of each row: jobs of all seeds, plain ones first


def settings(name: str, strength: float, limit: float | None) -> dict[str, Any]:
    way = {"method": "probes"} if name in ("HSR", "FlatnessAware") else {}
    return {"strength": strength} | way | ({} if limit is None else {"limit": limit})


def with_epochs(job: Job, epochs: int) -> Job:
    epochs = OF_TABLES if job.data in TABLES else epochs
    return replace(job, steps=epochs * math.ceil(len(data_of(job).x) / job.batch))


def row(plain: Job, name: str, seeds: range, limit: float | None) -> list[list[Job]]:
    jobs = [replace(plain, seed=seed) for seed in seeds]
    penalized = [
        [replace(job, method=name, settings=settings(name, each, limit)) for job in jobs]
        for each in STRENGTHS
    ]
    return [jobs, *penalized]


def report(results: Results, ways: Ways, seeds: range) -> str:
    rows, missed, firsts = [], 0, {}
    for (label, name), jobs in ways.items():
        found = [100 * statistics.mean(results[job]["accuracy"] for job in each) for each in jobs]
        deviation = statistics.mean(
            100 * statistics.pstdev(results[job]["accuracy"] for job in each) for each in jobs
        )
        limited = [statistics.mean(results[job]["limited"] for job in each) for each in jobs[1:]]
        plain, *others = found
        best = max(range(len(others)), key=others.__getitem__)
        of_first = firsts.setdefault(name, best)
        missed += abs(best - of_first) > 1
        rows.append(
            [
                name,
                label,
                f"{plain:.1f}",
                " / ".join(f"{each:.1f}" for each in others),
                f"{deviation:.1f}",
                f"{STRENGTHS[best]:g}",
                f"{others[best] - others[of_first]:.1f}",
                " / ".join(f"{each:.0%}" for each in limited),
            ]
        )
    first = next(iter(ways.values()))[0][0]
    strengths = " / ".join(f"{each:g}" for each in STRENGTHS)
    head = (
        f"{NOISE:.0%} random labels, at most {first.samples:,} samples, {EPOCHS} epochs, of tables "
        f"{OF_TABLES}; {len(seeds)} seeds; accuracies in %. **{missed}** of {len(rows)} best "
        "strengths are more than one step away from the first row's (reach: 0)."
    )
    heads = ["penalty", "data", "plain", f"strength {strengths}", "deviation over seeds", "best"]
    heads += ["points lost by the first row's best", "limited"]
    return f"{head}\n\n{table(heads, rows)}"


def main() -> None:
    parser = command_line(__doc__, "strength.jsonl")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument(
        "--penalties", nargs="+", choices=PENALTIES, default=["HSR", "HessianTrace"]
    )
    parser.add_argument("--invariance", action="store_true", help="on MNIST, what is changed")
    parser.add_argument("--limit", type=float, help="of the penalties, in place of the usual one")
    arguments = parser.parse_args()
    seeds = range(1 if arguments.quick else arguments.seeds)
    data = ("digits",) if arguments.quick else arguments.data
    samples, epochs = (500, 5) if arguments.quick else (SAMPLES, EPOCHS)
    plain = {name: Job(name, samples=samples, noise=NOISE) for name in data}
    if arguments.invariance:
        first = plain[data[0]]
        plain = {name: replace(first, **change) for name, change in CHANGES.items()}
    plain = {name: with_epochs(job, epochs) for name, job in plain.items()}
    ways = {
        (label, name): row(job, name, seeds, arguments.limit)
        for name in arguments.penalties
        for label, job in plain.items()
    }
    jobs = [job for row in ways.values() for each in row for job in each]
    jobs.sort(key=lambda job: job.seed)  # what is interrupted has the first seeds in full
    results = measured(jobs, arguments.out, arguments.jobs)
    script = "strength.py --invariance" if arguments.invariance else "strength.py"
    tell(script, report(results, ways, seeds), write=arguments.keep)


if __name__ == "__main__":
    main()

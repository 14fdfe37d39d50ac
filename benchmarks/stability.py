"""Whether penalties keep an ordinary training stable, whatever their strength is.

Every penalty at strengths over two decades, or with ``--weights`` at weights, with optimizers and
learning rates as people have them and nothing that clips. Where plain training converges none may
end in NaN or with a loss on its training data above that of guessing. Traces are estimated from
one random direction a step, whose gradients have the heavy tails that matter here. The result is
printed, with ``--keep`` it is kept in benchmarks/README.md; trainings that are in ``--out`` are not
run again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from trainings import PENALTIES, Job, Results, command_line, measured, table, tell

DATA = ("MNIST", "Fashion-MNIST", "digits", "CIFAR-10")
OPTIMIZERS = (("SGD", 0.01), ("SGD", 0.05), ("SGD", 0.1), ("AdamW", 1e-3))
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)
# Penalized quantities differ by orders of magnitude, and what weights do with them.
WEIGHTS = {
    "HSR": (0.003, 0.01, 0.03, 0.1, 0.3),
    "HessianTrace": (0.0003, 0.001, 0.003, 0.01, 0.03),
    "FlatnessAware": (0.0003, 0.001, 0.003, 0.01, 0.03),
    "LambdaMax": (0.003, 0.01, 0.03, 0.1, 0.3),
}
SAMPLES, STEPS = 2_000, 300


def settings(name: str, *, weights: bool) -> Iterator[dict[str, Any]]:
    way = {} if name == "LambdaMax" else {"method": "probes"}
    for value in WEIGHTS[name] if weights else STRENGTHS:
        yield {"weight" if weights else "strength": value} | way


def plain_jobs(data: Sequence[str], *, quick: bool) -> list[Job]:
    """One of every data set and optimizer."""
    samples, steps = (500, 30) if quick else (SAMPLES, STEPS)
    return [
        Job(name, samples=samples, steps=steps, optimizer=optimizer, rate=rate)
        for name in data
        for optimizer, rate in OPTIMIZERS[3 * quick :]
    ]


def row(results: Results, plain: Job, name: str, *, weights: bool) -> list[str]:
    jobs = [replace(plain, method=name, settings=each) for each in settings(name, weights=weights)]
    found = [results[job] for job in jobs]
    finite = [each["loss"] for each in found if math.isfinite(each["loss"])]
    bad = [
        f"{next(iter(job.settings.values())):g}"
        for job, each in zip(jobs, found, strict=True)
        if not each["loss"] <= each["chance"]
    ]
    without = results[plain]
    return [
        plain.data,
        f"{plain.optimizer} {plain.rate:g}",
        name,
        f"{without['loss']:.3f}",
        " / ".join(f"{each['loss']:.3f}" for each in found),
        f"{max(finite, default=math.nan):.3f}",
        str(len(found) - len(finite)),
        " / ".join(f"{each['limited']:.0%}" for each in found),
        " / ".join(f"{100 * each['accuracy']:.1f}" for each in found),
        ("plain does not converge" if not converges(without) else ", ".join(bad) or "none"),
    ]


def converges(result: dict[str, float]) -> bool:
    return result["loss"] < result["chance"]


def report(results: Results, plain: list[Job], *, weights: bool) -> str:
    what = "weights" if weights else "strengths"
    rows = [row(results, job, name, weights=weights) for job in plain for name in PENALTIES]
    runs = len(rows) * len(STRENGTHS)
    failed = sum(
        0 if each[-1] in ("none", "plain does not converge") else len(each[-1].split(", "))
        for each in rows
    )
    values = (
        "; ".join(f"{name} {', '.join(f'{w:g}' for w in each)}" for name, each in WEIGHTS.items())
        if weights
        else ", ".join(f"{s:g}" for s in STRENGTHS)
    )
    first = plain[0]
    head = (
        f"{runs} trainings with penalties, {first.steps} steps of {first.batch} samples out of "
        f"{first.samples:,}, no clipping; {what} {values}. **{failed}** end in NaN or above "
        "chance where plain training converges (reach: 0)."
    )
    heads = ["data", "optimizer", "penalty", "plain loss", f"losses over {what}", "worst", "NaN"]
    heads += ["limited", "accuracies", "failed"]
    return f"{head}\n\n{table(heads, rows)}"


def main() -> None:
    parser = command_line(__doc__, "stability.jsonl")
    parser.add_argument("--weights", action="store_true", help="weight= in place of strength=")
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    arguments = parser.parse_args()
    data = ("digits",) if arguments.quick else arguments.data
    plain = plain_jobs(data, quick=arguments.quick)
    jobs = [
        *plain,
        *(
            replace(job, method=name, settings=each)
            for job in plain
            for name in PENALTIES
            for each in settings(name, weights=arguments.weights)
        ),
    ]
    results = measured(jobs, arguments.out, arguments.jobs)
    script = "stability.py --weights" if arguments.weights else "stability.py"
    tell(script, report(results, plain, weights=arguments.weights), write=arguments.keep)


if __name__ == "__main__":
    main()

"""What the networks of the pair-proxy experiment cost, trained and measured: part of `make bench`.

A hundred networks of the published regime (two hidden layers of 64 and 8 units, 250 training
points, until all are right), trained together as the study trains them, and their pair proxies over
100 unseen points; on 2 processes of one thread each. MNIST's test images where LOWLAND_DATA names
their folder, else scikit-learn's digits. The result is printed and kept in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from page import keep

from lowland.studies.data.images import data_folder
from lowland.studies.illusion.preset import load_preset
from lowland.studies.illusion.run import run_study
from lowland.studies.runs.jobs import Store
from lowland.studies.runs.workers import workers

PROCESSES = 2
TRAINED, MEASURED = 60, 600  # seconds that are to be kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="write the result to README.md")
    arguments = parser.parse_args()
    paper = load_preset("paper")
    task = replace(paper.tasks[0], joint_unseen=0, joint_networks=0)
    if data_folder() is None:
        task = replace(task, data="digits", test=1200)
    preset = replace(paper, tasks=(task,))
    clock = [time.perf_counter()]

    def tell(title: str, done: int, total: int) -> None:  # noqa: ARG001
        if done == total:
            clock.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, workers(PROCESSES) as executor:
        store = Store.open(Path(folder), preset.to_dict())
        study = run_study(preset, store, stages=["pairs"], executor=executor, on_progress=tell)
    trained, measured = (after - before for before, after in pairwise(clock))
    pairs = study.pairs[task.name]
    count = int(pairs["count"].isfinite().sum())
    report = (
        f"{study.titles[task.name]}: {task.seeds} networks trained in {trained:.0f} s (reach: ≤ "
        f"{TRAINED}), {count} of which learnt their 250 points; {1000 * count:,} pairs in "
        f"{measured:.0f} s, {pairs['undecided'].nansum():.0f} undecided; together "
        f"{trained + measured:.0f} s (reach: ≤ {MEASURED}). {PROCESSES} processes."
    )
    print(report)
    if arguments.keep:
        keep("illusion.py", report)


if __name__ == "__main__":
    main()

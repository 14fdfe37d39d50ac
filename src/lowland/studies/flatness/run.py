"""The whole study: every task trained every way from every seed; kept piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial

import torch

from lowland.studies.data.images import data_folder
from lowland.studies.data.sources import Source, available
from lowland.studies.flatness.preset import Preset, Task, Way
from lowland.studies.flatness.tasks import title
from lowland.studies.flatness.train import timing, train
from lowland.studies.runs.jobs import Pieces, Store, Tensors
from lowland.studies.runs.stages import Progress, run_stage

STAGES = ("timing", "training")
"""What can be run by itself."""


@dataclass(frozen=True)
class Results:
    """Everything the figures and the claims are made of; empty where a stage was not run.

    Attributes:
        preset: What was run.
        titles: Of the tasks that were run, by name.
        skipped: Why each of the others was not.
        trained: By task and way, what :func:`~lowland.studies.flatness.train.train` gives, one
            entry per seed.
        timing: By task, seconds a step, ``(rounds, ways)``.
    """

    preset: Preset
    titles: dict[str, str]
    skipped: dict[str, str] = field(default_factory=dict)
    trained: dict[tuple[str, str], Tensors] = field(default_factory=dict)
    timing: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def tasks(self) -> list[Task]:
        """The tasks that were run."""
        return [task for task in self.preset.tasks if task.name in self.titles]

    def weights(self, task: Task) -> list[Way]:
        """The baseline and the flatness-aware penalty, by rising weight."""
        ways = self.preset.ways(task).values()
        return [way for way in ways if way.kind in ("baseline", "flatness-aware")]


def run_study(
    preset: Preset,
    store: Store,
    *,
    stages: Collection[str] = STAGES,
    executor: Executor | None = None,
    on_progress: Progress | None = None,
) -> Results:
    """Run what is missing from the store, and load all of it.

    Args:
        preset: What to run. Tasks whose files are not there are left out.
        store: Opened with the preset's settings.
        stages: Some of :data:`STAGES`.
        executor: Any :class:`concurrent.futures.Executor`; without one, this process computes.
        on_progress: Called with a title and how many of its pieces are done and in all.

    Raises:
        JobError: If a worker process died.
        DataError: If files are there and cannot be used.
        PresetError: If no task can be run.
    """
    source = Source(data_folder(), preset.verify)
    tasks, skipped = available(preset.tasks, source)

    run = partial(run_stage, store=store, on_progress=on_progress)
    clock, work = {}, {}
    if "timing" in stages:
        # First, one after the other and in this process, so that nothing of ours disturbs them.
        clock = run("timing steps", _timing_pieces(preset, tasks, source), executor=None)
    if "training" in stages:
        pieces = _training_pieces(preset, tasks, source)
        work = run("training networks", pieces, executor=executor)
    return Results(
        preset,
        {task.name: title(task, source) for task in tasks},
        skipped,
        {
            (task.name, way): _join([work[_name(task, way, s)] for s in range(task.seeds)])
            for task in tasks
            for way in preset.ways(task)
            if work
        },
        {task.name: clock[f"timing/{task.name}"]["seconds"] for task in tasks if clock},
    )


def _timing_pieces(preset: Preset, tasks: list[Task], source: Source) -> Pieces:
    return {f"timing/{task.name}": partial(timing, preset, task, source) for task in tasks}


def _training_pieces(preset: Preset, tasks: list[Task], source: Source) -> Pieces:
    """The longest work first, and a seed's methods side by side, so that clocks are comparable."""
    pieces: dict[str, Callable[[], Tensors]] = {}
    for task in reversed(tasks):
        for seed in range(task.seeds):
            for name, way in preset.ways(task).items():
                pieces[_name(task, name, seed)] = partial(train, preset, task, way, seed, source)
    return pieces


def _name(task: Task, way: str, seed: int) -> str:
    return f"training/{task.name}/{way}/{seed:04d}"


def _join(parts: list[Tensors]) -> Tensors:
    """Seed after seed."""
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}

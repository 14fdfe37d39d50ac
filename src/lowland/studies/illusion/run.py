"""The whole study: networks trained, measured, rescaled; kept piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from lowland.studies.data.images import data_folder
from lowland.studies.data.sources import Source, available
from lowland.studies.hsr.preset import load_preset as load_hsr
from lowland.studies.hsr.run import run_study as run_hsr
from lowland.studies.illusion import pieces
from lowland.studies.illusion.pieces import LastLayer
from lowland.studies.illusion.preset import SMALL, Preset, Regime, Task
from lowland.studies.illusion.tasks import points, title
from lowland.studies.runs.jobs import Pieces, Store, Tensors
from lowland.studies.runs.stages import Progress, run_stage

STAGES = ("pairs", "joint", "selection", "advantage", "rescaling", "hsr")
"""What can be run by itself; each trains the networks that it needs."""

_NEEDS = {"joint": "pairs", "rescaling": "advantage"}


@dataclass(frozen=True)
class Results:
    """Everything the figures and the claims are made of; empty where a stage was not run.

    Attributes:
        preset: What was run.
        titles: The data of the tasks that were run, by name.
        skipped: Why each of the others was not.
        trained: By regime's name, what :func:`~lowland.studies.illusion.pieces.train` gives,
            one entry a network.
        labels: Of the test points, by task.
        pairs: Pair proxies, by task; NaN for networks that did not learn their points.
        joint: Joint weakness, by task; of the first networks, NaN for the others.
        rescaled: By regime's name, ``(networks, rescalings)``.
        hsr: By kind of seed and method of the HSR study, one entry a network.
    """

    preset: Preset
    titles: dict[str, str]
    skipped: dict[str, str] = field(default_factory=dict)
    trained: dict[str, Tensors] = field(default_factory=dict)
    labels: dict[str, Tensor] = field(default_factory=dict)
    pairs: dict[str, Tensors] = field(default_factory=dict)
    joint: dict[str, Tensors] = field(default_factory=dict)
    rescaled: dict[str, Tensors] = field(default_factory=dict)
    hsr: dict[tuple[str, str], Tensors] = field(default_factory=dict)

    def tasks(self, kind: str = "") -> list[Task]:
        """The tasks of a kind, or of all kinds, that were run."""
        return [
            task
            for task in self.preset.tasks
            if task.name in self.titles and kind in ("", task.kind)
        ]

    def rescalings(self) -> Iterator[tuple[Task, Regime, Tensors]]:
        """Each regime whose networks were rescaled, with its task and what was found."""
        for task in self.tasks("advantage"):
            for regime in self.preset.regimes(task):
                if regime.name in self.rescaled:
                    yield task, regime, self.rescaled[regime.name]


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
        stages: Some of :data:`STAGES`; what they need is run as well.
        executor: Any :class:`concurrent.futures.Executor`; without one, this process computes.
        on_progress: Called with a title and how many of its pieces are done and in all.

    Raises:
        JobError: If a worker process died.
        DataError: If files are there and cannot be used.
        PresetError: If no task can be run.
    """
    source = Source(data_folder())
    kinds = {_NEEDS.get(stage, stage) for stage in stages}
    tasks, skipped = available([task for task in preset.tasks if task.kind in kinds], source)
    run = partial(run_stage, store=store, executor=executor, on_progress=on_progress)
    results = Results(
        preset,
        {task.name: title(task, source) for task in tasks},
        skipped,
        labels={task.name: points(task, task.sizes[-1], source).y_test[0] for task in tasks},
    )
    if tasks:
        done = run("training networks", _training_pieces(preset, tasks, source))
        results = replace(results, trained=_by_regime(preset, tasks, done))
    rest: dict[str, Callable[[], Tensors]] = {}
    if "rescaling" in stages:
        rest |= _rescaling_pieces(results, source)
    if "joint" in stages:
        rest |= _joint_pieces(results, source)
    if "pairs" in stages:
        rest |= _pair_pieces(results, source)
    found = run("measuring networks", rest) if rest else {}
    results = replace(
        results,
        pairs=_by_network(results, found, "pairs"),
        joint=_by_network(results, found, "joint"),
        rescaled=_rescaled(results, found),
    )
    if "hsr" not in stages or not preset.hsr:
        return results
    theirs = load_hsr(preset.hsr)
    controlled = run_hsr(
        theirs, store, stages=["control"], executor=executor, on_progress=on_progress
    ).controlled
    work = {
        f"hsr/{kind}-{method}": partial(pieces.hsr, theirs, networks, preset.hsr_unseen)
        for (kind, method), networks in controlled.items()
    }
    found = run("measuring HSR's networks", work)
    return replace(results, hsr={key: found[f"hsr/{'-'.join(key)}"] for key in controlled})


def _training_pieces(preset: Preset, tasks: list[Task], source: Source) -> Pieces:
    """The longest work first, so that no worker waits for another."""
    regimes = [(task, regime) for task in tasks for regime in preset.regimes(task)]
    regimes.sort(key=lambda pair: -pair[1].size)
    return {
        _chunk_name(regime, first): partial(
            pieces.train, task, regime, first, min(first + preset.chunk, task.seeds), source
        )
        for task, regime in regimes
        for first in range(0, task.seeds, preset.chunk)
    }


def _chunk_name(regime: Regime, first: int) -> str:
    return f"training/{regime.name}/{first:04d}"


def _by_regime(preset: Preset, tasks: list[Task], done: dict[str, Tensors]) -> dict[str, Tensors]:
    found = {}
    for task in tasks:
        for regime in preset.regimes(task):
            chunks = [
                done[_chunk_name(regime, first)] for first in range(0, task.seeds, preset.chunk)
            ]
            # Only the first chunks hold weights.
            found[regime.name] = {
                name: torch.cat([chunk[name] for chunk in chunks if name in chunk])
                for name in chunks[0]
            }
    return found


def _learnt(results: Results, task: Task) -> list[int]:
    """The networks of a task with pair proxies that learnt their points."""
    (regime,) = results.preset.regimes(task)
    enough = results.trained[regime.name]["learnt"] >= results.preset.enough
    return enough.nonzero().flatten().tolist()


def _last_layer(results: Results, task: Task, index: int, unseen: int, source: Source) -> LastLayer:
    (regime,) = results.preset.regimes(task)
    data = points(task, regime.size, source)
    networks = results.trained[regime.name]
    return LastLayer(
        networks["features_train"][index].clone(),
        data.y_train[0],
        networks["features_unseen"][index, :unseen].clone(),
        data.classes,
    )


def _pair_pieces(results: Results, source: Source) -> Pieces:
    return {
        f"pairs/{task.name}/{index:04d}": partial(
            pieces.pairs, _last_layer(results, task, index, task.unseen, source)
        )
        for task in results.tasks("pairs")
        for index in _learnt(results, task)
    }


def _joint_pieces(results: Results, source: Source) -> Pieces:
    return {
        f"joint/{task.name}/{index:04d}": partial(
            pieces.joint,
            results.preset,
            _last_layer(results, task, index, task.joint_unseen, source),
            index,
        )
        for task in results.tasks("pairs")
        if task.joint_unseen
        for index in _learnt(results, task)
        if index < task.joint_networks
    }


def _by_network(results: Results, found: dict[str, Tensors], kind: str) -> dict[str, Tensors]:
    """Tables with an entry for each network of a task; NaN where nothing was looked for."""
    tables = {}
    for task in results.tasks("pairs"):
        prefix = f"{kind}/{task.name}/"
        own = {
            int(n.removeprefix(prefix)): part for n, part in found.items() if n.startswith(prefix)
        }
        names = next(iter(own.values()), {})
        table = {name: torch.full((task.seeds,), torch.nan, dtype=torch.float64) for name in names}
        for index, part in own.items():
            for name, value in part.items():
                table[name][index] = value
        tables[task.name] = table
    return {name: table for name, table in tables.items() if table}


def _rescaling_regimes(preset: Preset, task: Task) -> list[Regime]:
    wanted = task.rescaled and (task.factors or task.second_factors)
    return [regime for regime in preset.regimes(task) if wanted and regime.batch == SMALL]


def _rescaling_pieces(results: Results, source: Source) -> Pieces:
    work = {}
    for task in results.tasks("advantage"):
        for regime in _rescaling_regimes(results.preset, task):
            found = results.trained[regime.name]
            layers = [found[f"weights_{place}"] for place in range(len(task.hidden) + 1)]
            for index in range(len(layers[0])):
                one = tuple(layer[index : index + 1].clone() for layer in layers)
                work[f"rescaling/{regime.name}/{index:04d}"] = partial(
                    pieces.rescale, task, regime, one, source
                )
    return work


def _rescaled(results: Results, found: dict[str, Tensors]) -> dict[str, Tensors]:
    tables = {}
    for task in results.tasks("advantage"):
        for regime in _rescaling_regimes(results.preset, task):
            prefix = f"rescaling/{regime.name}/"
            parts = [part for name, part in found.items() if name.startswith(prefix)]
            if parts:
                tables[regime.name] = {
                    name: torch.stack([part[name] for part in parts]) for name in parts[0]
                }
    return tables

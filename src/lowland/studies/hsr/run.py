"""The whole study: search, selection, control, theory; kept piece by piece in a folder."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial

import torch

from lowland.studies.ensembles.training import Method
from lowland.studies.hsr import theory
from lowland.studies.hsr.alignment import alignment
from lowland.studies.hsr.control import control
from lowland.studies.hsr.preset import Preset
from lowland.studies.hsr.search import NOTHING, Selection, search, select
from lowland.studies.hsr.sweep import sweep
from lowland.studies.runs.jobs import Pieces, Store, Tensors
from lowland.studies.runs.stages import Progress, run_stage

KINDS = ("sharp", "flat")
FITTED = 8  # converged networks whose samples figure 4 looks at

STAGES = (
    "search",
    "control",
    "ours",
    "timing",
    "agreement",
    "fit",
    "covariance",
    "parts",
    "descent",
    "alignment",
    "sweep",
)
"""What can be run by itself; control and ours, fit and alignment need the search's networks.

Control is training again by the paper's methods, ours the same by the method that is not."""


@dataclass(frozen=True)
class Results:
    """Everything the figures and the claims are made of; empty where a stage was not run.

    Attributes:
        preset: What was run.
        found: The search, one entry per seed.
        selection: Which of its networks are what.
        controlled: The control experiment, by kind of seed and by method, ours after the paper's;
            one entry per seed; curves are ``(seeds, checkpoints)``.
        theory: The data of figures 2 to 7 and 17, by stage.
        sweep: By hidden units and training samples, what :func:`sweep` found.
    """

    preset: Preset
    found: Tensors = field(default_factory=dict)
    selection: Selection = NOTHING
    controlled: dict[tuple[str, str], Tensors] = field(default_factory=dict)
    theory: dict[str, Tensors] = field(default_factory=dict)
    sweep: dict[tuple[int, int], Tensors] = field(default_factory=dict)

    @property
    def methods(self) -> dict[str, Method]:
        """By name those whose control experiment was run, ours after the paper's."""
        known = self.preset.methods | self.preset.ours
        return {name: known[name] for _, name in self.controlled}

    def most_negative(self, method: str) -> tuple[str, int]:
        """Where a method's smallest eigenvalue of all is: the kind of seed, and the network."""
        smallest = {kind: self.controlled[kind, method]["eigenvalues"][:, 0] for kind in KINDS}
        kind = min(KINDS, key=lambda kind: float(smallest[kind].min()))
        return kind, int(smallest[kind].argmin())


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
        preset: What to run.
        store: Opened with the preset's settings.
        stages: Some of :data:`STAGES`; what they need is run as well.
        executor: Any :class:`concurrent.futures.Executor`; without one, this process computes.
        on_progress: Called with a title and how many of its pieces are done and in all.

    Raises:
        JobError: If a worker process died.
    """
    run = partial(run_stage, store=store, executor=executor, on_progress=on_progress)
    # By itself and first, so that nothing else of ours disturbs its clock.
    timing = {"theory/timing": partial(theory.timing, preset)} if "timing" in stages else {}
    results = run("timing gradients", timing)
    found, selection = {}, NOTHING
    if {"search", "control", "ours", "fit", "alignment"} & set(stages):
        found = _join(list(run("searching critical points", _search_pieces(preset)).values()))
        selection = select(preset, found)
    # All the rest at once, what takes longest first, so that no worker waits for another.
    rest: dict[str, Callable[[], Tensors]] = {}
    if "sweep" in stages:
        rest |= _sweep_pieces(preset)
    methods = [
        *(preset.methods if "control" in stages else ()),
        *(preset.ours if "ours" in stages else ()),
    ]
    rest |= _control_pieces(preset, methods, found, selection)
    if "alignment" in stages:
        critical = found["parameters"][selection.distinct]
        rest["theory/alignment"] = partial(alignment, preset, critical)
    if "fit" in stages:
        examples = found["parameters"][selection.distinct[:FITTED]]
        rest["theory/fit"] = partial(theory.fit, preset, examples)
    rest |= {
        f"theory/{name}": partial(function, preset)
        for name, function in _THEORY.items()
        if name in stages
    }
    results |= run("training and measuring", rest)
    return Results(
        preset,
        found,
        selection,
        _by_kind(methods, results, selection),
        {
            name.removeprefix("theory/"): result
            for name, result in results.items()
            if name.startswith("theory/")
        },
        {key: results[_cell_name(*key)] for key in _cells(preset)} if "sweep" in stages else {},
    )


_THEORY: dict[str, Callable[[Preset], Tensors]] = {
    "agreement": theory.agreement,
    "covariance": theory.covariance,
    "parts": theory.parts,
    "descent": theory.descent,
}


def _search_pieces(preset: Preset) -> Pieces:
    return {
        f"search/{first:05d}": partial(
            search, preset, first, min(first + preset.chunk, preset.seeds)
        )
        for first in range(0, preset.seeds, preset.chunk)
    }


def _control_pieces(
    preset: Preset, methods: list[str], found: Tensors, selection: Selection
) -> Pieces:
    """Sharp and flat seeds side by side; the methods that take longest first."""
    if not methods:
        return {}
    seeds = found["seed"][torch.cat([selection.sharp, selection.flat])].tolist()
    return {
        f"control/{method}-{first:05d}": partial(
            control, preset, method, seeds[first : first + preset.chunk]
        )
        for method in reversed(methods)
        for first in range(0, len(seeds), preset.chunk)
    }


def _cells(preset: Preset) -> dict[tuple[int, int], int]:
    """The number of data sets by hidden units and training samples, the longest work first."""
    sizes = dict(zip(preset.sweep_train_sizes, preset.sweep_datasets, strict=True))
    return {
        (hidden, size): sizes[size]
        for size in sorted(sizes, reverse=True)
        for hidden in sorted(preset.sweep_hidden, reverse=True)
    }


def _cell_name(hidden: int, size: int) -> str:
    return f"sweep/{hidden:03d}-{size:06d}"


def _sweep_pieces(preset: Preset) -> Pieces:
    return {
        _cell_name(hidden, size): partial(sweep, preset, size, hidden, datasets)
        for (hidden, size), datasets in _cells(preset).items()
    }


def _by_kind(
    methods: list[str], parts: dict[str, Tensors], selection: Selection
) -> dict[tuple[str, str], Tensors]:
    """The control experiment by kind of seed and by method."""
    cut = len(selection.sharp)
    joined = {
        method: _join(
            [part for name, part in parts.items() if name.startswith(f"control/{method}-")]
        )
        for method in methods
    }
    return {
        (kind, method): {name: tensor[networks] for name, tensor in whole.items()}
        for kind, networks in zip(KINDS, (slice(cut), slice(cut, None)), strict=True)
        for method, whole in joined.items()
    }


def _join(parts: list[Tensors]) -> Tensors:
    """Pieces side by side, network after network."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

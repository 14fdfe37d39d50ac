"""The whole study: search, selection, control, theory; kept piece by piece in a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowland.experiments.hsr import theory
from lowland.experiments.hsr.control import control
from lowland.experiments.hsr.preset import Preset
from lowland.experiments.hsr.search import Selection, search, select
from lowland.jobs import Store, Tensors, run_pieces

Pieces = Mapping[str, tuple[Any, ...]]
Progress = Callable[[str, int, int], None]

KINDS = ("sharp", "flat")
FITTED = 8  # converged networks whose samples figure 4 looks at


@dataclass(frozen=True)
class Study:
    """Everything the figures and the claims are made of.

    Attributes:
        preset: What was run.
        found: The search, one entry per seed.
        selection: Which of its networks are what.
        controlled: The control experiment, by kind of seed and by method; one entry per seed, but
            curves are ``(checkpoints, seeds)``.
        theory: The data of figures 2 to 7, by stage.
    """

    preset: Preset
    found: Tensors
    selection: Selection
    controlled: dict[tuple[str, str], Tensors]
    theory: dict[str, Tensors]


def run_study(
    preset: Preset,
    store: Store,
    *,
    executor: Executor | None = None,
    on_progress: Progress | None = None,
) -> Study:
    """Run what is missing from the store, and load all of it.

    Args:
        preset: What to run.
        store: Opened with the preset's settings.
        executor: Any :class:`concurrent.futures.Executor`; without one, this process computes.
        on_progress: Called with a stage's title and its pieces done and in all.

    Raises:
        JobError: If a worker process died.
    """

    def stage(title: str, function: Callable[..., Tensors], pieces: Pieces) -> list[Tensors]:
        run_pieces(
            function,
            pieces,
            store,
            executor=executor,
            on_done=lambda done: on_progress and on_progress(title, done, len(pieces)),
        )
        return [store.load(name) for name in pieces]

    found = _join(stage("search", search, _search_pieces(preset)))
    selection = select(preset, found)
    pieces = _control_pieces(preset, found, selection)
    results = dict(zip(pieces, stage("control", control, pieces), strict=True))
    controlled = {
        (kind, method): _join(
            [part for name, part in results.items() if name.startswith(f"control/{kind}-{method}-")]
        )
        for kind in KINDS
        for method in preset.methods
    }
    examples = found["parameters"][selection.distinct[:FITTED]]
    stages: dict[str, tuple[Callable[..., Tensors], tuple[Any, ...]]] = {
        "agreement": (theory.agreement, (preset,)),
        "timing": (theory.timing, (preset,)),
        "fit": (theory.fit, (preset, examples)),
        "covariance": (theory.covariance, (preset,)),
        "parts": (theory.parts, (preset,)),
        "descent": (theory.descent, (preset,)),
    }
    in_theory = {
        name: stage(f"theory: {name}", function, {f"theory/{name}": arguments})[0]
        for name, (function, arguments) in stages.items()
    }
    return Study(preset, found, selection, controlled, in_theory)


def _search_pieces(preset: Preset) -> Pieces:
    return {
        f"search/{first:05d}": (preset, first, min(first + preset.chunk, preset.seeds))
        for first in range(0, preset.seeds, preset.chunk)
    }


def _control_pieces(preset: Preset, found: Tensors, selection: Selection) -> Pieces:
    pieces = {}
    for kind in KINDS:
        seeds = found["seed"][getattr(selection, kind)].tolist()
        for method in preset.methods:
            for first in range(0, len(seeds), preset.chunk):
                some = seeds[first : first + preset.chunk]
                pieces[f"control/{kind}-{method}-{first:05d}"] = (preset, method, some)
    return pieces


def _join(parts: list[Tensors]) -> Tensors:
    """Pieces side by side: along networks, which in curves are the second dimension."""

    def joined(name: str) -> Tensor:
        if name == "checkpoints":
            return parts[0][name]
        return torch.cat([part[name] for part in parts], dim=int(name.startswith("curve_")))

    return {name: joined(name) for name in parts[0]}

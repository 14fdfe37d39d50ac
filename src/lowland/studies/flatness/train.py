"""Training a network one way, and what its steps cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import lowland
from lowland.penalties import CurvaturePenalty
from lowland.studies.data.sources import Source
from lowland.studies.flatness.preset import Preset, Task, Way
from lowland.studies.flatness.tasks import (
    Samples,
    accuracy,
    criterion,
    network,
    samples,
)
from lowland.studies.runs.jobs import Tensors
from lowland.studies.runs.streams import stream
from lowland.threads import threads

# Streams of random numbers, so that what one draws changes nothing in another.
_BATCHES, _PROBES, _LOOKS, _FINAL = range(1, 5)

PENALTIES: dict[str, type[CurvaturePenalty]] = {
    "flatness-aware": lowland.FlatnessAware,
    "hsr": lowland.HSR,
    "hessian-trace": lowland.HessianTrace,
}


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """An epoch: the samples of each step, each sample at most once."""
    order = torch.randperm(count, generator=generator)
    size = min(size, count)
    yield from order[: count - count % size].split(size)


@dataclass(frozen=True)
class Trainer:
    """A network on its way.

    Attributes:
        model: The network.
        step: Takes one step on a batch.
    """

    model: nn.Module
    step: Callable[[Tensor, Tensor], object]


def trainer(preset: Preset, task: Task, way: Way, data: Samples, seed: int) -> Trainer:
    """A network at its starting point, and the steps of a method."""
    model, loss = network(task, data, seed), criterion(data)
    descent = torch.optim.SGD(model.parameters(), lr=task.learning_rate)
    if way.kind in PENALTIES:
        penalty = PENALTIES[way.kind](
            loss,
            way.strength,
            limit=None,  # as published
            method="probes",
            probes=preset.probes,
            generator=stream(seed, _PROBES),
        )

        def step(x: Tensor, y: Tensor) -> None:
            descent.zero_grad()
            penalty.loss(model, x, y).backward()
            descent.step()

    elif way.strength:
        sam = lowland.SAM(
            model.parameters(),
            torch.optim.SGD,
            rho=way.strength,
            adaptive=way.kind == "adaptive-sam",
            lr=task.learning_rate,
        )

        def step(x: Tensor, y: Tensor) -> None:
            def closure() -> Tensor:
                sam.zero_grad()
                value: Tensor = loss(model(x), y)
                value.backward()
                return value

            sam.step(closure)

    else:

        def step(x: Tensor, y: Tensor) -> None:
            descent.zero_grad()
            loss(model(x), y).backward()
            descent.step()

    return Trainer(model, step)


def train(preset: Preset, task: Task, way: Way, seed: int, source: Source) -> Tensors:
    """Train one network, a piece of the study.

    Returns:
        ``accuracy`` on the test part after each epoch; ``flatness``, the ``Tr(H^2) / B`` of the
        batches at the steps ``looks``, before these; ``loss``, ``trace_sq`` and its ``stderr`` at
        the end, on the training part; ``seconds`` spent in steps; ``failed``, whether the loss
        ended no lower than that of the classes' shares alone, or as no number at all.
    """
    data = samples(task, seed, source)
    count = len(data.x_train)
    size = min(task.batch, count)
    looks = set(look_steps(preset, task.epochs * (count // size)))
    drawn, own = stream(seed, _BATCHES), stream(seed, _LOOKS)
    loss = criterion(data)
    accuracies, flatness, seconds, number = [], [], 0.0, 0
    with threads(1):
        run, going = trainer(preset, task, way, data, seed), True
        for _ in range(task.epochs):
            for chosen in batches(count, size, drawn):
                x, y = data.x_train[chosen], data.y_train[chosen]
                if number in looks:
                    flatness.append(
                        _flatness(run.model, loss, x, y, probes=preset.look_probes, own=own)
                    )
                number += 1
                begin = time.perf_counter()
                if going:
                    going = _try_step(run, loss, x, y)
                seconds += time.perf_counter() - begin
            accuracies.append(accuracy(run.model, data))
        return {
            "accuracy": torch.tensor(accuracies, dtype=torch.float64),
            "flatness": torch.tensor(flatness, dtype=torch.float64),
            "looks": torch.tensor(sorted(looks)),
            "seconds": torch.tensor(seconds, dtype=torch.float64),
            **_end(preset, run.model, data, seed),
        }


def _try_step(run: Trainer, loss: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Take a step; whether the loss was a number, without which penalties refuse to."""
    try:
        run.step(x, y)
    except ValueError:
        with torch.no_grad():
            if loss(run.model(x), y).isfinite():
                raise
        return False
    return True


def look_steps(preset: Preset, steps: int) -> list[int]:
    """The steps before which the flatness is measured, evenly spaced from the first."""
    return sorted({int(step) for step in np.linspace(0, steps, preset.looks, endpoint=False)})


def _flatness(
    model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, *, probes: int, own: torch.Generator
) -> float:
    """``Tr(H^2) / B`` of a batch; NaN where the network has failed."""
    try:
        moments = lowland.hessian_moments(model, loss, x, y, "probes", probes=probes, generator=own)
    except ValueError:
        return float("nan")
    return float(moments.trace_sq.detach()) / len(x)


def _end(preset: Preset, model: nn.Module, data: Samples, seed: int) -> Tensors:
    """The trained network's loss and curvature, in double precision."""
    x = data.x_train[: preset.final_samples].double()
    y = data.y_train[: preset.final_samples]
    y = y.double() if y.is_floating_point() else y
    model, loss = model.double(), criterion(data)
    with torch.no_grad():
        value = loss(model(x), y)
    shares = torch.bincount(y.flatten().long()).double() / len(y)
    failed = not bool(value < torch.special.entr(shares).sum())
    trace_sq = stderr = torch.tensor(float("nan"), dtype=torch.float64)
    if value.isfinite():
        moments = lowland.hessian_moments(
            model, loss, x, y, probes=preset.final_probes, generator=stream(seed, _FINAL)
        )
        trace_sq = moments.trace_sq.detach()
        stderr = torch.zeros_like(trace_sq)
        if moments.stderr is not None:
            stderr = moments.stderr[1].detach()
    return {
        "loss": value,
        "trace_sq": trace_sq,
        "stderr": stderr,
        "failed": torch.tensor(failed),
    }


def timing(preset: Preset, task: Task, source: Source) -> Tensors:
    """Seconds a step of each method, ``(rounds, methods)``, the methods taking turns."""
    data = samples(task, 0, source)
    with threads(1):
        runs = [trainer(preset, task, way, data, 0) for way in preset.ways(task).values()]
        drawn = stream(0, _BATCHES)
        size = min(task.batch, len(data.x_train))
        seconds = torch.zeros(preset.rounds + 1, len(runs), dtype=torch.float64)
        for row in seconds:
            order = torch.randperm(len(data.x_train), generator=drawn)[:size]
            x, y = data.x_train[order], data.y_train[order]
            for column, run in enumerate(runs):
                # The median, since other programs interrupt some of the steps.
                clock = [time.perf_counter()]
                for _ in range(preset.round_steps):
                    run.step(x, y)
                    clock.append(time.perf_counter())
                row[column] = float(np.median(np.diff(clock)))
    return {"seconds": seconds[1:].clone()}  # the first round meets cold caches

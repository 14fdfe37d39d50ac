"""Short trainings of small networks on real data: what three measurements of penalties share.

A :class:`Job` says all that a training depends on, and :func:`train` gives what became of it;
:func:`measured` runs many, and keeps each result as a line of a file, so that a run that was
interrupted goes on where it was. Images and tables come from the folder that ``LOWLAND_DATA``
names.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from page import keep
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import lowland
from lowland.penalty import Penalty
from lowland.studies.data.images import data_folder, fashion_mnist, mnist

PENALTIES: dict[str, type[Penalty]] = {
    "HSR": lowland.HSR,
    "HessianTrace": lowland.HessianTrace,
    "FlatnessAware": lowland.FlatnessAware,
    "LambdaMax": lowland.LambdaMax,
}
TABLES = ("segment", "vowel", "texture")  # of numbers, classes in the last column
IMAGES = (3, 32, 32)  # of CIFAR-10
SEEN = 5_000  # samples to validate by, at most
LOOK = 1_000  # samples of which the largest eigenvalue is found
Step = Callable[[Tensor, Tensor], object]


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        data: ``"MNIST"``, ``"Fashion-MNIST"``, ``"CIFAR-10"``, ``"digits"`` or a table's name.
        method: ``"plain"``, ``"SAM"``, or a penalty's name.
        settings: The method's own.
        samples: At most so many are trained on; the others are for validation.
        noise: The share of training labels that are drawn anew from all classes.
        steps: With a learning rate that follows a cosine down to zero.
        momentum: Of SGD.
        decay: Weight decay.
        scale: What the loss is multiplied by, and the learning rate divided.
        sharpness: Whether the largest eigenvalue is looked for at the end.
    """

    data: str
    method: str = "plain"
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    samples: int = 5_000
    noise: float = 0.0
    width: int = 128
    batch: int = 64
    steps: int = 300
    optimizer: str = "SGD"
    rate: float = 0.05
    momentum: float = 0.9
    decay: float = 0.0
    scale: float = 1.0
    sharpness: bool = False

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


class Data(NamedTuple):
    """Standardized features and classes, to train with and to validate by."""

    x: Tensor
    y: Tensor
    seen_x: Tensor
    seen_y: Tensor
    classes: int


def folder() -> Path:
    found = data_folder()
    if found is None:
        raise SystemExit("set LOWLAND_DATA to the folder with MNIST, Fashion-MNIST and the others")
    return found


def cifar10(directory: Path) -> tuple[Tensor, Tensor]:
    """The first training batch of CIFAR-10's binary version: a label and 3,072 pixels each."""
    paths = sorted(directory.rglob("data_batch_1.bin*"))
    if not paths:
        raise SystemExit(f"there is no data_batch_1.bin, or .bin.gz, of CIFAR-10 in {directory}")
    content = paths[0].read_bytes()
    content = gzip.decompress(content) if paths[0].suffix == ".gz" else content
    table = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, 3073).copy())
    return table[:, 1:].float() / 255, table[:, 0].long()


@cache
def samples_of(name: str) -> tuple[Tensor, Tensor]:
    """All samples that there are, in a random order that is always the same."""
    if name == "digits":
        images, labels = load_digits(return_X_y=True)
        x, y = torch.from_numpy(images), torch.from_numpy(labels)
    elif name == "CIFAR-10":
        x, y = cifar10(folder())
    elif name in TABLES:
        (path,) = folder().rglob(f"{name}.csv")
        table = torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1))
        x, y = table[:, :-1], table[:, -1].unique(return_inverse=True)[1]
    else:
        load = {"MNIST": mnist, "Fashion-MNIST": fashion_mnist}[name]
        test = load(folder())[1]
        x, y = test.x, test.y
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order].float(), y[order].long()


def data_of(job: Job) -> Data:
    x, y = samples_of(job.data)
    classes = int(y.max()) + 1
    count = min(job.samples, 7 * len(x) // 10)
    x, seen_x, y, seen_y = x[:count], x[count:][:SEEN], y[:count], y[count:][:SEEN]
    # Pixels are of one unit: they have one mean and one deviation.
    by = {"dim": 0} if job.data in TABLES else {}
    mean, deviation = x.mean(**by), x.std(**by) + 1e-6
    x, seen_x = (x - mean) / deviation, (seen_x - mean) / deviation
    if job.data == "CIFAR-10":
        x, seen_x = x.unflatten(1, IMAGES), seen_x.unflatten(1, IMAGES)
    generator = torch.Generator().manual_seed(job.seed)
    drawn = torch.randint(classes, y.shape, generator=generator)
    noisy = torch.rand(y.shape, generator=generator) < job.noise
    return Data(x, torch.where(noisy, drawn, y), seen_x, seen_y, classes)


def network(job: Job, inputs: int, classes: int) -> nn.Module:
    """One hidden layer of ReLU units; for color images two convolutions, each normalized."""
    torch.manual_seed(job.seed)
    if job.data != "CIFAR-10":
        hidden = nn.Linear(inputs, job.width), nn.ReLU()
        return nn.Sequential(*hidden, nn.Linear(job.width, classes))
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 8 * 8, classes)),
    )


def criterion_of(job: Job) -> Callable[[Tensor, Tensor], Tensor]:
    if job.scale == 1:
        return nn.CrossEntropyLoss()
    if job.scale == job.batch:  # by the same engine, which knows this one as well
        return nn.CrossEntropyLoss(reduction="sum")
    return lambda output, target: job.scale * functional.cross_entropy(output, target)


def ways(job: Job, model: nn.Module) -> tuple[torch.optim.Optimizer, Step, Penalty | None]:
    """The optimizer, a step of training, and the penalty if there is one."""
    criterion, penalty = criterion_of(job), None
    settings = {"lr": job.rate / job.scale, "weight_decay": job.decay}
    if job.optimizer == "SGD":
        settings["momentum"] = job.momentum
    kind = getattr(torch.optim, job.optimizer)
    if job.method == "SAM":
        optimizer = lowland.SAM(model.parameters(), kind, **job.settings, **settings)
    else:
        optimizer = kind(model.parameters(), **settings)
    if job.method in PENALTIES:
        penalty = PENALTIES[job.method](criterion, **job.settings)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        found = penalty.loss(model, x, y) if penalty else criterion(model(x), y)
        found.backward()
        return found

    def step(x: Tensor, y: Tensor) -> None:
        if job.method == "SAM":
            optimizer.step(lambda: loss(x, y), model=model)
        else:
            loss(x, y)
            optimizer.step()

    return optimizer, step, penalty


def train(job: Job) -> dict[str, Any]:
    """What a training ends in: losses and accuracy in evaluation mode, and the penalty's report."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "the limit of")
    data = data_of(job)
    model = network(job, data.x[0].numel(), data.classes)
    optimizer, step, penalty = ways(job, model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.steps)
    order = torch.Generator().manual_seed(job.seed)
    start, done = time.perf_counter(), 0
    while done < job.steps:
        for batch in torch.randperm(len(data.x), generator=order).split(job.batch):
            step(data.x[batch], data.y[batch])
            schedule.step()
            done += 1
            if done == job.steps:
                break
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        output = model(data.seen_x)
        result: dict[str, Any] = {
            "loss": float(functional.cross_entropy(model(data.x), data.y)),
            "accuracy": float((output.argmax(1) == data.seen_y).double().mean()),
            "nll": float(functional.cross_entropy(output, data.seen_y)),
            "chance": math.log(data.classes),
            "seconds": seconds,
        }
    if not all(p.isfinite().all() for p in model.parameters()):
        result["loss"] = math.nan
    if penalty:
        report = penalty.report()
        result |= {"limited": report.limited, "ratio": report.ratio, "used": penalty.used}
    if job.sharpness and math.isfinite(result["loss"]):
        result["sharpness"] = sharpness(model, data)
    return result


def sharpness(model: nn.Module, data: Data) -> float:
    """The largest eigenvalue of the Hessian of the loss on training samples."""
    found = lowland.spectrum(
        model,
        nn.CrossEntropyLoss(),
        (data.x[:LOOK], data.y[:LOOK]),
        k=1,
        method="lanczos",
        trace_probes=2,
        tolerance=1e-3,
    )
    return float(found.eigenvalues[0])


class Results:
    """What has been found, of each job; a line of a file each."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, {}
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):  # a run was ended while it wrote
            path.write_text("".join(whole))
        for job, result in map(json.loads, whole):
            self.found[json.dumps(job, sort_keys=True)] = result

    def add(self, job: Job, result: dict[str, Any]) -> None:
        self.found[job.key] = result
        with self.path.open("a") as file:
            file.write(json.dumps([asdict(job), result]) + "\n")

    def __contains__(self, job: Job) -> bool:
        return job.key in self.found

    def __getitem__(self, job: Job) -> dict[str, Any]:
        return self.found[job.key]


def measured(jobs: Iterable[Job], out: Path, processes: int) -> Results:
    """The results of all jobs; those that are in the file already are not run again."""
    results = Results(out)
    missing = {job.key: job for job in jobs if job not in results}.values()

    def tell(job: Job, result: dict[str, Any]) -> None:
        results.add(job, result)
        name = f"{job.data}, {job.optimizer} {job.rate:g}, {job.method} {job.settings}"
        found = f"loss {result['loss']:.3g}, accuracy {result['accuracy']:.3f}"
        print(f"{name}: {found}, {result['seconds']:.1f} s", file=sys.stderr, flush=True)

    if processes == 1:
        for job in missing:
            tell(job, train(job))
        return results
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for job, result in zip(missing, pool.imap(train, missing), strict=True):
            tell(job, result)
    return results


def table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def command_line(description: str | None, out: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path(out), help="a line for each training")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--quick", action="store_true", help="a small part of it")
    parser.add_argument("--keep", action="store_true", help="write the result to README.md")
    return parser


def tell(script: str, report: str, *, write: bool) -> None:
    print(report)
    if write:
        keep(script, report)

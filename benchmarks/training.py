"""What a step of training with control of curvature costs: part of `make bench`.

In multiples of one plain step of the same optimizer on the same batch: gradients zeroed, forward,
backward, update; medians of interleaved rounds in float32. The result is printed and kept in
benchmarks/README.md. A further way of training is one more entry of JOBS.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from page import keep
from timing import interleaved, median_ratio
from torch import Tensor, nn

import lowland

Step = Callable[[], object]


class Network:
    """A network by its layers, with random images and classes."""

    def __init__(self, shape: tuple[int, ...], classes: int, samples: int, *layers: nn.Module):
        self.model = nn.Sequential(*layers)
        self.x, self.y = torch.randn(samples, *shape), torch.randint(classes, (samples,))
        self.criterion = nn.CrossEntropyLoss()

    def loss(self) -> Tensor:
        return self.criterion(self.model(self.x), self.y)


def wide() -> Network:
    layers = nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 100)
    return Network((3072,), 100, 128, *layers)


def narrow() -> Network:
    layers = nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    return Network((784,), 10, 64, *layers)


def convolutional() -> Network:
    layers = (
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )
    return Network((1, 28, 28), 10, 64, *layers)


NETWORKS: dict[str, Callable[[], Network]] = {
    "MLP 3072→512→100, batch 128": wide,
    "MLP 784→256→128→10, batch 64": narrow,
    "CNN 28x28, 16 and 32 channels, batch 64": convolutional,
}
# At this rate a long measurement stays at the same network.
SETTINGS = {"lr": 1e-6, "momentum": 0.9}


def plain(network: Network) -> Step:
    optimizer = torch.optim.SGD(network.model.parameters(), **SETTINGS)

    def step() -> None:
        optimizer.zero_grad()
        network.loss().backward()
        optimizer.step()

    return step


def sam(network: Network, *, adaptive: bool = False) -> Step:
    optimizer = lowland.SAM(
        network.model.parameters(), torch.optim.SGD, adaptive=adaptive, **SETTINGS
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = network.loss()
        loss.backward()
        return loss

    return lambda: optimizer.step(closure, model=network.model)


def adaptive_sam(network: Network) -> Step:
    return sam(network, adaptive=True)


# Each with the most that it may cost, where something is promised.
JOBS: dict[str, tuple[Callable[[Network], Step], float | None]] = {
    "SAM": (sam, 2.05),
    "SAM, adaptive": (adaptive_sam, None),
}


def costs(names: list[str], rounds: int) -> list[str]:
    heads = [name if (reach := JOBS[name][1]) is None else f"{name} (≤ {reach})" for name in names]
    lines = [
        f"| network | P | a plain step, ms | {' | '.join(heads)} |",
        "| --- | --- | --- |" + " --- |" * len(names),
    ]
    for label, build in NETWORKS.items():
        torch.manual_seed(0)
        network = build()
        # One network for all jobs: a training has one too, and its caches hold no other.
        jobs = {"plain": plain(network)} | {name: JOBS[name][0](network) for name in names}
        times = interleaved(jobs, rounds=rounds)
        ratios = [f"{median_ratio(times[name], times['plain']):.2f}" for name in names]
        size = sum(p.numel() for p in network.model.parameters())
        milliseconds = 1e3 * sorted(times["plain"])[rounds // 2]
        lines.append(f"| {label} | {size:,} | {milliseconds:.2f} | {' | '.join(ratios)} |")
        print(lines[-1], file=sys.stderr)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=201)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--keep", action="store_true", help="write the result to README.md")
    arguments = parser.parse_args()
    head = (
        f"{torch.get_num_threads()} threads, float32, SGD with momentum, medians of "
        f"{arguments.rounds} rounds; multiples of one plain step, its update included."
    )
    report = "\n\n".join([head, "\n".join(costs(arguments.jobs, arguments.rounds))])
    print(report)
    if arguments.keep:
        keep("training.py", report)


if __name__ == "__main__":
    main()

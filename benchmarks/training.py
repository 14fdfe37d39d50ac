"""What a step of training with control of curvature costs: part of `make bench`.

In multiples of one plain step of the same optimizer on the same batch: gradients zeroed, forward,
backward, update; medians of interleaved rounds in float32. The result is printed and kept in
benchmarks/README.md. A further way of training is one more entry of JOBS.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import traces
from networks import GPT, resnet8, resnet18
from page import keep
from timing import interleaved, median_ratio
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import lowland
from lowland.penalties import Penalty

Step = Callable[[], object]


class Network:
    """A network with random inputs and classes."""

    def __init__(self, model: nn.Module, x: Tensor, classes: int, labels: int) -> None:
        self.model, self.x, self.y = model, x, torch.randint(classes, (labels,))
        self.criterion = nn.CrossEntropyLoss()

    def loss(self) -> Tensor:
        return self.criterion(self.model(self.x), self.y)


def shallow() -> Network:
    layers = nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)
    return Network(nn.Sequential(*layers), torch.randn(64, 784), 10, 64)


def wide() -> Network:
    layers = nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 100)
    return Network(nn.Sequential(*layers), torch.randn(128, 3072), 100, 128)


def narrow() -> Network:
    layers = nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    return Network(nn.Sequential(*layers), torch.randn(64, 784), 10, 64)


def convolutional() -> Network:
    layers = (
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )
    return Network(nn.Sequential(*layers), torch.randn(64, 1, 28, 28), 10, 64)


def small_residual() -> Network:
    return Network(resnet8(16, 10), torch.randn(128, 3, 32, 32), 10, 128)


def residual() -> Network:
    return Network(resnet18(32, 10), torch.randn(16, 3, 32, 32), 10, 16)


def evaluated() -> Network:
    network = residual()
    for _ in range(10):
        network.loss()
    network.model.eval()
    return network


def attentive() -> Network:
    return Network(GPT(256, 128, 4, 4, 64), torch.randint(256, (8, 64)), 256, 512)


NETWORKS: dict[str, Callable[[], Network]] = {
    "MLP 784→128→10, batch 64": shallow,
    "MLP 784→256→128→10, batch 64": narrow,
    "MLP 3072→512→100, batch 128": wide,
    "CNN 28x28, 16 and 32 channels, batch 64": convolutional,
    "ResNet-8, 16 to 64 channels, 32x32, batch 128": small_residual,
    "ResNet-18, 32 to 256 channels, 32x32, batch 16": residual,
    "the same in evaluation mode": evaluated,
    "GPT-2, 4 layers of width 128, 8 times 64 tokens": attentive,
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


def sam(**settings: object) -> Callable[[Network], Step]:
    """A step with SAM; of one that looks nearby in some steps only, as many as until then."""

    def build(network: Network) -> Step:
        model = network.model
        optimizer = lowland.SAM(model.parameters(), torch.optim.SGD, **SETTINGS, **settings)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = network.loss()
            loss.backward()
            return loss

        def step() -> None:
            for _ in range(optimizer.every):
                optimizer.step(closure, model=model)

        return step

    return build


def estimated(kind: type[Penalty], **settings: object) -> Callable[[Network], Step]:
    return penalized(kind, method="probes", **settings)


def penalized(kind: type[Penalty], **settings: object) -> Callable[[Network], Step]:
    """A step with a penalty; of one in some steps only, as many as until it comes again."""

    def build(network: Network) -> Step:
        optimizer = torch.optim.SGD(network.model.parameters(), **SETTINGS)
        penalty = kind(network.criterion, 1e-3, **settings)

        def step() -> None:
            for _ in range(penalty.every):
                optimizer.zero_grad()
                penalty.loss(network.model, network.x, network.y).backward()
                optimizer.step()

        return step

    return build


def by_hand(network: Network) -> Step:
    """What one writes without a library: a graph of the gradient's graph."""
    parameters = list(network.model.parameters())
    optimizer = torch.optim.SGD(parameters, **SETTINGS)

    def step() -> None:
        optimizer.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            loss = network.loss()
        gradient = grad(loss, parameters, create_graph=True)
        signs = [torch.randint(0, 2, p.shape).float() * 2 - 1 for p in parameters]
        form = sum((g * v).sum() for g, v in zip(gradient, signs, strict=True))
        products = grad(form, parameters, create_graph=True)
        (loss + 1e-3 * sum(product.square().sum() for product in products)).backward()
        optimizer.step()

    return step


@dataclass(frozen=True)
class Job:
    """A way of training: what makes its step, the most that it may cost, steps in one call.

    Where the most differs from network to network it is given for the first ones, in their order.
    """

    build: Callable[[Network], Step]
    reach: float | tuple[float, ...] | None = None
    steps: int = 1

    def reach_on(self, label: str) -> float | None:
        if not isinstance(self.reach, tuple):
            return self.reach
        return dict(zip(NETWORKS, self.reach, strict=False)).get(label)


QUARTER = {"samples": 0.25}
JOBS = {
    "Tr H": Job(penalized(lowland.HessianTrace), (1.7, 4, 3, 4.5, 4.5)),
    "Tr H, ¼ of the samples, every 2": Job(
        penalized(lowland.HessianTrace, every=2, **QUARTER), (1.2, 1.6, 1.5, 1.5, 1.5), 2
    ),
    "HSR, ¼ of the samples": Job(estimated(lowland.HSR, **QUARTER), (2.5, 2.5, 2.5, 2, 2)),
    "HSR, ¼ of the samples, every 4": Job(
        estimated(lowland.HSR, every=4, **QUARTER), (1.4, 1.4, 1.4, 1.3, 1.3), 4
    ),
    "λ_max": Job(penalized(lowland.LambdaMax), 3.3),
    "SAM": Job(sam(), 2.05),
    "SAM, adaptive": Job(sam(adaptive=True)),
    "SAM, momentum": Job(sam(perturb="momentum"), 1.1),
    "SAM, every 5 (LookSAM)": Job(sam(every=5), steps=5),
    "Tr H², by hand": Job(by_hand),
    "Tr H², exact": Job(estimated(lowland.FlatnessAware), 5.5),
    "HSR, exact": Job(estimated(lowland.HSR), 5.5),
    "HSR, finite": Job(estimated(lowland.HSR, products="differences"), 4.2),
    "HSR, exact, every 4": Job(estimated(lowland.HSR, every=4), 2.2, 4),
    "HSR, finite, every 4": Job(estimated(lowland.HSR, every=4, products="differences"), 2.2, 4),
    "λ_max, finite": Job(penalized(lowland.LambdaMax, products="differences"), 3.3),
}


def costs(chosen: list[str], names: list[str], rounds: int) -> list[str]:
    lines = table("network", "P", "a plain step, ms", *names)
    for label, network in networks(chosen):
        # One network for all jobs: a training has one too, and its caches hold no other.
        jobs = {"plain": plain(network)} | {name: JOBS[name].build(network) for name in names}
        times = interleaved(jobs, rounds=rounds)
        ratios = []
        for name in names:
            ratio = median_ratio(times[name], times["plain"]) / JOBS[name].steps
            reach = JOBS[name].reach_on(label)
            ratios.append(f"{ratio:.2f}" + ("" if reach is None else f" (≤ {reach})"))
        size = sum(p.numel() for p in network.model.parameters())
        milliseconds = 1e3 * sorted(times["plain"])[rounds // 2]
        lines.append(f"| {label} | {size:,} | {milliseconds:.2f} | {' | '.join(ratios)} |")
        print(lines[-1], file=sys.stderr)
    return lines


def counts(chosen: list[str], names: list[str]) -> list[str]:
    """Calls of Python functions and operations of PyTorch in a step, which no busy machine moves.

    On small networks they decide: each costs microseconds, whatever it does.
    """
    lines = table("network", "a plain step", *names)
    for label, network in networks(chosen):
        steps = {"plain": (plain(network), 1)} | {
            name: (JOBS[name].build(network), JOBS[name].steps) for name in names
        }
        cells = [f"{calls(step) // n}, {operations(step) // n}" for step, n in steps.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def calls(step: Step) -> int:
    """How many Python functions a call runs."""
    for _ in range(3):
        step()
    count = 0

    def seen(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(seen)
    step()
    sys.setprofile(None)
    return count


def operations(step: Step) -> int:
    """How many operations of PyTorch a call runs, those of backward passes included."""
    with _Operations() as seen:
        step()
    return seen.count


class _Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def peaks(chosen: list[str], names: list[str]) -> list[str]:
    """Peak memory: what a step allocates on top of parameters, momentum and data, and these."""
    lines = table("network", "a plain step, MiB", *names)
    for label, network in networks(chosen):
        held = sum(2 * p.nbytes for p in network.model.parameters()) + network.x.nbytes
        alone = held + _allocated(plain(network))
        ratios = [f"{(held + _allocated(JOBS[name].build(network))) / alone:.2f}" for name in names]
        lines.append(f"| {label} | {alone / 2**20:.1f} | {' | '.join(ratios)} |")
    return lines


def table(*heads: str) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]


def networks(chosen: list[str]) -> Iterator[tuple[str, Network]]:
    for label in chosen:
        torch.manual_seed(0)
        yield label, NETWORKS[label]()


def _allocated(step: Step) -> int:
    """The most bytes that one call holds at a time."""
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(accumulate(change for _, change in sorted(changes)))


def main() -> None:
    # These networks have kinks; what differences across them are worth is not the matter here.
    warnings.filterwarnings("ignore", "products='differences' with")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=201)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--keep", action="store_true", help="write the result to README.md")
    arguments = parser.parse_args()
    head = (
        f"{torch.get_num_threads()} threads, float32, SGD with momentum, medians of "
        f"{arguments.rounds} rounds; multiples of one plain step, its update included."
    )
    memory = "Peak memory in multiples of a plain step's, parameters, momentum and data included:"
    chosen = [name for name in NETWORKS if name in arguments.networks]
    beside = "Calls of Python functions in a step, and operations of PyTorch:"
    tables = [part(chosen, arguments.jobs) for part in (counts, peaks)]
    tables.insert(0, costs(chosen, arguments.jobs, arguments.rounds))
    first, second, third = ("\n".join(table) for table in tables)
    report = f"{head}\n\n{first}\n\n{beside}\n\n{second}\n\n{memory}\n\n{third}"
    print(report)
    exact = traces.report(arguments.rounds)
    print(f"\n{exact}")
    if arguments.keep:
        keep("training.py", report)
        keep("traces.py", exact)


if __name__ == "__main__":
    main()

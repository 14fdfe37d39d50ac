"""What a loss with its exact `Tr H` costs: part of `make bench`, called by training.py.

In multiples of one gradient of the loss, without an update, in float32 and on one thread; medians
of interleaved rounds. The result is printed and kept in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from page import keep
from timing import interleaved, median_ratio
from torch import Tensor, nn

import lowland


@dataclass(frozen=True)
class Case:
    """A network, a batch, and the most that loss, penalty and gradient may cost together."""

    widths: tuple[int, ...]
    unit: type[nn.Module]
    batch: int
    reach: float


CASES = (
    Case((784, 128, 10), nn.ReLU, 16, 2.0),
    Case((784, 128, 10), nn.ReLU, 64, 1.7),
    Case((784, 128, 10), nn.ReLU, 256, 1.7),
    Case((784, 256, 128, 10), nn.GELU, 64, 4.0),
    Case((30, 16, 16, 1), nn.Tanh, 569, 3.0),
)


def jobs(case: Case) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for one, other in pairwise(case.widths):
        layers += [nn.Linear(one, other), case.unit()]
    model, outputs = nn.Sequential(*layers[:-1]), case.widths[-1]
    x, criterion = torch.randn(case.batch, case.widths[0]), nn.CrossEntropyLoss()
    y = torch.randint(outputs, (case.batch,))
    if outputs == 1:
        criterion, y = nn.BCEWithLogitsLoss(), (torch.randn(case.batch, 1) > 0).float()
    penalty = lowland.HessianTrace(criterion, 1e-3, method="exact")
    unlimited = lowland.HessianTrace(criterion, 1e-3, method="exact", limit=None)

    def step(loss: Callable[[], Tensor]) -> None:
        model.zero_grad()
        loss().backward()

    return {
        "plain": partial(step, lambda: criterion(model(x), y)),
        "ours": partial(step, lambda: unlimited.loss(model, x, y)),
        "limited": partial(step, lambda: penalty.loss(model, x, y)),
    }


def report(rounds: int) -> str:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    head = (
        f"One thread, float32, medians of {rounds} rounds: "
        '`HessianTrace(method="exact", limit=None).loss` and its gradient, in gradients of the '
        "loss alone; and with a limit, for which both gradients are taken and compared."
    )
    lines = [
        f"{head}\n",
        "| network | batch | a gradient, ms | with Tr H, exact | reach | with a limit |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in CASES:
        times = interleaved(jobs(case), rounds=rounds)
        milliseconds = 1e3 * sorted(times["plain"])[rounds // 2]
        lines.append(
            f"| {'→'.join(map(str, case.widths))}, {case.unit.__name__} | {case.batch} | "
            f"{milliseconds:.2f} | {median_ratio(times['ours'], times['plain']):.2f} | "
            f"≤ {case.reach:g} | {median_ratio(times['limited'], times['plain']):.2f} |"
        )
        print(lines[-1], file=sys.stderr)
    torch.set_num_threads(threads)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=401)
    parser.add_argument("--keep", action="store_true", help="write the result to README.md")
    arguments = parser.parse_args()
    found = report(arguments.rounds)
    print(found)
    if arguments.keep:
        keep("traces.py", found)


if __name__ == "__main__":
    main()

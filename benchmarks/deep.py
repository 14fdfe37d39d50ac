"""What the exact moments of deeper and wider networks cost: part of `make bench`.

In multiples of one plain loss gradient of the same batch, medians of interleaved rounds in float64.
The result is printed and kept in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from itertools import pairwise

import torch
from page import keep
from timing import exponent, interleaved, median_ratio, seconds
from torch import Tensor, nn
from torch.autograd import grad

import lowland
from lowland.exact.modules import read

# Widths, samples, order of summation, and the most that one moment and its gradient may cost.
SIZES = (
    ((64, 32, 10), 1_797, "auto", 120.0),
    ((30, 16, 16, 1), 569, "auto", 40.0),
    ((784, 64, 10), 128, "samples", 25.0),
)
SCALING = (1_000, 4_000, 16_000, 64_000)


class Case:
    """A multilayer perceptron and random data: one logit by `bce`, several by `ce`."""

    def __init__(self, widths: tuple[int, ...], samples: int) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs, dtype=torch.float64), nn.Tanh()]
        self.model = nn.Sequential(*layers[:-1])
        self.parameters = list(self.model.parameters())
        self.dim = sum(parameter.numel() for parameter in self.parameters)
        self.x = torch.randn(samples, widths[0], dtype=torch.float64)
        self.criterion: nn.Module
        if widths[-1] == 1:
            self.criterion, self.y = nn.BCEWithLogitsLoss(), (torch.randn(samples, 1) > 0).double()
        else:
            self.criterion, self.y = nn.CrossEntropyLoss(), torch.randint(widths[-1], (samples,))

    def plain(self) -> object:
        return grad(self.criterion(self.model(self.x), self.y), self.parameters)

    def moments(self, order: str = "auto") -> lowland.HessianMoments:
        return read(self.model, self.criterion, self.x, self.y).moments(order)

    def ours(self, order: str = "auto") -> object:
        return grad(self.moments(order).upper, self.parameters)

    def forward_alone(self, order: str = "auto") -> object:
        with torch.no_grad():
            return self.moments(order).upper

    def trace(self) -> object:
        return grad(read(self.model, self.criterion, self.x, self.y).trace(), self.parameters)

    def brute_force(self) -> object:
        shapes = [parameter.shape for parameter in self.parameters]
        names = [name for name, _ in self.model.named_parameters()]
        flat = torch.cat([p.detach().flatten() for p in self.parameters]).requires_grad_()

        def loss(flat: Tensor) -> Tensor:
            parts = flat.split([shape.numel() for shape in shapes])
            named = {
                name: part.view(shape)
                for name, part, shape in zip(names, parts, shapes, strict=True)
            }
            return self.criterion(torch.func.functional_call(self.model, named, self.x), self.y)

        hessian = torch.func.hessian(loss)(flat)
        moments = lowland.HessianMoments(self.dim, hessian.trace(), hessian.square().sum())
        return grad(moments.upper, flat)


def costs(rounds: int) -> list[str]:
    lines = [
        "| network, n | P | ours | reach | moments only | trace | brute force | by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for widths, samples, order, reach in SIZES:
        case = Case(widths, samples)
        times = interleaved(
            {
                "plain": case.plain,
                "ours": lambda case=case, order=order: case.ours(order),
                "forward": lambda case=case, order=order: case.forward_alone(order),
                "trace": case.trace,
            },
            rounds=rounds,
        )
        ours, forward, trace = (
            median_ratio(times[name], times["plain"]) for name in ("ours", "forward", "trace")
        )
        brute, factor = brute_force_cost(case, sum(widths[1:]), times)
        network = "→".join(map(str, widths))
        lines.append(
            f"| {network}, {samples:,} | {case.dim:,} | {ours:.1f} | ≤ {reach:g} | {forward:.1f} | "
            f"{trace:.1f} | {brute} | {factor} |"
        )
        print(lines[-1], file=sys.stderr)
    return lines


def brute_force_cost(case: Case, units: int, times: dict[str, list[float]]) -> tuple[str, str]:
    # The Hessian's graph holds every sample's forward pass once for each of P directions.
    needed = (30 * units * len(case.x) + 8 * case.dim) * case.dim * 8
    if needed > 16 << 30:
        return f"does not fit ({needed / 2**30:,.0f} GiB)", "—"
    took = statistics.median(seconds(case.brute_force) for _ in range(3))
    plain, ours = statistics.median(times["plain"]), statistics.median(times["ours"])
    return f"{took / plain:,.0f}", f"{took / ours:,.0f}"


def scaling(rounds: int) -> str:
    widths = (10, 8, 8, 3)
    medians = []
    for samples in SCALING:
        case = Case(widths, samples)
        few = max(3, min(rounds, 200_000 // samples))
        job = {"ours": lambda case=case: case.ours("parameters")}
        medians.append(statistics.median(interleaved(job, rounds=few)["ours"]))
    return (
        f"Time against n from {SCALING[0]:,} to {SCALING[-1]:,} ({'→'.join(map(str, widths))}, "
        f'order "parameters"): exponent **{exponent(SCALING, medians):.2f}** (reach: ≤ 1.05), '
        + ", ".join(f"{t * 1e3:.1f} ms" for t in medians)
        + "."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--keep", action="store_true", help="write the result to README.md")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    head = (
        f"{torch.get_num_threads()} threads, float64, medians of {rounds} rounds, tanh units, "
        "random data; multiples of one plain loss gradient of the same batch, as above. "
        "*trace* is `Tr H` alone with its gradient."
    )
    report = "\n\n".join([head, "\n".join(costs(rounds)), scaling(rounds)])
    print(report)
    if arguments.keep:
        keep("deep.py", report)


if __name__ == "__main__":
    main()

"""What the exact moments and the gradient of HSR cost: `make bench`.

One table, in multiples of one plain loss gradient on the same data; medians of interleaved rounds
in float64. The result is printed and kept in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from page import keep
from timing import exponent, interleaved, median_ratio, seconds
from torch import Tensor, nn

import lowland
from lowland.exact import c_backend

SIZES = ((4_000, 2, 10, 5.0), (100_000, 10, 16, 12.0), (1_000, 30, 32, 40.0))
SCALING = (1_000, 10_000, 100_000, 1_000_000)


class Case:
    """One network and its data, with every way to get at the gradient of the bound."""

    def __init__(self, samples: int, inputs: int, hidden: int, *ensemble: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.x = normal(samples, inputs)
        self.y = (normal(samples) > 0).double()
        self.weights = [
            (normal(*ensemble, inputs + 1, hidden) / math.sqrt(inputs)).requires_grad_(),
            normal(*ensemble, hidden + 1, 1).requires_grad_(),
        ]
        self.dim = (inputs + 1) * hidden + hidden + 1
        self.model = nn.Sequential(
            nn.Linear(inputs, hidden), nn.Sigmoid(), nn.Linear(hidden, 1)
        ).double()
        self.criterion = nn.BCEWithLogitsLoss()

    def plain(self) -> object:
        loss = self.criterion(self.model(self.x), self.y.unsqueeze(1))
        return torch.autograd.grad(loss, list(self.model.parameters()))

    def upper(self, weights: list[Tensor], order: str = "auto") -> Tensor:
        return lowland.exact.moments(
            weights, self.x, self.y, activation="sigmoid", loss="bce", order=order
        ).upper.sum()

    def ours(self, order: str = "auto") -> object:
        return torch.autograd.grad(self.upper(self.weights, order), self.weights)

    def of_module(self) -> object:
        moments = lowland.hessian_moments(
            self.model, self.criterion, self.x, self.y.unsqueeze(1), method="exact"
        )
        return torch.autograd.grad(moments.upper, list(self.model.parameters()))

    def uncompiled(self) -> object:
        with mock.patch.object(c_backend, "is_available", return_value=False):
            return self.ours()

    def forward_alone(self) -> object:
        with torch.no_grad():
            return self.upper(self.weights)

    def one_by_one(self) -> object:
        return [
            torch.autograd.grad(self.upper([w, v]), [w, v])
            for w, v in zip(*self.weights, strict=True)
        ]

    def brute_force(self) -> object:
        shapes = [weight.shape for weight in self.weights]
        flat = torch.cat([weight.detach().flatten() for weight in self.weights]).requires_grad_()

        def loss(flat: Tensor) -> Tensor:
            first, last = (
                part.view(shape)
                for part, shape in zip(
                    flat.split([shape.numel() for shape in shapes]), shapes, strict=True
                )
            )
            hidden = torch.sigmoid(self.x @ first[1:] + first[0])
            return self.criterion((hidden @ last[1:] + last[0]).squeeze(1), self.y)

        hessian = torch.func.hessian(loss)(flat)
        moments = lowland.HessianMoments(self.dim, hessian.trace(), hessian.square().sum())
        return torch.autograd.grad(moments.upper, flat)

    def chunked_value(self) -> object:
        """One value of the bound by our order over pairs of samples."""
        with torch.no_grad():
            return self.upper(self.weights, "samples")

    def paper_value(self) -> object:
        """One value of the bound as the paper writes it: every pair of samples, term by term.

        Source: arXiv:2606.28662, theorem 1, with one n x n matrix for each inner product.
        """
        with torch.no_grad():
            first, last = self.weights
            count = len(self.x)
            x = torch.cat([torch.ones(count, 1, dtype=self.x.dtype), self.x], 1)
            z = torch.sigmoid(x @ first)
            slope = z * (1 - z)
            bend = slope * (1 - 2 * z)
            u, c = last[1:, 0] * slope, last[1:, 0] * bend
            z1 = torch.cat([torch.ones(count, 1, dtype=z.dtype), z], 1)
            p = torch.sigmoid(z1 @ last)[:, 0]
            q, r = p * (1 - p), p - self.y
            qq, qr, rr = torch.outer(q, q), torch.outer(q, r), torch.outer(r, r)
            xx, uu, zz = x @ x.T, u @ u.T, z1 @ z1.T
            mixed = qr * (u.square() @ c.T)
            ww = qq * uu.square() + mixed + mixed.T + rr * (c @ c.T)
            mixed = qr * ((u * z) @ slope.T)
            wv = qq * uu * zz + mixed + mixed.T + rr * (slope @ slope.T)
            trace_sq = (xx.square() * ww + 2 * xx * wv + qq * zz.square()).sum() / count**2
            inner = q * u.square().sum(1) + r * c.sum(1)
            trace = (x.square().sum(1) * inner + q * z1.square().sum(1)).mean()
            return lowland.HessianMoments(self.dim, trace, trace_sq).upper


def costs(rounds: int) -> list[str]:
    heads = ("n, inputs, hidden", "P", "ours", "reach", "of a module (≤ 1.3 times)")
    heads += ("moments only", "not compiled", "brute force", "by")
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for samples, inputs, hidden, reach in SIZES:
        case = Case(samples, inputs, hidden)
        times = interleaved(
            {
                "plain": case.plain,
                "ours": case.ours,
                "module": case.of_module,
                "forward": case.forward_alone,
                "uncompiled": case.uncompiled,
            },
            rounds=rounds,
        )
        ours = median_ratio(times["ours"], times["plain"])
        module = median_ratio(times["module"], times["plain"])
        beside = median_ratio(times["module"], times["ours"])
        forward = median_ratio(times["forward"], times["plain"])
        uncompiled = median_ratio(times["uncompiled"], times["plain"])
        brute, factor = brute_force_cost(case, times)
        lines.append(
            f"| {samples:,}, {inputs}, {hidden} | {case.dim:,} | {ours:.1f} | ≤ {reach:g} | "
            f"{module:.1f} ({beside:.2f} times) | "
            f"{forward:.1f} | {uncompiled:.1f} | {brute} | {factor} |"
        )
        print(lines[-1], file=sys.stderr)
    return lines


def brute_force_cost(case: Case, times: dict[str, list[float]]) -> tuple[str, str]:
    # The Hessian's graph holds every sample's forward pass once for each of P directions.
    needed = 40 * case.dim * case.x.shape[0] * case.weights[0].shape[-1] * 8
    if needed > 12 << 30:
        return f"does not fit ({needed / 2**30:,.0f} GiB)", "—"
    took = statistics.median(seconds(case.brute_force) for _ in range(3))
    plain, ours = statistics.median(times["plain"]), statistics.median(times["ours"])
    return f"{took / plain:,.0f}", f"{took / ours:,.0f}"


def numerical_gradient(rounds: int) -> str:
    case = Case(4_000, 2, 10)
    torch.testing.assert_close(case.paper_value(), case.upper(case.weights))
    times = interleaved(
        {"paper": case.paper_value, "chunked": case.chunked_value, "ours": case.ours},
        rounds=max(3, rounds // 5),
    )
    values = 2 * case.dim
    paper = values * median_ratio(times["paper"], times["ours"])
    chunked = values * median_ratio(times["chunked"], times["ours"])
    return (
        f"Numerical gradient at n = 4,000, P = {case.dim}: central differences take {values} "
        "values of the bound. By the time of one value, with the double sum over samples written "
        f"out as in the paper, we are **{paper:,.0f}** times faster (reach: ≥ 10,000); with our "
        f'own chunked order "samples" in its place, {chunked:,.0f} times.'
    )


def ensemble(rounds: int) -> str:
    case = Case(1_000, 2, 5, 256)
    times = interleaved(
        {"together": case.ours, "loop": case.one_by_one}, rounds=max(3, rounds // 3)
    )
    share = median_ratio(times["together"], times["loop"])
    each = statistics.median(times["together"]) / 256
    return (
        "Ensemble of 256 networks (n = 1,000, 2 inputs, 5 hidden): one call costs "
        f"**{share:.3f}** of a loop over single calls (reach: ≤ 0.1); {each * 1e6:.0f} µs a "
        "network."
    )


def scaling(rounds: int) -> str:
    medians = []
    for samples in SCALING:
        case = Case(samples, 2, 10)
        few = max(3, min(rounds, 3_000_000 // samples))
        medians.append(statistics.median(interleaved({"ours": case.ours}, rounds=few)["ours"]))
    peaks = [peak_mebibytes(samples) for samples in SCALING]
    return (
        f"Time against n from {SCALING[0]:,} to {SCALING[-1]:,} (2 inputs, 10 hidden): exponent "
        f"**{exponent(SCALING, medians):.2f}** (reach: ≤ 1.05), "
        + ", ".join(f"{t * 1e3:.2f} ms" for t in medians)
        + "; peak memory beyond the data "
        + ", ".join(f"{peak:.1f} MiB" for peak in peaks)
        + "."
    )


def peak_mebibytes(samples: int) -> float:
    """How much a process's peak memory grows in one call; a fresh process for each size."""
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); from exact import Case;"
        "Case(1000, 2, 10).ours(); case = Case(int(sys.argv[2]), 2, 10); case.x.sum();"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "open('/proc/self/clear_refs', 'w').write('5');"
        "status = lambda key: next(int(l.split()[1]) for l in open('/proc/self/status') "
        "if l.startswith(key));"
        "before = status('VmRSS'); case.ours(); print((status('VmHWM') - before) / 1024)"
    )
    run = subprocess.run(  # noqa: S603 - our own file in our own interpreter
        [sys.executable, "-c", code, str(Path(__file__).parent), str(samples)],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(run.stdout)


def import_time(rounds: int) -> str:
    def run(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603

    # Names load when they are first used, so an import alone would say nothing.
    jobs = {"torch": run("import torch"), "lowland": run("from lowland import *")}
    times = interleaved(jobs, rounds=max(5, rounds // 3))
    ratio = median_ratio(times["lowland"], times["torch"])
    return (
        f"`from lowland import *` takes **{ratio:.2f}** times as long as `import torch` (reach: "
        "≤ 1.2)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--keep", action="store_true", help="write the result to README.md")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    built = "in use" if c_backend.is_available() else "not built"
    head = (
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, float64, medians of {rounds} rounds, compiled code "
        f"{built}. Costs are multiples of one plain loss gradient of the same data: *ours* is "
        "`lowland.exact.moments` and the gradient of the upper bound, *of a module* the same by "
        "`lowland.hessian_moments`, also in multiples of *ours*, *brute force* is "
        "`torch.func.hessian` and autograd through it, *by* the factor by which we are faster, "
        "*not compiled* our path through PyTorch, which serves where no C compiler was found."
    )
    paragraphs = [
        head,
        "\n".join(costs(rounds)),
        numerical_gradient(rounds),
        ensemble(rounds),
        scaling(rounds),
        import_time(rounds),
    ]
    report = "\n\n".join(paragraphs)
    print(report)
    if arguments.keep:
        keep("exact.py", report)


if __name__ == "__main__":
    main()

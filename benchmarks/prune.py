"""What leaving out fitted samples saves, and how far off it is, at several stages of training.

Networks trained by Adam on the whole batch: on two Gaussians in the plane, as far apart as in the
HSR paper and further, and on the tables that scikit-learn carries. Moments and the gradient of the
upper bound with `prune=` against those of all samples; float64, one thread, medians of ratios
within a round. An error above its certificate would stop the script.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence

import torch
from page import keep
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.preprocessing import StandardScaler
from timing import interleaved, median_ratio
from torch import Tensor
from torch.nn import functional

from lowland import HessianMoments, exact

STAGES = (0, 100, 1_000, 5_000)
TOLERANCES = (0.1, 0.01)
Data = tuple[Tensor, Tensor]


def gaussians(variance: float) -> Data:
    """A thousand samples of two classes around (1, 1) and (-1, -1)."""
    generator = torch.Generator().manual_seed(0)
    y = (torch.arange(1_000) % 2).double()
    noise = torch.randn(1_000, 2, generator=generator, dtype=torch.float64)
    return variance**0.5 * noise + (2 * y - 1)[:, None], y


def table(load: Callable) -> Data:
    x, y = load(return_X_y=True)
    return torch.from_numpy(StandardScaler().fit_transform(x)), torch.from_numpy(y)


def output(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    for weight in weights[:-1]:
        x = torch.tanh(x @ weight[1:] + weight[0])
    return x @ weights[-1][1:] + weights[-1][0]


def looked_at(
    weights: Sequence[Tensor], data: Data, network: dict[str, str], prune: float | None
) -> tuple[HessianMoments, list[Tensor]]:
    """The moments, and of both and of the upper bound the gradient."""
    moments = exact.moments(weights, *data, **network, prune=prune)
    found = []
    for value in (moments.trace, moments.trace_sq, moments.upper):
        grads = torch.autograd.grad(value, weights, retain_graph=True)
        found.append(torch.cat([part.flatten() for part in grads]))
    return moments, found


def errors(weights, data, network, tolerance) -> tuple[int, float, float, float]:
    """How many samples are left out; the largest error as a part of its certificate and, like the
    error of the upper bound's gradient, of the true quantity.
    """
    whole, in_whole = looked_at(weights, data, network, None)
    part, in_part = looked_at(weights, data, network, tolerance)
    report = part.pruned
    triples = [
        (whole.trace - part.trace, report.trace, whole.trace),
        (whole.trace_sq - part.trace_sq, report.trace_sq, whole.trace_sq),
        (in_whole[0] - in_part[0], report.trace_gradient, in_whole[0]),
        (in_whole[1] - in_part[1], report.trace_sq_gradient, in_whole[1]),
    ]
    shares, sizes = [], []
    for off, certificate, whole in triples:
        error, true = off.detach(), whole.detach()
        rounding = 1e-12 * true.norm()
        assert error.norm() <= certificate + rounding
        assert certificate <= tolerance * true.norm() + rounding
        shares.append(float(error.norm() / certificate) if certificate else 0.0)
        sizes.append(float(certificate / true.norm()))
    direction = float((in_whole[2] - in_part[2]).norm() / in_whole[2].norm())
    return report.dropped, max(shares), max(sizes), direction


def row(name, stage, weights, data, network, loss, rounds) -> str:
    def job(prune: float | None) -> Callable[[], object]:
        def step() -> None:
            upper = exact.moments(weights, *data, **network, prune=prune).upper
            torch.autograd.grad(upper, weights)

        return step

    jobs = {"all": job(None), **{str(each): job(each) for each in TOLERANCES}}
    times = interleaved(jobs, rounds=rounds)
    columns = []
    for tolerance in TOLERANCES:
        dropped, share, size, direction = errors(weights, data, network, tolerance)
        saved = median_ratio(times["all"], times[str(tolerance)])
        columns.append(f"{dropped / len(data[0]):.0%} | {saved:.2g}")
        columns.append(f"{direction:.0e} | {size:.0e} | {share:.2f}" if dropped else "| |")
    dim = sum(weight.numel() for weight in weights)
    start = f"| {name} | {dim:,} | {len(data[0]):,} | {stage:,} | {loss:.1g} |"
    return f"{start} {' | '.join(columns)} |"


def rows(name, data, widths, rounds) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(rows + 1, columns, generator=generator, dtype=torch.float64) / rows**0.5
        for rows, columns in itertools.pairwise(widths)
    ]
    weights = [weight.requires_grad_() for weight in weights]
    network = {"activation": "tanh", "loss": "ce" if widths[-1] > 1 else "bce"}
    x, y = data
    if widths[-1] == 1:
        data = x, y.double()
    optimizer = torch.optim.Adam(weights, lr=0.01)
    lines = []
    for step in range(STAGES[-1] + 1):
        logits = output(weights, x)
        if widths[-1] > 1:
            loss = functional.cross_entropy(logits, y)
        else:
            loss = functional.binary_cross_entropy_with_logits(logits[:, 0], data[1])
        if step in STAGES:
            lines.append(row(name, step, weights, data, network, loss.item(), rounds))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lines


def report(rounds: int) -> str:
    torch.set_num_threads(1)
    of_each = ("dropped", "saved", "error of ∇U", "largest certificate", "error / certificate")
    columns = ["data, network", "P", "n", "steps", "loss"]
    columns += [f"{tolerance:g}: {name}" for tolerance in TOLERANCES for name in of_each]
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    digits, classes = table(load_digits)
    for name, data, widths in (
        ("Gaussians of variance 2, 2-5-1", gaussians(2.0), (2, 5, 1)),
        ("Gaussians of variance 0.25, 2-32-1", gaussians(0.25), (2, 32, 1)),
        ("Breast Cancer, 30-32-1", table(load_breast_cancer), (30, 32, 1)),
        ("Breast Cancer, 30-16-16-1", table(load_breast_cancer), (30, 16, 16, 1)),
        ("Digits, even or odd, 64-32-1", (digits, classes % 2), (64, 32, 1)),
        ("Digits, 64-16-10", (digits, classes), (64, 16, 10)),
    ):
        lines += rows(name, data, widths, rounds)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--keep", action="store_true", help="write the result to README.md")
    arguments = parser.parse_args()
    result = report(arguments.rounds)
    print(result)
    if arguments.keep:
        keep("prune.py", result)


if __name__ == "__main__":
    main()

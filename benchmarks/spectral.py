"""What eigenvalues and their exact gradients cost, in gradients of HSR.

The largest eigenvalue by products with the Hessian and by the whole matrix, each with its gradient,
and the gradient alone along an eigenvector that is known. One thread, float64; ratios of medians
within one run.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
from page import keep
from timing import interleaved, median_ratio
from torch import Tensor

from lowland import exact
from lowland._limits import DEFAULT_MEMORY_BUDGET
from lowland.exact.setup import Setup, prepare

SHAPES = (
    ("10-16-1, tanh", (10, 16, 1), "tanh", "bce", 500),
    ("30-16-16-1, gelu", (30, 16, 16, 1), "gelu", "bce", 569),
    ("64-32-10, tanh", (64, 32, 10), "tanh", "ce", 500),
    ("784-128-10, gelu", (784, 128, 10), "gelu", "ce", 64),
)
MOST_BY_MATRIX = 1_000


def problem(widths, activation, loss, samples) -> tuple[list[Tensor], Tensor, Tensor, dict]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = [
        (normal(rows + 1, columns) / rows**0.5).requires_grad_()
        for rows, columns in itertools.pairwise(widths)
    ]
    x, y = normal(samples, widths[0]), normal(samples, widths[-1])
    targets = y.argmax(1) if loss == "ce" else (y[:, 0] > 0).double()
    return weights, x, targets, {"activation": activation, "loss": loss}


def passes(setup: Setup) -> tuple[Callable[[], object], Callable[[], object]]:
    """Jobs that take a product with the Hessian, and the gradient along a direction."""
    problem = setup.of_plain_code().trace_problem(DEFAULT_MEMORY_BUDGET)
    direction = [torch.randn_like(weight) for weight in setup.weights]

    def product() -> object:
        return problem.on_torch(setup.weights, lambda backend: backend.product(direction))

    def contraction() -> object:
        return problem.on_torch(setup.weights, lambda backend: backend.gradient_along(direction))

    return product, contraction


def row(name, widths, activation, loss, samples, rounds) -> str:
    weights, x, y, network = problem(widths, activation, loss, samples)

    def gradient(value: Tensor) -> None:
        torch.autograd.grad(value, weights)

    setup = prepare(weights, x, y, activation, loss, "mean")
    setup = setup.at([weight.detach() for weight in setup.weights])
    product, contraction = passes(setup)
    jobs = {
        "hsr": lambda: gradient(exact.moments(weights, x, y, **network).upper),
        "samples": lambda: gradient(exact.moments(weights, x, y, **network, order="samples").upper),
        "product": product,
        "contraction": contraction,
        "lanczos": lambda: gradient(
            exact.spectral(weights, x, y, **network, f="lambda_max", method="lanczos")
        ),
    }
    if setup.size.dim <= MOST_BY_MATRIX:
        jobs["dense"] = lambda: gradient(
            exact.spectral(weights, x, y, **network, f="lambda_max", method="dense")
        )
        jobs["nuclear"] = lambda: gradient(exact.spectral(weights, x, y, **network, f="nuclear"))
    times = interleaved(jobs, rounds=rounds)

    def ratio(job: str, to: str) -> str:
        return f"{median_ratio(times[job], times[to]):.2g}" if job in times else ""

    columns = [ratio(job, "hsr") for job in ("product", "contraction")]
    columns.append(ratio("contraction", "samples"))
    columns += [ratio(job, "hsr") for job in ("lanczos", "dense", "nuclear")]
    return f"| {name} | {setup.size.dim:,} | {samples} | {' | '.join(columns)} |"


def report(rounds: int) -> str:
    torch.set_num_threads(1)
    columns = ("network", "P", "n", "H u", "∇(uᵀHu)", "the same, in HSR by samples")
    columns += ("λ₁ and ∇λ₁, Lanczos", "by the matrix", "nuclear norm")
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    lines += [row(*shape, rounds) for shape in SHAPES]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", action="store_true", help="write the result to README.md")
    arguments = parser.parse_args()
    result = report(arguments.rounds)
    print(result)
    if arguments.keep:
        keep("spectral.py", result)


if __name__ == "__main__":
    main()

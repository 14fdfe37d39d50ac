"""What the library does on a GPU: its tests, the exact engine at scale, and probe penalties.

At most eight minutes; what no longer fits into them is left out and said. The result is printed,
and written to benchmarks/gpu.md. `--small` runs tiny problems on whatever device there is.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from networks import resnet18
from torch import Tensor, nn

import lowland
from lowland import exact
from lowland.exact.plan import work
from lowland.exact.setup import prepare

MINUTES = 8.0
TESTS_AT_MOST = 150.0  # seconds
# Order of summation, samples, widths. P is 19,210, 2,762, and 19,210.
CASES = (
    ("parameters", 100_000, (64, 256, 10)),
    ("parameters", 1_000_000, (20, 100, 6)),
    ("parameters", 1_000_000, (64, 256, 10)),
    ("samples", 4_000, (64, 256, 10)),
    ("samples", 20_000, (64, 256, 10)),
)
SMALL_CASES = (("parameters", 200, (3, 5, 2)), ("samples", 50, (3, 5, 2)))
TYPES = (
    ("float64", torch.float64, False),
    ("float32", torch.float32, False),
    ("float32, TF32", torch.float32, True),
)
CRITERION = nn.CrossEntropyLoss()


class Run:
    """One run of this script: where, how large, and until when."""

    def __init__(self, *, small: bool) -> None:
        self.small = small
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.started = time.perf_counter()

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return 60 * MINUTES - (time.perf_counter() - self.started)

    def seconds(self, job: Callable[[], object]) -> float:
        """What a job takes, the device's work included."""
        self.wait()
        start = time.perf_counter()
        job()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self, dtype: torch.dtype) -> float:
        """Multiply-adds a second, twice, of one large product: the device's own peak."""
        count = 256 if self.small else 8192
        a, b = torch.randn(2, count, count, device=self.device, dtype=dtype)
        a @ b
        return 2 * count**3 / min(self.seconds(lambda: a @ b) for _ in range(3))


def tests(run: Run) -> str:
    """The tests that need an accelerator, in a process of their own."""
    if run.small or run.device.type == "cpu":
        return "GPU tests: not run here."
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests", "-p", "no:cacheprovider"]
    root = Path(__file__).parent.parent
    try:
        found = subprocess.run(  # noqa: S603 - our own tests
            command, cwd=root, capture_output=True, text=True, timeout=TESTS_AT_MOST, check=False
        )
    except subprocess.TimeoutExpired:
        return f"GPU tests: not done after {TESTS_AT_MOST:.0f} s."
    lines = found.stdout.strip().splitlines()
    failed = [f"* {line}" for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "\n".join([f"GPU tests: {lines[-1] if lines else found.stderr[-200:]}", *failed])


def engine(run: Run) -> Iterator[str]:
    """Moments and their gradient, order by order and type by type."""
    yield "| order | n | P | numbers | seconds | Tflop/s | share of a product's peak |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, dtype, fast in TYPES:
        torch.backends.cuda.matmul.allow_tf32 = fast
        peak = run.peak(dtype)
        for order, samples, widths in SMALL_CASES if run.small else CASES:
            dim = sum((a + 1) * b for a, b in pairwise(widths))
            head = f"| {order} | {samples:,} | {dim:,} | {name} |"
            weights, x, y = problem(run, samples, widths, dtype)
            setup = prepare(weights, x, y, "gelu", "ce", "mean")
            path = "samples" if order == "samples" else "parameters"
            operations = 2 * work(setup.size, path)[0]
            if operations / (0.3 * peak) > run.left - 60:
                yield f"{head} left out for lack of time | | |"
                continue
            budget = (1 << 28) if run.device.type == "cpu" else (12 << 30)

            def job(
                weights: list[Tensor] = weights,
                x: Tensor = x,
                y: Tensor = y,
                order: str = order,
                budget: int = budget,
            ) -> None:
                found = exact.moments(
                    weights, x, y, activation="gelu", loss="ce", order=order, memory_budget=budget
                )
                torch.autograd.grad(found.upper, weights)

            took = run.seconds(job)
            if took < 2:  # the first time holds what is set up once
                took = min(run.seconds(job) for _ in range(3))
            rate = operations / took
            yield f"{head} {took:.3g} | {rate / 1e12:.3g} | {100 * rate / peak:.0f} % |"
    torch.backends.cuda.matmul.allow_tf32 = False


def problem(
    run: Run, samples: int, widths: tuple[int, ...], dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Random networks and data, the same in each run."""
    torch.manual_seed(0)
    settings = {"device": run.device, "dtype": dtype}
    weights = [
        (torch.randn(a + 1, b, **settings) / (a + 1) ** 0.5).requires_grad_()
        for a, b in pairwise(widths)
    ]
    x = torch.randn(samples, widths[0], **settings)
    return weights, x, torch.randint(widths[-1], (samples,), device=run.device)


def penalties(run: Run) -> Iterator[str]:
    """Steps with one probe, in plain steps of the same network."""
    torch.manual_seed(0)
    width, batch, side, rounds = (4, 2, 8, 1) if run.small else (64, 128, 32, 10)
    model = resnet18(width, 10).to(run.device)
    x = torch.randn(batch, 3, side, side, device=run.device)
    y = torch.randint(10, (batch,), device=run.device)

    def step(penalty: lowland.CurvaturePenalty | None) -> None:
        model.zero_grad()
        loss = CRITERION(model(x), y) if penalty is None else penalty.loss(model, x, y)
        loss.backward()

    kinds = (lowland.HSR, lowland.HessianTrace, lowland.FlatnessAware)
    jobs: dict[str, lowland.CurvaturePenalty | None] = {"plain": None}
    jobs |= {kind.__name__: kind(CRITERION, 0.01, method="probes") for kind in kinds}
    jobs["head alone, exact"] = lowland.HessianTrace(
        CRITERION, 0.01, method="exact", parameters=list(model.parameters())[-2:]
    )
    for penalty in jobs.values():
        step(penalty)
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        if run.left < 30:
            break
        for name, penalty in jobs.items():
            times[name].append(run.seconds(lambda penalty=penalty: step(penalty)))
    yield f"ResNet-18 of {width} to {8 * width} channels, {side}x{side}, batch {batch}:"
    yield ""
    yield "| penalty | plain steps |"
    yield "| --- | --- |"
    for name in jobs:
        ratios = [a / b for a, b in zip(times[name], times["plain"], strict=True)]
        yield (
            f"| {name} | {statistics.median(ratios):.2f} |" if ratios else f"| {name} | left out |"
        )


def report(run: Run) -> str:
    """All of it, in Markdown."""
    on = torch.cuda.get_device_name() if run.device.type == "cuda" else f"{platform.machine()}, CPU"
    lines = [
        "# On a GPU",
        "",
        (
            f"By `python benchmarks/gpu.py` on {on}, PyTorch {torch.__version__}. Time is that of "
            "both moments and their gradient; the peak is that of one product of 8,192 by 8,192 "
            "matrices of the same numbers, measured in the same run. Operations are those of the "
            "products alone."
        ),
        "",
        tests(run),
        "",
        *engine(run),
        "",
        *penalties(run),
        "",
        f"All of it took {(time.perf_counter() - run.started) / 60:.1f} minutes.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny problems, on any device")
    parser.add_argument("--out", type=Path, help="where to write; gpu.md beside this by default")
    settings = parser.parse_args()
    run = Run(small=settings.small)
    if run.device.type == "cpu" and not run.small:
        parser.error("there is no GPU here: use --small for tiny problems on the processor")
    text = report(run)
    print(text)
    out = settings.out or (None if run.small else Path(__file__).with_name("gpu.md"))
    if out is not None:
        out.write_text(text)


if __name__ == "__main__":
    main()

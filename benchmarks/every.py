"""What `every=4` and finite differences change in what training finds.

Networks are trained on scikit-learn's digits with HSR through one probe a step; what is compared is
the largest eigenvalue of the Hessian of the whole training set at the end, by brute force. The
result is printed and kept in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from page import keep
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowland
from lowland.dense import dense_hessian

WEIGHTS = (0.001, 0.003, 0.01)
WAYS = {
    "every 4": {"every": 4},
    "differences": {"products": "differences"},
    "finite, every 4": {"products": "differences", "every": 4},
}
CRITERION = nn.CrossEntropyLoss()


def train(x: Tensor, y: Tensor, seed: int, steps: int, weight: float, **settings: object) -> float:
    """The largest eigenvalue after training."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    signs, batches = (torch.Generator().manual_seed(seed) for _ in range(2))
    penalty = lowland.HSR(CRITERION, weight, method="probes", generator=signs, **settings)
    for _ in range(steps):
        batch = torch.randint(len(x), (128,), generator=batches)
        optimizer.zero_grad()
        penalty.loss(model, x[batch], y[batch]).backward()
        optimizer.step()
    matrix = dense_hessian(model.double(), CRITERION, x.double(), y).detach()
    return float(torch.linalg.eigvalsh(matrix)[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--keep", action="store_true", help="write the result to README.md")
    arguments = parser.parse_args()
    seeds, steps = range(arguments.seeds), arguments.steps
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)

    def trained(weight: float, **settings: object) -> list[float]:
        return [train(x, y, seed, steps, weight, **settings) for seed in seeds]

    without = statistics.median(trained(0.0))
    lines = [
        f"| weight | λ₁ of every step | {' | '.join(WAYS)} |",
        "| --- | --- |" + " --- |" * len(WAYS),
    ]
    for weight in WEIGHTS:
        whole = trained(weight)
        cells = []
        for settings in WAYS.values():
            found = trained(weight, **settings)
            ratios = sorted(a / b for a, b in zip(found, whole, strict=True))
            cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        lines.append(f"| {weight} | {statistics.median(whole):.3f} | {' | '.join(cells)} |")
        print(lines[-1])
    report = (
        f"Digits, 64→16→10 with GELU units, {steps} steps of 128 samples, {len(seeds)} seeds. "
        f"Without a penalty λ₁ ends at {without:.3f} (median). The other columns are multiples of "
        "the same seed's λ₁ where the penalty is exact and in every step: median, and range.\n\n"
        + "\n".join(lines)
    )
    print(report)
    if arguments.keep:
        keep("every.py", report)


if __name__ == "__main__":
    main()

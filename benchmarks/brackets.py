"""How closely two and four moments bracket the largest eigenvalue of trained networks' Hessians.

Small networks on the data that scikit-learn carries, trained by Adam on the whole batch; their
Hessians are formed, so the eigenvalue is known. Each row is one network at one moment of training.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from page import keep
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from lowland import HessianMoments
from lowland.dense import dense_hessian

STEPS = (0, 100, 1_000)
SAMPLES = 500


def samples(load) -> tuple[Tensor, Tensor]:
    x, y = load(return_X_y=True)
    return tuple(
        torch.from_numpy(part[:SAMPLES]) for part in (StandardScaler().fit_transform(x), y)
    )


def network(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for rows, columns in itertools.pairwise(widths):
        layers += [nn.Linear(rows, columns), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def row(name: str, shape: str, steps: int, matrix: Tensor) -> str:
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    square = matrix @ matrix
    moments = HessianMoments(
        len(matrix),
        matrix.trace(),
        square.trace(),
        higher=((square * matrix).sum(), square.square().sum()),
    )
    ends = [tuple(map(float, moments.bracket(1, moments=number))) for number in (2, 4)]
    assert all(low <= largest * (1 + 1e-6) and largest <= high * (1 + 1e-6) for low, high in ends)
    widths = " | ".join(f"{(high - low) / largest:.2f}" for low, high in ends)
    uppers = " | ".join(f"{high / largest:.3f}" for _, high in ends)
    return (
        f"| {name}, {shape} | {steps:,} | {len(matrix):,} | {largest:.3g} | {widths} | {uppers} |"
    )


def report() -> str:
    lines = [
        "| data, network | steps | P | λ₁ | width / λ₁ by 2 | by 4 | upper / λ₁ by 2 | by 4 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    x, y = samples(load_breast_cancer)
    cancer = "Breast Cancer", x, y.double().unsqueeze(1), nn.BCEWithLogitsLoss()
    digits = "Digits", *samples(load_digits), nn.CrossEntropyLoss()
    for (name, x, y, criterion), widths in (
        (cancer, (30, 4, 1)),
        (cancer, (30, 32, 1)),
        (cancer, (30, 16, 16, 1)),
        (digits, (64, 8, 10)),
        (digits, (64, 16, 10)),
        (digits, (64, 12, 12, 10)),
    ):
        torch.manual_seed(0)
        model = network(*widths)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(max(STEPS) + 1):
            if step in STEPS:
                with torch.no_grad():
                    matrix = dense_hessian(model, criterion, x, y)
                lines.append(row(name, "-".join(map(str, widths)), step, matrix))
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", action="store_true", help="write the result to README.md")
    arguments = parser.parse_args()
    result = report()
    print(result)
    if arguments.keep:
        keep("brackets.py", result)


if __name__ == "__main__":
    main()

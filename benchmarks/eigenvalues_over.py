"""Products with the Hessian that ``eigenvalues_over`` takes, beside random starts and ``spectrum``.

Networks on 500 of MNIST's digits, from the folder that ``LOWLAND_DATA`` names, trained by full
batches. What it prints stands in the docstring of ``eigenvalues_over``.
"""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import nn

import lowland
from lowland.spectra.surface import HessianOperator
from lowland.studies.data.images import data_folder, mnist_test

SAMPLES, CHECKPOINTS, EVERY, RATE = 500, 20, 20, 0.05
ALONE = slice(1, None, 4)  # checkpoints that are looked at from random starts, too


def mlp():
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh()),
        nn.Linear(32, 10),
    )


def cnn():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 32, 5, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


@contextmanager
def counted():
    """Count products of the Hessian with a vector."""
    plain, count = HessianOperator.__matmul__, [0]

    def product(self, vectors):
        count[0] += 1 if vectors.ndim == 1 else vectors.shape[1]
        return plain(self, vectors)

    HessianOperator.__matmul__ = product
    try:
        yield count
    finally:
        HessianOperator.__matmul__ = plain


def trained(model, criterion, data):
    """Checkpoints of training."""
    x, y = data
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    states = []
    for step in range(EVERY * CHECKPOINTS):
        if step % EVERY == 0:
            states.append({name: part.clone() for name, part in model.state_dict().items()})
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return states


def by_spectrum(model, criterion, data, states, k):
    """Products of a call for each checkpoint, of as few probes as it takes."""
    model = deepcopy(model)
    with counted() as count:
        for state in states:
            model.load_state_dict(state)
            lowland.spectrum(
                model, criterion, data, k=k, method="lanczos", trace_probes=2, tolerance=1e-3
            )
    return count[0] / len(states)


def main() -> None:
    torch.set_num_threads(1)
    digits = mnist_test(data_folder())
    data = digits.x[:SAMPLES].float().view(-1, 1, 28, 28), digits.y[:SAMPLES]
    criterion = nn.CrossEntropyLoss()
    print(
        "network, k: products at a checkpoint, from the last one, from random starts, by spectrum"
    )
    for build in (mlp, cnn):
        torch.manual_seed(0)
        model = build()
        states = trained(model, criterion, data)
        size = sum(part.numel() for part in model.parameters())
        for k in (1, 5):
            history = lowland.eigenvalues_over(model, criterion, data, states, k)
            cold = [
                lowland.eigenvalues_over(model, criterion, data, [state], k).products.item()
                for state in states[ALONE]
            ]
            spectra = by_spectrum(model, criterion, data, states[ALONE], k)
            ours, random = history.products[1:].double().mean(), sum(cold) / len(cold)
            print(
                f"{build.__name__} of {size:,} parameters, {k}: {ours:.1f}, {random:.1f} "
                f"({ours / random:.2f}), {spectra:.1f} ({ours / spectra:.2f})"
            )


if __name__ == "__main__":
    main()

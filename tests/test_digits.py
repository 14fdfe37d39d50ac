"""Real digits, where LOWLAND_DATA has them: inputs far from random, most of them zero."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lowland


def read(path):
    """An IDX file: a magic number whose last byte counts the dimensions, the sizes, the bytes."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dims = content[3]
    shape = np.frombuffer(content, ">i4", dims, 4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * dims).copy()).view(
        *shape.tolist()
    )


@pytest.fixture(scope="module")
def threes_and_fives():
    if "LOWLAND_DATA" not in os.environ:
        pytest.skip("LOWLAND_DATA names no folder with MNIST's files")
    folder = Path(os.environ["LOWLAND_DATA"])
    images, labels = (
        read(next(folder.rglob(f"t10k-{kind}*"))) for kind in ("images-idx3", "labels-idx1")
    )
    chosen = ((labels == 3) | (labels == 5)).nonzero().flatten()[:100]
    return images[chosen].flatten(1).double() / 255, (labels[chosen] == 5).double()


@pytest.mark.slow
def test_exact_moments_and_gradient_of_raw_pixels_are_those_of_brute_force(threes_and_fives):
    x, y = threes_and_fives
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 2), nn.SiLU(), nn.Linear(2, 1)).double()
    criterion = nn.BCEWithLogitsLoss()
    results = []
    for method in ("exact", "dense"):
        moments = lowland.hessian_moments(model, criterion, x, y, method)
        results.append((moments, torch.autograd.grad(moments.upper, list(model.parameters()))))
    (exact, gradient), (dense, expected) = results
    torch.testing.assert_close(exact.trace, dense.trace, rtol=1e-10, atol=0)
    torch.testing.assert_close(exact.trace_sq, dense.trace_sq, rtol=1e-10, atol=0)
    for one, other in zip(gradient, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


def test_hsr_lowers_the_bound_on_digits_while_they_are_learned(threes_and_fives):
    x, y = threes_and_fives
    criterion = nn.BCEWithLogitsLoss()
    ends = []
    for weight in (0.0, 0.05):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, 8), nn.Sigmoid(), nn.Linear(8, 1)).double()
        penalty = lowland.HSR(criterion, weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(40):
            optimizer.zero_grad()
            loss = criterion(model(x).squeeze(1), y) + penalty(model, x, y)
            loss.backward()
            optimizer.step()
        correct = ((model(x).squeeze(1) > 0) == (y > 0.5)).double().mean()
        ends.append((lowland.hessian_moments(model, criterion, x, y).upper.item(), correct.item()))
    (plain, plain_correct), (penalized, penalized_correct) = ends
    assert penalized < 0.8 * plain
    assert penalized_correct > plain_correct - 0.05 > 0.8

"""What the pair proxy costs against one cold linear program per pair: part of `make bench`.

The network is the published one, 64, 8 and 10 units behind the images, trained on 250 of them until
all are right; the cold programs are SciPy's `linprog(method="highs")`, 2,259 inequalities in 90
unknowns.
Single thread against single thread. A sample of the pairs is solved cold and stands for all of
them, unless `--all`; every sampled answer must be ours. The result is printed and kept in
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything reads it

import gzip
import statistics
from pathlib import Path

import numpy as np
import torch
from page import keep
from scipy.optimize import linprog
from sklearn.datasets import load_digits
from timing import interleaved, seconds
from torch import nn

from lowland.weakness import activation_patterns, pair_proxy

TRAIN, UNSEEN, CLASSES = 250, 100, 10
REACH = 25


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """MNIST's test images where LOWLAND_DATA names their folder, else scikit-learn's digits."""
    folder = os.environ.get("LOWLAND_DATA")
    if folder is None:
        x, y = load_digits(return_X_y=True)
        return torch.tensor(x / 16).float(), torch.tensor(y)
    pixels, labels = (
        np.frombuffer(gzip.decompress(next(Path(folder).rglob(name)).read_bytes()), np.uint8)
        for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
    )
    return torch.tensor(pixels[16:] / 255).float().view(-1, 784), torch.tensor(labels[8:]).long()


def features(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A trained network's last hidden layer, at training points and at others."""
    torch.manual_seed(seed)
    x, y = images()
    chosen = torch.randperm(len(x))[: TRAIN + UNSEEN]
    x, y = x[chosen], y[chosen]
    model = nn.Sequential(
        *(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(500):
        for batch in torch.randperm(TRAIN).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        if bool((model(x[:TRAIN]).argmax(1) == y[:TRAIN]).all()):
            break
    with torch.no_grad():
        hidden = model[:4](x)
    return hidden[:TRAIN], y[:TRAIN], hidden[TRAIN:]


def rows(z: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``W_y z - W_k z`` for k != y."""
    blocks = np.zeros((len(z), CLASSES, CLASSES, z.shape[1]))
    for k in range(CLASSES):
        blocks[np.arange(len(z)), k, labels] += z
        blocks[:, k, k] -= z
    return blocks[np.arange(CLASSES) != labels[:, None]].reshape(-1, CLASSES * z.shape[1])


def cold(fixed: np.ndarray, point: np.ndarray, label: int) -> bool:
    matrix = np.vstack([fixed, rows(point[None], np.array([label]))])
    limit = -np.ones(len(matrix))
    zero = np.zeros(matrix.shape[1])
    done = linprog(zero, A_ub=-matrix, b_ub=limit, bounds=(None, None), method="highs")
    return done.status == 0


def compare(seed: int, sample: int) -> str:
    """One network's row of the table."""
    train, labels, unseen = features(seed)
    z, u = (np.column_stack([x.double().numpy(), np.ones(len(x))]) for x in (train, unseen))
    fixed = rows(z, labels.numpy())
    pairs = np.random.default_rng(seed).permutation(UNSEEN * CLASSES)[:sample]
    ours, theirs = [], []
    answer = pair_proxy(train, labels, unseen, CLASSES)
    # In turn, so that a busy machine slows both alike.
    for part in np.array_split(pairs, 5):
        ours.append(seconds(lambda: pair_proxy(train, labels, unseen, CLASSES)))
        for pair in part:
            x, c = divmod(int(pair), CLASSES)
            found = []
            theirs.append(seconds(lambda x=x, c=c, to=found: to.append(cold(fixed, u[x], c))))
            assert found[0] == bool(answer.feasible[x, c]), (x, c)
    mine, each = statistics.median(ours), statistics.mean(theirs)
    undecided = int(answer.undecided.sum())
    return (
        f"| {seed} | {answer.count} | {undecided} | {mine:.2f} | {1e3 * each:.1f} | "
        f"{each * answer.total / mine:.1f} |"
    )


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=3)
    parser.add_argument("--sample", type=int, default=100, help="pairs solved cold")
    parser.add_argument("--all", action="store_true", help="solve every pair cold")
    parser.add_argument("--keep", action="store_true", help="write the result to README.md")
    arguments = parser.parse_args()
    sample = UNSEEN * CLASSES if arguments.all else arguments.sample
    units = torch.randn(70_000, 128)
    times = interleaved({"patterns": lambda: activation_patterns(units)}, rounds=7)["patterns"]
    data = "MNIST" if "LOWLAND_DATA" in os.environ else "scikit-learn's digits"
    lines = [
        (
            f"{data}: 250 training points, 8 features, 10 classes, 100 unseen points; 1 thread; "
            f"{sample} of 1,000 pairs solved cold, all answers alike. *by* is the factor by which "
            f"we are faster (reach: ≥ {REACH})."
        ),
        "",
        "| network | feasible pairs | undecided | ours, s | one cold program, ms | by |",
        "| --- | --- | --- | --- | --- | --- |",
        *(compare(seed, sample) for seed in range(arguments.networks)),
        "",
        f"Activation patterns of 70,000 points and 128 units: {statistics.median(times):.3f} s.",
    ]
    report = "\n".join(lines)
    print(report)
    if arguments.keep:
        keep("weakness.py", report)


if __name__ == "__main__":
    main()

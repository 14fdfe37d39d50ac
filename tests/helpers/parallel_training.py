"""The same training with SAM in one process or in several; no test module, so spawning finds it."""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lowland


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    return model, torch.randn(24, 4).double(), torch.rand(24, 1).double().round()


def train(model, micro_batches, **settings):
    """Three steps on the mean loss over micro-batches of equal size; the weights that result."""
    criterion = nn.BCEWithLogitsLoss()
    optimizer = lowland.SAM(
        model.parameters(), torch.optim.SGD, 0.3, lr=0.5, momentum=0.9, **settings
    )
    *early, last = micro_batches

    def backward(x, y):
        loss = criterion(model(x), y) / len(micro_batches)
        loss.backward()
        return loss.detach()

    def closure():
        optimizer.zero_grad()
        alone = model.no_sync if isinstance(model, DistributedDataParallel) else nullcontext
        with alone():
            losses = [backward(x, y) for x, y in early]
        return sum(losses) + backward(*last)

    for _ in range(3):
        optimizer.step(closure, model=model)
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    if optimizer.curvature is not None:
        weights["curvature"] = optimizer.curvature
    return weights


def in_parallel(rank, micro_batches, settings):
    model, x, y = problem()
    part = slice(rank, None, 2)  # every second sample
    pairs = zip(x[part].chunk(micro_batches), y[part].chunk(micro_batches), strict=True)
    weights = train(DistributedDataParallel(model), list(pairs), **settings)
    return {name.removeprefix("module."): value for name, value in weights.items()}


def several(rank, cases):
    """One start of the processes for several trainings, since starting takes the time."""
    return [in_parallel(rank, *case) for case in cases]

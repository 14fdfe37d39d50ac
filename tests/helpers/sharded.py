"""SAM and the measures on parameters that two processes share; no test module, so spawning works."""

from contextlib import suppress
from functools import partial

import parallel_training
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lowland


def model_of(kind):
    """The model as one way of sharding has it, after ``lowland`` knows nothing of that."""
    model, x, y = parallel_training.problem()
    if kind in ("flat", "flat originals"):
        return (
            FullyShardedDataParallel(
                model, use_orig_params=kind == "flat originals", device_id=torch.device("cpu")
            ),
            x,
            y,
        )
    if kind == "tensor parallel":
        mesh = init_device_mesh("cpu", (2,))
        return (
            parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}),
            x,
            y,
        )
    if kind in ("nested", "shards"):
        for layer in model if kind == "nested" else ():
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
    mesh = init_device_mesh(
        "cpu",
        (2, 1) if kind == "replicas" else (2,),
        mesh_dim_names=("r", "s") if kind == "replicas" else None,
    )
    return fully_shard(model, mesh=mesh), x, y


def full(model):
    return {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for n, p in model.named_parameters()
    }


def train(rank, kind, adaptive, how):
    model, x, y = model_of(kind)
    criterion = nn.BCEWithLogitsLoss()
    optimizer = lowland.SAM(
        model.parameters(), torch.optim.SGD, 0.3, adaptive=adaptive, lr=0.5, momentum=0.9
    )
    if kind != "tensor parallel":
        part = slice(rank, None, 2)
        x, y = x[part], y[part]

    def closure(x=x, y=y):
        if how == "zero":
            optimizer.zero_grad()
        elif how == "zero in place":
            optimizer.zero_grad(set_to_none=False)
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        if how == "micro":
            optimizer.step(lambda i: closure(x.chunk(2)[i], y.chunk(2)[i]), micro_batches=2)
        else:
            optimizer.step(closure)
    return full(model)


def several(rank, cases):
    results = []
    for case in cases:
        try:
            results.append(train(rank, *case))
        except Exception as e:
            results.append(f"{type(e).__name__}: {e}")
    return results

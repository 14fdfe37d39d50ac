"""Exact moments in one process or in several; no test module, so spawning finds it."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lowland

CE = nn.CrossEntropyLoss()
# Two batches for the first process, one for the second.
SIZES = (4, 7, 5)


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(16, 3).double(), torch.randint(3, (16,))
    y[1:3] = -100
    return model, x, y


def result(moments, model):
    model.zero_grad()
    moments.upper.backward()
    return [
        moments.trace.detach(),
        moments.trace_sq.detach(),
        *(p.grad for p in model.parameters()),
    ]


def alone():
    model, x, y = problem()
    whole = result(lowland.hessian_moments(model, CE, x, y, "exact"), model)
    return {
        "loader": whole,
        "auto": whole,
        "batch": whole,
        "penalty": step(model, model, x[:15], y[:15]),
    }


def step(wrapped, model, x, y):
    """Gradients of a loss of equally many samples a process, and of a penalty."""
    model.zero_grad()
    x, y = x[3:], y[3:]  # none is ignored
    penalty = lowland.HSR(nn.MSELoss(), 0.1, method="exact")
    y = nn.functional.one_hot(y, 3).double()
    penalty.loss(wrapped, x, y).backward()
    value = penalty.eval()(wrapped, x, y).detach()
    return [value, value, *(p.grad for p in model.parameters())]


def in_parallel(rank):
    model, x, y = problem()
    parallel = DistributedDataParallel(model)
    batches = list(zip(x.split(SIZES), y.split(SIZES), strict=True))
    own = batches[:2] if rank == 0 else batches[2:]
    found = {}
    moments = lowland.hessian_moments(parallel, CE, own, method="exact")
    found["loader"] = result(moments, model)
    moments = lowland.hessian_moments(parallel, CE, own)
    assert moments.method == "exact"
    found["auto"] = result(moments, model)
    own = (x[:11], y[:11]) if rank == 0 else (x[11:], y[11:])
    moments = lowland.hessian_moments(parallel, CE, *own, method="exact")
    found["batch"] = result(moments, model)
    rows = [0, 0, 0, *range(3 + rank, 15, 2)]
    found["penalty"] = step(parallel, model, x[rows], y[rows])
    return {name: [value.clone() for value in values] for name, values in found.items()}


def disagreeing(rank):
    said = []
    layers = [nn.Tanh(), nn.GELU()], [nn.Softsign(), nn.GELU()], [nn.GELU(), nn.GELU()]
    for number, kinds in enumerate(layers):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), kinds[rank], nn.Linear(4, 3)).double()
        x, y = torch.randn(5, 3).double(), torch.randint(3, (5,))
        if number == 2 and rank == 0:
            x[0, 0] = float("nan")
        try:
            lowland.hessian_moments(DistributedDataParallel(model), CE, x, y, method="exact")
        except (ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said

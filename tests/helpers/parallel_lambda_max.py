"""The tracked eigenvalue in one process or in several; no test module, so spawning finds it."""

import torch
from any_models import CROSS_ENTROPY, build
from torch.nn.parallel import DistributedDataParallel

import lowland


def steps(model, x, y, products, seed, *, loaded=False):
    """The vector, the value and the gradient after some steps, one of which looks around."""
    generator = torch.Generator().manual_seed(seed)

    def make():
        return lowland.LambdaMax(
            CROSS_ENTROPY, 0.1, products=products, generator=generator, refresh=3
        )

    penalty = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(5):
        optimizer.zero_grad()
        penalty.loss(model, x, y).backward()
        optimizer.step()
        if loaded and step == 3:
            state, penalty = penalty.state_dict(), make()
            penalty.load_state_dict(state)
    gradient = [p.grad.clone() for p in model.parameters()]
    return [*penalty._tracked.vector, penalty.known.eigenvalue, *gradient]


def in_parallel(rank):
    results = []
    for loaded in (False, True):
        for products in ("autograd", "differences"):
            model, x, y = build("mlp", samples=16)
            own = slice(8 * rank, 8 * rank + 8)
            # Another seed than the first process's: its vector is everyone's.
            results.append(
                steps(
                    DistributedDataParallel(model),
                    x[own],
                    y[own],
                    products,
                    7 * rank,
                    loaded=loaded,
                )
            )
    return results


def alone():
    return [
        steps(*build("mlp", samples=16), products, 0, loaded=loaded)
        for loaded in (False, True)
        for products in ("autograd", "differences")
    ]

"""The same penalties in one process or in several; no test module, so spawning finds it."""

from functools import partial

import torch
from any_models import CROSS_ENTROPY, Routed, build
from torch.nn.parallel import DistributedDataParallel

import lowland

KINDS = [lowland.HSR, lowland.HessianTrace, lowland.FlatnessAware]
CASES = [
    {"kind": kind, "products": products, "loss": False, "unbiased": False}
    for kind in range(len(KINDS))
    for products in ("autograd", "differences")
]
CASES += [{**case, "loss": True} for case in CASES[:2]]
CASES += [{**case, "unbiased": True} for case in CASES[4:6]]
# Limits that act, and strengths, go by the gradients of all processes' samples.
CASES += [
    {**case, "loss": loss, "amount": amount}
    for case in CASES[:4:2]
    for loss, amount in ((True, {"weight": 50.0}), (False, {"strength": 0.3}))
]


def problem():
    """A model and samples: a quarter's first half, then the other quarters'."""
    return build("mlp", samples=16)


def share(rank):
    """The samples of a process, so that first halves together are the first half of all."""
    return [*range(4 * rank, 4 * rank + 4), *range(8 + 4 * rank, 12 + 4 * rank)]


def two_steps(model, x, y, case, seed=0):
    """Gradients of two steps at the same parameters, and the second penalty's value."""
    generator = torch.Generator().manual_seed(seed)
    penalty = KINDS[case["kind"]](
        CROSS_ENTROPY,
        **case.get("amount", {"weight": 0.1}),
        method="probes",
        probes=2,
        products=case["products"],
        generator=generator,
        unbiased=case["unbiased"],
    )
    results = []
    for _ in range(2):
        model.zero_grad()
        if case["loss"]:
            total = penalty.loss(model, x, y)
        else:
            total = CROSS_ENTROPY(model(x), y) + penalty(model, x, y)
        total.backward()
        results += [p.grad.clone() for p in model.parameters()]
    value = penalty.eval()(model, x, y).detach()
    return [value, *results]


def batches(rank, x, y):
    """Of unequal sizes; rank None for all of them."""
    parts = list(zip(x.split([2, 5, 3, 6]), y.split([2, 5, 3, 6]), strict=True))
    return parts if rank is None else parts[rank::2]


def loader(model, rank, x, y):
    found = lowland.hessian_moments(
        model,
        CROSS_ENTROPY,
        batches(rank, x, y),
        probes=3,
        generator=torch.Generator().manual_seed(0),
    )
    return [found.trace, found.trace_sq]


def with_a_part_that_is_not_used(wrap, x, y):
    """Gradients of the part that is."""
    torch.manual_seed(0)
    model = Routed().double()
    penalty = lowland.HSR(CROSS_ENTROPY, 0.1, method="probes", generator=torch.Generator())
    wrapped = wrap(model)  # which a backward pass needs alive
    penalty.loss(wrapped, x, y).backward()
    assert model.other.weight.grad is None or not model.other.weight.grad.any()
    return [p.grad for p in model.one.parameters()]


def in_parallel(rank):
    model, x, y = problem()
    own = share(rank)
    parallel = DistributedDataParallel(model)
    # Other seeds than the first process's: the signs are to be its own everywhere.
    results = [two_steps(parallel, x[own], y[own], case, seed=7 * rank) for case in CASES]
    results.append(loader(parallel, rank, x, y))
    wrap = partial(DistributedDataParallel, find_unused_parameters=True)
    results.append(with_a_part_that_is_not_used(wrap, x[own], y[own]))
    compiled = torch.compile(parallel, backend="eager")
    results.append(two_steps(compiled, x[own], y[own], CASES[0], seed=7 * rank))
    errors = []
    for method in ("dense",):
        for call in (
            lowland.HSR(CROSS_ENTROPY, 0.1, method=method),
            lambda *data, method=method: lowland.hessian_moments(
                data[0], CROSS_ENTROPY, *data[1:], method=method
            ),
        ):
            try:
                call(parallel, x[own], y[own])
            except lowland.UnsupportedModelError as error:
                errors.append(str(error))
    return results, errors


def alone():
    model, x, y = problem()
    results = [two_steps(model, x, y, case) for case in CASES]
    results.append(loader(model, None, x, y))
    results.append(with_a_part_that_is_not_used(lambda model: model, x, y))
    results.append(results[0])
    return results

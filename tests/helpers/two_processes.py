"""One function in two processes that know each other, as data-parallel training runs."""

from datetime import timedelta

import torch
from torch import distributed, multiprocessing


def run(function, folder, *arguments):
    """Each process's result of ``function(rank, *arguments)``, for two ranks over gloo."""
    context = multiprocessing.start_processes(
        _process, (function, str(folder), arguments), nprocs=2, join=False
    )
    try:
        if not context.join(timeout=60, grace_period=1) and not context.join(timeout=60):
            raise TimeoutError("two processes took longer than two minutes")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"result-{rank}.pt") for rank in range(2)]


def _process(rank, function, folder, arguments):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=50),
    )
    try:
        torch.save(function(rank, *arguments), f"{folder}/result-{rank}.pt")
    finally:
        distributed.destroy_process_group()

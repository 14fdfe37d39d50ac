"""How many threads PyTorch's operations may take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let operations within the block take ``count`` threads.

    An operation of microseconds gains nothing from a second thread. Where another program keeps a
    core busy it loses a thousandfold: threads that wait for each other then wait for the
    scheduler. With one thread the numbers do not depend on the machine's number of cores either.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let NumPy's and SciPy's linear algebra within the block take one thread.

    Raises:
        ImportError: Without threadpoolctl, which scikit-learn and ``lowland[weakness]`` bring.
    """
    from threadpoolctl import threadpool_limits  # noqa: PLC0415 - optional

    with threadpool_limits(1, user_api="blas"):
        yield

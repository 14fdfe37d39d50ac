"""Work for other processes, which find it here by its name.

PyTorch takes seconds to load, so it is loaded where a result is made: not by work that is killed.
"""

import os
import signal
import time
from pathlib import Path


def square(number):
    import torch  # noqa: PLC0415

    return {"square": torch.tensor([float(number) ** 2]), "process": torch.tensor(os.getpid())}


def die(folder, number):
    """Work, but for number 0: its process dies once something is kept in the folder."""
    while number == 0:
        if any(Path(folder).glob("*.safetensors")):
            os._exit(1)
        time.sleep(0.01)
    return square(number)


def die_once(folder, number):
    """Work, but at the first attempt the process is killed in the middle of it."""
    tried = Path(folder) / f"{number}.tried"
    if not tried.exists():
        tried.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return square(number)


def linger(folder, number):
    """Work for longer than anyone waits, unless the folder says that it is over."""
    (Path(folder) / f"{number}.begun").touch()
    for _ in range(600):
        if (Path(folder) / "over").exists():
            break
        time.sleep(0.1)
    return square(number)


def unusual():
    """Tensors that not every way of sending them can take."""
    import torch  # noqa: PLC0415

    return {
        "half": torch.arange(3, dtype=torch.bfloat16),
        "complex": torch.tensor([1 + 2j]),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(True),
    }


def fail(number):
    raise AssertionError(number)

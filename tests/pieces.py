"""Work for other processes, which find it here by its name."""

import os
import time
from pathlib import Path

import torch


def square(number):
    return {"square": torch.tensor([float(number) ** 2]), "process": torch.tensor(os.getpid())}


def die(folder, number):
    """Work, but for number 0: its process dies once something is kept in the folder."""
    while number == 0:
        if any(Path(folder).glob("*.safetensors")):
            os._exit(1)
        time.sleep(0.01)
    return square(number)


def fail(number):
    raise AssertionError(number)

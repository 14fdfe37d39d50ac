"""The data that studies are about: what packages carry, and what lies in a local folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch

from lowland.studies.data.images import (
    FOLDER_VARIABLE,
    MissingDataError,
    cifar100,
    fashion_mnist,
    mnist,
    mnist_test,
)
from lowland.studies.data.tables import CARRIED, Dataset
from lowland.studies.runs.presets import PresetError

Parts = tuple[Dataset, Dataset | None]


@dataclass(frozen=True)
class Source:
    """Where data that no package carries come from.

    Attributes:
        folder: With their files; None if there is none.
        verify: Whether CIFAR-100's files have to be the published ones.
    """

    folder: Path | None = None
    verify: bool = True


@lru_cache(maxsize=2)
def parts(data: str, source: Source) -> Parts:
    """The training and the test part of some data; no test part where there is none.

    Args:
        data: ``"breast-cancer"``, ``"digits"``, ``"mnist"`` (the 10,000 test images alone),
            ``"mnist-full"``, ``"fashion-mnist"`` or ``"cifar-100"``.
        source: Where files are.

    Raises:
        MissingDataError: If its files are not there.
        DataError: If they cannot be used.
    """
    if data in CARRIED:
        return CARRIED[data](), None
    if source.folder is None:
        raise MissingDataError(f"{FOLDER_VARIABLE} names no folder with the files of {data}")
    if data == "mnist":
        return mnist_test(source.folder), None
    read: dict[str, Callable[[Path], Parts]] = {
        "mnist-full": mnist,
        "fashion-mnist": fashion_mnist,
        "cifar-100": partial(cifar100, verify=source.verify),
    }
    return read[data](source.folder)


def missing(data: str, source: Source) -> str:
    """Why some data cannot be had; empty if they can.

    Raises:
        DataError: If their files are there and cannot be used.
    """
    try:
        parts(data, source)
    except MissingDataError as error:
        return str(error)
    return ""


@runtime_checkable
class Task(Protocol):
    """Something to do with data."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def data(self) -> str: ...  # noqa: D102


T = TypeVar("T", bound=Task)


def available(tasks: Sequence[T], source: Source) -> tuple[list[T], dict[str, str]]:
    """The tasks whose data can be had, and why the others' cannot, by name.

    Raises:
        PresetError: If there are tasks, and none of them can be run.
        DataError: If files are there and cannot be used.
    """
    reasons = {task.name: missing(task.data, source) for task in tasks}
    found = [task for task in tasks if not reasons[task.name]]
    if tasks and not found:
        raise PresetError(f"no task can be run: {'; '.join(dict.fromkeys(reasons.values()))}")
    return found, {name: reason for name, reason in reasons.items() if reason}


def stream(seed: int, kind: int) -> torch.Generator:
    """Random numbers of one kind, of at most ten, for one seed: apart from those of the others."""
    return torch.Generator().manual_seed(10 * seed + kind)

"""The data that studies are about: what packages carry, and what lies in a local folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from lowland.studies.data.carried import CARRIED
from lowland.studies.data.dataset import Dataset
from lowland.studies.data.images import (
    FOLDER_VARIABLE,
    MissingDataError,
    cifar100,
    fashion_mnist,
    mnist,
    mnist_test,
)
from lowland.studies.runs.presets import PresetError

Parts = tuple[Dataset, Dataset | None]


@dataclass(frozen=True)
class Source:
    """Where data that no package carries come from.

    Attributes:
        folder: With their files; None if there is none.
        verify: Whether files have to be the published ones, where that is known.
    """

    folder: Path | None = None
    verify: bool = True


@dataclass(frozen=True)
class Reader:
    """How data are read from a local folder.

    Attributes:
        read: Gives the training part, and the test part or None; takes the folder, and whether its
            files have to be the published ones.
        has_test: Whether there is a test part.
    """

    read: Callable[[Path, bool], Parts]
    has_test: bool


FILES = {
    "mnist": Reader(lambda folder, _: (mnist_test(folder), None), has_test=False),
    "mnist-full": Reader(lambda folder, _: mnist(folder), has_test=True),
    "fashion-mnist": Reader(lambda folder, _: fashion_mnist(folder), has_test=True),
    "cifar-100": Reader(lambda folder, verify: cifar100(folder, verify=verify), has_test=True),
}
"""What lies in local files, by its name in presets; ``mnist`` is the 10,000 test images alone."""


def names() -> list[str]:
    """The data that presets can name."""
    return [*CARRIED, *FILES]


def has_test(data: str) -> bool:
    """Whether some data have a test part of their own."""
    return data in FILES and FILES[data].has_test


@lru_cache(maxsize=2)
def parts(data: str, source: Source) -> Parts:
    """The training and the test part of some data; no test part where there is none.

    Args:
        data: One of :func:`names`.
        source: Where files are.

    Raises:
        MissingDataError: If its files are not there.
        DataError: If they cannot be used.
    """
    if data in CARRIED:
        return CARRIED[data](), None
    if source.folder is None:
        raise MissingDataError(f"{FOLDER_VARIABLE} names no folder with the files of {data}")
    return FILES[data].read(source.folder, source.verify)


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


def check_data(task: Task, where: str) -> None:
    """Refuse a task of unknown data; ``where`` it stands is for the message.

    Raises:
        PresetError: If its data is none of :func:`names`.
    """
    if task.data not in names():
        raise PresetError(f"{where}: data must be one of {', '.join(names())}; got {task.data!r}")


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

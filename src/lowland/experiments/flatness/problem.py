"""The tasks: their samples, standardized, and their networks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from lowland.datasets import Dataset, breast_cancer, digits, stratified_splits
from lowland.experiments.flatness.preset import Task
from lowland.images import FOLDER_VARIABLE, MissingDataError, cifar100, mnist_test
from lowland.networks import initial_weights

IMAGES = ("mnist", "cifar-100")
"""Whose pixels stay as they are, so that inputs are about as long as those of other data."""

_DATASETS = {"breast-cancer": breast_cancer, "digits": digits}


@dataclass(frozen=True)
class Samples:
    """What a network is trained and tested on, in float32.

    Attributes:
        x_train: Features in standard deviations of the training part, but pixels of images from 0
            to 1.
        y_train: Labels: of two classes a column in float32, of more in int64.
        x_test: Features on the same scale.
        y_test: Labels.
        outputs: Of a network: one for two classes, else one for each.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    outputs: int


@dataclass(frozen=True)
class Source:
    """Where data that no package carries come from.

    Attributes:
        folder: With their files; None if there is none.
        verify: Whether CIFAR-100's files have to be the published ones.
    """

    folder: Path | None = None
    verify: bool = True


def samples(task: Task, seed: int, source: Source) -> Samples:
    """A task's samples, split by the seed unless the data has a test part.

    Raises:
        MissingDataError: If its files are not there.
        DataError: If they cannot be used.
    """
    train, test = _parts(task.data, source)
    if test is not None:
        parts = [train.x, train.y, test.x, test.y]
    elif task.data in IMAGES:
        chosen = train_test_split(
            range(len(train.y)), test_size=task.test_size, stratify=train.y, random_state=seed
        )
        parts = [values[own] for own in chosen for values in (train.x, train.y)]
    else:
        splits = stratified_splits(train, range(seed, seed + 1), test_size=task.test_size)
        parts = [part[0] for part in (splits.x_train, splits.y_train, splits.x_test, splits.y_test)]
    single = [part.float() if part.is_floating_point() else part for part in parts]
    x_train, y_train, x_test, y_test = single
    if len(train.classes) > 2:
        return Samples(x_train, y_train, x_test, y_test, len(train.classes))
    return Samples(x_train, y_train.unsqueeze(-1), x_test, y_test.unsqueeze(-1), 1)


def title(task: Task, source: Source) -> str:
    """Data and network, for people."""
    model = "-".join(map(str, task.hidden))
    network = f"ReLU MLP, {model} hidden units" if model else "logistic regression"
    return f"{_parts(task.data, source)[0].name}, {network}"


def missing(task: Task, source: Source) -> str:
    """Why a task cannot be run; empty if it can.

    Raises:
        DataError: If its files are there and cannot be used.
    """
    try:
        _parts(task.data, source)
    except MissingDataError as error:
        return str(error)
    return ""


@lru_cache(maxsize=2)
def _parts(data: str, source: Source) -> tuple[Dataset, Dataset | None]:
    """The training and the test part; no test part where seeds split the samples."""
    if data in _DATASETS:
        return _DATASETS[data](), None
    if source.folder is None:
        raise MissingDataError(f"{FOLDER_VARIABLE} names no folder with the files of {data}")
    if data == "mnist":
        return mnist_test(source.folder), None
    return cifar100(source.folder, verify=source.verify)


def network(task: Task, data: Samples, seed: int) -> nn.Sequential:
    """A network at its starting point, distributed as PyTorch's own layers are."""
    sizes = [data.x_train.shape[1], *task.hidden, data.outputs]
    layers: list[nn.Module] = []
    for weights in initial_weights(range(seed, seed + 1), sizes):
        bias, matrix = weights[0, 0], weights[0, 1:]
        layer = nn.Linear(*matrix.shape)
        with torch.no_grad():
            layer.weight.copy_(matrix.T)
            layer.bias.copy_(bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def criterion(data: Samples) -> nn.Module:
    """The loss that suits the labels."""
    return nn.BCEWithLogitsLoss() if data.outputs == 1 else nn.CrossEntropyLoss()


def accuracy(model: nn.Module, data: Samples) -> float:
    """The share of test samples that are classified right."""
    with torch.no_grad():
        outputs = model(data.x_test)
    found = outputs > 0 if data.outputs == 1 else outputs.argmax(-1)
    return float((found == data.y_test).double().mean())

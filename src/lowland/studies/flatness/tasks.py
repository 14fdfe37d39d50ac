"""The tasks: their samples, standardized, and their networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from lowland.studies.data.carried import CARRIED
from lowland.studies.data.sources import Source, parts
from lowland.studies.data.splits import stratified_splits
from lowland.studies.ensembles.networks import as_module, initial_weights
from lowland.studies.flatness.preset import Task


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


def samples(task: Task, seed: int, source: Source) -> Samples:
    """A task's samples, split by the seed unless the data has a test part.

    Raises:
        MissingDataError: If its files are not there.
        DataError: If they cannot be used.
    """
    train, test = parts(task.data, source)
    if test is not None:
        split = [train.x, train.y, test.x, test.y]
    elif train.one_unit and task.data not in CARRIED:
        # Pixels from files are from 0 to 1, and inputs then about as long as those of other data.
        chosen = train_test_split(
            range(len(train.y)), test_size=task.test_size, stratify=train.y, random_state=seed
        )
        split = [values[own] for own in chosen for values in (train.x, train.y)]
    else:
        splits = stratified_splits(train, range(seed, seed + 1), test_size=task.test_size)
        split = [part[0] for part in (splits.x_train, splits.y_train, splits.x_test, splits.y_test)]
    single = [part.float() if part.is_floating_point() else part for part in split]
    x_train, y_train, x_test, y_test = single
    if len(train.classes) > 2:
        return Samples(x_train, y_train, x_test, y_test, len(train.classes))
    return Samples(x_train, y_train.unsqueeze(-1), x_test, y_test.unsqueeze(-1), 1)


def title(task: Task, source: Source) -> str:
    """Data and network, for people."""
    model = "-".join(map(str, task.hidden))
    network = f"ReLU MLP, {model} hidden units" if model else "logistic regression"
    return f"{parts(task.data, source)[0].name}, {network}"


def network(task: Task, data: Samples, seed: int) -> nn.Sequential:
    """A network at its starting point, distributed as PyTorch's own layers are."""
    sizes = [data.x_train.shape[1], *task.hidden, data.outputs]
    weights = initial_weights(range(seed, seed + 1), sizes)
    return as_module(tuple(layer.float() for layer in weights), nn.ReLU)


def criterion(data: Samples) -> nn.Module:
    """The loss that suits the labels."""
    return nn.BCEWithLogitsLoss() if data.outputs == 1 else nn.CrossEntropyLoss()


def accuracy(model: nn.Module, data: Samples) -> float:
    """The share of test samples that are classified right."""
    with torch.no_grad():
        outputs = model(data.x_test)
    found = outputs > 0 if data.outputs == 1 else outputs.argmax(-1)
    return float((found == data.y_test).double().mean())
